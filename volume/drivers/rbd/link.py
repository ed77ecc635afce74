# SPDX-License-Identifier: Apache-2.0
"""The client object: every call of librados and librbd goes through here.

A call is a *question*, which changes nothing, or an *act*; that decides what
a time-out means. It runs in a native thread, since librbd waits without
knowing of greenthreads, and its errors become ours by one table.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from volume import concurrency
from volume import errors
from volume.drivers.rbd import failures
from volume.drivers.rbd import headers
from volume.drivers.rbd import names
from volume.drivers.rbd.options import Settings
from volume.drivers.rbd.watched import Watched
from volume.drivers.rbd.wire import Wire
from volume.node import Node

LOG = logging.getLogger(__name__)

T = TypeVar('T')
Connect = Callable[[Settings], Wire]
Told = Callable[[int, int], int]

USER, TRASH = 0, 2  # librbd's namespaces of snapshots


class Link:
    """One cluster, connected to when it is needed."""

    def __init__(
        self, settings: Settings, node: Node, connect: Connect
    ) -> None:
        self.settings = settings
        self.node = node
        self._connect = connect
        # Taken in native threads, where nothing green may be waited for.
        self._guard = concurrency.native().Lock()
        self._wire: Wire | None = None

    def ask(self, what: str, effect: Callable[[Wire], T]) -> T:
        """Return what a question answers.

        :raises Unavailable: the cluster does not answer
        """
        return self._call(f'ask {what}', effect, is_act=False)

    def do(self, what: str, effect: Callable[[Wire], T]) -> T:
        """Have an effect on the cluster.

        :raises Unknown: it may have happened
        """
        return self._call(what, effect, is_act=True)

    def watched(
        self, what: str, effect: Callable[[Wire, Told], object],
        watch: Callable[[float], None],
    ) -> None:
        """As ``do``, for long work that tells how far it is."""
        watched = Watched()

        def work() -> None:
            self._try(what, lambda wire: effect(wire, watched.told), True)

        self.node.act(f'rbd {what}', lambda: watched.run(work, watch))

    @contextlib.contextmanager
    def image(
        self, pool: str, name: str = '', *, id: str = '',
        snapshot: str | None = None, is_read_only: bool = True,
    ) -> Iterator[Image]:
        """Have an image open, by its name or its id.

        Open to be written it has a watch, by which others see it in use.

        :raises NotFound: there is none, or no such snapshot
        :raises Corrupt: there is one, and a part of it is not
        """
        what = f'image {name or id} of pool {pool}'
        try:
            wire, raw = self.ask(f'open {name or id}', lambda wire: (
                wire, wire.rbd.Image(
                    wire.ioctx(pool), name or None, snapshot, is_read_only,
                    id or None,
                ),
            ))
        except errors.NotFound as gone:
            if snapshot is not None:
                raise errors.NotFound(
                    f'{what} has no snapshot {snapshot}, or is not there'
                ) from gone
            if name and self.header(pool, name) is not None:
                raise errors.Corrupt(
                    f'{what} cannot be opened: the image that it is a clone '
                    'of, or a part of itself, is missing'
                ) from gone
            raise errors.NotFound(f'there is no {what}') from gone
        try:
            yield Image(self, pool, raw, what)
        finally:
            self.node.blocking(lambda: _close(wire, raw))

    def header(self, pool: str, name: str) -> str | None:
        """Return the id of an image that is there, but for what it needs."""
        return self.ask(
            f'header {name}', lambda wire: headers.find(wire, pool, name))

    def is_signed(self, pool: str, image_id: str, name: str) -> bool:
        """Say whether an image is a volume of ours, if it opens or not.

        :raises NotFound: it has no header
        """
        return is_signed(name, {names.ID: self.ask(
            'signature', lambda wire: headers.note(
                wire, pool, image_id, names.ID))})

    def _call(
        self, what: str, effect: Callable[[Wire], T], *, is_act: bool
    ) -> T:
        return self.node.act(
            f'rbd {what}', lambda: self.node.blocking(
                lambda: self._try(what, effect, is_act))
        )

    def _try(
        self, what: str, effect: Callable[[Wire], T], is_act: bool
    ) -> T:
        wire = self._open()
        try:
            return effect(wire)
        except wire.failures as failed:
            if failures.code(failed) in failures.LOST:
                self._drop(wire)
            raise failures.mean(f'rbd {what}', failed, is_act) from failed

    def _open(self) -> Wire:
        with self._guard:
            if self._wire is None:
                self._wire = self._connect(self.settings)
                weakref.finalize(self, _end, self._wire).atexit = False
            return self._wire

    def _drop(self, wire: Wire) -> None:
        """Let the next call connect anew; images that are open go on."""
        with self._guard:
            if self._wire is wire:
                self._wire = None
                LOG.warning('the connection to the cluster is given up')


class Image:
    """An image that is open."""

    def __init__(self, link: Link, pool: str, raw: Any, what: str) -> None:
        self.link = link
        self.pool = pool
        self.what = what
        self.raw = raw

    def ask(self, what: str, effect: Callable[[Any], T]) -> T:
        return self.link.ask(what, lambda wire: effect(self.raw))

    def do(self, what: str, effect: Callable[[Any], T]) -> T:
        return self.link.do(what, lambda wire: effect(self.raw))

    def watched(
        self, what: str, effect: Callable[[Any, Told], object],
        watch: Callable[[float], None],
    ) -> None:
        """As ``do``, for long work; what ``watch`` raises ends it."""
        self.link.watched(
            what, lambda wire, told: effect(self.raw, told), watch)

    def size(self) -> int:
        return self.ask('size', lambda raw: int(raw.size()))

    def id(self) -> str:
        return self.ask('id', lambda raw: str(raw.id()))

    def notes(self) -> dict[str, str]:
        """Return the metadata, as far as it is text."""
        return self.link.ask('metadata', lambda wire: headers.notes(
            wire, self.pool, str(self.raw.id())))

    def note(self, key: str, value: str) -> None:
        self.do('metadata_set', lambda raw: raw.metadata_set(key, value))

    def forget(self, *keys: str) -> None:
        """Remove metadata, as far as it is there; keys may be prefixes."""
        for key in self.notes():
            if key.startswith(keys):
                self.do('metadata_remove', functools.partial(_forget, key))

    def snapshots(self) -> dict[str, int]:
        """Return name and size of the snapshots that users make."""
        found = self.ask('snapshots', lambda raw: list(raw.list_snaps()))
        return {
            each['name']: each['size'] for each in found
            if each['namespace'] == USER
        }

    def has_any_snapshot(self) -> bool:
        """Say whether there is one, those in the trash included."""
        return self.ask('snapshots', lambda raw: any(raw.list_snaps()))

    def parent(self) -> tuple[str, str] | None:
        """Return pool and id of the image that this is a clone of."""

        def look(wire: Wire) -> tuple[str, str] | None:
            try:
                spec = self.raw.get_parent_image_spec()
            except wire.rbd.ImageNotFound:
                return None
            return str(spec['pool_name']), str(self.raw.parent_id())

        return self.link.ask('parent', look)

    def watchers(self) -> list[Mapping[str, Any]]:
        """Return who has the image open to be written, but for us."""

        def look(wire: Wire) -> list[Mapping[str, Any]]:
            own = wire.client()
            return [
                each for each in wire.watchers(self.raw)
                if each['id'] != own
            ]

        return self.link.ask('watchers', look)

    def remove_snapshot(self, name: str) -> None:
        self.do('remove_snap', lambda raw: raw.remove_snap(name))


def is_signed(name: str, notes: Mapping[str, str]) -> bool:
    """Say whether an image is a volume of ours."""
    volume_id = names.volume_id(name)
    return volume_id is not None and notes.get(names.ID) == volume_id


def _forget(key: str, raw: Any) -> None:
    with contextlib.suppress(KeyError):
        raw.metadata_remove(key)


def _close(wire: Wire, raw: Any) -> None:
    try:
        raw.close()
    except wire.failures as failed:
        # Nothing waits in a cache, so nothing is lost.
        LOG.debug('an image was not closed: %s', failed)


def _end(wire: Wire) -> None:
    """Close the connection of a driver that nobody has any more."""
    concurrency.native().Thread(target=wire.close, daemon=True).start()
