# SPDX-License-Identifier: Apache-2.0
"""Calls that every class has: read a field, change it, find an object."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.failure import Failure

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.published.datamodel import Message
    from volume.sim.xapi.published.datamodel import Model
    from volume.sim.xapi.registry import Ctx
    from volume.sim.xapi.state.rows import Row

Answer = Callable[..., Any]


def find(model: Model, message: Message) -> Answer | None:
    """Return what answers a message that is the same for every class."""
    cls, _, name = message.name.partition('.')
    whole = _WHOLE.get(name)
    if whole is not None:
        return _of_class(whole, cls)
    if not message.implicit:
        return None
    for prefix, function in _PARTS:
        field = name.removeprefix(prefix)
        if name.startswith(prefix) and field in model.fields(cls):
            return _of_field(function, cls, field)
    return None


def missing(model: Model) -> list[str]:
    """Return the calls that are published, and not simulated."""
    return sorted(
        name for name, message in model.messages().items()
        if name not in registry.CALLS and find(model, message) is None
    )


def _of_class(function: Answer, cls: str) -> Answer:
    def answer(pool: Pool, ctx: Ctx, *args: Any) -> Any:
        return function(pool, cls, *args)
    return answer


def _of_field(function: Answer, cls: str, field: str) -> Answer:
    def answer(pool: Pool, ctx: Ctx, *args: Any) -> Any:
        return function(pool, cls, field, *args)
    return answer


def _get_all(pool: Pool, cls: str) -> list[str]:
    return pool.rows.all(cls)


def _get_record(pool: Pool, cls: str, ref: str) -> Row:
    return pool.rows.get(cls, ref)


def _get_all_records(pool: Pool, cls: str) -> dict[str, Row]:
    with pool.rows.lock:
        return {ref: pool.rows.get(cls, ref) for ref in pool.rows.all(cls)}


def _get_all_records_where(
    pool: Pool, cls: str, text: str,
) -> dict[str, Row]:
    wanted = Expression(text)
    return {
        ref: row for ref, row in _get_all_records(pool, cls).items()
        if wanted.holds(row)
    }


def _get_by_uuid(pool: Pool, cls: str, uuid: str) -> str:
    return pool.rows.by_uuid(cls, uuid)


def _get_by_name_label(pool: Pool, cls: str, label: str) -> list[str]:
    return pool.rows.find(cls, name_label=label)


def _get(pool: Pool, cls: str, field: str, ref: str) -> Any:
    return pool.rows.field(cls, ref, field)


def _set(pool: Pool, cls: str, field: str, ref: str, value: Any) -> None:
    pool.rows.update(cls, ref, **{field: value})


def _add(pool: Pool, cls: str, field: str, ref: str, *args: Any) -> None:
    """Add a pair to a map, or a value to a set."""
    with pool.rows.change(cls, ref, field) as stored:
        if isinstance(stored, dict):
            key, value = args
            if key in stored:
                raise Failure('MAP_DUPLICATE_KEY', cls, field, ref, key)
            stored[key] = value
        elif args[0] not in stored:
            stored.append(args[0])


def _remove(pool: Pool, cls: str, field: str, ref: str, key: Any) -> None:
    """Take a key or a value away; one that is not there is no error."""
    with pool.rows.change(cls, ref, field) as stored:
        if isinstance(stored, dict):
            stored.pop(key, None)
        elif key in stored:
            stored.remove(key)


_WHOLE: dict[str, Answer] = {
    'get_all': _get_all,
    'get_record': _get_record,
    'get_all_records': _get_all_records,
    'get_all_records_where': _get_all_records_where,
    'get_by_uuid': _get_by_uuid,
    'get_by_name_label': _get_by_name_label,
}
_PARTS: tuple[tuple[str, Answer], ...] = (
    ('get_', _get), ('set_', _set), ('add_to_', _add), ('add_', _add),
    ('remove_from_', _remove), ('remove_', _remove),
)


class Expression:
    """A condition on a record: ``field "name_label"="x" and not …``.

    Only members that are plain values can be compared; what lies within a
    map or a set cannot be asked for.
    """

    _WORD = re.compile(
        r'\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\')'
        r'|(?P<word>\w+)|(?P<sign>[()=]))'
    )

    def __init__(self, text: str) -> None:
        self._words = self._split(text)
        self._at = 0
        self.holds = self._any()
        if self._at != len(self._words):
            raise self._bad()

    def _split(self, text: str) -> list[tuple[str, str]]:
        words = []
        self._text = text
        at, end = 0, len(text.rstrip())
        while at < end:
            found = self._WORD.match(text, at)
            if found is None:
                raise self._bad()
            kind = str(found.lastgroup)
            word = found[kind]
            if kind == 'text':
                word = re.sub(r'\\(.)', r'\1', word[1:-1])
            words.append((kind, word))
            at = found.end()
        return words

    def _bad(self) -> Failure:
        return Failure(
            'INTERNAL_ERROR',
            f'Db_filter.Expression_error({self._text}, Parsing.Parse_error)',
        )

    def _next(self, *signs: str) -> str | None:
        """Take the next word if it is one of these, or a text for none."""
        if self._at < len(self._words):
            kind, word = self._words[self._at]
            if (kind == 'text') if not signs else (
                kind != 'text' and word in signs
            ):
                self._at += 1
                return word
        return None

    def _need(self, *signs: str) -> str:
        word = self._next(*signs)
        if word is None:
            raise self._bad()
        return word

    def _any(self) -> Callable[[Row], bool]:
        parts = [self._all()]
        while self._next('or'):
            parts.append(self._all())
        return lambda row: any(part(row) for part in parts)

    def _all(self) -> Callable[[Row], bool]:
        parts = [self._one()]
        while self._next('and'):
            parts.append(self._one())
        return lambda row: all(part(row) for part in parts)

    def _one(self) -> Callable[[Row], bool]:
        if self._next('not'):
            part = self._one()
            return lambda row: not part(row)
        if self._next('('):
            inner = self._any()
            self._need(')')
            return inner
        word = self._next('true', 'false')
        if word is not None:
            return lambda row: word == 'true'
        left = self._value()
        self._need('=')
        right = self._value()
        return lambda row: left(row) == right(row)

    def _value(self) -> Callable[[Row], str]:
        if self._next('field'):
            name = self._need().replace('__', '_')
            return lambda row: _plain(row, name)
        text = self._need()
        return lambda row: text


def _plain(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise Failure(
            'INTERNAL_ERROR',
            f'Db_exn.DBCache_NotFound(missing field: {name})',
        )
    if isinstance(value, bool):
        return 'true' if value else 'false'
    return '' if isinstance(value, dict | list) else str(value)
