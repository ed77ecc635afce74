# SPDX-License-Identifier: Apache-2.0
"""What a flow starts from, what it does, and what must hold afterwards.

A scenario is a class with ``prepare`` (nothing fails there), ``act`` (where
one call fails) and ``verify`` (after recovery; what it says beyond the
world's own invariants). Bytes are patterns of one letter a MiB.
"""

from __future__ import annotations

import abc
import functools
import os
from typing import Any

from tests.fault.world import CALLER
from tests.fault.world import World
from volume import errors
from volume import ids
from volume import model
from volume.db import models
from volume.verbs import attachments
from volume.verbs import images
from volume.verbs import manage
from volume.verbs import snapshots
from volume.verbs import volumes

MIB = model.MIB
SIZE = 4 * MIB
CONNECTOR = {'host': 'compute-1', 'ip': '192.0.2.1'}
OTHER = {'host': 'compute-2', 'ip': '192.0.2.2'}


@functools.cache
def pattern(letter: str, offset: int = MIB) -> bytes:
    """Return a volume's bytes: zeros but for one MiB of a letter."""
    return (
        bytes(offset) + letter.encode() * MIB + bytes(SIZE - offset - MIB)
    )


class Scenario(abc.ABC):
    """One volume ``v`` that holds ``a``; nothing is done to it."""

    needs: frozenset[str] = frozenset()
    exporter: str | None = None

    def __init__(self, world: World) -> None:
        self.world = world
        self.core = world.core

    def prepare(self) -> None:
        self.v = self.create(size_bytes=SIZE)
        self.world.write(self.v, MIB, b'a' * MIB)

    @abc.abstractmethod
    def act(self) -> None:
        """Do what faults are to meet."""

    def verify(self) -> None:
        self.holds(self.v, pattern('a'))

    # Words for scenarios.

    def create(self, **wish: Any) -> str:
        return volumes.create(
            self.world.core, CALLER, volumes.NewVolume(**wish)
        ).id

    def snap(self, volume_id: str, **wish: Any) -> str:
        return snapshots.create(
            self.world.core, CALLER,
            snapshots.NewSnapshot(volume_id, force=True, **wish),
        ).id

    def status(self, volume_id: str) -> str | None:
        row = self.world.live(models.Volume).get(volume_id)
        return row.status if row else None

    def holds(self, volume_id: str, *allowed: bytes) -> None:
        """Check the bytes of a volume that must be there, available."""
        status = self.status(volume_id)
        assert status in ('available', 'in-use'), (volume_id, status)
        found = self.world.content(self.world.noun(volume_id))
        assert found in allowed, (
            f'volume {volume_id} holds {summary(found)}, not one of '
            f'{[summary(each) for each in allowed]}'
        )

    def holds_if_there(self, volume_id: str, *allowed: bytes) -> None:
        if self.status(volume_id) == 'available':
            self.holds(volume_id, *allowed)

    def snapshot_holds(self, snapshot_id: str, expected: bytes) -> None:
        row = self.world.live(models.Snapshot)[snapshot_id]
        assert row.status == 'available', row.status
        found = self.world.content(self.world.snapshot_noun(snapshot_id))
        assert found == expected, summary(found)


def summary(data: bytes) -> str:
    letters = ''.join(
        chr(data[at]) if data[at] else '.' for at in range(0, len(data), MIB)
    )
    return f'{len(data)} bytes {letters}'


class Create(Scenario):
    def act(self) -> None:
        self.new = ids.new()
        self.create(id=self.new, size_bytes=SIZE)

    def verify(self) -> None:
        super().verify()
        self.holds_if_there(self.new, bytes(SIZE))


class CreateFromImage(Create):
    format = 'raw'

    def prepare(self) -> None:
        super().prepare()
        self.path = os.path.join(self.world.images, 'image.raw')
        with open(self.path, 'wb') as f:
            f.write(pattern('i'))

    def act(self) -> None:
        self.new = ids.new()
        self.create(id=self.new, size_bytes=SIZE, image={
            'url': f'file://{self.path}', 'format': self.format,
        })

    def verify(self) -> None:
        Scenario.verify(self)
        self.holds_if_there(self.new, pattern('i'))


class CreateFromQcow2(CreateFromImage):
    format = 'qcow2'

    def prepare(self) -> None:
        super().prepare()
        target = os.path.join(self.world.images, 'image.qcow2')
        self.world.node.run(
            'qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', self.path,
            target,
        )
        self.path = target


class CloneVolume(Create):
    def act(self) -> None:
        self.new = ids.new()
        self.create(id=self.new, source_volume_id=self.v, size_bytes=None)

    def verify(self) -> None:
        Scenario.verify(self)
        self.holds_if_there(self.new, pattern('a'))


