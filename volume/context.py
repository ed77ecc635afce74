# SPDX-License-Identifier: Apache-2.0
"""Who asks: the project, the user, and the id that one request keeps."""

from __future__ import annotations

import contextvars
import dataclasses
import uuid


def new_request_id() -> str:
    """Return an id by which one request is followed through all logs."""
    return f'req-{uuid.uuid4()}'


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """A checked identity; never built from a request's body."""

    project_id: str = 'default'
    user_id: str = 'default'
    is_admin: bool = False
    request_id: str = dataclasses.field(default_factory=new_request_id)


current_request: contextvars.ContextVar[str] = contextvars.ContextVar(
    'current_request', default='-'
)
"""The request that this thread works for; the log format shows it."""
