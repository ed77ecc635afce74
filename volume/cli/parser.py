# SPDX-License-Identifier: Apache-2.0
"""How a verb is declared: its name, what it says of itself, an example.

Options of the whole command may stand before or behind a verb, whichever
comes to mind first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from volume.cli import show
from volume.cli import values
from volume.cli.wait import Session

Run = Callable[[Session, argparse.Namespace], int | None]
Verbs = Any
"""What ``argparse`` returns from ``add_subparsers``; its class is private."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and never abbreviates."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault('formatter_class', Formatter)
        super().__init__(allow_abbrev=False, **settings)

        # -1G is a wrong size, and no option.
        self._negative_number_matcher = re.compile(r'-\d')

    def parse_known_args(self, *args: Any, **settings: Any) -> Any:
        """Refuse here what is unknown: the verb's help says what it takes.
        """
        found, unknown = super().parse_known_args(*args, **settings)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return found, unknown

    def error(self, message: str) -> NoReturn:
        words = show.clean(message)
        print(
            f'{self.prog}: {words}; see "{self.prog} --help"', file=sys.stderr
        )
        raise SystemExit(2)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are, and room for the names of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=79)


def verb(
    verbs: Verbs,
    name: str,
    run: Run | None,
    help: str,
    example: str,
    *,
    more: str = '',
    waits: bool = False,
    aliases: tuple[str, ...] = (),
) -> Parser:
    """Declare a verb; what it takes is added to the parser it returns."""
    sentence = f'{help[0].upper()}{help[1:]}.'
    parser: Parser = verbs.add_parser(
        name, help=help, aliases=list(aliases),
        description=f'{sentence} {more}'.strip() if not more else (
            f'{sentence}\n\n{more}'
        ),
        epilog=f'example:\n  {example}',
    )
    parser.set_defaults(run=run, example=example)
    common(parser, is_verb=True)
    if waits:
        waiting(parser)
    return parser


def group(
    verbs: Verbs,
    name: str,
    help: str,
    *,
    default: Run | None = None,
    options: Callable[[Parser], None] = lambda parser: None,
) -> Verbs:
    """Declare a noun that has verbs of its own.

    Without a verb it does what ``default`` does, which takes ``options``:
    their defaults must be ``argparse.SUPPRESS``.
    """
    parser: Parser = verbs.add_parser(
        name, help=help, description=f'{help[0].upper()}{help[1:]}.',
    )
    if default is not None:
        parser.set_defaults(run=default)
        options(parser)
    common(parser, is_verb=True)
    return parser.add_subparsers(
        title='verbs', metavar='VERB', required=default is None,
        parser_class=Parser,
    )


def common(parser: argparse.ArgumentParser, *, is_verb: bool) -> None:
    """Add the options that every verb has."""

    def hidden(text: str) -> str:
        # Said once, in the help of the whole command.
        return argparse.SUPPRESS if is_verb else text

    def default(value: object) -> object:
        # A verb's default must not undo what stood before the verb.
        return argparse.SUPPRESS if is_verb else value

    options = parser.add_argument_group(
        'output' if is_verb else 'options for all verbs'
    )
    options.add_argument(
        '--format', choices=show.FORMATS, default=default('table'),
        help='table for people, json for programs, or id: only the ids',
    )
    options.add_argument(
        '--url', default=default(None), metavar='URL',
        help=hidden('where the service is (VOLUME_URL), by default '
                    'http://127.0.0.1:8776/v3; unix:/path is a socket'),
    )
    options.add_argument(
        '--project', default=default(None), metavar='NAME',
        help=hidden('the project to work in (VOLUME_PROJECT)'),
    )
    options.add_argument(
        '--token-file', default=default(None), metavar='FILE',
        help=hidden('read the token from a file, or with - from standard '
                    'input (VOLUME_TOKEN_FILE; or the token itself in '
                    'VOLUME_TOKEN)'),
    )
    options.add_argument(
        '--ca-file', default=default(None), metavar='FILE',
        help=hidden('certificates that https:// trusts (VOLUME_CA_FILE)'),
    )


def waiting(parser: argparse.ArgumentParser) -> None:
    """Add the options of a verb that starts work."""
    options = parser.add_argument_group('waiting')
    options.add_argument(
        '--wait', action=argparse.BooleanOptionalAction, default=True,
        help='wait until it is done (the default), or only until the '
             'service has accepted it',
    )
    options.add_argument(
        '--timeout', type=values.duration, metavar='TIME',
        help='wait no longer than this, like 30s, 10m or 2h; the work goes '
             'on',
    )
