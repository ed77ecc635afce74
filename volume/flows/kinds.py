# SPDX-License-Identifier: Apache-2.0
"""Which flow a kind of job follows."""

from __future__ import annotations

from volume.flows import adopt
from volume.flows import attach
from volume.flows import create
from volume.flows import delete
from volume.flows import image
from volume.flows import limit
from volume.flows import reshape
from volume.flows import snapshot
from volume.journal import Flow

FLOWS: dict[str, Flow] = {
    flow.kind: flow
    for flow in (
        create.EMPTY,
        create.FILLED,
        delete.FLOW,
        reshape.EXTEND,
        reshape.REVERT,
        reshape.FLATTEN,
        limit.FLOW,
        snapshot.CREATE,
        snapshot.DELETE,
        attach.ATTACH,
        attach.DETACH,
        attach.RESTORE,
        image.UPLOAD,
        adopt.ADOPT,
        adopt.DISOWN,
    )
}