class CloneSnapshot(Create):
    needs = frozenset({'Snapshots'})

    def prepare(self) -> None:
        super().prepare()
        self.s = self.snap(self.v)
        self.world.write(self.v, MIB, b'b' * MIB)

    def act(self) -> None:
        self.new = ids.new()
        self.create(id=self.new, snapshot_id=self.s)

    def verify(self) -> None:
        self.holds(self.v, pattern('b'))
        self.snapshot_holds(self.s, pattern('a'))
        self.holds_if_there(self.new, pattern('a'))


class Delete(Scenario):
    def prepare(self) -> None:
        super().prepare()
        self.w = self.create(size_bytes=SIZE)

    def act(self) -> None:
        volumes.delete(self.world.core, CALLER, self.w)

    def verify(self) -> None:
        super().verify()
        assert self.status(self.w) in (None, 'available', 'error_deleting')


class DeleteCascade(Scenario):
    needs = frozenset({'Snapshots'})

    def prepare(self) -> None:
        super().prepare()
        self.w = self.create(size_bytes=SIZE)
        self.world.write(self.w, 0, b'w' * MIB)
        self.snap(self.w)
        self.snap(self.w)

    def act(self) -> None:
        volumes.delete(self.world.core, CALLER, self.w, cascade=True)


class DeleteOrigin(Scenario):
    """The origin of a clone goes; the clone keeps its bytes."""

    def prepare(self) -> None:
        super().prepare()
        self.w = self.create(source_volume_id=self.v)

    def act(self) -> None:
        volumes.delete(self.world.core, CALLER, self.v)

    def verify(self) -> None:
        self.holds(self.w, pattern('a'))
        self.holds_if_there(self.v, pattern('a'))


class Extend(Scenario):
    needs = frozenset({'Resize'})

    def act(self) -> None:
        volumes.extend(self.world.core, CALLER, self.v, 2 * SIZE)

    def verify(self) -> None:
        row = self.world.live(models.Volume)[self.v]
        assert row.status == 'available', row.status
        found = self.world.content(self.world.noun(self.v))
        assert found[:SIZE] == pattern('a'), summary(found)
        assert found[SIZE:] == bytes(row.size_bytes - SIZE), summary(found)


class Snapshot(Scenario):
    needs = frozenset({'Snapshots'})

    def act(self) -> None:
        self.s = ids.new()
        self.snap(self.v, id=self.s)

    def verify(self) -> None:
        super().verify()
        row = self.world.live(models.Snapshot).get(self.s)
        if row and row.status == 'available':
            self.snapshot_holds(self.s, pattern('a'))
            self.world.write(self.v, MIB, b'b' * MIB)
            self.snapshot_holds(self.s, pattern('a'))
            self.holds(self.v, pattern('b'))


class DeleteSnapshot(Scenario):
    needs = frozenset({'Snapshots'})

    def prepare(self) -> None:
        super().prepare()
        self.s = self.snap(self.v)
        self.world.write(self.v, 2 * MIB, b'b' * MIB)
        self.t = self.snap(self.v)
        self.now_holds = self.world.content(self.world.noun(self.v))

    def act(self) -> None:
        snapshots.delete(self.world.core, CALLER, self.s)

    def verify(self) -> None:
        self.holds(self.v, self.now_holds)
        self.snapshot_holds(self.t, self.now_holds)


class Revert(Scenario):
    needs = frozenset({'Snapshots'})

    def prepare(self) -> None:
        super().prepare()
        self.s = self.snap(self.v)
        self.world.write(self.v, MIB, b'b' * MIB)

    def act(self) -> None:
        volumes.revert(self.world.core, CALLER, self.v, self.s)

    def verify(self) -> None:
        self.holds(self.v, pattern('a'), pattern('b'))
        self.snapshot_holds(self.s, pattern('a'))


class Attach(Scenario):
    connector = CONNECTOR

    def act(self) -> None:
        attachments.reserve(self.world.core, CALLER, self.v)
        self.info = attachments.connect(
            self.world.core, CALLER, self.v, self.connector
        )
        attachments.attach(
            self.world.core, CALLER, self.v, ids.new(), '/dev/vdb'
        )

    def verify(self) -> None:
        # What a compute service does after a call has failed.
        try:
            attachments.disconnect(
                self.world.core, CALLER, self.v, self.connector
            )
        except errors.NotFound:
            pass
        attachments.unreserve(self.world.core, CALLER, self.v)
        row = self.world.live(models.Volume)[self.v]
        if row.status == 'in-use':
            attachments.detach(self.world.core, CALLER, self.v, force=True)
        self.holds(self.v, pattern('a'))
        assert not self.world.all(models.Attachment)


