# SPDX-License-Identifier: Apache-2.0
"""Actions: a body with one key, which names the verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from volume import errors
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.faults import Refused
from volume.api.fields import Fields


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """``since`` is the first minor version that has it."""

    do: Callable[[Call, Fields], dict[str, Any] | None]
    status: int
    since: int = 0
    admin: bool = False


def dispatch(call: Call, actions: Mapping[str, Action]) -> Reply:
    """Do what the body's one key names."""
    names = list(Fields(call.body, 'the body').values)
    if len(names) != 1 or names[0] not in actions:
        raise errors.Invalid(
            f'there is no such action: {", ".join(names)!r:.80}'
        )
    action = actions[names[0]]
    if call.minor < action.since:
        raise Refused(
            404, f'action {names[0]} needs API version 3.{action.since}'
        )
    if action.admin and not call.caller.is_admin:
        raise errors.Denied(f'only an administrator may {names[0]}')
    info = call.body[names[0]]
    # Verbs without parameters are sent with null, {} or, for an
    # attachment, with its id again.
    fields = Fields(info if isinstance(info, Mapping) else {}, names[0])
    return Reply(action.status, action.do(call, fields))
