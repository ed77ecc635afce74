# SPDX-License-Identifier: Apache-2.0
"""Read what a caller has sent: bytes to JSON, and JSON to typed values.

Whatever arrives, the answer is a value or ``Invalid``; nothing here trusts
a size, a depth or a type. What verbs check themselves is passed as it came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from volume import errors
from volume import ids

DEPTH_MAX = 12
TRUE = frozenset({'true', '1', 't', 'on', 'y', 'yes'})
FALSE = frozenset({'false', '0', 'f', 'off', 'n', 'no'})


def parse(raw: bytes) -> Any:
    """Return the JSON that these bytes are.

    :raises Invalid: they are none, or are nested too deeply
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise errors.Invalid('the body is not valid JSON') from None
    _check(value)
    return value


class Fields:
    """A JSON object whose values are read by type; null is absent."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, Mapping):
            raise errors.Invalid(f'{what} is not a JSON object')
        self.values: Mapping[str, Any] = value
        self.what = what

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def only(self, keys: Collection[str]) -> Fields:
        """Refuse every key but these.

        :raises Invalid: there is another
        """
        for key in self.values:
            if key not in keys:
                raise errors.Invalid(
                    f'{self.what} has an unknown key, {key!r:.80}'
                )
        return self

    def object(self, key: str) -> Fields:
        """Return an object that must be there."""
        if not isinstance(self.values.get(key), Mapping):
            raise errors.Invalid(f'{self.what} has no object {key!r}')
        return Fields(self.values[key], key)

    def need(self, key: str) -> Any:
        """Return a value that must be there."""
        value = self.values.get(key)
        if value is None:
            raise errors.Invalid(f'{self.what} has no {key!r}')
        return value

    def raw(self, *keys: str) -> Any:
        """Return the first of these that is there, as it was sent."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        return None

    def text(self, *keys: str) -> str:
        """Return a text; an absent one is empty."""
        value = self.raw(*keys)
        if value is None:
            return ''
        if not isinstance(value, str):
            raise errors.Invalid(f'{keys[0]} {value!r:.80} is not text')
        return value

    def id(self, *keys: str) -> str | None:
        """Return an id; an absent or empty one is ``None``."""
        value = self.raw(*keys)
        if value is None or value == '':
            return None
        return ids.check(value, keys[0])

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean; words and 0 or 1 are understood too."""
        value = self.values.get(key)
        return default if value is None else flag(value, key)

    def whole(self, key: str) -> int | None:
        """Return a whole number greater than 0; digits in a text too."""
        value = self.values.get(key)
        if value is None:
            return None
        return whole(value, key)


def flag(value: Any, what: str) -> bool:
    """Return a boolean from what Cinder's clients send for one."""
    word = str(value).strip().lower() if not isinstance(
        value, (list, dict)
    ) else ''
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise errors.Invalid(f'{what} {value!r:.40} is neither true nor false')


def whole(value: Any, what: str, least: int = 1) -> int:
    """Return a whole number from a number or digits."""
    if (
        isinstance(value, str) and len(value) < 20
        and value.isascii() and value.isdigit()
    ):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise errors.Invalid(f'{what} {value!r:.40} is not a whole number')
    if value < least or value >= 1 << 62:
        raise errors.Invalid(
            f'{what} {str(value)[:40]} must be a whole number from {least} '
            'on, within reason'
        )
    return value


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _check(value: Any) -> None:
    """Refuse depth, and texts and numbers that no database can keep."""
    todo = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if depth > DEPTH_MAX:
            raise errors.Invalid(
                f'the body is nested more than {DEPTH_MAX} deep'
            )
        if isinstance(item, dict):
            todo += [(each, depth) for each in item]
            todo += [(each, depth + 1) for each in item.values()]
        elif isinstance(item, list):
            todo += [(each, depth + 1) for each in item]
        elif isinstance(item, str):
            check_text(item, 'the body')
        elif isinstance(item, float) and not math.isfinite(item):
            raise errors.Invalid('the body has a number out of range')
        elif isinstance(item, int) and abs(item) >= 1 << 63:
            raise errors.Invalid('the body has a number out of range')


def check_text(text: str, what: str) -> str:
    """Return a text that can be stored and sent.

    :raises Invalid: it has half a character, or a NUL
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise errors.Invalid(
            f'{what} has a text that is not valid Unicode'
        ) from None
    if '\0' in text:
        raise errors.Invalid(f'{what} has a NUL character in it')
    return text
