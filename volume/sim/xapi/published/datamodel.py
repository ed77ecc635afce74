# SPDX-License-Identifier: Apache-2.0
"""The published contract: classes, messages, types, roles, releases.

Read from ``datamodel.json``, which was made from the data model of xapi.
What a call looks like is never written down a second time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import internal
from volume.sim.xapi.failure import NULL
from volume.sim.xapi.state.values import DateTime
from volume.sim.xapi.state.values import EPOCH

ROLES: Final = (
    'read-only', 'vm-operator', 'vm-admin', 'vm-power-admin',
    'pool-operator', 'pool-admin',
)
OPTIONAL: Final = 'optional'

_WHOLE = re.compile('[+-]?[0-9]{1,20}')
_INT64 = 1 << 63

# What comes after a release that is not named yet.
_NEXT = '-next'


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of a message."""

    name: str
    type: str
    optional: bool


@dataclasses.dataclass(frozen=True)
class Message:
    """A call that the server knows; its session is not among the params."""

    name: str
    params: tuple[Param, ...]
    result: str
    role: str | None
    life: Mapping[str, Any]
    is_async: bool
    implicit: bool = False
    has_session: bool = True

    @property
    def required(self) -> int:
        """Return how many parameters there must be."""
        return sum(not param.optional for param in self.params)


@dataclasses.dataclass(frozen=True)
class Field:
    """A member of an object."""

    name: str
    type: str
    qualifier: str
    default: str | None
    life: Mapping[str, Any]


class Model:
    """All that is published, by name."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._releases = {
            name: at for at, name in enumerate(document['release_order'])
        }
        self._enums: dict[str, frozenset[str]] = {
            name: frozenset(values)
            for name, values in document['enums'].items()
        }
        self.constructors: dict[str, Any] = document['constructors']
        self.errors: dict[str, Any] = document['errors']
        self._fields: dict[str, dict[str, Field]] = {}
        self._messages: dict[str, Message] = {}
        for cls, about in document['classes'].items():
            self._fields[cls] = {
                field['name']: Field(
                    field['name'], field['type'], field['q'],
                    field.get('default'), field['life'],
                ) for field in about['fields']
            }
            for message in about['messages']:
                made = self._as_before(cls, _message(cls, message))
                self._messages[made.name] = made
            self._add_hidden(cls)

    def _as_before(self, cls: str, message: Message) -> Message:
        # A field's accessor that was written anew has lost its history:
        # it is as old as its field (``task.add_to_other_config``).
        again = message.life.get('prototyped')
        for prefix in ('set_', 'add_to_', 'remove_from_'):
            field = self._fields[cls].get(
                message.name.partition('.')[2].removeprefix(prefix),
            )
            if again is None or field is None or 'since' in message.life:
                continue
            since = field.life.get('since')
            if since is not None and self._at(since) < self._at(again):
                return dataclasses.replace(
                    message, life=field.life, implicit=True, is_async=False,
                )
        return message

    def _add_hidden(self, cls: str) -> None:
        # xapi answers it for every class with get_all_records, and leaves
        # it out of the documents.
        every = self._messages.get(f'{cls}.get_all_records')
        name = f'{cls}.get_all_records_where'
        if every is not None and name not in self._messages:
            self._messages[name] = dataclasses.replace(
                every, name=name, params=(Param('expr', 'string', False),),
            )

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, as published."""
        return list(self._fields)

    def fields(self, cls: str) -> Mapping[str, Field]:
        """Return the members of a class by name."""
        return self._fields[cls]

    def message(self, name: str) -> Message | None:
        """Return a call by ``Class.name`` or ``Class_name``."""
        found = self._messages.get(name)
        if found is None and '.' not in name:
            cls = next((
                cls for cls in sorted(self._fields, key=len, reverse=True)
                if name.startswith(f'{cls}_')
            ), None)
            if cls is not None:
                found = self._messages.get(f'{cls}.{name[len(cls) + 1:]}')
        return found

    def messages(self) -> Mapping[str, Message]:
        """Return every call by its name."""
        return self._messages

    @functools.cache  # noqa: B019 - there is one model in a process
    def permissions(self, role: str) -> list[str]:
        """Return the calls that a role may make, as sessions tell them."""
        rank = ROLES.index(role)
        return sorted(
            message.name.lower() for message in self._messages.values()
            if message.role in ROLES[:rank + 1]
        )

    def released(self, name: str, release: str) -> bool:
        """Say if a release is the named one or a later one."""
        return self._at(release) >= self._at(name)

    def check_release(self, message: Message, release: str) -> None:
        """Refuse a call that a release does not have yet, or no more."""
        life = message.life
        since = life.get('since') or life.get('prototyped') or 'rio'
        removed = life.get('removed')
        if removed is not None:
            again = self._at(since) > self._at(removed)
            if self.released(removed, release) and not (
                again and self.released(since, release)
            ):
                raise Failure('MESSAGE_REMOVED')
            if again:
                return
        if not self.released(since, release):
            raise Failure('MESSAGE_METHOD_UNKNOWN', message.name)

    def _at(self, release: str) -> float:
        # "26.16.1-next" is what comes after 26.16.1; a release that the
        # list leaves out ("25.33.1") stands behind the last before it.
        plain = release.removesuffix(_NEXT)
        at = self._releases.get(plain)
        if at is None:
            number = _number(plain)
            return 0.5 + max(
                at for name, at in self._releases.items()
                if number and name[0].isdigit() and _number(name) < number
            )
        return at + (0.5 if plain != release else 0)

    def check_value(self, kind: str, value: Any, name: str = '') -> Any:
        """Return a value from the wire as one of ours.

        :raises Failure: it is not of the type
        """
        try:
            return self._checked(kind, value)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise Failure('FIELD_TYPE_ERROR', name) from error

    def _checked(self, kind: str, value: Any) -> Any:
        if kind.endswith(' set'):
            _must_be(value, list)
            return [self._checked(kind[:-4], part) for part in value]
        if kind.endswith(') map'):
            key, _, inner = kind[1:-len(') map')].partition(' -> ')
            _must_be(value, dict)
            return {
                self._checked(key, name): self._checked(inner, part)
                for name, part in value.items()
            }
        if kind.endswith(' record'):
            return self._record(kind.removesuffix(' record'), value)
        if kind.startswith('enum '):
            return _member(self._enums[kind[5:]], value)
        return _scalar(kind, value)

    def _record(self, cls: str, value: Any) -> dict[str, Any]:
        _must_be(value, dict)
        fields = self._fields[cls]
        needed = self.constructors.get(cls, {}).get('required', ())
        for name in needed:
            if name not in value:
                raise internal(
                    f'Server_helpers.Dispatcher_FieldNotFound("{name}")'
                )
        return {
            name: self.check_value(fields[name].type, part, name)
            for name, part in value.items() if name in fields
        }

    def default(self, field: Field) -> Any:
        """Return what a member is where nobody says."""
        return _default(field.type, field.default, self._enums)


