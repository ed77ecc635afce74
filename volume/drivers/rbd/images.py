# SPDX-License-Identifier: Apache-2.0
"""Images as volumes: made, found, grown, thrown away, adopted.

An image has several parts, and a client that dies may leave some. What has
a name and no header was never there, and what was begun and is not signed was
never handed out: both are made anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping

from volume import errors
from volume import model
from volume.drivers.rbd import guests
from volume.drivers.rbd import headers
from volume.drivers.rbd import names
from volume.drivers.rbd.keys import Keys
from volume.drivers.rbd.link import Image
from volume.drivers.rbd.link import is_signed
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.wire import Wire

LOG = logging.getLogger(__name__)

MAX_BYTES = 256 << 40  # more objects than this have maps that are too large
# How long the watch of a client outlives it, and a little more.
STALE_S = 40.0
POLL_S = 0.5
HANDLE = re.compile(r'[^./@\0][^/@\0]{0,254}')


def check_size(size_bytes: int, what: str) -> None:
    """Refuse what no image can be.

    :raises Invalid: no whole sectors, nothing, or too much
    """
    if size_bytes % model.SECTOR_BYTES or not 0 < size_bytes <= MAX_BYTES:
        raise errors.Invalid(
            f'{what} has {size_bytes} bytes: a volume has a positive '
            f'multiple of {model.SECTOR_BYTES}, up to {MAX_BYTES}'
        )


def noted_bytes(text: str) -> int:
    """Return a size that stands in the metadata; none if no image has it."""
    if not re.fullmatch('[0-9]{1,20}', text):
        return 0
    size_bytes = int(text)
    return size_bytes if size_bytes <= MAX_BYTES else 0


def need_unused(
    image: Image, verb: str, stale_s: float = STALE_S
) -> None:
    """Refuse to go on while a client has the image open to be written.

    Where no host was let in, it is the watch of one of our own that died:
    it ends by itself, and is waited for.

    :raises Busy: it is in use
    """
    deadline = time.monotonic() + stale_s
    while watchers := image.watchers():
        known = guests.read(image.notes())
        if known or time.monotonic() >= deadline:
            raise errors.Busy(
                f'cannot {verb} {image.what}: '
                f'{known or watchers[0]["addr"]} has it open'
            )
        time.sleep(POLL_S)


class Images:
    """All images of the cluster that this backend may touch."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.begun = Keys(link, names.BEGUN)

    # Questions.

    def find(self, volume: model.Volume) -> int | None:
        """Return the size of a volume; what was never finished goes.

        :raises Conflict: somebody else's image has the name
        """
        name = names.image(volume)
        try:
            with self.link.image(volume.pool, name) as image:
                size_bytes, notes = image.size(), image.notes()
        except errors.NotFound:
            return None
        if is_signed(name, notes):
            return size_bytes
        if not self.begun.has(volume.pool, name):
            raise _foreign(name)
        self._throw_draft_away(volume)
        return None

    def inspect(self, volume: model.Volume) -> model.Found:
        name = names.image(volume)
        with self.link.image(volume.pool, name) as image:
            size_bytes, notes = image.size(), image.notes()
        if not is_signed(name, notes) and self.begun.has(volume.pool, name):
            raise errors.NotFound(
                f'image {name} was begun, and is no volume yet'
            )
        return _found(name, size_bytes, notes)

    def listed(self, pool: str) -> list[str]:
        """Return the names of all images of a pool, ours or not."""
        return self.link.ask('list', lambda wire: sorted(
            each['name'] for each in
            wire.rbd.RBD().list2(wire.ioctx(pool))
        ))

    def scan(self, pool: str) -> Iterator[model.Found]:
        for name in self.listed(pool):
            try:
                with self.link.image(pool, name) as image:
                    size, notes = image.size(), image.notes()
                    snapshots = image.snapshots()
            except errors.NotFound:
                continue  # deleted since we listed it, or never made
            except errors.VolumeError as failed:
                yield from self._unopened(pool, name, failed)
                continue
            found = _found(name, size, notes)
            if found.id is None and names.volume_id(name) is not None and (
                self.begun.has(pool, name)
            ):
                continue
            yield found
            if found.id is not None:
                for snapshot, size_bytes in sorted(snapshots.items()):
                    if not names.MOMENT.fullmatch(snapshot):
                        yield model.Found(
                            f'{name}@{snapshot}', size_bytes,
                            names.snapshot_id(snapshot), found.id,
                        )

    # Deeds.

    def create(self, volume: model.Volume) -> str:
        check_size(volume.size_bytes, f'volume {volume.id}')
        if not self.is_there(volume):
            self.make(volume, lambda wire: wire.rbd.RBD().create(
                wire.ioctx(volume.pool), names.image(volume),
                volume.size_bytes, old_format=False, features=wire.features,
            ))
            self.sign(volume)
        return names.image(volume)

    def is_there(self, volume: model.Volume) -> bool:
        """Say whether the volume is there, with the size asked for.

        :raises Conflict: it has another size, or is somebody else's
        """
        size_bytes = self.find(volume)
        if size_bytes is None:
            return False
        if size_bytes != volume.size_bytes:
            raise errors.Conflict(
                f'volume {volume.id} exists with {size_bytes} bytes, not '
                f'{volume.size_bytes}'
            )
        return True

    def make(
        self, volume: model.Volume, effect: Callable[[Wire], None]
    ) -> None:
        """Make the image; whoever comes after us knows that it was begun."""
        name = names.image(volume)
        self.begun.add(volume.pool, name)
        try:
            self.link.do('make', effect)
        except errors.Conflict:
            # It cannot be opened: a maker died before it had a header.
            self._sweep(volume.pool, name)
            self.link.do('make', effect)

    def sign(self, volume: model.Volume) -> None:
        """Say that the image is the volume, made to its end."""
        name = names.image(volume)
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            image.note(names.ID, volume.id)
        self.begun.remove(volume.pool, name)

    def delete(self, volume: model.Volume) -> None:
        name = names.image(volume)
        try:
            with self.link.image(volume.pool, name) as image:
                is_ours = is_signed(name, image.notes())
                if is_ours:
                    refuse_snapshots(image, volume)
                    need_unused(image, 'delete')
                moments = image.snapshots()
            if not is_ours:
                self.find(volume)
            else:
                self.end_moments(volume.pool, name, moments)
                self.throw_away(volume.pool, name)
        except errors.NotFound:
            self._sweep(volume.pool, name)
        except errors.Corrupt:
            self._delete_unreadable(volume, name)
        self.begun.remove(volume.pool, name)

    def throw_away(self, pool: str, name: str) -> None:
        """Move an image to the trash, where upkeep finds it."""
        delay_s = self.link.settings.trash_delay_s
        with contextlib.suppress(errors.NotFound):
            self.link.do('trash_move', lambda wire: wire.rbd.RBD().trash_move(
                wire.ioctx(pool), name, delay_s))

    def end_moments(
        self, pool: str, name: str, snapshots: Mapping[str, int]
    ) -> None:
        """Remove what clones that never ended have left on their source."""
        moments = [each for each in snapshots if names.MOMENT.fullmatch(each)]
        if moments:
            with self.link.image(pool, name, is_read_only=False) as image:
                for each in moments:
                    with contextlib.suppress(errors.NotFound):
                        image.remove_snapshot(each)

    def resize(self, volume: model.Volume, size_bytes: int) -> None:
        check_size(size_bytes, f'volume {volume.id}')
        name = names.image(volume)
        with self.link.image(volume.pool, name) as image:
            old_bytes = image.size()
        if size_bytes < old_bytes:
            raise errors.Invalid(
                f'volume {volume.id} has {old_bytes} bytes: it cannot shrink '
                f'to {size_bytes}'
            )
        if size_bytes > old_bytes:
            with self.link.image(
                volume.pool, name, is_read_only=False
            ) as image:
                image.do('resize', lambda raw: raw.resize(
                    size_bytes, allow_shrink=False))

    def describe(
        self, volume: model.Volume, sidecar: Mapping[str, str]
    ) -> None:
        text = json.dumps(dict(sidecar), sort_keys=True)
        with self.link.image(
            volume.pool, names.image(volume), is_read_only=False
        ) as image:
            image.note(names.NOTE, text)

    def limit(self, volume: model.Volume, limits: model.IoLimits) -> None:
        done = 0
        with self.link.image(
            volume.pool, names.image(volume), is_read_only=False
        ) as image:
            for key, value in (
                (f'{names.LIMIT}iops_limit', limits.iops),
                (f'{names.LIMIT}bps_limit', limits.bytes_per_s),
            ):
                try:
                    if value is None:
                        image.forget(key)
                    else:
                        image.note(key, str(value))
                except errors.VolumeError as failed:
                    if not done:
                        raise
                    # Whatever has become of this one, something happened.
                    raise errors.Unknown(
                        f'one limit of volume {volume.id} is set, and the '
                        f'other may be what it was: {failed}'
                    ) from failed
                done += 1

    def adopt(self, handle: str, volume: model.Volume) -> str:
        name = names.image(volume)
        if not HANDLE.fullmatch(handle):
            raise errors.Invalid(
                f'{handle!r:.300} is not the plain name of an image'
            )
        try:
            with self.link.image(volume.pool, handle) as image:
                if is_signed(handle, image.notes()):
                    if handle == name:
                        return name
                    raise errors.Conflict(f'{handle} is ours already')
                self._check_foreign(handle, image)
                own_id = image.id()
        except errors.NotFound:
            if self.find(volume) is None:
                raise
            return name  # a repeated call
        if handle != name:
            self._clear_way(volume.pool, own_id, handle, name)
        with self.link.image(
            volume.pool, handle, is_read_only=False
        ) as image:
            image.forget(*names.OURS)
            image.note(names.ID, volume.id)
        if handle != name:
            self._rename(volume.pool, handle, name)
        return name

    def disown(self, volume: model.Volume) -> None:
        name, foreign = names.image(volume), names.disowned(volume)
        try:
            with self.link.image(volume.pool, name) as image:
                if not is_signed(name, image.notes()):
                    return
                refuse_snapshots(image, volume)
                need_unused(image, 'let go of')
                own_id, moments = image.id(), image.snapshots()
        except errors.NotFound:
            return
        self.end_moments(volume.pool, name, moments)
        self._clear_way(volume.pool, own_id, name, foreign)
        self._rename(volume.pool, name, foreign)
        with self.link.image(
            volume.pool, foreign, is_read_only=False
        ) as image:
            image.forget(*names.OURS)

    # Ours alone.

    def _unopened(
        self, pool: str, name: str, failed: errors.VolumeError
    ) -> Iterator[model.Found]:
        """Yield an image that cannot be opened: of it there is no size.

        One image's trouble must not hide all others; a cluster that does
        not answer does not answer here either.
        """
        image_id = self.link.header(pool, name)
        if image_id is not None:
            LOG.warning('pool %s: %s', pool, failed)
            is_ours = self.link.is_signed(pool, image_id, name)
            yield model.Found(
                name, 0, names.volume_id(name) if is_ours else None)

    def _throw_draft_away(self, volume: model.Volume) -> None:
        name = names.image(volume)
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            image.note(names.ID, volume.id)  # so that upkeep removes it
        self.throw_away(volume.pool, name)

    def _delete_unreadable(self, volume: model.Volume, name: str) -> None:
        """Delete what nobody can read any more: what it stands on is gone.

        :raises Conflict: it is somebody else's
        """
        image_id = self.link.header(volume.pool, name)
        if image_id is None:
            self._sweep(volume.pool, name)
        elif self.link.is_signed(volume.pool, image_id, name):
            self.throw_away(volume.pool, name)
        elif self.begun.has(volume.pool, name):
            # Unsigned it would stay in the trash.
            self._remove(volume.pool, name)
        else:
            raise _foreign(name)

    def _sweep(self, pool: str, name: str) -> None:
        """Remove what is left of an image that cannot be opened by name.

        Half in the trash it has its header; half made it has not.
        """
        self.throw_away(pool, name)
        self._remove(pool, name)

    def _remove(self, pool: str, name: str) -> None:
        with contextlib.suppress(errors.NotFound):
            self.link.do('remove', lambda wire: wire.rbd.RBD().remove(
                wire.ioctx(pool), name))

    def _check_foreign(self, handle: str, image: Image) -> None:
        check_size(image.size(), f'image {handle}')
        if image.snapshots():
            raise errors.Busy(
                f'image {handle} has snapshots, which would be nobody\'s: '
                'remove them first, or flatten a copy of it'
            )
        need_unused(image, 'adopt')

    def _clear_way(
        self, pool: str, own_id: str, old: str, new: str
    ) -> None:
        """See that the new name is free, or half given to this image.

        :raises Conflict: another image has it
        """
        try:
            with self.link.image(pool, new) as image:
                if image.id() != own_id:
                    raise errors.Conflict(
                        f'pool {pool} has an image {new} already: {old} '
                        'cannot become it'
                    )
        except errors.NotFound:
            return
        # A rename was cut off. The directory says how far it came; if not
        # far, it is begun again.
        listed = self.link.ask('list', lambda wire: {
            each['id']: each['name'] for each in
            wire.rbd.RBD().list2(wire.ioctx(pool))
        })
        if listed.get(own_id) == old:
            self._remove_name(pool, new)

    def _rename(self, pool: str, old: str, new: str) -> None:
        with contextlib.suppress(errors.Conflict):
            self.link.do('rename', lambda wire: wire.rbd.RBD().rename(
                wire.ioctx(pool), old, new))
            return
        self._remove_name(pool, old)

    def _remove_name(self, pool: str, name: str) -> None:
        with contextlib.suppress(errors.NotFound):
            self.link.do('remove_name', lambda wire: wire.ioctx(
                pool).remove_object(f'rbd_id.{name}'))


def _foreign(name: str) -> errors.Conflict:
    return errors.Conflict(
        f'there is an image {name} that is not ours: adopt it'
    )


def refuse_snapshots(image: Image, volume: model.Volume) -> None:
    """Refuse what cannot be while a volume has snapshots.

    :raises Busy: it has
    """
    for name in image.snapshots():
        if not names.MOMENT.fullmatch(name):
            raise errors.Busy(
                f'volume {volume.id} has snapshots ({name}): delete them '
                'first'
            )


def _found(
    name: str, size_bytes: int, notes: Mapping[str, str]
) -> model.Found:
    if not is_signed(name, notes):
        return model.Found(name, size_bytes)
    said = headers.parse(notes.get(names.NOTE, '{}'))
    return model.Found(
        name, size_bytes, names.volume_id(name),
        # A broken note is none, for it is only a note.
        sidecar={
            key: str(value) for key, value in said.items()
        } if isinstance(said, dict) else {},
        hosts=guests.read(notes).hosts, is_torn=names.REVERT in notes,
    )
