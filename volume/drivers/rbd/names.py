# SPDX-License-Identifier: Apache-2.0
"""What things are called in a pool, and what stands in an image's metadata.

=============================  ============================================
``volume-<id>``                the image of a volume
``volume-<id>@snapshot-<id>``  a snapshot of it
``volume-<id>@clone-<id>``     what that clone was made from; soon in the
                               trash of snapshots, and shown to nobody
``volume-<id>.disowned``       an image that we have let go of
``volume-service.begun``       an object whose keys are images that are being
                               made
``volume-service.flatten``     the same for clones that stand on too many
                               others
=============================  ============================================

An image is a volume of ours if its name says so and its metadata has the
same id: it is *signed*. librbd copies metadata to clones, where the id is
another's. What is unsigned is foreign, even with such a name (another service
names its images in the same way); unless it is being made: then nobody has
got it yet, and it may be thrown away.
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

BEGUN = 'volume-service.begun'
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
