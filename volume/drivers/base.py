# SPDX-License-Identifier: Apache-2.0
"""The contract of a driver: eight methods, and features to choose from.

Rules that hold for every method:

1. *Repeat is safe.* ``volume.id`` is minted before the first call; a driver
   derives its name from it. ``create`` of what exists is the same handle;
   with another size, ``Conflict``. ``delete``, ``unmap``, ``revoke`` of what
   is gone succeed.
2. *Done means durable*: what a method has returned survives a power cut.
3. *Errors are those of* ``volume.errors``. What escapes otherwise is a bug,
   is logged as one, and counts as ``Unknown``.
4. *Volumes are raw, guest-visible bytes, all zero when created*; sizes are
   bytes. A volume is at least as large as asked; ``inspect`` says how large.
5. *Calls on different volumes may run at once; calls on one volume never
   do*: the journal holds a lease. What volumes share inside the driver (a
   tree of layers) the driver locks itself.
6. *The world is reached through* ``self.node``, or one client object made in
   ``__init__`` with its transport injectable. The fault suite relies on it.
7. *No public name outside the contract.*
8. *A pool may have less than its driver.* The class declares what the driver
   can do at best; ``Pool.features`` says what this pool can.

Features are interfaces without bodies. A driver lists them as bases, and
``features()`` asks. A feature is always an acceleration or an addition; the
flow that uses it owns the fallback.
"""

from __future__ import annotations

import abc
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from oslo_config import cfg

from volume import model
from volume.node import Node

VERSION = '1.0'


class Reader(io.RawIOBase):
    """A volume's or snapshot's bytes: raw, seekable, with ``readinto``.

    A reader sees what was durable when it was opened. Reading at the end
    gives no bytes.
    """

    size_bytes: int

    @abc.abstractmethod
    def extents(self) -> Iterator[model.Extent]:
        """Yield runs in ascending order that cover ``size_bytes``.

        A run that is not zero may still hold zeros; a run that is zero
        never holds anything else.
        """