def _message(cls: str, about: Mapping[str, Any]) -> Message:
    return Message(
        f'{cls}.{about["name"]}',
        tuple(
            Param(param[0], param[1], OPTIONAL in param[2:])
            for param in about['params']
        ),
        about['result'], about.get('role'), about['life'],
        bool(about.get('async')), bool(about.get('implicit')),
        not about.get('no_session'),
    )


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split('.') if part.isdigit())


def _must_be(value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f'{type(value).__name__} is no {kind.__name__}')


def _member(values: frozenset[str], value: Any) -> str:
    # The server reads the names of enumerations in any case.
    _must_be(value, str)
    for name in values:
        if name == value or name.lower() == value.lower():
            return name
    raise ValueError(value)


def _scalar(kind: str, value: Any) -> Any:
    if kind == 'int':
        # A string in XML, a number in JSON; both are read everywhere.
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise TypeError(value)
        if isinstance(value, str) and not _WHOLE.fullmatch(value):
            raise ValueError(value)
        if not -_INT64 <= int(value) < _INT64:
            raise ValueError(value)
        return int(value)
    if kind == 'float':
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise TypeError(value)
        return float(value)
    if kind == 'bool':
        _must_be(value, bool)
        return value
    if kind == 'datetime':
        return DateTime.parse(value)
    _must_be(value, str)
    return str(value)


def _default(
    kind: str, text: str | None, enums: Mapping[str, frozenset[str]],
) -> Any:
    if kind.endswith(' map'):
        return {} if text in (None, '{}') else _map(str(text))
    if kind.endswith(' set'):
        inner = (text or '{}').strip('{}')
        return [
            int(part) if kind.startswith('int') else part.strip('"')
            for part in inner.split(';') if part
        ]
    if kind.endswith(' ref'):
        return NULL
    if kind.startswith('enum '):
        return text if text is not None else sorted(enums[kind[5:]])[0]
    if kind == 'int':
        return int(text or 0)
    if kind == 'float':
        return float(text or 0)
    if kind == 'bool':
        return text == 'true'
    if kind == 'datetime':
        return EPOCH
    return (text or '').strip('"')


def _map(text: str) -> dict[str, str]:
    pairs = (part.split('->') for part in text.strip('{}').split(','))
    return {key.strip(' "'): value.strip(' "') for key, value in pairs}


@functools.cache
def load() -> Model:
    """Return the contract that is shipped."""
    place = resources.files('volume.sim.xapi') / 'datamodel.json'
    return Model(json.loads(place.read_text('utf-8')))
