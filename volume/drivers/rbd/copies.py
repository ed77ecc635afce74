# SPDX-License-Identifier: Apache-2.0
"""Snapshots, clones, and the way back.

Clones are of the second kind (``rbd_default_clone_format = 2``): a snapshot
or image that has clones can be deleted, and stays in the trash, hidden, until
they are gone or flattened. So the order of deletions is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from volume import errors
from volume import model
from volume.drivers.rbd import images
from volume.drivers.rbd import names
from volume.drivers.rbd.images import Images
from volume.drivers.rbd.link import Link
from volume.drivers.rbd.tending import Tending

Source = model.Volume | model.Snapshot


class Copies:
    """What shares bytes with a volume."""

    def __init__(
        self, link: Link, images: Images, tending: Tending
    ) -> None:
        self.link = link
        self.images = images
        self.tending = tending

    def snapshot(self, snapshot: model.Snapshot) -> str:
        volume, name = snapshot.volume, names.snapshot(snapshot)
        image_name = names.image(volume)
        with self.link.image(volume.pool, image_name) as image:
            is_there = name in image.snapshots()
        if not is_there:
            with self.link.image(
                volume.pool, image_name, is_read_only=False
            ) as image, contextlib.suppress(errors.Conflict):
                image.do('create_snap', lambda raw: raw.create_snap(name))
        return f'{image_name}@{name}'

    def delete_snapshot(self, snapshot: model.Snapshot) -> None:
        volume, name = snapshot.volume, names.snapshot(snapshot)
        image_name = names.image(volume)
        with contextlib.suppress(errors.NotFound):
            with self.link.image(volume.pool, image_name) as image:
                if name not in image.snapshots():
                    return
            with self.link.image(
                volume.pool, image_name, is_read_only=False
            ) as image:
                image.remove_snapshot(name)

    def clone(self, source: Source, volume: model.Volume) -> str:
        images.check_size(volume.size_bytes, f'volume {volume.id}')
        name = names.image(volume)
        if self.images.is_there(volume):
            return name
        self._check_source(source, volume)
        origin = source if isinstance(source, model.Volume) else source.volume
        if isinstance(source, model.Snapshot):
            self._clone(origin, names.snapshot(source), volume)
        else:
            moment = names.moment(volume)
            self._take(origin, moment)
            self._clone(origin, moment, volume)
            self._end(origin, moment)
        self._finish(volume, name)
        return name

    def revert(self, snapshot: model.Snapshot) -> str:
        """Roll the image back, which copies what differs.

        While it lasts the image is a mixture, and a rollback gives it the
        snapshot's size. So there stands in its metadata, from before the
        first byte until after the last, what size it had: that it is torn,
        and what a repeated call gives it back.
        """
        volume, name = snapshot.volume, names.snapshot(snapshot)
        image_name = names.image(volume)
        with self.link.image(volume.pool, image_name) as image:
            there = image.snapshots()
            if name not in there:
                raise errors.NotFound(
                    f'volume {volume.id} has no snapshot {snapshot.id}'
                )
            images.need_unused(image, 'revert')
            notes, size_bytes = image.notes(), image.size()
        size_bytes = max(
            size_bytes, volume.size_bytes,
            images.noted_bytes(notes.get(names.REVERT, '')),
        )
        self.tending.release(volume.pool, image_name)
        with self.link.image(
            volume.pool, image_name, is_read_only=False
        ) as image:
            image.note(names.REVERT, str(size_bytes))
            image.do('rollback', lambda raw: raw.rollback_to_snap(name))
            if there[name] != size_bytes:
                image.do('resize', lambda raw: raw.resize(
                    size_bytes, allow_shrink=False))
            image.forget(names.REVERT)
        return image_name

    def flatten(
        self, volume: model.Volume, watch: Callable[[float], None]
    ) -> str:
        name = names.image(volume)
        with self.link.image(volume.pool, name) as image:
            images.refuse_snapshots(image, volume)
            images.need_unused(image, 'flatten')
            is_flat = image.parent() is None
        self.tending.release(volume.pool, name)
        if not is_flat:
            self.tending.flatten(volume.pool, name, watch)
        return name

    # Ours alone.

    def _check_source(self, source: Source, volume: model.Volume) -> None:
        is_snapshot = isinstance(source, model.Snapshot)
        origin = source.volume if isinstance(
            source, model.Snapshot) else source
        with self.link.image(
            origin.pool, names.image(origin),
            snapshot=names.snapshot(source) if isinstance(
                source, model.Snapshot) else None,
        ) as image:
            size_bytes = image.size()
            if volume.size_bytes < size_bytes:
                raise errors.Invalid(
                    f'volume {volume.id} has {volume.size_bytes} bytes, '
                    f'fewer than its source with {size_bytes}'
                )
            depth = self.tending.depth(image) + 1
            left = {} if is_snapshot else image.snapshots()
        if left:
            self._sweep_moments(origin, left)
        if depth > self.link.settings.clone_depth_max:
            self.tending.note(volume.pool, names.image(volume))

    def _sweep_moments(
        self, origin: model.Volume, left: dict[str, int]
    ) -> None:
        """Remove moments of clones that are there, and of dead tries."""
        mine = {
            name: size for name, size in left.items()
            if names.MOMENT.fullmatch(name)
            and self.tending.is_old(origin, name)
        }
        self.images.end_moments(origin.pool, names.image(origin), mine)

    def _take(self, origin: model.Volume, moment: str) -> None:
        """Take the snapshot that the clone is made from, anew."""
        with self.link.image(
            origin.pool, names.image(origin), is_read_only=False
        ) as image:
            if moment in image.snapshots():
                image.remove_snapshot(moment)
            image.do('create_snap', lambda raw: raw.create_snap(moment))

    def _clone(
        self, origin: model.Volume, snapshot: str, volume: model.Volume
    ) -> None:
        self.images.make(volume, lambda wire: wire.rbd.RBD().clone(
            wire.ioctx(origin.pool), names.image(origin), snapshot,
            wire.ioctx(volume.pool), names.image(volume),
            features=wire.features,
        ))

    def _end(self, origin: model.Volume, moment: str) -> None:
        with self.link.image(
            origin.pool, names.image(origin), is_read_only=False
        ) as image, contextlib.suppress(errors.NotFound):
            image.remove_snapshot(moment)

    def _finish(self, volume: model.Volume, name: str) -> None:
        with self.link.image(
            volume.pool, name, is_read_only=False
        ) as image:
            if image.size() < volume.size_bytes:
                image.do('resize', lambda raw: raw.resize(
                    volume.size_bytes, allow_shrink=False))
            # Its source's metadata came along.
            image.forget(*names.OURS, names.LIMIT)
        self.images.sign(volume)
