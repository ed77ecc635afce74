# SPDX-License-Identifier: Apache-2.0
"""Verbs of an endpoint: methods that a message may call, and with what.

Only what ``@verb`` declares on the endpoint's own class can be called;
nothing private, inherited or assigned later. A message's arguments are
checked by the method's own signature and types.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from volume import errors

# How a message calls each type that an argument may have.
_TYPE_NAMES: Mapping[Any, str] = {
    str: 'text', int: 'a whole number', bool: 'true or false',
    dict: 'a mapping', list: 'a list', types.NoneType: 'null',
    float: 'a number',
}


class Verb:
    """A method of an endpoint as messages see it."""

    def __init__(
        self, function: Callable[..., Any], since: str, error: str
    ) -> None:
        self.name = function.__name__
        self.function = function
        self.since = since
        self.error = error
        # Without self and the caller: what is left may be sent.
        self.parameters = dict(
            list(inspect.signature(function).parameters.items())[2:]
        )
        self._hints: dict[str, Any] = {}

    def check(self, args: Mapping[str, Any]) -> None:
        """Check arguments by the function's own signature.

        :raises Invalid: one is missing, unknown, or of another type
        """
        self._hints = self._hints or typing.get_type_hints(self.function)
        for name in args:
            if name not in self.parameters:
                raise errors.Invalid(
                    f'{self.name} has no argument {name!r:.60}; it has '
                    f'{", ".join(self.parameters)}'
                )
        for name, parameter in self.parameters.items():
            if name not in args:
                if parameter.default is parameter.empty:
                    raise errors.Invalid(
                        f'{self.name} needs the argument {name}'
                    )
            elif not _fits(args[name], self._hints[name]):
                # The value itself is not shown: a connector has secrets.
                raise errors.Invalid(
                    f'{self.name}: {name} must be '
                    f'{_type_name(self._hints[name])}, not '
                    f'{_TYPE_NAMES[type(args[name])]}'
                )


def verb(
    since: str = '1.0', *, error: str = ''
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a method callable by RPC, from a version of the door on.

    ``error`` is the event that reports a failed cast of it.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__dict__['rpc_verb'] = Verb(function, since, error)
        return function

    return declare


def verbs_of(endpoint: object) -> dict[str, Verb]:
    """Return the verbs declared on the endpoint's own class, by name."""
    return {
        name: value.rpc_verb
        for name, value in vars(type(endpoint)).items()
        if isinstance(getattr(value, 'rpc_verb', None), Verb)
    }


def _fits(value: object, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(
            _fits(each, inner[0]) for each in value
        )
    if origin is dict:
        return isinstance(value, dict)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return ' or '.join(_type_name(e) for e in typing.get_args(hint))
    name = _TYPE_NAMES[typing.get_origin(hint) or hint]
    if typing.get_origin(hint) is list:
        name += f' of {_type_name(typing.get_args(hint)[0])}'
    return name
