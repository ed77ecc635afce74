# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of the real service at random moments of a mixed load.

After the restart nothing stays in a transitional state, every id that was
accepted is there or was deleted by us, every ``available`` volume has its
bytes, and ``reconcile --dry-run`` finds nothing. The seed is in the test's
name; what the threads of the service do between two kills is not ours to
repeat, so a seed repeats the load and not the moment.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import http.client
import os
import random
import subprocess
import time
import unittest
import uuid
from typing import Any

from tests.process import Refused
from tests.process import ServiceProcess
from volume import errors
from volume.nbd import NbdClient

SEEDS = int(os.environ.get('VOLUME_TEST_KILL_SEEDS', '10'))
ROUNDS = 4
CLIENTS = 4
OPERATIONS = 12
SIZE = 4 << 20
LASTING = {'available', 'in-use', 'error'}
SECTIONS = """
[q]
driver = qcow
directories = {root}/layers
[f]
driver = file
directories = {root}/files
"""


class Load:
    """Random requests, and what must be true of each volume after them."""

    def __init__(
        self, service: ServiceProcess, seed: int, number: int
    ) -> None:
        self.service = service
        self.random = random.Random(seed * 100 + number)
        # What each volume may hold: more than one if we died while writing.
        self.expected: dict[str, list[bytes]] = {}
        self.kept: dict[str, list[bytes]] = {}
        self.done: collections.Counter[str] = collections.Counter()
        self.image = os.path.join(service.root, 'images', f'{number}.raw')
        self.content = bytes(1 << 20) + b'i' * (1 << 20) + bytes(2 << 20)
        with open(self.image, 'wb') as f:
            f.write(self.content)

    def one(self) -> None:
        """Ask for one thing; a refusal is an answer, a dead service too."""
        verbs = [
            self.create, self.create, self.create_from_image, self.clone,
            self.snapshot, self.delete, self.delete_snapshot, self.extend,
            self.write, self.write,
        ]
        verb = self.random.choice(verbs)
        try:
            verb()
            self.done[verb.__name__] += 1
        except Refused:
            pass
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)  # it is dead, and will be back
        except errors.VolumeError:
            pass  # the export ended under our write

    def some(self) -> None:
        for _ in range(OPERATIONS):
            self.one()

    def pick(self, of: dict[str, list[bytes]]) -> str | None:
        return self.random.choice(sorted(of)) if of else None

    def new(self, contents: list[bytes], **wish: Any) -> None:
        volume_id = str(uuid.UUID(int=self.random.getrandbits(128)))
        self.expected[volume_id] = contents
        self.service.call('POST', '/volumes', {
            'volume': {'size_bytes': len(contents[0]), **wish},
            'OS-SCH-HNT:scheduler_hints': {
                'volume_id': volume_id,
                'backend': self.random.choice('qf')
                if 'source_volid' not in wish else None,
            },
        })
        if self.random.random() < 0.5:
            self.service.wait(volume_id, *LASTING)

    def create(self) -> None:
        self.new([bytes(SIZE)])

    def create_from_image(self) -> None:
        self.new([self.content], imageRef=f'file://{self.image}')

    def clone(self) -> None:
        source = self.pick(self.expected)
        if source:
            self.new(self.expected[source], source_volid=source)

    def snapshot(self) -> None:
        source = self.pick(self.expected)
        if source:
            made = self.service.call('POST', '/snapshots', {
                'snapshot': {'volume_id': source, 'force': True},
            })
            self.kept[made['snapshot']['id']] = self.expected[source]

    def delete(self) -> None:
        victim = self.pick(self.expected)
        if victim:
            self.service.call('DELETE', f'/volumes/{victim}')

    def delete_snapshot(self) -> None:
        victim = self.pick(self.kept)
        if victim:
            self.service.call('DELETE', f'/snapshots/{victim}')

    def extend(self) -> None:
        victim = self.pick(self.expected)
        if victim:
            now = self.service.volume(victim)['size_bytes']
            self.service.action(
                victim, 'os-extend', {'new_size_bytes': now + (1 << 20)}
            )

    def write(self) -> None:
        """Attach, write a MiB that names its volume, detach."""
        victim = self.pick(self.expected)
        if victim is None:
            return
        made = self.service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': victim, 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'h'},
        }})
        attachment = made['attachment']
        data = self.random.randbytes(1 << 20)
        offset = self.random.randrange(3) << 20
        before = self.expected[victim]
        after = [
            each[:offset] + data + each[offset + len(data):]
            for each in before
        ]
        self.expected[victim] = before + after
        client = NbdClient(attachment['connection_info']['uri'])
        with contextlib.closing(client):
            client.pwrite(data, offset)
            client.flush()
        self.expected[victim] = after
        self.service.call('DELETE', f'/attachments/{attachment["id"]}')


