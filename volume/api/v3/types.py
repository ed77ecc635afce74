# SPDX-License-Identifier: Apache-2.0
"""/types: each backend is a type; ``__DEFAULT__`` leaves the choice to us."""

from __future__ import annotations

from volume import errors
from volume.api import views
from volume.api.call import Call
from volume.api.call import Reply
from volume.verbs import lookup


def index(call: Call) -> Reply:
    return Reply(200, {'volume_types': _all(call)})


def show(call: Call) -> Reply:
    return Reply(200, {'volume_type': _one(call)})


def default(call: Call) -> Reply:
    return Reply(200, {'volume_type': views.volume_type(call, None)})


def extra_specs(call: Call) -> Reply:
    return Reply(200, {'extra_specs': _one(call)['extra_specs']})


def encryption(call: Call) -> Reply:
    _one(call)
    return Reply(200, {})


def _all(call: Call) -> list[views.JSON]:
    return [views.volume_type(call, None)] + [
        views.volume_type(call, seen.row)
        for seen in lookup.backends(call.core, call.caller)
    ]


def _one(call: Call) -> views.JSON:
    for shown in _all(call):
        if shown['id'] == call.path['type_id']:
            return shown
    raise errors.NotFound(
        f'volume type {call.path["type_id"]!r:.80} could not be found'
    )
