# SPDX-License-Identifier: Apache-2.0
"""What a storage manager is to the calls: one per SR, with its disks.

A manager knows files and nothing of rows: it answers with ``Info``, and the
calls (``calls/sr.py``, ``calls/vdi.py``) write what they are told into the
pool's rows. It raises ``Failure`` as the real driver does, by
``smtypes.fault``. What a type cannot do at all it leaves as it is here.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar, TYPE_CHECKING

from volume.sim.xapi.published.smtypes import fault
from volume.sim.xapi.sm.taps import Taps

if TYPE_CHECKING:
    from volume.sim.xapi.disk.disks import Disk
    from volume.sim.xapi.disk.gc import Policy
    from volume.sim.xapi.pool import Pool
    from volume.sim.xapi.world import World


class Unimplemented(Exception):
    """A driver's fault 38: what the server makes of it depends on the call.

    ``UNIMPLEMENTED_IN_SM_BACKEND`` for a snapshot, a slow copy for a clone,
    ``INTERNAL_ERROR`` for the rest.
    """


@dataclasses.dataclass(slots=True)
class Info:
    """A VDI as the driver sees it; ``snapshot_of`` is a uuid."""

    uuid: str
    location: str
    size_bytes: int
    used_bytes: int
    sm_config: dict[str, str] = dataclasses.field(default_factory=dict)
    managed: bool = True
    read_only: bool = False
    name: str = ''
    description: str = ''
    is_a_snapshot: bool = False
    snapshot_of: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What SR.physical_size and its two fellows say."""

    physical_size: int
    physical_utilisation: int
    virtual_allocation: int


@dataclasses.dataclass(slots=True)
class Change:
    """Which VDIs, by uuid, a step of the collector changed or removed."""

    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


class Manager(abc.ABC):
    """The driver of one SR. Calls on one SR come one after another.

    Only ``open`` and what it gives are used beside them: a guest writes
    while a snapshot is made, which pauses it (``taps``).
    """

    family: ClassVar[str] = ''  # 'file', 'lvm', 'lun', 'array'

    def __init__(
        self,
        pool: Pool,
        kind: str,
        sr_uuid: str,
        device_config: dict[str, str],
        sm_config: dict[str, str],
        host_ref: str = '',
    ) -> None:
        """Stand for an SR; nothing is touched yet.

        ``host_ref`` is the host that acts: the master for a shared SR, the
        one that has the disk for a local one. Secrets in ``device_config``
        are in the clear again (``chappassword``, not ``_secret``).
        """
        self.pool = pool
        self.kind = kind
        self.sr_uuid = sr_uuid
        self.device_config = device_config
        self.sm_config = sm_config
        self.host_ref = host_ref
        self.attached: set[str] = set()  # host refs
        # Held by whoever reads the files to write the rows from it.
        self.lock = threading.RLock()
        self.taps = Taps(self.open_disk)

    @property
    def world(self) -> World:
        return self.pool.world

    @property
    def features(self) -> frozenset[str]:
        """What the profile says that this type can do."""
        return frozenset(self.pool.profile.sm[self.kind].features)

    def host_uuid(self, host_ref: str = '') -> str:
        """Return the uuid of a host; without a ref that of who acts."""
        return str(self.pool.rows.field(
            'host', host_ref or self.host_ref, 'uuid'))

    # -- the repository ---------------------------------------------------

    @abc.abstractmethod
    def create(self) -> None:
        """Format; may write into sm_config and device_config."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Remove what ``create`` made; attached for the time of it."""

    @abc.abstractmethod
    def attach(self, host_ref: str) -> None:
        """Plug on a host: an error if the storage is not there."""

    @abc.abstractmethod
    def detach(self, host_ref: str) -> None:
        """Unplug on a host."""

    def close(self) -> None:
        """Let go of all files at the end of the server; all stays plugged."""
        self.taps.close()

    @abc.abstractmethod
    def scan(self) -> list[Info]:
        """Return every VDI, hidden parents as well (``managed=False``)."""

    @abc.abstractmethod
    def sizes(self) -> Sizes:
        """Return the room of the SR; cheap, it follows every operation."""

    # -- its disks --------------------------------------------------------

    def make(
        self, uuid: str, size_bytes: int, sm_config: dict[str, str],
        name: str = '',
    ) -> Info:
        """Make an empty VDI; the answer may have another uuid (hba)."""
        raise Unimplemented('VDI create')

    def remove(self, uuid: str) -> None:
        """Remove a leaf; what only it needed goes with the collector."""
        raise Unimplemented('VDI delete')

    def resize(self, uuid: str, size_bytes: int) -> Info:
        """Grow a VDI that nobody has open."""
        raise Unimplemented('VDI resize')

    def snapshot(self, uuid: str, new_uuid: str) -> list[Info]:
        """Split a VDI: the new leaf first, then who else changed."""
        raise Unimplemented('VDI snapshot')

    def clone(self, uuid: str, new_uuid: str) -> list[Info]:
        """As ``snapshot``; the difference is in the row alone."""
        raise Unimplemented('VDI clone')

    def revert(self, uuid: str, snapshot_uuid: str) -> list[Info]:
        """Give a VDI the bytes of its snapshot; return who changed."""
        raise Unimplemented('VDI revert')

    def introduce(
        self, uuid: str, location: str, sm_config: dict[str, str],
    ) -> Info:
        """Find a VDI that is there already."""
        raise Unimplemented('VDI introduce')

    def rename(self, uuid: str, name: str, description: str = '') -> None:
        """Keep a VDI's name beside its bytes, if the type does that."""

    def chain_depth(self, uuid: str) -> int:
        """Return how many files a VDI is read from."""
        return 1

    def changed(self, uuid_from: str, uuid_to: str) -> bytes:
        """Return the bitmap of what differs: 64 KiB a bit, MSB first."""
        raise fault(460, 'Source and target VDI are unrelated')

    def collect(
        self, aborted: Callable[[], bool], policy: Policy,
    ) -> Iterator[Change]:
        """Do one pass of the collector, a step at a time.

        Each step is whole by itself; who runs it writes what ``inspect``
        then says into the rows. ``aborted()`` is asked within long steps.
        """
        return iter(())

    def inspect(self, uuid: str) -> Info | None:
        """Return what a VDI is now, None if it is not there."""
        return None

    def free_bytes(self) -> int:
        """Return how much more may be stored."""
        sizes = self.sizes()
        return max(0, sizes.physical_size - sizes.physical_utilisation)

    def needs_collect(self, policy: Policy) -> bool:
        """Whether a pass would find something to do."""
        return False

    # -- their bytes ------------------------------------------------------

    @abc.abstractmethod
    def open_disk(self, uuid: str, writable: bool) -> Disk:
        """Open the files of a VDI; called by ``taps`` alone."""

    def open(self, uuid: str, writable: bool = False) -> Disk:
        """Open a VDI: what it gives outlives snapshots and coalescing."""
        self.assert_online()
        return self.taps.open(uuid, writable)

    # -- failures ---------------------------------------------------------

    def assert_online(self) -> None:
        """Refuse while the test has put the storage out of reach.

        :raises Failure: SR_BACKEND_FAILURE_47
        """
        if self.pool.faults.is_sr_offline(self.sr_uuid):
            raise fault(
                47, f'no such volume group or directory: {self.sr_uuid}')