class Writer(io.RawIOBase):
    """A volume's bytes to be filled: raw, seekable, with ``write``.

    What is skipped stays as it was: zero in a new volume. Offsets ascend; a
    driver may refuse to go back with ``Unsupported``. Leaving the context
    without ``commit()`` means that the volume is not filled, and the caller
    must fill it again or delete it.
    """

    size_bytes: int

    def expect(self, extents: Iterable[model.Extent]) -> None:
        """Hear, before the first write, what will be written.

        The runs ascend and cover ``size_bytes``. Nothing will be written
        where they are zero; and unless the volume is new, nothing will be
        skipped: what is not written will be made zero. A driver that sends
        bytes in one stream can then leave out what is empty. Whoever does
        not know calls nothing; a driver need not listen, as here.
        """

    @abc.abstractmethod
    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a run read as zeros, without sending them if possible."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Make all that was written durable.

        Also what another process (``qemu-img``) had written into the volume
        before it was opened here.
        """


class Driver(abc.ABC):
    """One storage system with one or more pools."""

    options: ClassVar[tuple[cfg.Opt, ...]] = ()
    may_be_remote: ClassVar[bool] = False
    """Whether the node may be another machine: all that the driver does is
    done by methods of its node, and nothing by a path or a process here."""
    may_format: bool = True
    """Whether ``check`` may format storage; where somebody only wants to
    know how things are (``volume-manage check``) it may not."""

    @abc.abstractmethod
    def __init__(self, conf: Any, node: Node) -> None:
        """Keep the option group and the node; touch nothing yet."""

    @abc.abstractmethod
    def check(self) -> None:
        """Prepare for work, or say why the backend cannot.

        :raises Invalid: an option is wrong
        :raises Unavailable: the storage is not reachable now
        """

    @abc.abstractmethod
    def pools(self) -> list[model.Pool]:
        """Return every pool with its capacity and features of this moment."""

    @abc.abstractmethod
    def create(self, volume: model.Volume) -> str:
        """Make an all-zero volume and return its handle.

        :raises Conflict: it exists with another size
        :raises NoSpace: the pool cannot hold it
        """

    @abc.abstractmethod
    def delete(self, volume: model.Volume) -> None:
        """Remove the volume; return at once if it is gone.

        Clones made from it, and their bytes, stay whole.

        :raises Busy: it is in use, or has snapshots of its own
        """

    @abc.abstractmethod
    def inspect(self, volume: model.Volume) -> model.Found:
        """Say what is stored under the volume's name.

        :raises NotFound: nothing is; never guessed from a failing command
        """

    @abc.abstractmethod
    def scan(self, pool: str) -> Iterator[model.Found]:
        """Yield every volume and snapshot of a pool, ours or not."""

    @abc.abstractmethod
    def reader(
        self, source: model.Volume | model.Snapshot
    ) -> AbstractContextManager[Reader]:
        """Open the bytes of a volume or snapshot for reading.

        :raises NotFound: there is no such volume or snapshot
        """

    @abc.abstractmethod
    def writer(self, volume: model.Volume) -> AbstractContextManager[Writer]:
        """Open a volume that no host uses, to fill it.

        :raises NotFound: there is no such volume
        :raises Busy: a host uses it
        """


class LocalDevice(abc.ABC):
    """A volume can be a path on this node.

    Have this if the storage is local, or if this node can attach it.
    """

    forms: frozenset[model.Form] = frozenset(model.Form)
    """In which forms the volumes that it makes come, as the options say."""

    @abc.abstractmethod
    def map(
        self, volume: model.Volume, access: model.Access
    ) -> model.Device:
        """Make the path appear and return it; the same path if repeated."""

    @abc.abstractmethod
    def unmap(self, volume: model.Volume) -> None:
        """Take the path away; return at once if it is gone.

        :raises Busy: something has it open
        """


class NativeAccess(abc.ABC):
    """Hosts reach the storage themselves, without this node.

    Have this if the storage speaks a network protocol that hosts know.
    """

    abilities: ClassVar[model.Abilities] = model.Abilities()

    @abc.abstractmethod
    def grant(
        self, volume: model.Volume, host: model.Host, access: model.Access
    ) -> model.Connection:
        """Admit a host and say how it connects; the same if repeated."""

    @abc.abstractmethod
    def revoke(self, volume: model.Volume, host: model.Host) -> None:
        """Forbid the host, end its sessions, and prove that none is left."""


class Snapshots(abc.ABC):
    """A volume's bytes of one moment can be kept.

    Have this if it costs less than copying the volume.
    """

    @abc.abstractmethod
    def snapshot(self, snapshot: model.Snapshot) -> str:
        """Take the snapshot and return its handle; the same if repeated.

        What the volume held before the first call is kept; a repeated call
        never takes a later moment.
        """

    @abc.abstractmethod
    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        """Remove the snapshot; return at once if it is gone.

        Order is free: volumes cloned from it and other snapshots of the
        volume stay whole.
        """

    def before_overwrite(self, volume: model.Volume) -> None:
        """Have room for what snapshots keep when all of a volume changes.

        Called before its bytes are copied back from one of them, which no
        driver with ``Revert`` needs; nor does one whose snapshots take room
        from the whole pool, as here.

        :raises NoSpace: there is none; nothing has changed
        """


class Clone(abc.ABC):
    """A volume can start with another's bytes.

    Have this if it costs less than copying them.
    """

    @abc.abstractmethod
    def clone(
        self, source: model.Volume | model.Snapshot, volume: model.Volume
    ) -> str:
        """Make the volume from the source's bytes and return its handle.

        The volume may be larger than its source; what is beyond reads as
        zeros. Repeated, it is the same volume.

        :raises Conflict: the volume exists with another size
        :raises Invalid: the volume is smaller than its source
        """


class Revert(abc.ABC):
    """A volume can go back to one of its snapshots.

    Have this if it costs less than copying the snapshot.
    """

    @abc.abstractmethod
    def revert(self, snapshot: model.Snapshot) -> str:
        """Give the volume the snapshot's bytes; return its handle.

        The handle may be new. The volume keeps its size: what is beyond the
        snapshot reads as zeros. Every snapshot stays.

        One that fails, or dies, leaves the volume as it was or as it is to
        be. Where it can leave a mixture, ``inspect`` says ``is_torn`` from
        before the first byte changes until a call has come to its end.

        :raises Busy: a host uses the volume
        """


class Resize(abc.ABC):
    """A volume can grow in place.

    Have this if growing costs less than copying the volume.
    """

    @abc.abstractmethod
    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        """Grow it; return at once if it has that size. New bytes are zero.

        :raises Invalid: it is larger already
        :raises Busy: a host uses it, and it cannot grow under use
        """


class BlockNode(abc.ABC):
    """QEMU can open a volume by itself.

    Have this if QEMU has a block driver for the storage.
    """

    @abc.abstractmethod
    def blocknode(
        self, source: model.Volume | model.Snapshot
    ) -> Mapping[str, Any]:
        """Return the QAPI ``BlockdevOptions`` of it, every format named."""


class Extents(abc.ABC):
    """The storage knows which bytes were written.

    Have this if asking costs less than reading the volume.
    """

    @abc.abstractmethod
    def extents(
        self,
        source: model.Volume | model.Snapshot,
        since: model.Snapshot | None,
    ) -> Iterator[model.Extent]:
        """Yield what is not zero, or what has changed since a snapshot."""


class Adopt(abc.ABC):
    """A volume that is on the storage already can become ours."""

    @abc.abstractmethod
    def adopt(self, handle: str, volume: model.Volume) -> str:
        """Take the foreign thing under the volume's name; return its handle.

        :raises NotFound: there is no such thing in the pool
        :raises Conflict: it is ours already, under another id
        :raises Invalid: it can never be a volume of ours, and why
        """

    @abc.abstractmethod
    def disown(self, volume: model.Volume) -> None:
        """Let go of the volume, bytes untouched, under a foreign name.

        It can be adopted again by the handle that ``scan`` then shows;
        return at once if it is no longer ours.
        """


class Move(abc.ABC):
    """A volume can move to another pool of the backend."""

    @abc.abstractmethod
    def move(self, volume: model.Volume, pool: str) -> str:
        """Move the volume and return its handle."""


class Limits(abc.ABC):
    """How fast a volume may be used can be bounded."""

    @abc.abstractmethod
    def limit(self, volume: model.Volume, limits: model.IoLimits) -> None:
        """Set the volume's limits, also while it is in use."""


