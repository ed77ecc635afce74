# SPDX-License-Identifier: Apache-2.0
"""The nouns that drivers, exporters and connectors share.

All are frozen and small. Sizes and offsets are bytes; a GiB is known to
``api/views.py`` alone. What the database keeps beside them (names, owners,
states) is no driver's business and lives in ``db/models.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

GIB = 1 << 30
MIB = 1 << 20
SECTOR_BYTES = 512


class Access(enum.Enum):
    """What a host may do with a volume."""

    READ = 'ro'
    WRITE = 'rw'


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """A block device in a pool.

    ``id`` is a UUID in lower case, minted by the caller before the first
    call; ``handle`` is the driver's own name for it, empty before
    ``create`` has returned. ``note`` is what ``Describe.describe`` will be
    told right after ``create``: a driver may write it with the volume.
    """

    id: str
    pool: str
    size_bytes: int
    handle: str = ''
    note: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False, compare=False, repr=False
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What a volume held at one moment; ``size_bytes`` is of that moment."""

    id: str
    volume: Volume
    size_bytes: int
    handle: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """A place with capacity, as the driver sees it now.

    ``features`` are the names of those contract features that this pool
    has; a pool may have fewer than its driver's class declares.
    ``hidden_bytes`` is what the pool stores for nobody by name (a layer
    whose snapshot was deleted and whose children live on).
    ``device`` names the physical store: pools of one device share its free
    bytes.
    """

    name: str
    total_bytes: int
    free_bytes: int
    thin: bool
    features: frozenset[str] = frozenset()
    granularity_bytes: int = SECTOR_BYTES
    max_volume_bytes: int = (1 << 63) - SECTOR_BYTES
    hidden_bytes: int = 0
    device: str = ''


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A thing on the storage: a volume, or a snapshot of one.

    ``id`` is ours, read back from the name or the tag that the driver gave
    it; ``None`` if it is foreign. ``snapshot_of`` is the id of the volume
    whose snapshot this is. ``sidecar`` carries what stands beside the
    volume to rebuild a lost database from (no secrets). ``hosts`` are those
    that were let in, where the storage keeps that itself. ``is_torn`` says
    that a revert of the volume was begun and has not ended: what it holds
    may be a mixture, and another revert makes it whole.
    """

    handle: str
    size_bytes: int
    id: str | None = None
    snapshot_of: str | None = None
    sidecar: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hosts: tuple[Host, ...] = ()
    is_torn: bool = False


class Form(enum.Enum):
    """What a path of this node holds a volume in."""

    BLOCK = 'raw block devices'
    FILE = 'raw files'
    IMAGE = 'images of another format'


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A path on this node through which a volume can be read and written.

    ``format`` is what the path holds (``raw`` for a block device); nobody
    ever probes it.
    """

    path: str
    is_block: bool
    format: str = 'raw'

    @property
    def form(self) -> Form:
        if self.format != 'raw':
            return Form.IMAGE
        return Form.BLOCK if self.is_block else Form.FILE


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Who attaches a volume.

    ``properties`` is what else its connectors say of it, each key with the
    protocol's name in front (``xensm_pool``): short texts, no secret.
    """

    name: str
    addresses: tuple[str, ...] = ()
    iqn: str | None = None
    nqn: str | None = None
    properties: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Connection:
    """How a host reaches an exported volume.

    ``protocol`` is the ``driver_volume_type`` of the compute side
    (``nbd``, ``local``, ``iscsi`` …), ``fields`` its data; JSON values
    only. Two kinds of further fields are not for everybody.
    ``credentials`` are good for this attachment alone (a CHAP password):
    they go to who connects, by RPC or REST, and stand encrypted in the
    database. ``secrets`` are the storage's own, and nobody may keep them:
    they go to the host in the reply to its RPC, and neither into the
    database nor through REST.
    """

    protocol: str
    fields: Mapping[str, object]
    secrets: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False, repr=False
    )
    credentials: Mapping[str, str] = dataclasses.field(
        default_factory=dict, hash=False, repr=False
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Abilities:
    """What a way for hosts to reach volumes can do at best.

    ``auth`` are the ways in which a host is known: ``chap``,
    ``mutual-chap``, ``initiator`` (a name that it gives), ``address``,
    ``mac``, ``path`` (it is on this machine), ``cephx``, ``pool`` (it is a
    member of the storage's own pool). ``ends_sessions``: the end of an
    access ends what is open; otherwise it is Busy until that is closed.
    ``twice_per_host``: a host can have a volume by two attachments at a time.
    """

    auth: tuple[str, ...] = ()
    ends_sessions: bool = True
    read_only: bool = True
    multi_attach: bool = True
    twice_per_host: bool = True
    multi_portal: bool = False
    online_resize: bool = False
    remote_node: bool = False

    def names(self) -> frozenset[str]:
        """Return what pools tell of it, beside the driver's features."""
        return frozenset(
            f'export:{field.name}' for field in dataclasses.fields(self)
            if getattr(self, field.name) is True
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes; ``is_zero`` means that it reads as zeros."""

    offset_bytes: int
    length_bytes: int
    is_zero: bool


@dataclasses.dataclass(frozen=True, slots=True)
class IoLimits:
    """How fast a volume may be used; ``None`` is no limit."""

    iops: int | None = None
    bytes_per_s: int | None = None
