# SPDX-License-Identifier: Apache-2.0
"""The route table: method, path, handler, first version, who may.

Paths stand behind ``/v3``, with or without a project between the two. A
first word that the table knows is never a project.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from volume.api.call import Call
from volume.api.call import Reply
from volume.api.faults import Refused
from volume.api.v3 import attachments
from volume.api.v3 import cloud
from volume.api.v3 import jobs
from volume.api.v3 import manage
from volume.api.v3 import metadata
from volume.api.v3 import snapshots
from volume.api.v3 import types
from volume.api.v3 import volume_actions
from volume.api.v3 import volumes


class Route(NamedTuple):
    """``since`` is the first minor version that has it."""

    method: str
    path: str
    handler: Callable[[Call], Reply]
    since: int = 0
    admin: bool = False


ROUTES = (
    Route('POST', '/volumes', volumes.create),
    Route('GET', '/volumes', volumes.index),
    Route('GET', '/volumes/detail', volumes.detail),
    Route('GET', '/volumes/summary', volumes.summary, 12),
    Route('GET', '/volumes/{volume_id}', volumes.show),
    Route('PUT', '/volumes/{volume_id}', volumes.update),
    Route('DELETE', '/volumes/{volume_id}', volumes.delete),
    Route('POST', '/volumes/{volume_id}/action', volume_actions.act),
    Route('GET', '/volumes/{volume_id}/encryption', volumes.encryption),
    Route('GET', '/volumes/{volume_id}/encryption/{key}',
          volumes.encryption_key),
    Route('GET', '/volumes/{volume_id}/metadata', metadata.show),
    Route('POST', '/volumes/{volume_id}/metadata', metadata.merge),
    Route('PUT', '/volumes/{volume_id}/metadata', metadata.replace),
    Route('GET', '/volumes/{volume_id}/metadata/{key}', metadata.show_item),
    Route('PUT', '/volumes/{volume_id}/metadata/{key}', metadata.set_item),
    Route('DELETE', '/volumes/{volume_id}/metadata/{key}',
          metadata.remove_item),

    Route('POST', '/snapshots', snapshots.create),
    Route('GET', '/snapshots', snapshots.index),
    Route('GET', '/snapshots/detail', snapshots.detail),
    Route('GET', '/snapshots/{snapshot_id}', snapshots.show),
    Route('PUT', '/snapshots/{snapshot_id}', snapshots.update),
    Route('DELETE', '/snapshots/{snapshot_id}', snapshots.delete),
    Route('POST', '/snapshots/{snapshot_id}/action', snapshots.act),
    Route('GET', '/snapshots/{snapshot_id}/metadata', metadata.show),
    Route('POST', '/snapshots/{snapshot_id}/metadata', metadata.merge),
    Route('PUT', '/snapshots/{snapshot_id}/metadata', metadata.replace),
    Route('GET', '/snapshots/{snapshot_id}/metadata/{key}',
          metadata.show_item),
    Route('PUT', '/snapshots/{snapshot_id}/metadata/{key}',
          metadata.set_item),
    Route('DELETE', '/snapshots/{snapshot_id}/metadata/{key}',
          metadata.remove_item),

    Route('POST', '/attachments', attachments.create, 27),
    Route('GET', '/attachments', attachments.index, 27),
    Route('GET', '/attachments/detail', attachments.detail, 27),
    Route('GET', '/attachments/{attachment_id}', attachments.show, 27),
    Route('PUT', '/attachments/{attachment_id}', attachments.update, 27),
    Route('DELETE', '/attachments/{attachment_id}', attachments.delete, 27),
    Route('POST', '/attachments/{attachment_id}/action',
          attachments.act, 27),

    Route('GET', '/types', types.index),
    Route('GET', '/types/default', types.default),
    Route('GET', '/types/{type_id}', types.show),
    Route('GET', '/types/{type_id}/extra_specs', types.extra_specs),
    Route('GET', '/types/{type_id}/encryption', types.encryption),

    Route('GET', '/limits', cloud.limits),
    Route('GET', '/extensions', cloud.extensions),
    Route('GET', '/extensions/{alias}', cloud.extension),
    Route('GET', '/os-availability-zone', cloud.zones),
    Route('GET', '/os-services', cloud.services, 0, True),
    Route('GET', '/scheduler-stats/get_pools', cloud.pools, 0, True),
    Route('GET', '/os-quota-sets/{project_id}', cloud.quotas),
    Route('GET', '/os-quota-sets/{project_id}/defaults', cloud.quotas),
    Route('POST', '/os-volume-manage', manage.adopt, 0, True),
    Route('POST', '/manageable_volumes', manage.adopt, 8, True),

    Route('GET', '/os-volume-backends', cloud.backends),
    Route('GET', '/os-volume-jobs', jobs.index),
    Route('GET', '/os-volume-jobs/{job_id}', jobs.show),
    Route('POST', '/os-volume-jobs/{job_id}/action', jobs.act),
)


@dataclasses.dataclass(slots=True)
class _Place:
    """A word of a path: what may follow, and what ends here."""

    words: dict[str, _Place] = dataclasses.field(default_factory=dict)
    name: str = ''
    any: _Place | None = None
    routes: dict[str, Route] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """A route, what its path's braces hold, and the path's two parts."""

    route: Route
    params: dict[str, str]
    project_id: str
    path: str


def match(method: str, path: str, minor: int) -> Match:
    """Return the route of a path that stands behind ``/v3``.

    :raises Refused: 404, there is none; 405, not with this method
    """
    words = path.strip('/').split('/')
    project_id = ''
    if words[0] not in _ROOT.words:
        project_id, words = words[0], words[1:]
    place, params = _ROOT, {}
    for word in words:
        ahead = place.words.get(word)
        if ahead is None and place.any is not None and word:
            ahead = place.any
            params[ahead.name] = word
        if ahead is None:
            raise Refused(404, 'the resource could not be found')
        place = ahead
    route = place.routes.get(method)
    if route is None:
        if not place.routes:
            raise Refused(404, 'the resource could not be found')
        allowed = ', '.join(sorted(place.routes))
        raise Refused(
            405, f'the method {method[:20]!r} is not known here; {allowed} is',
            {'Allow': allowed},
        )
    if minor < route.since:
        raise Refused(
            404,
            f'API version 3.{minor} is not supported on this method; it '
            f'needs 3.{route.since}',
        )
    return Match(route, params, project_id, '/' + '/'.join(words))


def is_word(name: str) -> bool:
    """Say whether a project of this name could not be told from a path."""
    return name in _ROOT.words


def _tree(routes: tuple[Route, ...]) -> _Place:
    root = _Place()
    for route in routes:
        place = root
        for word in route.path.strip('/').split('/'):
            if word.startswith('{'):
                place.any = place.any or _Place(name=word[1:-1])
                assert place.any.name == word[1:-1], route.path
                place = place.any
            else:
                place = place.words.setdefault(word, _Place())
        assert route.method not in place.routes, route.path
        place.routes[route.method] = route
    return root


_ROOT = _tree(ROUTES)
