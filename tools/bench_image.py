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
        """Return times by name; leaves no volume behind."""
        found: dict[str, float] = {}
        with ImageServer(os.path.dirname(self._raw)) as web:
            for name, url, form in (
                ('image_file_raw', f'file://{self._raw}', 'raw'),
                ('image_http_raw', web.url(self._raw), 'raw'),
                ('image_file_qcow2', f'file://{self._qcow2}', 'qcow2'),
                ('image_http_qcow2', web.url(self._qcow2), 'qcow2'),
            ):
                found[name] = self._often(functools.partial(
                    self._create, 1, imageRef=url, image_format=form
                ))
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
        for noun, row_id in self._left:
            self._client.delete(f'/{noun}s/{row_id}')
            deadline = time.monotonic() + LIMIT_S
            while time.monotonic() < deadline:
                try:
                    self._client.get(f'/{noun}s/{row_id}')
                except errors.NotFound:
                    break
                time.sleep(LOOK_S)
