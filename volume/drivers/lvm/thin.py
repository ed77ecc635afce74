# SPDX-License-Identifier: Apache-2.0
"""Thin volumes: space when it is written, instant snapshots and clones.

The pool makes each of its blocks zero before a volume sees it, so nothing
has to be wiped; a pool that does not is refused. All volumes and snapshots
stand on their own: none needs another to live.
"""

from __future__ import annotations

from collections.abc import Iterator

from volume import errors
from volume import model
from volume.drivers.lvm import deltas
from volume.drivers.lvm import forming
from volume.drivers.lvm import names
from volume.drivers.lvm import store
from volume.drivers.lvm.groups import Group
from volume.drivers.lvm.report import Lv
from volume.drivers.lvm.report import Vg

# What the kernel says of a pool that is not well, and what to do.
HEALTH = {
    'failed': 'has failed: look at the kernel log, and repair it '
              '(lvconvert --repair)',
    'metadata_read_only': 'is read-only, as its metadata is full or damaged:'
                          ' make room in the group (vgextend), or extend it '
                          '(lvextend --poolmetadatasize); if that does not '
                          'help, repair it (lvconvert --repair)',
    'partial': 'lies on a disk that is missing',
}

LEFT_OF_REVERT = ('deleted', 'reverted')


class Thin(store.Store):
    """A group with a thin pool."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.deltas = deltas.Deltas(group)
        self._is_fresh = True

    def check(self, may_format: bool) -> None:
        if may_format and self.settings.may_create:
            forming.form(self.group)
        self.group.find()
        vg = self.group.look(self._pool_too())
        lv = self._pool(vg)
        if not vg.missing and not lv.is_active:
            self.group.change(
                'lvchange', '-ay', '-K', f'{vg.name}/{lv.name}')
            vg = self.group.look(self._pool_too())
            lv = self._pool(vg)
        self._wake(vg, lv)
        if may_format and self._is_starved(vg, lv):
            # Here, for there is no upkeep of what is down.
            self._extend_pool(vg, lv)
            vg = self.group.look(self._pool_too())
            lv = self._pool(vg)
        self._refuse_unsafe(vg, lv)
        if self._is_fresh and may_format and lv.is_active:
            self.deltas.release_left()
            self._is_fresh = False
        self.note(self._weakness(vg, lv))

    def pool(self, features: frozenset[str]) -> model.Pool:
        vg = self.group.look(self._pool_too())
        lv = self._pool(vg)
        free = lv.size_bytes - _part(lv.size_bytes, lv.data_percent)
        total = lv.size_bytes
        if self.settings.extend_percent < 100:
            free, total = free + vg.free_bytes, total + vg.free_bytes
        is_well = not vg.missing and lv.data_percent is not None and (
            lv.health not in HEALTH and not lv.needs_check
        )
        return model.Pool(
            vg.name, total, free if is_well else 0, thin=True,
            features=features - self.lacks,
            granularity_bytes=vg.extent_bytes,
            max_volume_bytes=self.max_bytes(vg),
            device=f'vg:{vg.uuid}/{lv.uuid}',
        )

    def check_kind(self, lv: Lv) -> None:
        if lv.pool != self.settings.thin_pool:
            raise errors.Invalid(
                f'{lv.name} is not in thin pool {self.settings.thin_pool}: '
                'only its volumes can be managed here'
            )

    # Volumes.

    def create(self, volume: model.Volume) -> str:
        vg = self._about(volume.id)
        size_bytes = self._rounded(vg, volume)
        if (there := self.has(vg, volume)) is not None:
            return there.name
        self._refuse_full(vg)
        name = f'volume-{volume.id}'
        self.group.change(
            'lvcreate', '-n', name, '-V', f'{size_bytes}b', '-ky',
            *store.new_tags(volume), '--thinpool', self.settings.thin_pool,
            vg.name,
        )
        return name

    def delete(self, volume: model.Volume) -> None:
        vg = self.group.about(volume.id)
        self.refuse_snapshots(vg, volume.id)
        for lv in vg.lvs:
            if lv.role == 'draft' and lv.of == volume.id:
                self._remove(lv)
        for role in 'draft', 'reverted', 'deleted', 'volume':
            left = vg.ours(role, volume.id)
            if left is not None:
                self._remove(left)

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        vg = self.group.about(volume.id)
        lv = self.need(vg, volume)
        count = self.extents(vg, size_bytes, f'volume {volume.id}')
        if count * vg.extent_bytes < lv.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {lv.size_bytes} bytes: it cannot '
                f'shrink to {size_bytes}'
            )
        if count * vg.extent_bytes > lv.size_bytes:
            self._extend(vg, lv.name, count)

    # Snapshots and clones.

    def snapshot(self, snapshot: model.Snapshot) -> str:
        vg = self._about(snapshot.volume.id, snapshot.id)
        name = f'snap-{snapshot.id}'
        if vg.ours('snap', snapshot.id) is None:
            lv = self.need(vg, snapshot.volume)
            self.refuse_taken(vg, name)
            self._refuse_full(vg)
            draft = self._draft(vg, lv, snapshot.id, [
                '-pr', '--addtag', f'snapshot:{snapshot.id}',
                '--addtag', f'of:{snapshot.volume.id}',
            ])
            self.group.change('lvrename', vg.name, draft, name)
        return name

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        vg = self.group.about(snapshot.id)
        for role in 'draft', 'snap':
            lv = vg.ours(role, snapshot.id)
            if lv is not None:
                self._remove(lv)

    def clone(self, source: store.Thing, volume: model.Volume) -> str:
        vg = self._about(source.id, volume.id)
        size_bytes = self._rounded(vg, volume)
        if (there := self.has(vg, volume)) is not None:
            return there.name
        origin = self.need(vg, source)
        if size_bytes < origin.size_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {volume.size_bytes} bytes, fewer '
                f'than its source with {origin.size_bytes}'
            )
        self._refuse_full(vg)
        name, tags = f'volume-{volume.id}', store.new_tags(volume)
        draft = self._draft(vg, origin, volume.id, ['-prw', *tags])
        if size_bytes > origin.size_bytes:
            self._extend(vg, draft, size_bytes // vg.extent_bytes)
        self.group.change('lvrename', vg.name, draft, name)
        return name

    def revert(self, snapshot: model.Snapshot) -> str:
        """Make a new volume of the snapshot, and let it take the name.

        Between the two renames the volume has no name; the two others say
        that they were under way, and whoever comes ends it.
        """
        volume = snapshot.volume
        vg = self._about(volume.id, snapshot.id)
        name = f'volume-{volume.id}'
        kept = self.need(vg, snapshot)
        lv = self.need(vg, volume)
        left = self.group.look(' || '.join(
            f'lv_name="{role}-{volume.id}"' for role in LEFT_OF_REVERT
        )).lvs if any(
            vg.ours(role, volume.id) for role in LEFT_OF_REVERT
        ) else ()
        for each in left:
            if each.role:
                self.group.remove(each.name)
        self.refuse_strangers(vg, lv)
        self.group.refuse_open(lv, 'revert')
        self._refuse_full(vg)
        draft = f'reverted-{volume.id}'
        self._branch(vg, kept, draft, [
            '-prw', '--addtag', f'volume:{volume.id}',
            *store.note_options(lv),
        ])
        if lv.size_bytes > kept.size_bytes:
            self._extend(vg, draft, lv.size_bytes // vg.extent_bytes)
        # Nobody can have it open now, or open what is about to go.
        self.group.deactivate(lv)
        self.group.change('lvrename', vg.name, name, f'deleted-{volume.id}')
        self.group.change('lvrename', vg.name, draft, name)
        self.group.remove(f'deleted-{volume.id}')
        return name

    def changed(
        self, source: store.Thing, since: model.Snapshot | None
    ) -> Iterator[model.Extent]:
        """Yield the extents of a volume that are stored, or have changed."""
        wanted = [source.id, *([since.id] if since else [])]
        vg = self._about(*wanted)
        lv = self.need(vg, source)
        old = self.need(vg, since) if since else None
        return self.deltas.extents(vg, lv, old)

    # In the background.

    def upkeep(self) -> bool:
        """Extend the pool before it is full, and remove what was left."""
        vg = self.group.look(f'{self._pool_too()} || {store.DELETED}')
        failures: list[errors.VolumeError] = []
        is_more = False
        if not vg.missing and self.settings.extend_percent < 100:
            try:
                is_more = self._extend_pool(vg, self._pool(vg))
            except errors.VolumeError as failed:
                failures.append(failed)
        is_more |= store.do_one(
            filter(self._is_left, vg.lvs), self._remove_left, failures,
        )
        if failures:
            raise failures[0]
        return is_more

    def _is_left(self, lv: Lv) -> bool:
        if lv.role != 'deleted' or lv.is_open:
            return False
        # Beside one that is coming, it is part of a revert.
        return self.group.about(lv.id).ours('reverted', lv.id) is None

    def _remove_left(self, lv: Lv) -> None:
        """Remove it, and nothing that a revert calls so meanwhile."""
        with self.group.alone() as group:
            vg = group.about(lv.id)
            now = vg.ours('deleted', lv.id)
            if (
                now is not None and now.uuid == lv.uuid
                and vg.ours('reverted', lv.id) is None
            ):
                group.remove(now.name)

    def _wake(self, vg: Vg, lv: Lv) -> None:
        """Let the pool go on if a command has left it suspended.

        All its volumes hang then; of its own layer LVM reports nothing.
        """
        device = names.device(vg.name, lv.name).removeprefix('/dev/mapper/')
        text = self.node.run(
            'dmsetup', 'info', '--columns', '--noheadings', '--separator',
            ' ', '-o', 'name,suspended', '-S',
            f'name={device}-tpool && suspended=Suspended',
        )
        if text.startswith(f'{device}-tpool '):
            self.group.wake(lv.name)

    def _is_starved(self, vg: Vg, lv: Lv) -> bool:
        """Say whether more metadata is all that it needs."""
        return (
            lv.health == 'metadata_read_only' and not lv.needs_check
            and not vg.missing and self.settings.extend_percent < 100
        )

    def _extend_pool(self, vg: Vg, lv: Lv) -> bool:
        if not self._is_high(lv):
            return False
        with self.group.changing:
            # Of many that find it full at once, one extends it.
            vg = self.group.look(self._pool_too())
            lv = self._pool(vg)
            return self._is_high(lv) and self._extend_high(vg, lv)

    def _is_high(self, lv: Lv) -> bool:
        if lv.needs_check or lv.health == 'failed':
            return False  # the kernel would take nothing of it
        return max(
            lv.metadata_percent or 0, lv.data_percent or 0
        ) >= self.settings.extend_percent

    def _extend_high(self, vg: Vg, lv: Lv) -> bool:
        high, by = self.settings.extend_percent, (
            self.settings.extend_by_percent)
        name, free = f'{vg.name}/{lv.name}', vg.free_bytes // vg.extent_bytes
        for percent, size_bytes, option in (
            # Metadata first: without it more data is of no use. LVM keeps
            # a spare of it that grows as well.
            (lv.metadata_percent, lv.metadata_bytes, '--poolmetadatasize'),
            (lv.data_percent, lv.size_bytes, '-l'),
        ):
            if percent is None or percent < high:
                continue
            count = max(1, size_bytes * by // 100 // vg.extent_bytes)
            more = min(count, free if option == '-l' else free // 2)
            if more < 1 or (
                option != '-l' and size_bytes >= forming.METADATA_BYTES_MAX
            ):
                continue
            self.group.change('lvextend', option, (
                f'+{more}' if option == '-l' else
                f'+{more * vg.extent_bytes}b'
            ), name)
            return True
        return False

    # Ours alone.

    def need(self, vg: Vg, thing: store.Thing) -> Lv:
        waits = vg.ours('reverted', thing.id)
        if (
            waits is not None and vg.ours('deleted', thing.id) is not None
            and vg.ours('volume', thing.id) is None
        ):
            # A revert died between its two renames.
            return self.group.rename(waits, 'volume')
        return super().need(vg, thing)

    def _pool_too(self) -> str:
        return f'lv_name="{self.settings.thin_pool}"'

    def _about(self, *ids: str) -> Vg:
        return self.group.about(*ids, name=self.settings.thin_pool)

    def _pool(self, vg: Vg) -> Lv:
        lv = vg.named(self.settings.thin_pool)
        if lv is None:
            raise errors.Unavailable(
                f'volume group {vg.name} has no thin pool '
                f'{self.settings.thin_pool}: make it (lvcreate -T '
                '--errorwhenfull y), or set create'
            )
        if not lv.is_thin_pool:
            raise errors.Unavailable(
                f'{vg.name}/{lv.name} is no thin pool, but '
                f'{"/".join(sorted(lv.layout))}: remove it if a command '
                'that was ended has left it, or set thin_pool to another '
                'name'
            )
        return lv

    def _rounded(self, vg: Vg, volume: model.Volume) -> int:
        return vg.extent_bytes * self.extents(
            vg, volume.size_bytes, f'volume {volume.id}'
        )

    def _draft(
        self, vg: Vg, lv: Lv, id: str, options: list[str]
    ) -> str:
        """Make a snapshot of it under the name of a draft; return that.

        LVM writes down a snapshot before the kernel has made it. One that
        a command has left then has a later moment, or none: it is made
        anew, and has its own name only once the command has ended well.
        """
        if (left := vg.ours('draft', id)) is not None:
            self._remove(left)
        self._branch(vg, lv, f'draft-{id}', options)
        return f'draft-{id}'

    def _remove(self, lv: Lv) -> None:
        """Remove what nobody has open, if its pool can do it.

        :raises Unavailable: the pool is not well
        """
        self.group.refuse_open(lv, 'delete')
        vg = self.group.look(self._pool_too())
        self._refuse_unsafe(vg, self._pool(vg))
        self.group.remove(lv.name)

    def _branch(self, vg: Vg, lv: Lv, name: str, options: list[str]) -> None:
        self.group.change(
            'lvcreate', '-s', '-n', name, '-ky', *options,
            f'{vg.name}/{lv.name}',
        )

    def _extend(self, vg: Vg, name: str, count: int) -> None:
        self.group.change('lvextend', '-l', str(count), f'{vg.name}/{name}')

    def _refuse_unsafe(self, vg: Vg, lv: Lv) -> None:
        name = f'{vg.name}/{lv.name}'
        if lv.health in HEALTH:
            which = self.group.missing_words(vg)
            raise errors.Unavailable(
                f'thin pool {name} {HEALTH[lv.health]}'
                f'{": " if which else ""}{which}'
            )
        if lv.needs_check:
            raise errors.Unavailable(
                f'thin pool {name} needs a check of its metadata: '
                'deactivate and repair it (lvconvert --repair)'
            )
        if not lv.zeroes:
            raise errors.Unavailable(
                f'thin pool {name} does not make new blocks zero, and a '
                'volume would show what others wrote: lvchange --zero y '
                f'{name}'
            )

    def _weakness(self, vg: Vg, lv: Lv) -> str:
        if vg.missing:
            return f'misses {self.group.missing_words(vg)}'
        if not lv.errors_when_full:
            return (
                f'thin pool {vg.name}/{lv.name} waits when it is full, and '
                'whoever writes hangs: lvchange --errorwhenfull y '
                f'{vg.name}/{lv.name}'
            )
        return ''

    def _refuse_full(self, vg: Vg) -> None:
        """Refuse a new volume or snapshot before it could do harm."""
        self.refuse_trouble(vg)
        lv = self._pool(vg)
        self._refuse_unsafe(vg, lv)
        high = self.settings.metadata_high_percent
        if (lv.metadata_percent or 0) >= high:
            self._extend_pool(vg, lv)  # or somebody else has
            lv = self._pool(self.group.look(self._pool_too()))
        if lv.metadata_percent is None:
            raise errors.Unavailable(
                f'thin pool {vg.name}/{lv.name} is not active: it is with '
                'the next check of the backend'
            )
        if lv.metadata_percent >= high:
            raise errors.NoSpace(
                f'the metadata of thin pool {vg.name}/{lv.name} is '
                f'{lv.metadata_percent:g} % full: extend it '
                '(lvextend --poolmetadatasize), or delete snapshots'
            )


def _part(size_bytes: int, percent: float | None) -> int:
    return int(size_bytes * (percent or 0) / 100)
