# SPDX-License-Identifier: Apache-2.0
"""How long whole volumes take: filled from images, kept, cloned.

Each is timed from the request to the moment at which REST says that it is
done, in milliseconds; the median of several.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable

import bench_floor
from demo_screen import Failed
from demo_web import ImageServer

from volume import errors
from volume.cli.client import Client

GIB = 1 << 30
LOOK_S = 0.002
LIMIT_S = 300.0
TIMES = 5


class Images:
    """Images of a directory, into volumes of a service."""

    def __init__(self, url: str, raw: str, qcow2: str) -> None:
        self._client = Client(url)
        self._raw = raw
        self._qcow2 = qcow2
        self._left: list[tuple[str, str]] = []

    def measure(self) -> dict[str, float]:
        """Return times by name; leaves no volume behind.

        What an image is compared with, ``base_…``, is measured in turn with
        it: a disk is not as quick in one minute as in the next.
        """
        found: dict[str, float] = {}
        with ImageServer(os.path.dirname(self._raw)) as web:
            for form, path in ('raw', self._raw), ('qcow2', self._qcow2):
                for way, url in (
                    ('file', f'file://{path}'), ('http', web.url(path)),
                ):
                    ours, base = self._in_turn(way, url, path, form)
                    found[f'image_{way}_{form}'] = ours
                    found[f'base_{way}_{form}'] = base
        for gib in 1, 1024:
            source, _ = self._create(
                gib, imageRef=f'file://{self._qcow2}', image_format='qcow2'
            )
            kept, _ = self._make('snapshot', {'volume_id': source})
            found[f'clone_{gib}_gib'] = self._often(
                functools.partial(self._create, gib, snapshot_id=kept)
            )
            found[f'snapshot_{gib}_gib'] = self._often(functools.partial(
                self._make, 'snapshot', {'volume_id': source}
            ))
        self._clear()
        return found

    def _in_turn(
        self, way: str, url: str, path: str, form: str
    ) -> tuple[float, float]:
        """Return the service's time, and the tools'."""
        made = os.path.join(os.path.dirname(path), 'made')
        spool = os.path.join(os.path.dirname(path), 'spool')

        def tools() -> None:
            source = path
            if way == 'http' and bench_floor.download(url, spool):
                source = spool
            bench_floor.convert_durably(source, form, made)

        ours, base = [], []
        for _ in range(TIMES):
            base.append(bench_floor.median(tools, times=1))
            bench_floor.gone(made)
            bench_floor.gone(spool)
            ours.append(self._create(1, imageRef=url, image_format=form)[1])
            self._clear()
        return statistics.median(ours), statistics.median(base)

    def _often(self, deed: Callable[[], tuple[str, float]]) -> float:
        return statistics.median(deed()[1] for _ in range(TIMES))

    def _create(self, gib: int, **source: str) -> tuple[str, float]:
        hints = {
            key: source.pop(key) for key in ('image_format',) if key in source
        }
        return self._make('volume', {'size': gib, **source}, hints)

    def _make(
        self, noun: str, wish: dict[str, object],
        hints: dict[str, str] | None = None,
    ) -> tuple[str, float]:
        """Return the id of a new volume or snapshot, and its time in ms."""
        body: dict[str, object] = {noun: wish}
        if hints:
            body['OS-SCH-HNT:scheduler_hints'] = hints
        began = time.perf_counter()
        made = self._client.post(f'/{noun}s', body)[noun]
        self._left.insert(0, (noun, made['id']))
        while (status := self._status(noun, made['id'])) != 'available':
            took_s = time.perf_counter() - began
            if status.startswith('error') or took_s > LIMIT_S:
                raise Failed(f'{noun} {made["id"]} is {status}')
            time.sleep(LOOK_S)
        return made['id'], (time.perf_counter() - began) * 1000

    def _status(self, noun: str, row_id: str) -> str:
        return str(self._client.get(f'/{noun}s/{row_id}')[noun]['status'])

    def _clear(self) -> None:
        while self._left:
            noun, row_id = self._left.pop(0)
            self._client.delete(f'/{noun}s/{row_id}')
            deadline = time.monotonic() + LIMIT_S
            while time.monotonic() < deadline:
                try:
                    self._client.get(f'/{noun}s/{row_id}')
                except errors.NotFound:
                    break
                time.sleep(LOOK_S)