class Detach(Scenario):
    def prepare(self) -> None:
        super().prepare()
        attachments.reserve(self.world.core, CALLER, self.v)
        attachments.connect(self.world.core, CALLER, self.v, CONNECTOR)
        attachments.attach(
            self.world.core, CALLER, self.v, ids.new(), '/dev/vdb'
        )
        attachments.begin_detaching(self.world.core, CALLER, self.v)

    def act(self) -> None:
        attachments.disconnect(self.world.core, CALLER, self.v, CONNECTOR)
        attachments.detach(self.world.core, CALLER, self.v)

    def verify(self) -> None:
        row = self.world.live(models.Volume)[self.v]
        if row.status != 'available':
            attachments.detach(self.world.core, CALLER, self.v, force=True)
        self.holds(self.v, pattern('a'))
        assert not self.world.all(models.Attachment)


class AttachApi(Attach):
    """The newer API's way: one call that reserves and connects."""

    def act(self) -> None:
        made = attachments.create(
            self.world.core, CALLER, self.v, ids.new(), CONNECTOR
        )
        attachments.complete(self.world.core, CALLER, made.id)

    def verify(self) -> None:
        for row in self.world.all(models.Attachment):
            attachments.delete(self.world.core, CALLER, row.id)
        if self.status(self.v) == 'attaching':
            attachments.unreserve(self.world.core, CALLER, self.v)
        self.holds(self.v, pattern('a'))


class Upload(Scenario):
    def act(self) -> None:
        self.path = os.path.join(self.world.images, 'out.raw')
        images.upload(
            self.world.core, CALLER, self.v, f'file://{self.path}'
        )

    def verify(self) -> None:
        super().verify()
        if os.path.exists(self.path):
            with open(self.path, 'rb') as f:
                assert f.read() == pattern('a')
        left = set(os.listdir(self.world.images)) - {'out.raw'}
        assert not left, f'drafts are left: {left}'


class UploadAttached(Upload):
    """A host writes on; the image holds the moment that was asked for."""

    exporter = 'nbd'

    def prepare(self) -> None:
        super().prepare()
        attachments.reserve(self.world.core, CALLER, self.v)
        attachments.connect(self.world.core, CALLER, self.v, CONNECTOR)
        attachments.attach(
            self.world.core, CALLER, self.v, ids.new(), '/dev/vdb'
        )

    def act(self) -> None:
        self.path = os.path.join(self.world.images, 'out.raw')
        images.upload(
            self.world.core, CALLER, self.v, f'file://{self.path}',
            force=True,
        )


class Adopt(Scenario):
    needs = frozenset({'Adopt'})

    def prepare(self) -> None:
        super().prepare()
        self.w = self.create(size_bytes=SIZE)
        self.world.write(self.w, MIB, b'w' * MIB)
        manage.disown(self.world.core, CALLER, self.w)
        self.handle = next(
            found.handle
            for found in self.world.driver().scan(self.world.pool())
            if found.id is None
        )

    def act(self) -> None:
        self.new = ids.new()
        manage.adopt(
            self.world.core, CALLER, backend='b', pool=self.world.pool(),
            handle=self.handle, id=self.new,
        )

    def verify(self) -> None:
        super().verify()
        if self.status(self.new) == 'available':
            self.holds(self.new, pattern('w'))
        else:  # it is as foreign as it was
            foreign = [
                found
                for found in self.world.driver().scan(self.world.pool())
                if found.id is None
            ]
            assert len(foreign) == 1, foreign


class Disown(Scenario):
    needs = frozenset({'Adopt'})

    def act(self) -> None:
        manage.disown(self.world.core, CALLER, self.v)

    def verify(self) -> None:
        if self.status(self.v) is None:
            found = [
                each for each in self.world.driver().scan(self.world.pool())
                if each.id is None
            ]
            assert len(found) == 1, found
        else:
            super().verify()


class Flatten(Scenario):
    needs = frozenset({'Flatten'})

    def prepare(self) -> None:
        super().prepare()
        self.w = self.create(source_volume_id=self.v)

    def act(self) -> None:
        volumes.flatten(self.world.core, CALLER, self.w)

    def verify(self) -> None:
        super().verify()
        self.holds(self.w, pattern('a'))


SCENARIOS = (
    Create, CreateFromImage, CreateFromQcow2, CloneVolume, CloneSnapshot,
    Delete, DeleteCascade, DeleteOrigin, Extend, Snapshot, DeleteSnapshot,
    Revert, Attach, AttachApi, Detach, Upload, UploadAttached, Adopt,
    Disown, Flatten,
)