class KillTest(unittest.TestCase):
    def survive(self, seed: int) -> None:
        service = ServiceProcess(
            self, SECTIONS, backends='q, f',
            directories=('layers', 'files', 'images'),
        )
        service.configure(
            SECTIONS, backends='q, f',
            extra=f'image_allowed_directories = {service.root}/images',
        )
        service.start()
        loads = [Load(service, seed, number) for number in range(CLIENTS)]
        moments = random.Random(seed)
        for _ in range(ROUNDS):
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
                running = [clients.submit(load.some) for load in loads]
                time.sleep(0.05 + moments.random() * 0.6)
                service.kill()
                service.start()
                for each in running:
                    each.result()
        self.settle(service)
        expected = {k: v for load in loads for k, v in load.expected.items()}
        self.compare(service, expected)
        service.stop()
        service.start()
        self.compare(service, expected)
        done = sum((load.done for load in loads), collections.Counter())
        self.assertGreater(sum(done.values()), OPERATIONS, done)
        found = service.manage('reconcile', '--dry-run')
        self.assertEqual(
            'nothing differs', found.stdout.strip(), found.stderr
        )

    def settle(self, service: ServiceProcess) -> None:
        """Wait until no job is open; whatever takes long is a failure."""
        deadline = time.monotonic() + 120
        while True:
            # A host that died between two calls asks again: so do we.
            for each in service.call('GET', '/attachments')['attachments']:
                try:
                    service.call('DELETE', f'/attachments/{each["id"]}')
                except Refused:
                    pass
            jobs = service.call('GET', '/os-volume-jobs?state=open')['jobs']
            if not jobs:
                return
            self.assertLess(time.monotonic(), deadline, jobs)
            time.sleep(0.1)

    def compare(
        self, service: ServiceProcess, expected: dict[str, list[bytes]]
    ) -> None:
        volumes, snapshots = service.volumes(), service.snapshots()
        for kind in volumes, snapshots:
            for row in kind.values():
                self.assertIn(row['status'], LASTING, row)
        self.assertLessEqual(set(volumes), set(expected))
        for volume_id, row in volumes.items():
            if row['status'] == 'available':
                self.holds(service, row, expected[volume_id])

    def holds(
        self,
        service: ServiceProcess,
        row: dict[str, Any],
        contents: list[bytes],
    ) -> None:
        """Compare through an export, with qemu-img as an honest reader."""
        made = service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': row['id'], 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'checker'}, 'mode': 'ro',
        }})['attachment']
        target = os.path.join(service.root, 'copy')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'raw', '-O', 'raw',
             made['connection_info']['uri'], target],
            check=True, capture_output=True, timeout=60,
        )
        with open(target, 'rb') as f:
            found = f.read()
        os.unlink(target)
        size_bytes = row['size_bytes']
        self.assertTrue(
            any(found == each.ljust(size_bytes, b'\0') for each in contents),
            f'volume {row["id"]} holds what nobody wrote',
        )
        service.call('DELETE', f'/attachments/{made["id"]}')


def _add_tests() -> None:
    for seed in range(1, SEEDS + 1):

        def test(self: KillTest, seed: int = seed) -> None:
            self.survive(seed)

        name = f'test_nothing_is_lost_or_stuck_seed_{seed}'
        test.__name__ = name
        setattr(KillTest, name, test)


_add_tests()
