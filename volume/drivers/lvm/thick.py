# SPDX-License-Identifier: Apache-2.0
"""Thick volumes: all of their space at once, and all of it made zero.

Extents that LVM hands out hold what their last owner wrote. So a volume is
a draft until zeros were written over all of it; one that grows gets extents
that were zeroed under another name before; and what goes is renamed, wiped
and only then removed. Writing through a snapshot would only copy, so the
area of one is split off first, and wiped by itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

from volume import errors
from volume import model
from volume.drivers.lvm import forming
from volume.drivers.lvm import names
from volume.drivers.lvm import store
from volume.drivers.lvm import wiping
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Vg

COW_CHUNK_BYTES = 4096  # LVM's own choice, if nobody says another
COW_CHUNKS = 256  # exceptions of a snapshot that one chunk of tables holds
PLAIN = ('linear', 'striped', 'mirror')
# Health of a mirror where zeros would not come to one of its sides.
BEHIND = ('partial', 'refresh needed')
UPKEEP_S = 10.0  # of wiping at a time: others wait for it


class Thick(store.Store):
    """A group whose volumes are linear."""

    lacks = frozenset({'Clone', 'Extents', 'Revert'})

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._alone = threading.Lock()
        self._ending: set[str] = set()
        self.upkeep_s = UPKEEP_S

    def check(self, may_format: bool) -> None:
        if may_format and self.settings.may_create:
            forming.form_group(self.group)
        self.group.find()
        vg = self.group.look()
        self.note(
            f'misses {self.group.missing_words(vg)}' if vg.missing else ''
        )

    def pool(self, features: frozenset[str]) -> model.Pool:
        vg = self.group.look()
        return model.Pool(
            vg.name, vg.size_bytes, 0 if vg.missing else vg.free_bytes,
            thin=False, granularity_bytes=vg.extent_bytes,
            features=features - self.lacks,
            max_volume_bytes=self.max_bytes(vg), device=f'vg:{vg.uuid}',
        )

    def check_kind(self, lv: Lv) -> None:
        if not all(
            kind in PLAIN or kind.startswith('raid') for kind in lv.layout
        ):
            raise errors.Invalid(
                f'{lv.name} is {"/".join(sorted(lv.layout))}: a thick '
                'backend has only what can be wiped where it lies, linear, '
                'striped or mirrored'
            )

    # Volumes.

    def create(self, volume: model.Volume) -> str:
        vg = self.group.about(volume.id)
        count = self.extents(vg, volume.size_bytes, f'volume {volume.id}')
        if (there := self.has(vg, volume)) is not None:
            return there.name
        if (old := vg.ours('deleted', volume.id)) is not None:
            self._end(old)
        draft, name = vg.ours('draft', volume.id), f'draft-{volume.id}'
        if draft and draft.size_bytes != count * vg.extent_bytes:
            self.group.remove(name)
            draft = None
        path = self.group.activate(draft) if draft else self._allocate(
            vg, name, count, store.new_tags(volume)
        )
        if self.settings.wipes_new:
            wiping.wipe(self.node, path, 0, count * vg.extent_bytes)
        made = f'volume-{volume.id}'
        self.group.change('lvrename', vg.name, name, made)
        return made

    def delete(self, volume: model.Volume) -> None:
        vg = self.group.about(volume.id)
        self.refuse_snapshots(vg, volume.id)
        for lv in vg.lvs:
            if lv.of == volume.id:
                self._end_left(vg, lv.id)
        if (old := vg.ours('deleted', volume.id)) is not None:
            self._end(old)
        for role in 'draft', 'tail':
            # Nobody has written to these but we, and that was zeros.
            left = vg.ours(role, volume.id)
            if left is not None:
                self.group.remove(left.name)
        whole = vg.ours('volume', volume.id)
        if whole is not None:
            self.group.refuse_open(whole, 'delete')
            whole = self.group.deactivate(whole)
            self._end(self._condemn(whole))

    def _condemn(self, lv: Lv) -> Lv:
        """Call it deleted."""
        # Whoever took it back by hand may have written to it since.
        self._mark_wiped(lv, [])
        return self.group.rename(lv, 'deleted')

    def _mark_wiped(self, lv: Lv, tags: list[str]) -> None:
        words = [
            *store.each_option('--deltag', lv.wiped_tags),
            *store.each_option('--addtag', tags),
        ]
        if words:
            self.group.change(
                'lvchange', *words, f'{self.group.name}/{lv.name}'
            )

    def _end(self, lv: Lv, limit_s: float = math.inf) -> None:
        """Wipe what is called deleted, and remove it.

        With a limit only a part of it, if it is large; where that ends is
        remembered, and whoever comes next goes on from there.

        :raises Unavailable: another thread is at it, somebody has it
            open, or something depends on it
        """
        with self._alone:
            if lv.id in self._ending:
                raise errors.Unavailable(
                    f'{self.group.name}/{lv.name} is being wiped already: '
                    'ask again when that has ended'
                )
            self._ending.add(lv.id)
        try:
            self._wipe_and_remove(lv, limit_s)
        except errors.Busy as busy:
            # Not as it was: nobody may take it for whole.
            raise errors.Unavailable(str(busy)) from busy
        finally:
            with self._alone:
                self._ending.discard(lv.id)

    def _wipe_and_remove(self, lv: Lv, limit_s: float) -> None:
        lv = self._again(lv)
        # Before a byte of it is gone.
        self.group.refuse_dependents(lv)
        if lv.is_thick_snapshot:
            self.group.change(
                'lvconvert', '--splitsnapshot',
                f'{self.group.name}/{lv.name}',
            )
            lv = self._again(lv)
        if self.settings.wipes_old:
            if lv.is_read_only:
                self.group.change(
                    'lvchange', '-prw', f'{self.group.name}/{lv.name}'
                )
            path = self.group.activate(lv)
            self._refuse_behind(lv)
            at = wiping.wipe(
                self.node, path, lv.wiped_bytes, lv.stored_bytes, limit_s
            )
            if at < lv.stored_bytes:
                self._mark_wiped(lv, [names.wiped_tag(at)])
                return
        self.group.remove(lv.name)

    def _refuse_behind(self, lv: Lv) -> None:
        """Refuse to wipe a mirror that one of its disks does not follow.

        :raises Unavailable: it is one
        """
        if lv.layout == {'linear'}:
            return
        health = self._again(lv).health
        if health in BEHIND:
            raise errors.Unavailable(
                f'{self.group.name}/{lv.name} is not well ({health}) and '
                'cannot be wiped on all of its disks: repair it first '
                '(lvchange --refresh, lvconvert --repair)'
            )

    # Growth.

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        vg = self.group.about(volume.id)
        lv = self.need(vg, volume)
        count = self.extents(vg, size_bytes, f'volume {volume.id}')
        wanted = count * vg.extent_bytes
        if wanted < lv.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {lv.size_bytes} bytes: it cannot '
                f'shrink to {size_bytes}'
            )
        if (left := vg.ours('tail', volume.id)) is not None:
            self.group.remove(left.name)
            vg = self.group.about(volume.id)  # what it took is free now
        if wanted == lv.size_bytes:
            return
        if lv.layout != {'linear'}:
            raise errors.Unsupported(
                f'{lv.name} is {"/".join(sorted(lv.layout))}, and was made '
                'by somebody else: such a volume cannot be extended here'
            )
        if any(each.origin == lv.name for each in vg.lvs):
            # LVM extends an origin of snapshots only while it is inactive.
            self.group.refuse_open(lv, 'extend, as it has snapshots,')
            self.group.deactivate(lv)
        self._grow(vg, lv, count - lv.size_bytes // vg.extent_bytes)

    def _grow(self, vg: Vg, lv: Lv, count: int) -> None:
        """Add extents that are zero.

        They are freed and taken in two commands, with nobody in between: a
        host may write there from the second on, so that it is too late to
        make them zero again, or to say that it did not work.
        """
        tail = f'tail-{lv.id}'
        path = self._allocate(
            vg, tail, count, ['--addtag', f'volume:{lv.id}']
        )
        if self.settings.wipes_new:
            try:
                wiping.wipe(self.node, path, 0, count * vg.extent_bytes)
            except errors.Cancelled:
                self.group.remove(tail)
                raise
        self.group.change('lvchange', '-an', f'{vg.name}/{tail}')
        with self.group.alone() as group:
            zeroed = group.about(lv.id).ours('tail', lv.id)
            if zeroed is None:
                raise errors.Unavailable(
                    f'{vg.name}/{tail} went away as it was to become a part '
                    f'of {lv.name}: somebody else is at it'
                )
            group.remove(tail, keeps_zeros=True)
            group.change(
                'lvextend', '-l', f'+{count}', f'{vg.name}/{lv.name}',
                *zeroed.ranges,
            )

    # Snapshots.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        vg = self.group.about(snapshot.volume.id, snapshot.id)
        name = f'snap-{snapshot.id}'
        if vg.ours('snap', snapshot.id) is not None:
            return name
        lv = self.need(vg, snapshot.volume)
        self.refuse_taken(vg, name)
        if self._end_left(vg, snapshot.id):
            vg = self.group.about(snapshot.volume.id, snapshot.id)
        count = _area_extents(
            vg, lv.size_bytes * self.settings.snapshot_percent // 100)
        self._refuse_full(vg, count, f'snapshot {snapshot.id}')
        # LVM writes down a plain volume of whatever lies there, then that
        # it is a snapshot, and then has the kernel know: it has its name
        # once all of that is done.
        draft = f'draft-{snapshot.id}'
        self.group.change(
            'lvcreate', '-s', '-n', draft, '-l', str(count), '-pr', '-ky',
            '--addtag', f'snapshot:{snapshot.id}',
            '--addtag', f'of:{snapshot.volume.id}',
            f'{vg.name}/{lv.name}',
        )
        self.group.change('lvrename', vg.name, draft, name)
        return name

    def before_overwrite(self, volume: model.Volume) -> None:
        """Let all snapshots keep all that the volume holds.

        One that runs full is lost, and a volume that is reverted to it is
        read from it while it is overwritten.
        """
        vg = self.group.about(volume.id)
        lv = self.need(vg, volume)
        count = _area_extents(vg, lv.size_bytes)
        small = {
            each.name: count - each.stored_bytes // vg.extent_bytes
            for each in vg.lvs
            if each.role == 'snap' and each.origin == lv.name
            and not each.is_invalid
            and each.stored_bytes < count * vg.extent_bytes
        }
        if small:
            self._refuse_full(
                vg, sum(small.values()), 'to keep what the snapshots of '
                f'volume {volume.id} hold while all of it changes',
            )
        for name, more in small.items():
            self.group.change(
                'lvextend', '-l', f'+{more}', f'{vg.name}/{name}'
            )

    def need(self, vg: Vg, thing: store.Thing) -> Lv:
        lv = super().need(vg, thing)
        if isinstance(thing, model.Snapshot) and not lv.is_thick_snapshot:
            raise errors.Corrupt(
                f'{vg.name}/{lv.name} is no snapshot any more: somebody has '
                'split it off; delete it'
            )
        return lv

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        vg = self.group.about(snapshot.id)
        lv = vg.ours('snap', snapshot.id)
        if lv is not None:
            self.refuse_strangers(vg, lv)
            self.group.refuse_open(lv, 'delete')
            self._end(self._condemn(lv))
        self._end_left(vg, snapshot.id)

    def _end_left(self, vg: Vg, snapshot_id: str) -> bool:
        """End what is no snapshot yet, or no more; say if there was any."""
        left = [
            lv for role in ('draft', 'deleted')
            if (lv := vg.ours(role, snapshot_id)) is not None
        ]
        for lv in left:
            self._end(lv if lv.role == 'deleted' else self._condemn(lv))
        return bool(left)

    # In the background.

    def upkeep(self) -> bool:
        """Extend one snapshot that fills up, and wipe some of what goes.

        Neither waits for the other: a snapshot that is full is lost, and
        what is removed makes room for it.
        """
        vg = self.group.look(f'{store.DELETED} || lv_name=~"^snap-"')
        failures: list[errors.VolumeError] = []
        is_more = store.do_one(
            filter(self._fills_up, vg.lvs),
            lambda lv: self._extend_snapshot(vg, lv), failures,
        )
        is_more |= store.do_one(
            self._condemned(vg), lambda lv: self._end(lv, self.upkeep_s),
            failures,
        )
        if failures:
            raise failures[0]
        return is_more

    def _fills_up(self, lv: Lv) -> bool:
        high = self.settings.extend_percent
        return (
            self.settings.snapshot_percent < 100 and high < 100
            and lv.role == 'snap' and not lv.is_invalid
            and (lv.data_percent or 0) >= high
            and lv.stored_bytes < lv.size_bytes
        )

    def _condemned(self, vg: Vg) -> Iterator[Lv]:
        """Yield what is to be wiped, as long as there is time to begin."""
        late = time.monotonic() + UPKEEP_S
        for lv in vg.lvs:
            if (
                lv.role == 'deleted' and not lv.is_open
                and lv.id not in self._ending and time.monotonic() < late
            ):
                yield lv

    def _extend_snapshot(self, vg: Vg, lv: Lv) -> None:
        by = lv.stored_bytes * self.settings.extend_by_percent // 100
        count = max(1, by // vg.extent_bytes)
        self.group.change(
            'lvextend', '-l', f'+{count}', f'{vg.name}/{lv.name}'
        )

    # Ours alone.

    def _allocate(
        self, vg: Vg, name: str, count: int, tags: list[str]
    ) -> str:
        """Make a logical volume with whatever bytes lie there.

        Return the path of its device.
        """
        self._refuse_full(vg, count, f'{vg.name}/{name}')
        self.refuse_taken(vg, name)
        # No signature is looked for, and no first page zeroed: all of it
        # will be.
        self.group.change(
            'lvcreate', '-n', name, '-l', str(count), *tags, '-ky', '-K',
            '-Wn', '-Zn', vg.name,
        )
        made = self.group.look(f'lv_name="{name}"').named(name)
        if made is None:
            raise errors.Unavailable(
                f'{vg.name}/{name} went away as it was made: somebody else '
                'is at it'
            )
        return self.group.await_device(made)

    def _refuse_full(self, vg: Vg, count: int, what: str) -> None:
        self.refuse_trouble(vg)
        if vg.free_bytes < count * vg.extent_bytes:
            raise errors.NoSpace(
                f'{what} takes {count * vg.extent_bytes} bytes, and volume '
                f'group {vg.name} has {vg.free_bytes} free'
            )

    def _again(self, lv: Lv) -> Lv:
        found = self.group.look(f'lv_uuid="{lv.uuid}"').lvs
        if not found:
            raise errors.Unavailable(
                f'{self.group.name}/{lv.name} went away while we worked on '
                'it: somebody else is at it'
            )
        return found[0]


def _area_extents(vg: Vg, size_bytes: int) -> int:
    """Return what the area takes that can keep so much of an origin.

    A chunk is its header, and of the tables the next one is always there.
    For the whole origin LVM has the same limit (``_cow_max_size`` of its
    lib/metadata/snapshot_manip.c), and would give no extent more.
    """
    chunks = -(-size_bytes // COW_CHUNK_BYTES)
    tables = chunks // COW_CHUNKS
    return -(-(chunks + tables + 2) * COW_CHUNK_BYTES // vg.extent_bytes)
