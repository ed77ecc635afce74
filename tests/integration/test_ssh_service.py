# SPDX-License-Identifier: Apache-2.0
"""A service whose storage is on a node over SSH: copies, images, losses."""

from __future__ import annotations

import os
import threading
import unittest
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy import update

from tests import sshd
from tests.integration import serving
from volume import ids
from volume.db import models
from volume.remote.node import SshNode
from volume.testing import fixtures
from volume.testing import workbench

T = TypeVar('T')
MIB = 1 << 20


class WatchedNode(SshNode):
    """Notes what is done there; a test may come between."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.acts: list[str] = []
        self.before: Callable[[str], None] = lambda what: None

    def act(self, what: str, effect: Callable[[], T]) -> T:
        self.acts.append(what)
        self.before(what)
        return effect()


class SshServiceCase(unittest.TestCase):
    server: sshd.Sshd
    retry_s = 60  # connecting anew may take a while

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.server = sshd.Sshd(cls)

    def setUp(self) -> None:
        self.pool = fixtures.plain_directory(self, 'far')
        self.world = serving.World(
            self, names='fast, san',
            settings=f'job_retry_s = {self.retry_s}\n',
            sections='[san]\ndriver = file\nexporter = local\n'
            f'directories = {self.pool}\ncapacity_gib = 8\n',
        )
        self.node = WatchedNode(self.server.target())
        self.addCleanup(self.node.close)
        self.service = self.world.service
        # No exporter without a kernel's help serves another machine, and
        # none is asked here.
        backend = self.service.runner.backends['san']
        backend.node = backend.driver.node = self.node
        self.service.node.neighbours['san'] = self.node

    def make(
        self,
        backend: str = 'san',
        hints: Mapping[str, Any] = MappingProxyType({}),
        **volume: Any,
    ) -> dict[str, Any]:
        asked = self.world.ask('POST', '/v3/volumes', {
            'volume': {'size': 1, **volume},
            'OS-SCH-HNT:scheduler_hints': {'backend': backend, **hints},
        })
        self.assertEqual(202, asked.status, asked.text)
        return self.world.settled(asked.json['volume']['id'])

    def path(self, volume: dict[str, Any], pool: str = '') -> str:
        return os.path.join(pool or self.pool, f'{volume["id"]}.raw')

    def seed(self, path: str) -> bytes:
        image = workbench.pattern(7, MIB)
        with open(path, 'r+b') as f:
            f.write(image)
            f.seek(500 * MIB)
            f.write(image)
        return image

    def assert_seeded(self, volume: dict[str, Any], pool: str = '') -> None:
        self.assertEqual('available', volume['status'])
        image = workbench.pattern(7, MIB)
        with open(self.path(volume, pool), 'rb') as f:
            self.assertEqual(image + bytes(MIB), f.read(2 * MIB))
            f.seek(500 * MIB)
            self.assertEqual(image, f.read(MIB))


class SshServiceTest(SshServiceCase):
    def test_life_of_a_volume_holds_its_locks_there(self) -> None:
        volume = self.make()
        self.assertEqual('available', volume['status'])
        self.assertTrue(os.path.exists(
            os.path.join(self.node.lock_dir, f'volume-{volume["id"]}')
        ))
        acts = self.node.acts
        self.assertLess(acts.index('lock'), acts.index(
            f'rename {volume["id"]}.raw'
        ))
        self.world.ask('DELETE', f'/v3/volumes/{volume["id"]}')
        self.world.gone(volume['id'])
        self.assertFalse(os.path.exists(self.path(volume)))

    def test_copy_within_a_node_is_made_there(self) -> None:
        source = self.make()
        self.seed(self.path(source))
        self.node.acts.clear()
        self.assert_seeded(self.make(source_volid=source['id']))
        self.assertIn('run qemu-img convert', self.node.acts)
        # Not a byte of it came here.
        self.assertFalse(
            [act for act in self.node.acts if act.startswith('read ')]
        )

    def test_copies_to_and_from_a_node_have_the_bytes(self) -> None:
        near = self.make('fast')
        self.seed(self.path(near, self.world.pool))
        far = self.make(source_volid=near['id'])
        self.assert_seeded(far)
        back = self.make('fast', source_volid=far['id'])
        self.assert_seeded(back, self.world.pool)
        self.assertNotIn('run qemu-img convert', self.node.acts)

    def test_images_go_to_a_node_and_come_from_it(self) -> None:
        source = self.make()
        self.seed(self.path(source))
        for kind in 'raw', 'qcow2', 'vhd':
            with self.subTest(kind):
                path = os.path.join(self.world.images, f'image.{kind}')
                asked = self.world.ask(
                    'POST', f'/v3/volumes/{source["id"]}/action',
                    {'os-volume_upload_image': {
                        'image_name': f'file://{path}', 'disk_format': kind,
                        'container_format': 'bare', 'force': False,
                    }},
                )
                self.assertEqual(202, asked.status, asked.text)
                self.world.settled(source['id'])
                self.assertTrue(os.path.exists(path), kind)
                self.assert_seeded(self.make(
                    imageRef=f'file://{path}',
                    hints={'image_format': kind},
                ))

    def test_cut_in_the_middle_of_a_copy_is_survived(self) -> None:
        source = self.make()
        self.seed(self.path(source))
        was_cut = threading.Event()

        def cut(what: str) -> None:
            if what == 'run qemu-img convert' and not was_cut.is_set():
                was_cut.set()
                self.server.cut()

        self.node.before = cut
        self.assert_seeded(self.make(source_volid=source['id']))
        self.assertTrue(was_cut.is_set())

    def test_who_lost_the_lease_does_nothing_there(self) -> None:
        db = self.world.core.db
        taken: list[str] = []

        def take_over(what: str) -> None:
            if what == 'look at locks' and not taken:
                # As another manager does that finds the lease run out.
                row = db.read(lambda s: s.scalars(select(models.Job).where(
                    models.Job.state == 'open'
                )).one())
                taken.append(row.id)
                db.write(lambda s: s.execute(
                    update(models.Job).where(models.Job.id == row.id)
                    .values(
                        token=row.token + 1, owner=ids.new(),
                        expires_at=db.clock() + 3600,
                    )
                ))

        self.node.before = take_over
        asked = self.world.ask('POST', '/v3/volumes', {
            'volume': {'size': 1},
            'OS-SCH-HNT:scheduler_hints': {'backend': 'san'},
        })
        volume_id = asked.json['volume']['id']
        serving.until(
            lambda: (taken, self.service.runner.busy()),
            lambda found: found[0] and not found[1],
        )
        self.assertNotIn('lock', self.node.acts)
        self.assertFalse(
            [name for name in os.listdir(self.pool) if volume_id in name]
        )


class GoneTest(SshServiceCase):
    retry_s = 3

    def test_node_that_is_gone_leaves_nothing_in_between(self) -> None:
        volume = self.make()
        self.server.know_host('other')
        self.addCleanup(self.server.know_host, 'host')
        self.node.close()
        failed = self.make()
        self.assertEqual('error', failed['status'])
        self.server.know_host('host')
        self.assertEqual('available', self.world.ask(
            'GET', f'/v3/volumes/{volume["id"]}'
        ).json['volume']['status'])
        self.assertEqual('available', self.make()['status'])


if __name__ == '__main__':
    unittest.main()
