# SPDX-License-Identifier: Apache-2.0
"""Upkeep: empty the trash, and flatten clones that stand on too many.

Both go in pieces. Of a large image in the trash a part is cut off at a time;
a flatten is stopped after a while and goes on where it was. An image that
somebody else wants, or uses, is let go of at once. One that fails is passed
over for a while, and keeps no other waiting.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from volume import errors
from volume import model
from volume.drivers.rbd import names
from volume.drivers.rbd.keys import Keys
from volume.drivers.rbd.link import Image
from volume.drivers.rbd.link import is_signed
from volume.drivers.rbd.link import Link

PIECE_BYTES = 64 << 30
FLATTEN_S = 10.0
HELD_S = 300.0  # until an image with clones, or in trouble, is seen again
MOMENT_S = 3600.0  # no clone takes so long to begin
POLL_S = 0.01
DEPTH_MAX = 64
RELEASE_S = 60.0


class Tending:
    """What upkeep knows, and whom it lets go first."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._noted = Keys(link, names.FLATTEN)
        self._guard = threading.Lock()
        self._flattening: tuple[str, str] | None = None
        self._is_wanted = False
        # What images in the trash store, by id; and which images are passed
        # over until when, by id or name. Forgotten with the process, and
        # found out again.
        self._stored: dict[str, int] = {}
        self._held: dict[str, float] = {}

    def hidden_bytes(self, pool: str) -> int:
        """Return what deleted images still store, as far as was seen."""
        return sum(
            self._stored.get(each['id'], 0) for each in self._trash(pool)
        )

    def upkeep(self, pool: str) -> bool:
        failed: list[errors.VolumeError] = []
        is_done = self._empty_trash(pool, failed) or self._flatten_one(
            pool, failed)
        if failed:
            raise failed[0]
        return is_done

    # The trash.

    def _trash(self, pool: str) -> list[dict[str, Any]]:
        """Return what was thrown away and has a name like ours."""
        found = self.link.ask('trash_list', lambda wire: list(
            wire.rbd.RBD().trash_list(wire.ioctx(pool))))
        return [each for each in found if names.volume_id(each['name'])]

    def _empty_trash(
        self, pool: str, failed: list[errors.VolumeError]
    ) -> bool:
        """Remove a piece of what is due; say if anything was done."""
        for each in self._trash(pool):
            image_id = each['id']
            if self._held.get(image_id, 0.0) > time.monotonic():
                continue
            if not _is_due(each['deferment_end_time']):
                if image_id not in self._stored:
                    with self._passed(image_id, failed):
                        self._measure(pool, image_id)
                continue
            with self._passed(image_id, failed):
                try:
                    is_gone = self._remove_piece(pool, image_id, each['name'])
                except (errors.Busy, errors.Denied):
                    self._held[image_id] = time.monotonic() + HELD_S
                    continue
                except errors.NotFound:
                    is_gone = True
                if is_gone:
                    self._stored.pop(image_id, None)
                    self._held.clear()  # it may have been the last clone
                return True
        return False

    def _remove_piece(self, pool: str, image_id: str, name: str) -> bool:
        """Remove the image, or cut a piece off; say if it is gone.

        :raises Busy: it has clones, or is another service's
        """
        try:
            with self.link.image(pool, id=image_id) as image:
                if not is_signed(name, image.notes()):
                    raise errors.Busy(f'{image.what} is not ours')
                if image.has_any_snapshot():
                    if image_id not in self._stored:
                        self._stored[image_id] = _stored(image)
                    raise errors.Busy(f'{image.what} has clones')
                size_bytes = image.size()
            if size_bytes > PIECE_BYTES:
                self._cut(pool, image_id, size_bytes - PIECE_BYTES)
                return False
        except errors.NotFound:
            self._need_remains(pool, image_id, name)
        self.link.do('trash_remove', lambda wire: wire.rbd.RBD().trash_remove(
            wire.ioctx(pool), image_id))
        return True

    def _need_remains(self, pool: str, image_id: str, name: str) -> None:
        """See that what cannot be opened may go.

        Without a header it is what a removal that was cut off has left.
        With one, what it stands on is gone; it is whose it says.

        :raises Busy: it is another service's
        """
        with contextlib.suppress(errors.NotFound):
            if not self.link.is_signed(pool, image_id, name):
                raise errors.Busy(
                    f'image {image_id} of pool {pool} is not ours')

    def _cut(self, pool: str, image_id: str, size_bytes: int) -> None:
        with self.link.image(
            pool, id=image_id, is_read_only=False
        ) as image:
            image.do('resize', lambda raw: raw.resize(
                size_bytes, allow_shrink=True))

    def _measure(self, pool: str, image_id: str) -> None:
        with contextlib.suppress(errors.NotFound):
            with self.link.image(pool, id=image_id) as image:
                self._stored[image_id] = _stored(image)

    @contextlib.contextmanager
    def _passed(
        self, key: str, failed: list[errors.VolumeError]
    ) -> Iterator[None]:
        """Pass over what fails, for a while, and keep its error.

        A cluster that is silent ends the round: each would take its time.
        """
        try:
            yield
        except errors.VolumeError as error:
            self._held[key] = time.monotonic() + HELD_S
            if isinstance(error, (errors.Unavailable, errors.Unknown)):
                raise
            failed.append(error)

    # Chains.

    def depth(self, image: Image) -> int:
        """Return how many images it stands on."""
        parent = image.parent()
        for depth in range(DEPTH_MAX):
            if parent is None:
                return depth
            pool, image_id = parent
            with self.link.image(pool, id=image_id) as each:
                parent = each.parent()
        return DEPTH_MAX

    def is_old(self, origin: model.Volume, moment: str) -> bool:
        """Say whether a snapshot that a clone begins with is a dead try's."""

        def look(raw: Any) -> float:
            taken: datetime.datetime = raw.get_snap_timestamp(
                raw.snap_get_id(moment))
            return taken.replace(tzinfo=datetime.UTC).timestamp()

        try:
            with self.link.image(origin.pool, names.image(origin)) as image:
                return image.ask('moment', look) < time.time() - MOMENT_S
        except errors.NotFound:
            return False

    def note(self, pool: str, name: str) -> None:
        """Have an image flattened by upkeep, once there is time."""
        self._noted.add(pool, name)

    def _flatten_one(
        self, pool: str, failed: list[errors.VolumeError]
    ) -> bool:
        """Flatten for a while one that nobody uses; say if there was one."""
        for name in self._noted.some(pool):
            if self._held.get(name, 0.0) > time.monotonic():
                continue
            with self._passed(name, failed):
                try:
                    with self.link.image(pool, name) as image:
                        is_flat = image.parent() is None
                        # A host that was let in may open it at any time.
                        is_used = bool(image.watchers()) or any(
                            key.startswith(names.HOST)
                            for key in image.notes()
                        )
                except errors.NotFound:
                    is_flat, is_used = True, False
                if is_used:
                    continue
                if not is_flat and not self._flatten_slice(pool, name):
                    return True
                self._noted.remove(pool, name)
                return True
        return False

    def _flatten_slice(self, pool: str, name: str) -> bool:
        """Say whether it is flat now; it is not if the time was over."""
        deadline = time.monotonic() + FLATTEN_S

        def watch(percent: float) -> None:
            if self._is_wanted or time.monotonic() > deadline:
                raise errors.Cancelled('upkeep goes on later')

        with self._guard:
            self._flattening, self._is_wanted = (pool, name), False
        try:
            self.flatten(pool, name, watch)
        except (errors.Cancelled, errors.NotFound, errors.Busy):
            return False
        finally:
            self._flattening = None
        return True

    def release(self, pool: str, name: str) -> None:
        """Have upkeep let go of an image that somebody wants."""
        deadline = time.monotonic() + RELEASE_S
        while self._flattening == (pool, name):
            self._is_wanted = True
            if time.monotonic() > deadline:
                raise errors.Busy(
                    f'image {name} of pool {pool} is being flattened'
                )
            time.sleep(POLL_S)

    def flatten(
        self, pool: str, name: str, watch: Callable[[float], None]
    ) -> None:
        """Flatten, telling ``watch`` how far it is."""
        with self.link.image(pool, name, is_read_only=False) as image:
            image.watched('flatten', lambda raw, told: raw.flatten(
                on_progress=told), watch)


def _is_due(when: datetime.datetime) -> bool:
    return when.replace(tzinfo=datetime.UTC).timestamp() <= time.time()


def _stored(image: Image) -> int:
    """Return what an image stores of its own, by whole objects."""
    size_bytes = image.size()
    total = 0

    def count(offset: int, length: int, exists: bool) -> None:
        nonlocal total
        total += length if exists else 0

    image.ask('diff', lambda raw: raw.diff_iterate(
        0, size_bytes, None, count, include_parent=False, whole_object=True))
    return total
