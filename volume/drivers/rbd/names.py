# SPDX-License-Identifier: Apache-2.0
"""What things are called in a pool, and what stands in an image's metadata.

=============================  ============================================
``volume-<id>``                the image of a volume
``volume-<id>@snapshot-<id>``  a snapshot of it
``volume-<id>@clone-<id>``     what that clone was made from; soon in the
                               trash of snapshots, and shown to nobody
``volume-<id>.disowned``       an image that we have let go of
``volume-service.flatten``     an object whose keys are clones that stand on
                               too many others
=============================  ============================================

The name says which volume an image is. The metadata of an image is copied
to its clones, so what stands there holds only beside the image's own id; an
image with our name and without our id is a create or clone that never ended.
"""

from __future__ import annotations

import hashlib
import re

from volume import model

_ID = r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}'
VOLUME = re.compile(rf'volume-({_ID})')
SNAPSHOT = re.compile(rf'snapshot-({_ID})')
MOMENT = re.compile(rf'clone-({_ID})')

# Keys of an image's metadata.
ID = 'volume.id'
NOTE = 'volume.note'
REVERT = 'volume.revert'
HOST = 'volume.host.'
OURS = (ID, NOTE, REVERT, HOST)
LIMIT = 'conf_rbd_qos_'  # librbd's own

FLATTEN = 'volume-service.flatten'


def image(volume: model.Volume) -> str:
    return f'volume-{volume.id}'


def disowned(volume: model.Volume) -> str:
    return f'volume-{volume.id}.disowned'


def snapshot(snapshot: model.Snapshot) -> str:
    return f'snapshot-{snapshot.id}'


def moment(volume: model.Volume) -> str:
    """Return the name of the snapshot that a clone is made from."""
    return f'clone-{volume.id}'


def host(name: str) -> str:
    """Return the key under which it stands that a host was let in."""
    return HOST + hashlib.sha256(name.encode()).hexdigest()[:32]


def volume_id(image: str) -> str | None:
    """Return the id of the volume whose image has this name."""
    found = VOLUME.fullmatch(image)
    return found[1] if found else None


def snapshot_id(snapshot: str) -> str | None:
    """Return our id of a snapshot; none if it is foreign."""
    found = SNAPSHOT.fullmatch(snapshot)
    return found[1] if found else None
