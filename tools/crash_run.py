# SPDX-License-Identifier: Apache-2.0
"""One seed: a service, clients, kills; after each of them a look at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator

import crash_check
import crash_files
import crash_kill
import crash_rows
from crash_load import Client
from crash_model import Model
from crash_model import Thing
from crash_reader import Storage
from crash_report import Difference
from crash_report import Outcome
from crash_roster import Held
from crash_roster import Known
from crash_roster import Roster
from crash_rows import Rows
from demo_family import Family
from demo_screen import Failed
from demo_web import ImageServer
from service_process import ServiceProcess

from volume import errors
from volume.nbd import NbdClient

QUIET_S = 120.0
HOST_S = 20.0
HOLD_TRIES = 10
AGAIN = 0.3  # how often a restarted service is killed once more
LOOK_S = 0.1
ROUND_S = 300.0
CONFIGURATION = """\
[DEFAULT]
enabled_backends = tree, plain
state_path = {directory}/state
host = crash
# The images are on loopback, where they are refused otherwise.
image_allowed_networks = 127.0.0.0/8
image_allowed_directories = {images}, {directory}/uploads
image_upload_directories = {directory}/uploads
# Slow copies are the ones that are met by a kill.
image_rate_bytes_per_s = 25165824
lease_wait_s = 20
sweep_interval_s = 0.5
stats_interval_s = 1
upkeep_interval_s = 0.5
log_level = INFO

[api]
port = 0

[tree]
driver = qcow
directories = {directory}/tree