class PoolAdmin(abc.ABC):
    """Pools can be made and let go of."""

    @abc.abstractmethod
    def create_pool(
        self, name: str, settings: Mapping[str, str]
    ) -> model.Pool:
        """Make a pool; the same pool if repeated."""

    @abc.abstractmethod
    def forget_pool(self, name: str) -> None:
        """Let go of a pool, what it holds untouched."""


class GroupSnapshot(abc.ABC):
    """Several volumes can be kept as of one moment."""

    @abc.abstractmethod
    def snapshot_group(
        self, snapshots: Sequence[model.Snapshot]
    ) -> list[str]:
        """Take all snapshots of one moment, or none; return handles."""


class Describe(abc.ABC):
    """A note can stand beside a volume, to rebuild a lost database from."""

    @abc.abstractmethod
    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        """Replace the volume's note: names and sizes, never a secret."""


class Flatten(abc.ABC):
    """A volume can be freed of the layers that it shares with others.

    Have this if clones or snapshots lengthen the way to a volume's bytes.
    """

    @abc.abstractmethod
    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        """Copy what is shared into the volume; return its handle.

        ``watch`` is called with the percentage done; what it raises ends
        the copy, and the volume is as it was.

        :raises Busy: a host uses the volume, or it has snapshots
        """


class Upkeep(abc.ABC):
    """The storage gets better by work in the background.

    Have this if deleting or cloning leaves something to be merged or swept.
    """

    @abc.abstractmethod
    def upkeep(self, pool: str) -> bool:
        """Do one bounded, repeatable piece of it; say if more is left.

        May run beside any other call, and takes the driver's own locks.
        """


FEATURES: tuple[type, ...] = (
    Adopt, BlockNode, Clone, Describe, Extents, Flatten, GroupSnapshot,
    Limits, LocalDevice, Move, NativeAccess, PoolAdmin, Resize, Revert,
    Snapshots, Upkeep,
)


def features(driver: Driver | type[Driver]) -> frozenset[str]:
    """Return the names of the features a driver declares."""
    cls = driver if isinstance(driver, type) else type(driver)
    return frozenset(f.__name__ for f in FEATURES if issubclass(cls, f))
