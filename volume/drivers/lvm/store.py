# SPDX-License-Identifier: Apache-2.0
"""A volume group as a store of volumes: what thick and thin do alike.

Each method looks once at all that bears the ids in question, and goes on
from what it finds: a predecessor may have died after any command.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from volume import errors
from volume import model
from volume.drivers import base
from volume.drivers import generic
from volume.drivers.lvm import names
from volume.drivers.lvm.groups import EVERYTHING
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.groups import refuse_dependents
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Vg

LOG = logging.getLogger(__name__)

EXTENTS_MAX = (1 << 32) - 1
DELETED = 'lv_name=~"^deleted-"'  # a selection of reports

Thing = model.Volume | model.Snapshot


class Store(abc.ABC):
    """The volumes of one group."""

    lacks: frozenset[str] = frozenset()
    """Features that the driver has, and this kind has not."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.node = group.node
        self.settings = group.settings
        self.trouble = ''
        """Why no volume is made here now; nothing if one can be."""

    # What differs.

    @abc.abstractmethod
    def check(self, may_format: bool) -> None:
        """Prepare for work, or say why it cannot."""

    @abc.abstractmethod
    def pool(self, features: frozenset[str]) -> model.Pool: ...

    @abc.abstractmethod
    def create(self, volume: model.Volume) -> str: ...

    @abc.abstractmethod
    def delete(self, volume: model.Volume) -> None: ...

    @abc.abstractmethod
    def snapshot(self, snapshot: model.Snapshot) -> str: ...

    @abc.abstractmethod
    def delete_snapshot(self, snapshot: model.Snapshot) -> None: ...

    def before_overwrite(self, volume: model.Volume) -> None:
        """Have room for what snapshots keep when all of a volume changes."""

    @abc.abstractmethod
    def resize(self, volume: model.Volume, size_bytes: int) -> None: ...

    @abc.abstractmethod
    def upkeep(self) -> bool: ...

    @abc.abstractmethod
    def check_kind(self, lv: Lv) -> None:
        """Refuse to adopt what is no volume of this kind."""

    # Looking.

    def inspect(self, volume: model.Volume) -> model.Found:
        return self.found(self.need(self.group.about(volume.id), volume))

    def scan(self) -> Iterator[model.Found]:
        for lv in self.group.look(EVERYTHING).lvs:
            if lv.role in ('volume', 'snap', '') and _is_volume(lv):
                yield self.found(lv)

    def found(self, lv: Lv) -> model.Found:
        return model.Found(
            lv.name, lv.size_bytes, lv.id or None,
            lv.of if lv.role == 'snap' else None,
            names.note_of(lv.tags) if lv.role == 'volume' else {},
        )

    def need(self, vg: Vg, thing: Thing) -> Lv:
        """Return what holds a volume or snapshot.

        :raises NotFound: nothing does
        """
        role = 'volume' if isinstance(thing, model.Volume) else 'snap'
        lv = vg.ours(role, thing.id)
        if lv is None:
            kind = type(thing).__name__.lower()
            raise errors.NotFound(
                f'volume group {vg.name} has no {kind} {thing.id}'
            )
        return lv

    # Bytes.

    def open(self, thing: Thing) -> str:
        """Return the path of what holds a volume or snapshot, ready."""
        lv = self.need(self.group.about(_volume_id(thing), thing.id), thing)
        path = self.group.activate(lv)
        if lv.is_thick_snapshot and not lv.is_active:
            # Whether it was lost is known once its device is there.
            lv = self.need(self.group.about(thing.id), thing)
        if lv.is_invalid:
            raise errors.Corrupt(
                f'snapshot {thing.id} is lost: more has changed since than '
                f'its {lv.stored_bytes} bytes could keep; delete it, and '
                'raise snapshot_percent'
            )
        return path

    @contextlib.contextmanager
    def reader(self, source: Thing) -> Iterator[base.Reader]:
        with generic.file_reader(
            self.node, self.open(source), is_mapped=True
        ) as reader:
            yield reader

    @contextlib.contextmanager
    def writer(self, volume: model.Volume) -> Iterator[base.Writer]:
        lv = self.need(self.group.about(volume.id), volume)
        self.group.refuse_open(lv, 'fill')
        path = self.group.activate(lv)
        with generic.file_writer(
            self.node, path, lv.size_bytes, is_mapped=True
        ) as writer:
            yield writer

    def unmap(self, volume: model.Volume) -> None:
        vg = self.group.about(volume.id)
        lv = vg.ours('volume', volume.id)
        if lv is None or not lv.is_active:
            return
        if any(each.origin == lv.name and each.is_thick_snapshot
               for each in vg.lvs):
            # It goes with its snapshots, and somebody may read those.
            self.group.refuse_open(lv, 'unmap')
            return
        self.group.deactivate(lv)

    # Whose it is.

    def adopt(self, handle: str, volume: model.Volume) -> str:
        if not names.is_plain(handle):
            raise errors.Invalid(
                f'{handle!r:.200} is not the plain name of a logical volume'
            )
        wanted = f'volume-{volume.id}'
        vg = self.group.about(volume.id, name=handle)
        mine, lv = vg.ours('volume', volume.id), vg.named(handle)
        if lv is None or lv is mine:
            # NotFound, unless this is repeated
            self._keep_inactive(self.need(vg, volume))
            return wanted
        if lv.role:
            raise errors.Conflict(f'{handle} is ours already')
        if mine is not None or vg.named(wanted) not in (None, lv):
            raise errors.Conflict(
                f'{wanted} exists: {handle} cannot become it'
            )
        self._check_foreign(vg, lv)
        tag = f'volume:{volume.id}'
        if tag not in lv.tags:
            self.group.change(
                'lvchange', '--addtag', tag, f'{vg.name}/{handle}'
            )
        if handle != wanted:
            self.group.change('lvrename', vg.name, handle, wanted)
        self._keep_inactive(dataclasses.replace(lv, name=wanted))
        return wanted

    def _keep_inactive(self, lv: Lv) -> None:
        """Have it stay inactive when the machine starts."""
        if not lv.is_skipped:
            self.group.change(
                'lvchange', '-ky', f'{self.group.name}/{lv.name}'
            )

    def disown(self, volume: model.Volume) -> None:
        foreign = f'{names.DISOWNED}-{volume.id}'
        vg = self.group.about(volume.id, name=foreign)
        lv, gone = vg.ours('volume', volume.id), vg.named(foreign)
        self._leave_unadopted(vg, volume.id)
        if lv is not None:
            self.refuse_snapshots(vg, volume.id)
            self.group.refuse_open(lv, 'let go of')
            if gone is not None:
                raise errors.Conflict(
                    f'{vg.name}/{foreign} is in the way: adopt or remove it '
                    'first'
                )
            self.group.change('lvrename', vg.name, lv.name, foreign)
            gone = lv
        if gone is not None and f'volume:{volume.id}' in gone.tags:
            old = [f'volume:{volume.id}', *_notes(gone)]
            self.group.change(
                'lvchange', '-kn', *each_option('--deltag', old),
                f'{vg.name}/{foreign}',
            )

    def _leave_unadopted(self, vg: Vg, id: str) -> None:
        """Take our tag from what was not renamed yet when it was adopted."""
        tag, foreign = f'volume:{id}', f'{names.DISOWNED}-{id}'
        for lv in vg.lvs:
            if tag in lv.tags and not lv.role and lv.name != foreign:
                self.group.change(
                    'lvchange', '--deltag', tag, f'{vg.name}/{lv.name}'
                )

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        lv = self.need(self.group.about(volume.id), volume)
        wanted, there = names.note_tags(sidecar), _notes(lv)
        if set(wanted) != set(there):
            old = [tag for tag in there if tag not in wanted]
            new = [tag for tag in wanted if tag not in there]
            self.group.change(
                'lvchange', *each_option('--deltag', old),
                *each_option('--addtag', new),
                f'{self.group.name}/{lv.name}',
            )

    def _check_foreign(self, vg: Vg, lv: Lv) -> None:
        self.check_kind(lv)
        if not _is_volume(lv) or lv.is_thick_snapshot:
            raise errors.Invalid(
                f'{lv.name} is no volume of its own, but '
                f'{"/".join(sorted(lv.roles))} of another'
            )
        self.group.refuse_dependents(lv)
        self.group.refuse_open(lv, 'adopt')

    # What several methods ask.

    def extents(self, vg: Vg, size_bytes: int, what: str) -> int:
        """Return how many extents so many bytes take.

        :raises Invalid: no volume has so many
        """
        if size_bytes <= 0:
            raise errors.Invalid(
                f'{what} has {size_bytes} bytes: a volume has more than none'
            )
        count = -(-size_bytes // vg.extent_bytes)
        if size_bytes > self.max_bytes(vg):
            raise errors.Invalid(
                f'{what} has {size_bytes} bytes: in volume group {vg.name} '
                f'a volume has {self.max_bytes(vg)} at most'
            )
        return count

    def max_bytes(self, vg: Vg) -> int:
        return min(EXTENTS_MAX * vg.extent_bytes, (1 << 63) - vg.extent_bytes)

    def has(self, vg: Vg, volume: model.Volume) -> Lv | None:
        """Return the volume if it is there, with the size asked for.

        :raises Conflict: its name is taken, or its size another
        """
        lv = vg.ours('volume', volume.id)
        if lv is None:
            self.refuse_taken(vg, f'volume-{volume.id}')
            return None
        wanted = self.extents(vg, volume.size_bytes, f'volume {volume.id}')
        if lv.size_bytes != wanted * vg.extent_bytes:
            raise errors.Conflict(
                f'volume {volume.id} exists with {lv.size_bytes} bytes, not '
                f'{volume.size_bytes}'
            )
        return lv

    def refuse_taken(self, vg: Vg, name: str) -> None:
        lv = vg.named(name)
        if lv is not None and not lv.role:
            raise errors.Conflict(
                f'{vg.name}/{name} exists, and is not ours: it bears no tag '
                'of this service; rename it, or manage it'
            )

    def refuse_snapshots(self, vg: Vg, volume_id: str) -> None:
        for lv in vg.lvs:
            if lv.role == 'snap' and lv.of == volume_id:
                raise errors.Busy(
                    f'volume {volume_id} has snapshots: delete them first'
                )
        whole = vg.ours('volume', volume_id)
        if whole is not None:
            self.refuse_strangers(vg, whole)

    def refuse_strangers(self, vg: Vg, lv: Lv) -> None:
        """Refuse to end what somebody else's depends on.

        :raises Busy: something would go together with it
        """
        others = dataclasses.replace(
            vg, lvs=tuple(each for each in vg.lvs if not each.role)
        )
        refuse_dependents(others, lv)

    def refuse_trouble(self, vg: Vg) -> None:
        """Refuse to store anything new in a group that is not well.

        :raises Unavailable: a disk is missing
        :raises NoSpace: its metadata is nearly full
        """
        if vg.missing:
            raise errors.Unavailable(
                f'volume group {vg.name} misses '
                f'{self.group.missing_words(vg)}: connect it; until then '
                'what lies on other disks can be read and written, and '
                'nothing can be made'
            )
        low = (100 - self.settings.metadata_high_percent) / 100
        # Half of the area can be used: the other has the next version.
        if vg.metadata_free_bytes < low * vg.metadata_bytes / 2:
            raise errors.NoSpace(
                f'the metadata of volume group {vg.name} is nearly full '
                f'({vg.metadata_free_bytes} bytes are left): delete '
                'volumes, or make a group with a larger --metadatasize'
            )

    def note(self, reason: str) -> None:
        """Remember what is wrong, and log it once."""
        if reason and reason != self.trouble:
            LOG.error('pool %s: %s', self.group.name, reason)
        self.trouble = reason


def do_one(
    lvs: Iterable[Lv],
    deed: Callable[[Lv], object],
    failures: list[errors.VolumeError],
) -> bool:
    """Do it to the first that lets us; say if there was one.

    One that does not is no reason to leave all others as they are.
    """
    for lv in lvs:
        try:
            deed(lv)
        except errors.VolumeError as failed:
            failures.append(failed)
        else:
            return True
    return False


def new_tags(volume: model.Volume) -> list[str]:
    """Return the tags that a new volume gets, as options of a command."""
    return each_option('--addtag', [
        f'volume:{volume.id}', *names.note_tags(volume.note)
    ])


def note_options(lv: Lv) -> list[str]:
    """Return a volume's note as options of a command."""
    return each_option('--addtag', _notes(lv))


def _notes(lv: Lv) -> list[str]:
    return sorted(tag for tag in lv.tags if names.NOTE.fullmatch(tag))


def each_option(option: str, values: list[str]) -> list[str]:
    """Return an option of a command once for each value."""
    return [word for value in values for word in (option, value)]


def _is_volume(lv: Lv) -> bool:
    """Say whether it is one that could be a volume or its snapshot."""
    return 'public' in lv.roles and 'pool' not in lv.layout


def _volume_id(thing: Thing) -> str:
    return thing.id if isinstance(thing, model.Volume) else thing.volume.id
