# SPDX-License-Identifier: Apache-2.0
"""Clients that ask the service for one thing after another, by a seed.

Each chooses from what it believes to be there: that is often wrong by the
time it asks, and a refusal is an answer. Who asks twice at once, and what a
kill cuts off, is left to chance.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from crash_bytes import BLOCK_BYTES
from crash_bytes import new_token
from crash_model import Model
from crash_model import Write
from crash_report import Request
from crash_roster import Held
from crash_roster import Known
from crash_roster import Roster
from service_process import Json
from service_process import ServiceProcess

from volume import errors
from volume.nbd import NbdClient

MIB = 1 << 20
HINTS = 'OS-SCH-HNT:scheduler_hints'
BACKENDS = ('tree', 'plain')
SETTLE_S = 20.0
UP_S = 60.0
LOOK_S = 0.05
VOLUMES_MAX = 16
LASTING = frozenset({'available', 'in-use', 'error'})
ODD_BYTES = (0, 0, 512, BLOCK_BYTES, 65536 - 512)

# How often each is asked for.
WEIGHTS = {
    'create': 10, 'create_from_image': 12, 'clone': 9, 'from_snapshot': 8,
    'extend': 6, 'snapshot': 11, 'delete_snapshot': 5, 'revert': 6,
    'flatten': 2, 'session': 16, 'hold': 7, 'work': 9, 'force_detach': 3,
    'upload': 6, 'delete': 6, 'delete_cascade': 4, 'cancel': 5,
}
MAKES = frozenset({'create', 'create_from_image', 'clone', 'from_snapshot'})


class Client:
    """One of several that ask at once."""

    def __init__(
        self,
        number: int,
        seed: int,
        service: ServiceProcess,
        roster: Roster,
        model: Model,
        history: list[Request],
        serving: threading.Event,
    ) -> None:
        self.number = number
        self._chance = random.Random(f'{seed} {number}')
        self._service = service
        self._roster = roster
        self._model = model
        self._history = history
        self._serving = serving
        self._asked = 0
        self._answer = ''
        self._verbs: dict[str, Callable[[], None]] = {
            name: getattr(self, name) for name in WEIGHTS
        }

    def some(self, may_go_on: Callable[[], bool]) -> None:
        """Ask for one thing after another."""
        while may_go_on():
            self._serving.wait(UP_S)
            self.one()

    def one(self) -> None:
        """Do something, by chance; what cannot be done yet is passed over."""
        asked = self._asked
        while self._asked == asked:
            name, = self._chance.choices(
                list(WEIGHTS), list(WEIGHTS.values())
            )
            if len(self._roster.volumes) >= VOLUMES_MAX and name in MAKES:
                name = self._chance.choice(['delete', 'delete_cascade'])
            self._verbs[name]()

    # What makes volumes.

    def create(self) -> None:
        size_bytes = self._size(4 * MIB)
        self.new_volume('create', size_bytes, backend=self._backend())

    def create_from_image(self) -> None:
        image = self._chance.choice(sorted(self._roster.images))
        self._from_image(image)

    def clone(self) -> None:
        source = self._some_volume()
        if source is None:
            return
        volume_id, known = source
        # Elsewhere it is a copy, by qemu-img or by ourselves.
        backend = self._chance.choice([known.backend, *BACKENDS])
        self.new_volume(
            'clone', known.size_bytes + self._more(), backend=backend,
            source_volid=volume_id,
        )

    def from_snapshot(self) -> None:
        source = self._roster.pick(self._chance, self._roster.snapshots)
        if source is None:
            return
        snapshot_id, known = source
        backend = self._chance.choice([known.backend, *BACKENDS])
        self.new_volume(
            'from_snapshot', known.size_bytes + self._more(),
            backend=backend, snapshot_id=snapshot_id,
        )

    def copy_slowly(self) -> None:
        """Ask for what takes a helper a while: the biggest image."""
        self._from_image('large.qcow2', wait=False)

    # What changes them.

    def extend(self) -> None:
        found = self._some_volume()
        if found is None:
            return
        volume_id, known = found
        size_bytes = known.size_bytes + MIB + self._more()
        if self._act('extend', volume_id, 'os-extend', {
            'new_size_bytes': size_bytes,
        }) is not None:
            known.size_bytes = size_bytes
            self._perhaps_settle('volume', volume_id)

    def snapshot(self) -> None:
        # The other has snapshots only where its file system has reflink.
        found = self._some_volume(self._chance.choice(['tree', 'tree', '']))
        if found is None:
            return
        volume_id, known = found
        snapshot_id = self._new_id()
        if self.ask(
            'snapshot', 'POST', '/snapshots',
            {'snapshot': {'volume_id': volume_id, 'force': True}},
            headers={'X-Snapshot-Id': snapshot_id},
            about=f'{snapshot_id} of {volume_id}',
        ) is not None:
            self._roster.add_snapshot(snapshot_id, Known(
                known.backend, known.size_bytes, volume_id
            ))
            self._perhaps_settle('snapshot', snapshot_id)

    def delete_snapshot(self) -> None:
        found = self._roster.pick(self._chance, self._roster.snapshots)
        if found and self.ask(
            'delete_snapshot', 'DELETE', f'/snapshots/{found[0]}',
            about=found[0],
        ) is not None:
            self._roster.drop(found[0])
            self._perhaps_settle('snapshot', found[0])

    def revert(self) -> None:
        found = self._roster.pick(self._chance, self._roster.snapshots)
        if found is not None:
            volume_id = found[1].volume_id
            if self._act('revert', volume_id, 'revert', {
                'snapshot_id': found[0],
            }) is not None:
                self._perhaps_settle('volume', volume_id)

    def flatten(self) -> None:
        found = self._some_volume('tree')
        if found and self._act(
            'flatten', found[0], 'os-flatten', {}
        ) is not None:
            self._perhaps_settle('volume', found[0])

    def delete(self) -> None:
        self._delete('delete', '')

    def delete_cascade(self) -> None:
        self._delete('delete_cascade', '?cascade=true')

    # What reads and writes them.

    def session(self) -> None:
        """Attach, write, flush, perhaps keep it meanwhile, and detach."""
        held = self._attach()
        if held is None:
            return
        if self._write(held) and self._chance.random() < 0.3:
            self.snapshot()
            self._write(held)
        self._detach(held)

    def hold(self) -> None:
        """Attach, write, and stay; a host that lives through the kills."""
        held = self._attach()
        if held is not None:
            self._write(held)
            self._roster.hold(held)

    def work(self) -> None:
        """Be a host that has a volume already: write, and perhaps go."""
        held = self._roster.take_held(self._chance)
        if held is None:
            return
        self._write(held)
        if self._chance.random() < 0.4:
            self._detach(held)
        else:
            self._roster.hold(held)

    def force_detach(self) -> None:
        held = self._roster.take_held(self._chance)
        if held is not None:
            self._act('force_detach', held.volume_id, 'os-force_detach', {
                'attachment_id': held.attachment_id,
            })

    def upload(self) -> None:
        found = self._some_volume()
        if found is None:
            return
        volume_id = found[0]
        image_format = self._chance.choice(['raw', 'qcow2'])
        path = self._service.path(
            'uploads', f'{self._new_id()}.{image_format}'
        )
        if self._act('upload', volume_id, 'os-volume_upload_image', {
            'image_name': f'file://{path}', 'disk_format': image_format,
            'force': True,
        }) is not None:
            self._perhaps_settle('volume', volume_id)

    def cancel(self) -> None:
        """Stop an open job, of our own or of anybody."""
        if self._chance.random() < 0.7:
            self._from_image('large.qcow2', wait=False)
        with contextlib.suppress(errors.VolumeError):
            jobs = self._service.client.get(
                '/os-volume-jobs', state='open'
            )['jobs']
            if jobs:
                job_id = self._chance.choice(jobs)['id']
                self._roster.cancelled.add(job_id)
                self.ask(
                    'cancel', 'POST', f'/os-volume-jobs/{job_id}/action',
                    {'os-cancel': {}}, about=job_id,
                )

    # How.

    def new_volume(
        self,
        kind: str,
        size_bytes: int,
        *,
        backend: str,
        image: str = '',
        wait: bool | None = None,
        **wanted: Any,
    ) -> str:
        """Ask for a volume; return its id, whatever was answered."""
        volume_id = self._new_id()
        self._model.wish(volume_id, size_bytes, image)
        # It may be there even if nobody answers.
        self._roster.add_volume(volume_id, Known(backend, size_bytes))
        self.ask(
            kind, 'POST', '/volumes', {
                'volume': {'size_bytes': size_bytes, **wanted},
                HINTS: {'volume_id': volume_id, 'backend': backend},
            },
            about=f'{volume_id} in {backend} {wanted}',
        )
        if self._answer == 'refused':
            self._roster.drop(volume_id)
        if wait is None:
            self._perhaps_settle('volume', volume_id)
        return volume_id

    def ask(
        self,
        kind: str,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        headers: dict[str, str] | None = None,
        about: str = '',
    ) -> Json | None:
        """Ask once; return the answer, or None if it was no or none."""
        request = Request(
            kind, self.number, about, f'req-{self._new_id()}', time.time()
        )
        self._note(request)
        all_headers = {
            'X-Openstack-Request-Id': request.request_id, **(headers or {}),
        }
        client = self._service.client
        try:
            if method == 'DELETE':
                answer = client.delete(path, headers=all_headers)
            else:
                answer = client.post(path, body or {}, headers=all_headers)
        except (errors.Unavailable, errors.Unknown) as none:
            request.words = str(none)
            return None
        except errors.VolumeError as refused:
            is_bug = type(refused) is errors.VolumeError
            request.answer = 'internal error' if is_bug else 'refused'
            request.words = str(refused)
            return None
        finally:
            request.took_s = time.time() - request.at
            self._answer = request.answer
        request.answer = self._answer = 'accepted'
        return answer

    def _note(self, request: Request) -> None:
        self._history.append(request)
        self._asked += 1

    def _from_image(self, image: str, wait: bool | None = None) -> None:
        self.new_volume(
            'create_from_image',
            self._size(self._roster.images[image]),
            backend=self._backend(), image=image, wait=wait,
            imageRef=self._roster.url(self._chance, image),
        )

    def _delete(self, kind: str, query: str) -> None:
        found = self._some_volume()
        if found and self.ask(
            kind, 'DELETE', f'/volumes/{found[0]}{query}', about=found[0]
        ) is not None:
            self._roster.drop(found[0])
            self._perhaps_settle('volume', found[0])

    def _act(
        self, kind: str, volume_id: str, action: str, info: Json
    ) -> Json | None:
        return self.ask(
            kind, 'POST', f'/volumes/{volume_id}/action', {action: info},
            about=f'{volume_id} {info}',
        )

    def _attach(self) -> Held | None:
        found = self._some_volume()
        if found is None:
            return None
        made = self.ask('attach', 'POST', '/attachments', {'attachment': {
            'volume_uuid': found[0],
            'connector': {'host': f'client{self.number}'},
        }}, about=found[0])
        if made is None:
            return None
        attachment = made['attachment']
        held = Held(
            attachment['id'], found[0], found[1].size_bytes,
            attachment['connection_info']['uri'],
        )
        if self.ask(
            'complete', 'POST', f'/attachments/{held.attachment_id}/action',
            {'os-complete': {}}, about=held.attachment_id,
        ) is None:
            return None  # whoever looks for lost ones will end it
        return held

    def _detach(self, held: Held) -> None:
        self.ask(
            'detach', 'DELETE', f'/attachments/{held.attachment_id}',
            about=f'{held.attachment_id} of {held.volume_id}',
        )

    def _write(self, held: Held) -> bool:
        """Write blocks and flush; say whether both were answered."""
        request = Request('write', self.number, '', '', time.time())
        self._note(request)
        write = None
        try:
            with contextlib.closing(NbdClient(held.uri)) as disk:
                write = self._plan(held, disk.size_bytes)
                request.about = f'{held.volume_id} {sorted(write.tokens)}'
                self._model.wrote(write)
                for number, data in self._roster.runs(write.tokens):
                    disk.pwrite(data, number * BLOCK_BYTES)
                disk.flush()
                write.is_flushed = True
                request.answer = 'done'
        except (errors.VolumeError, OSError) as failed:
            # The daemon may be dead; it will be started again.
            request.words = str(failed)
        finally:
            request.took_s = time.time() - request.at
            if write is not None:
                write.ended_at = time.time()
        return request.answer == 'done'

    def _plan(self, held: Held, size_bytes: int) -> Write:
        count = size_bytes // BLOCK_BYTES
        tokens = {}
        for _ in range(self._chance.randint(1, 4)):
            start = self._chance.randrange(count)
            length = self._chance.randint(1, 24)
            for number in range(start, min(start + length, count)):
                tokens[number] = new_token(self._chance)
        return Write(held.volume_id, tokens, time.time())

    def _perhaps_settle(
        self, noun: str, row_id: str, chance: float = 0.5
    ) -> None:
        """Wait for what was asked for, or do not: by chance."""
        if self._chance.random() > chance:
            return
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and self._serving.is_set():
            try:
                found = self._service.client.get(f'/{noun}s/{row_id}')[noun]
            except errors.VolumeError:
                return
            if (
                found['status'] in LASTING
                or found['status'].startswith('error')
            ):
                return
            time.sleep(LOOK_S)

    def _some_volume(self, backend: str = '') -> tuple[str, Known] | None:
        """Choose a volume; mostly wait until it is made, as people do."""
        found = self._roster.pick(
            self._chance, self._roster.volumes,
            lambda known: not backend or known.backend == backend,
        )
        if found is not None:
            self._perhaps_settle('volume', found[0], 0.8)
        return found

    def _backend(self) -> str:
        return self._chance.choice(BACKENDS)

    def _size(self, least_bytes: int) -> int:
        sectors = -(-least_bytes // 512)
        return sectors * 512 + self._more()

    def _more(self) -> int:
        return (
            self._chance.choice([0, 0, 1, 4]) * MIB
            + self._chance.choice(ODD_BYTES)
        )

    def _new_id(self) -> str:
        return str(uuid.UUID(int=self._chance.getrandbits(128), version=4))
