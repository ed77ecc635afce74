# SPDX-License-Identifier: Apache-2.0
"""``volume-connect``: the volumes of this host, for who has no compute
service that would see to them.

It is for root, on the host that uses the volumes. ``attach`` and ``detach``
are those of ``volume``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import volume
from volume.cli import hostside
from volume.cli import main as command
from volume.cli import parser

ABOUT = """\
Attach volumes to this host, and let go of them again.

The service is asked for access, and this host is changed: sessions, devices,
mounts. So it is run as root. What was begun is noted under /run/volume: after
a crash run it again, or see "volume-connect clean".
"""
CODES = """\
exit codes:
  0    done
  1    refused, or something is left; standard error says why
  2    the command is wrong, or a file that it names
  3    there is no such thing
  5    the service or the storage does not answer

example:
  volume-connect attach database
  volume-connect list
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code."""
    # Nothing that is written here is for other users.
    os.umask(0o077)
    return command.run(make_parser(), argv)


def make_parser() -> parser.Parser:
    """Return the parser of the whole command line."""
    top = parser.Parser(
        prog='volume-connect', description=ABOUT, epilog=CODES
    )
    top.add_argument(
        '--version', action='version', version=volume.__version__
    )
    parser.common(top, is_verb=False)
    verbs = top.add_subparsers(
        title='verbs', metavar='VERB', required=True,
        parser_class=parser.Parser,
    )
    hostside.add(verbs, 'volume-connect', takes_connection=True)
    verb = parser.verb(
        verbs, 'extend', hostside.extend, 'have this host see that a volume '
        'has grown',
        'volume-connect extend database',
        more='Extend it with "volume extend" first; then grow what is on it.',
    )
    hostside.add_volume(verb)
    parser.verb(
        verbs, 'list', hostside.show_list, 'list what this host has',
        'volume-connect list',
        more='The state is attached; attaching or detaching (a run was '
             'ended in between);\ndead (its device is there, and nothing '
             'answers); gone (it was attached, and\nnothing of it is there); '
             'or stray (no note is there, and nothing answers).',
    )
    verb = parser.verb(
        verbs, 'clean', hostside.clean, 'let go of what no attachment '
        'answers to',
        'volume-connect clean --dry-run',
        more='Sessions whose target is gone, records without a session, and '
             'what a run that\nwas killed has left. What is served is left '
             'alone, and so is what is in use.',
    )
    verb.add_argument(
        '--dry-run', action='store_true', help='only say what it would do'
    )
    verb.add_argument(
        '--offline', action='store_true',
        help='do not ask the service which attachments there are: none of '
             'those that are dead here is needed any more',
    )
    return top


if __name__ == '__main__':
    sys.exit(main())
