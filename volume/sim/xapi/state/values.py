# SPDX-License-Identifier: Apache-2.0
"""Kinds of values that Python has no type for, or not one of the wire's."""

from __future__ import annotations

import datetime
import re
from typing import Any, Self

_FORM = '%Y%m%dT%H:%M:%SZ'
_ACCEPTED = re.compile(
    r'(\d{4})-?(\d\d)-?(\d\d)T(\d\d):?(\d\d):?(\d\d)(\.\d+)?Z?'
)


class DateTime(str):
    """A time in UTC, as ``YYYYMMDDTHH:MM:SSZ``."""

    __slots__ = ()

    @classmethod
    def at(cls, seconds: float) -> Self:
        """Return the time so long after 1970."""
        return cls(datetime.datetime.fromtimestamp(
            int(seconds), datetime.UTC,
        ).strftime(_FORM))

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return what a client means; XML-RPC has an object for it."""
        found = _ACCEPTED.fullmatch(str(value))
        if found is None:
            raise ValueError(f'{value!r} is no time')
        year, month, day, hour, minute, second = found.groups()[:6]
        made = cls(f'{year}{month}{day}T{hour}:{minute}:{second}Z')
        made.seconds()
        return made

    def seconds(self) -> float:
        """Return how long after 1970 it is."""
        return datetime.datetime.strptime(self, _FORM).replace(
            tzinfo=datetime.UTC,
        ).timestamp()


class Int32(int):
    """A number that the wire carries as one, not as a string."""


EPOCH = DateTime('19700101T00:00:00Z')
