# SPDX-License-Identifier: Apache-2.0
"""One request, checked and ready for a handler; and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from volume import errors
from volume import ids
from volume.api.fields import Fields
from volume.context import Caller
from volume.core import Core

Query = Mapping[str, list[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    body_bytes_max: int = 114688
    page_items_max: int = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """A status, and JSON unless it is ``None``."""

    status: int
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One request. ``prefix`` is the URL under which its caller sees us:
    ``http://host:8776/v3/project``, or without the project if the request
    had none; ``minor`` is N of microversion 3.N.
    """

    core: Core
    caller: Caller
    roles: frozenset[str]
    minor: int
    path: Mapping[str, str]
    query: Query
    headers: Mapping[str, str]
    body: Any
    base_url: str
    project_path: str
    route_path: str
    limits: Limits
    upload_url: str = ''

    @property
    def prefix(self) -> str:
        return f'{self.base_url}/v3{self.project_path}'

    @property
    def is_trusted(self) -> bool:
        """Whether a service or an administrator asks, for others."""
        return self.caller.is_admin or 'service' in self.roles

    def id(self, key: str) -> str:
        """Return an id from the path.

        :raises NotFound: it is no id, so there is nothing of that name;
            clients look for a thing by its id first, then by its name
        """
        text = self.path[key].lower()
        if not ids.is_id(text):
            what = key.removesuffix('_id')
            raise errors.NotFound(
                f'{what} {self.path[key]!r:.80} could not be found'
            )
        return text

    def one(self, key: str) -> str | None:
        """Return a query parameter's last value."""
        values = self.query.get(key)
        return values[-1] if values else None

    def fields(self, key: str) -> Fields:
        """Return the object in the body that a request is about."""
        return Fields(self.body, 'the body').object(key)

    def minted_id(self, *headers: str) -> str | None:
        """Return the id that the caller has chosen for a new thing.

        With it, the same request may be sent again and makes nothing new.
        """
        for name in headers:
            if value := self.headers.get(name):
                return ids.check(value.strip().strip('"'), name)
        return None