[plain]
driver = file
directories = {directory}/plain
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done for each seed."""

    operations: int = 100
    kills: int = 5
    clients: int = 4
    files_s: float = 20.0  # in which what goes on by itself has tidied up


class Run:
    """One seed, from a fresh database to an empty storage."""

    def __init__(
        self,
        seed: int,
        settings: Settings,
        directory: str,
        family: Family,
        images: dict[str, Thing],
        server: ImageServer,
    ) -> None:
        self.outcome = Outcome(seed, time.time())
        self.directory = directory
        self.model = Model(images)
        self.roster = Roster(
            server, {name: each.size_bytes for name, each in images.items()}
        )
        self.service = ServiceProcess(
            family, directory,
            CONFIGURATION.format(
                directory=directory, images=server.directory
            ),
            ('tree', 'plain'),
        )
        os.mkdir(self.service.path('uploads'))
        self.storage = Storage(self.service.path('volume.conf'))
        self._settings = settings
        self._chance = random.Random(f'{seed} kills')
        self._serving = threading.Event()
        self._stop = threading.Event()
        self.clients = [
            Client(
                number, seed, self.service, self.roster, self.model,
                self.outcome.requests, self._serving,
            ) for number in range(settings.clients + 1)
        ]

    def go(self) -> Outcome:
        """Do all of it; what differs stands in the outcome."""
        began_at = time.monotonic()
        try:
            self._go()
        except (Failed, errors.VolumeError, OSError) as failed:
            self.differ('broken', 'the run', f'{type(failed).__name__}: '
                        f'{failed}')
        finally:
            self._stop.set()
            self.outcome.took_s = time.monotonic() - began_at
        return self.outcome

    def _go(self) -> None:
        self.start()
        targets = crash_kill.plan(self._chance, self._settings.kills)
        for target in targets or ['']:
            self.work(target)
            self.check()
            if self.outcome.differences:
                return
        self.stop()
        self.look()
        if not self.outcome.differences:
            self.start()
            self.clear()

    # The service.

    def start(self) -> None:
        self.service.start()
        self._serving.set()

    def stop(self) -> None:
        """End the service as its operator would."""
        self._serving.clear()
        code = self.service.stop()
        if code:
            self.differ('stop', 'the service', f'ended with code {code}')

    def rows(self) -> Rows:
        return crash_rows.read(self.service.path('state', 'volume.sqlite'))

    def differ(self, kind: str, what: str, detail: str) -> None:
        self.outcome.differences.append(Difference(kind, what, detail))

    # A round.

    def work(self, target: str) -> None:
        """Have the clients work, and kill somebody in the middle of it."""
        share = self._settings.operations // max(self._settings.kills, 1)
        begun = itertools.count(1)
        reached = threading.Event()
        point = self._chance.randint(share // 4, max(share * 3 // 4, 1))

        def may_go_on() -> bool:
            number = next(begun)
            if number >= point:
                reached.set()
            return number <= share and not self._stop.is_set()

        killer, *clients = self.clients
        with concurrent.futures.ThreadPoolExecutor(
            len(self.clients)
        ) as threads:
            try:
                running = [
                    threads.submit(each.some, may_go_on) for each in clients
                ]
                if target:
                    reached.wait(ROUND_S)
                    time.sleep(self._chance.random() * 0.3)
                    self._kill(target, lambda: running.append(threads.submit(
                        killer.copy_slowly if target == 'helper'
                        else killer.hold
                    )))
                for each in running:
                    each.result(ROUND_S)
            except BaseException:
                # Let nobody begin anything more.
                self._stop.set()
                self._serving.set()
                raise

    def _kill(self, target: str, provoke: Callable[[], None]) -> None:
        if target in crash_kill.ENDS_DAEMON:
            # Somebody has to lose something, and to have it again.
            for _ in range(HOLD_TRIES):
                if self.roster.pin(self._chance):
                    break
                self.clients[0].hold()
        again = True
        while again:
            ends_service = target in crash_kill.ENDS_SERVICE
            if ends_service:
                self._serving.clear()
            killed = crash_kill.kill(
                target, self.service, self._chance, provoke,
                lambda: self.rows().open_jobs(),
            )
            if ends_service:
                self.start()
            if killed is not None:
                self.outcome.kills.append(killed)
            # Recovery, too, has to live through a kill.
            again = ends_service and self._chance.random() < AGAIN
            if again:
                time.sleep(self._chance.random())

    # A look at everything.

    def check(self) -> None:
        """Wait until all is settled, and compare it with the model."""
        if not self.service.is_alive():
            self.differ('ended', 'the service', 'ended by itself')
            return
        left = self.settle(QUIET_S)
        if left:
            self.outcome.differences += left
            return
        self.look()
        self._remove_failed()
        self._correct()

    def settle(self, limit_s: float) -> list[Difference]:
        """Wait until nothing is under way; return what goes on all the same.

        Hosts that had no answer would ask again; theirs are ended.
        """
        deadline = time.monotonic() + limit_s
        while True:
            self._end_lost()
            left = crash_check.unsettled(self.rows())
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(LOOK_S)

    def _end_lost(self) -> None:
        for attachment_id in self.rows().attachments:
            if attachment_id not in self.roster.held:
                with contextlib.suppress(errors.VolumeError):
                    self.service.client.delete(
                        f'/attachments/{attachment_id}'
                    )

    def look(self) -> None:
        """Compare everything with what it must be."""
        rows = self.rows()
        outcome = self.outcome
        outcome.checks += 1
        self.model.play(rows.jobs.values())
        crash_check.recoveries(rows, outcome.kills)
        outcome.recovered_jobs = sum(
            row['token'] > 1 for row in rows.jobs.values()
        )
        found = outcome.differences
        found += crash_check.promises(
            rows, self.model, outcome, self.roster.cancelled
        )
        found += crash_check.presence(rows, self.model)
        found += crash_check.claims(rows)
        found += self._bytes(rows)
        found += self._hosts(rows)
        found += self._uploads()
        found += self._files()
        found += [
            Difference('reconcile', each['what'], each['detail'])
            for each in self.service.manage('reconcile', '--dry-run')
        ]

    def _bytes(self, rows: Rows) -> Iterator[Difference]:
        for noun, things in (
            ('volume', self.model.volumes),
            ('snapshot', self.model.snapshots),
        ):
            live = rows.live(noun)
            for row_id, thing in things.items():
                row = live.get(row_id)
                if row is None or row['status'].startswith('error'):
                    continue
                what = f'{noun} {row_id} in {row["backend"]}'
                try:
                    with self.storage.open(rows, row) as fill:
                        yield from crash_check.content(
                            what, thing, thing.size_bytes, fill, self.outcome
                        )
                except (Failed, errors.VolumeError) as failed:
                    yield Difference(
                        'bytes', what, f'cannot be read: {failed}'
                    )

    def _hosts(self, rows: Rows) -> Iterator[Difference]:
        """See that whoever is attached still has the volume."""
        for held in list(self.roster.held.values()):
            what = f'attachment {held.attachment_id} of {held.volume_id}'
            row = rows.attachments.get(held.attachment_id)
            if row is None or held.volume_id not in self.model.volumes:
                yield Difference('host', what, 'is gone')
                continue
            thing = self.model.volumes[held.volume_id]
            try:
                with contextlib.closing(_reach(held)) as disk:
                    yield from crash_check.content(
                        what, thing, disk.size_bytes, disk.pread_into,
                        self.outcome,
                    )
            except errors.VolumeError as failed:
                yield Difference('host', what, f'is cut off: {failed}')

    def _uploads(self) -> Iterator[Difference]:
        """Compare what was uploaded, and remove it."""
        perhaps = {
            path: thing for path, thing in self.model.perhaps_uploads.items()
            if os.path.exists(path)
        }
        for path, thing in {**self.model.uploads, **perhaps}.items():
            raw = path
            try:
                if path.endswith('.qcow2'):
                    raw = f'{path}.raw'
                    self.service.run(
                        'qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw',
                        path, raw,
                    )
                with open(raw, 'rb') as f:

                    def fill(buffer: bytearray, offset: int) -> None:
                        f.seek(offset)
                        if f.readinto(buffer) != len(buffer):
                            raise Failed(f'it is cut off at {offset}')

                    yield from crash_check.content(
                        f'image {path}', thing, thing.size_bytes, fill,
                        self.outcome,
                    )
            except (Failed, OSError) as failed:
                yield Difference('bytes', f'image {path}', str(failed))
            for each in {path, raw}:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(each)
        self.model.uploads.clear()
        self.model.perhaps_uploads.clear()
        for name in os.listdir(self.service.path('uploads')):
            yield Difference(
                'files', f'uploads/{name}', 'is of no upload that was done'
            )

    def _files(self) -> list[Difference]:
        """Wait until what goes on by itself has tidied up."""
        deadline = time.monotonic() + self._settings.files_s
        while True:
            left = self._strangers()
            is_late = time.monotonic() > deadline
            if not left or is_late or not self.service.is_alive():
                return left
            time.sleep(LOOK_S)

    def _strangers(self) -> list[Difference]:
        try:
            return [
                Difference(
                    'files', os.path.relpath(path, self.directory),
                    'is there, and no row knows it',
                ) for path in crash_files.strangers(
                    self.directory, self.rows()
                )
            ]
        except OSError as failed:
            # A layer may go while we look; it must not be missed for long.
            return [Difference('files', self.directory, str(failed))]

    # Afterwards.

    def _remove_failed(self) -> None:
        """What could not be made can be deleted."""
        rows = self.rows()
        for noun in 'snapshot', 'volume':
            for row_id, row in rows.live(noun).items():
                if row['status'].startswith('error'):
                    self._delete(noun, row_id)

    def _delete(self, noun: str, row_id: str, query: str = '') -> None:
        try:
            self.service.client.delete(f'/{noun}s/{row_id}{query}')
        except errors.VolumeError as refused:
            self.differ('delete', f'{noun} {row_id}', str(refused))

    def _correct(self) -> None:
        rows = self.rows()
        self.roster.correct(
            {
                row_id: Known(row['backend'], row['size_bytes'])
                for row_id, row in rows.live('volume').items()
            },
            {
                row_id: Known(
                    row['backend'], row['size_bytes'], row['volume_id']
                )
                for row_id, row in rows.live('snapshot').items()
            },
        )

    def clear(self) -> None:
        """Delete everything: nothing may be left, no byte and no claim."""
        self.roster.held.clear()
        self.outcome.differences += self.settle(QUIET_S)
        for row_id in self.rows().live('volume'):
            self._delete('volume', row_id, '?cascade=true')
        self.outcome.differences += self.settle(QUIET_S)
        rows = self.rows()
        for noun in 'volume', 'snapshot':
            for row_id, row in rows.live(noun).items():
                self.differ(
                    'delete', f'{noun} {row_id}',
                    f'is {row["status"]}: {row["reason"]}',
                )
        self.outcome.differences += crash_check.claims(rows)
        self.outcome.differences += self._files()
        self.stop()


def _reach(held: Held) -> NbdClient:
    """Connect as the host does that lost its connection.

    :raises VolumeError: nobody answers there
    """
    deadline = time.monotonic() + HOST_S
    while True:
        try:
            return NbdClient(held.uri)
        except errors.VolumeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)
