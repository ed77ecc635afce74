# SPDX-License-Identifier: Apache-2.0
"""``volume``: block storage from a terminal, over REST.

Results go to standard output, all else to standard error; what goes wrong is
one line that says what, which and why, and an exit code (``codes.py``).
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Mapping, Sequence

import volume
from volume import errors
from volume.cli import client
from volume.cli import cloud
from volume.cli import codes
from volume.cli import hosts
from volume.cli import parser
from volume.cli import reshape
from volume.cli import show
from volume.cli import snapshots
from volume.cli import volumes
from volume.cli.values import Usage
from volume.cli.wait import Session

TOKEN_BYTES_MAX = 4096

ABOUT = """\
Make, fill, attach, copy and delete volumes of block storage.

A volume is named by its name or its id; of several with one name, none is
guessed. A verb that starts work waits until it is done, unless --no-wait is
given.
"""
CODES = """\
exit codes:
  0    done
  1    refused, or begun and failed; standard error says why
  2    the command is wrong, or a file that it names
  3    there is no such thing
  4    the time of --timeout is over; the work goes on
  5    the service does not answer; nothing has happened unless it is said
  130  interrupted while waiting; the work goes on

example:
  volume create --name database --size 10G
  volume attach database
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code."""
    return run(make_parser(), argv)


def run(top: parser.Parser, argv: Sequence[str] | None) -> int:
    """Run a command line of a command, and return its exit code."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            # A name that this terminal cannot show is shown another way.
            stream.reconfigure(errors='backslashreplace')
    show.speak_as(top.prog)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        '\n'.join(words).encode()
    except UnicodeError:
        top.error('an argument is not valid text')
    args = top.parse_args(words)
    try:
        code: int | None = args.run(_session(args, os.environ), args)
        sys.stdout.flush()
    except errors.VolumeError as failed:
        show.note(str(failed))
        return codes.of(failed)
    except KeyboardInterrupt:
        show.note('interrupted; what was asked before goes on')
        return codes.INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has seen enough (head, less).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return codes.OK
    return code or codes.OK


def make_parser() -> parser.Parser:
    """Return the parser of the whole command line."""
    top = parser.Parser(prog='volume', description=ABOUT, epilog=CODES)
    top.add_argument(
        '--version', action='version', version=volume.__version__
    )
    parser.common(top, is_verb=False)
    verbs = top.add_subparsers(
        title='verbs', metavar='VERB', required=True,
        parser_class=parser.Parser,
    )
    volumes.add(verbs)
    reshape.add(verbs)
    snapshots.add(verbs)
    hosts.add(verbs)
    cloud.add(verbs)
    return top


def _session(
    args: argparse.Namespace, environ: Mapping[str, str]
) -> Session:
    timeout_s: float | None = getattr(args, 'timeout', None)
    return Session(
        client.Client(
            args.url or environ.get('VOLUME_URL') or client.DEFAULT_URL,
            token=_token(args, environ),
            project=args.project or environ.get('VOLUME_PROJECT') or '',
            ca_file=args.ca_file or environ.get('VOLUME_CA_FILE') or '',
        ),
        args.format,
        wait=getattr(args, 'wait', True),
        late=time.monotonic() + timeout_s if timeout_s is not None else 0.0,
    )


def _token(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """Return the token; never from an argument, which everybody can see."""
    path = args.token_file
    token = '' if path else environ.get('VOLUME_TOKEN', '')
    path = path or (not token and environ.get('VOLUME_TOKEN_FILE'))
    if path:
        try:
            with open(0 if path == '-' else path, closefd=path != '-') as f:
                token = f.read(TOKEN_BYTES_MAX + 1).strip()
        except OSError as failed:
            raise Usage(
                f'token file {path} cannot be read: {failed.strerror}'
            ) from None
        except UnicodeError:
            raise Usage(f'token file {path} is not text') from None
        if not token:
            raise Usage(f'token file {path} is empty')
    if len(token) > TOKEN_BYTES_MAX or not token.isascii() or not (
        token.isprintable()
    ):
        raise Usage('the token is no single line of plain letters')
    return token


if __name__ == '__main__':
    sys.exit(main())
