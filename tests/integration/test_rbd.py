# SPDX-License-Identifier: Apache-2.0
"""The rbd driver where the suites do not look: remains, chains, trash."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import unittest
from typing import Any

from tests import rbd
from tests.rbd_client import Client
from volume import errors
from volume import ids
from volume import model
from volume.drivers.rbd import images
from volume.drivers.rbd import names
from volume.drivers.rbd import pools
from volume.drivers.rbd.link import Link
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import workbench
from volume.testing.workbench import fill
from volume.testing.workbench import pattern

PROOF = bool(os.environ.get('VOLUME_PROOF'))
MIB = model.MIB


class Case(rbd.Pools, unittest.TestCase):
    """A driver of two pools, and the cluster's own tools beside it."""

    kind = 'broken'  # what is left is in nobody's way

    def setUp(self) -> None:
        self.node = fixtures.make_node(self)
        self.driver = self.make()
        self.pool = self.pool_names[0]
        self.link: Link = self.driver._parts().link

    def make(self, **options: Any) -> Any:
        driver = self.rbd(self.node, connect=rbd.lasting, **options)
        driver.check()
        return driver

    def volume(self, seed: int | None = None, size: int = MIB) -> Any:
        volume = model.Volume(ids.new(), self.pool, size)
        self.driver.create(volume)
        if seed is not None:
            fill(self.driver, volume, pattern(seed, size))
        return volume

    def wish(self, size: int = MIB) -> model.Volume:
        return model.Volume(ids.new(), self.pool, size)

    def snapshot(self, volume: model.Volume) -> model.Snapshot:
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.driver.snapshot(snapshot)
        return snapshot

    def export(self, name: str) -> bytes:
        """Return an image's bytes as another program reads them."""
        return self.cluster.read(
            'rbd', 'export', '--no-progress', f'{self.pool}/{name}', '-')

    def content(self, source: workbench.Source) -> bytes:
        return workbench.content(self.driver, source)

    def object_of(self, kind: str, image: str) -> str:
        """Return the name of an object of an image."""
        info = self.info(image)
        return f'rbd_{kind}.{info["id"]}'

    def info(self, image: str) -> dict[str, Any]:
        return dict(json.loads(self.cluster.run(
            'rbd', 'info', '--format', 'json', f'{self.pool}/{image}')))

    def remove_object(self, name: str) -> None:
        self.link.do('break', lambda wire: wire.ioctx(
            self.pool).remove_object(name))

    def trash(self) -> list[str]:
        return [
            each['name'] for each in json.loads(self.cluster.run(
                'rbd', 'trash', 'ls', '--format', 'json', self.pool))
        ]


class RemainsTest(Case):
    """What a client that died in the middle has left."""

    def test_image_without_header_is_made_anew(self) -> None:
        volume = self.volume(seed=1)
        self.remove_object(self.object_of('header', f'volume-{volume.id}'))
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(volume)
        self.driver.create(volume)
        self.assertEqual(bytes(MIB), self.content(volume))

    def test_image_without_header_is_removed(self) -> None:
        volume = self.volume()
        self.remove_object(self.object_of('header', f'volume-{volume.id}'))
        self.driver.delete(volume)
        listed = self.cluster.run('rbd', 'ls', self.pool).split()
        self.assertNotIn(f'volume-{volume.id}', listed)

    def test_image_half_in_the_trash_is_deleted(self) -> None:
        volume = self.volume()
        self.remove_object(f'rbd_id.volume-{volume.id}')
        self.driver.delete(volume)
        self.driver.create(volume)
        self.assertEqual(bytes(MIB), self.content(volume))

    def test_clone_that_got_no_parent_is_made_anew(self) -> None:
        source, clone = self.volume(seed=1), self.wish()
        name = f'volume-{clone.id}'
        self.driver._parts().images.begun.add(self.pool, name)
        self.cluster.run('rbd', 'create', '--size', '1M',
                         f'{self.pool}/{name}')
        self.assertNotIn(clone.id, [
            found.id for found in self.driver.scan(self.pool)])
        self.driver.clone(source, clone)
        self.assertEqual(pattern(1, MIB), self.content(clone))

    def test_image_whose_parent_is_lost_is_not_absent(self) -> None:
        source = self.volume(seed=1)
        clone = self.wish()
        self.driver.clone(source, clone)
        header = self.object_of('header', f'volume-{source.id}')
        self.remove_object(header)
        for ask in self.driver.inspect, self.content:
            with self.assertRaises(errors.Corrupt):
                ask(clone)
        self.assertIn(f'volume-{clone.id}', [
            found.handle for found in self.driver.scan(self.pool)])
        self.driver.delete(clone)

    def test_rename_that_was_cut_off_is_ended(self) -> None:
        for is_listed_by in 'old', 'new':
            with self.subTest(is_listed_by):
                volume = self.volume(seed=1)
                name = f'volume-{volume.id}'
                foreign = f'{name}.disowned'
                self.driver.disown(volume)
                there, missing = (
                    (foreign, name) if is_listed_by == 'old'
                    else (name, foreign)
                )
                if is_listed_by == 'new':
                    self.cluster.run('rbd', 'rename', '--pool', self.pool,
                                     foreign, name)
                self.link.do('break', lambda wire, a=there, b=missing: (
                    wire.ioctx(self.pool).write_full(
                        f'rbd_id.{b}',
                        wire.ioctx(self.pool).read(f'rbd_id.{a}'))))
                self.driver.adopt(foreign, volume)
                self.assertEqual(pattern(1, MIB), self.content(volume))
                listed = self.cluster.run('rbd', 'ls', self.pool).split()
                self.assertIn(name, listed)
                self.assertNotIn(foreign, listed)

    def test_foreign_image_with_such_a_name_is_left_alone(self) -> None:
        volume = self.wish()
        name = f'volume-{volume.id}'
        self.cluster.run('rbd', 'import', '-', f'{self.pool}/{name}',
                         input_bytes=pattern(5, MIB))
        source = self.volume(seed=1)
        for touch in (
            lambda: self.driver.create(volume),
            lambda: self.driver.clone(source, volume),
            lambda: self.driver.delete(volume),
        ):
            with self.assertRaises(errors.Conflict):
                touch()
        self.driver.disown(volume)
        self.assertEqual(pattern(5, MIB), self.export(name))
        self.driver.adopt(name, volume)
        self.assertEqual(volume.id, self.driver.inspect(volume).id)
        self.assertEqual(pattern(5, MIB), self.content(volume))

    def test_moments_of_dead_clones_keep_no_volume(self) -> None:
        source = self.volume(seed=1)
        self.cluster.run(
            'rbd', 'snap', 'create', '--no-progress',
            f'{self.pool}/volume-{source.id}@clone-{ids.new()}')
        self.assertEqual([None], [
            found.snapshot_of for found in self.driver.scan(self.pool)
            if found.handle.startswith(f'volume-{source.id}')])
        self.driver.delete(source)
        with self.assertRaises(errors.NotFound):
            self.driver.inspect(source)


class CopiesTest(Case):
    """Chains, what clones inherit, and what changed."""

    def test_rbd_export_reads_the_same(self) -> None:
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        clone = self.wish(2 * MIB)
        self.driver.clone(snapshot, clone)
        fill(self.driver, volume, pattern(2, MIB))
        self.assertEqual(pattern(2, MIB), self.export(f'volume-{volume.id}'))
        self.assertEqual(pattern(1, MIB), self.export(
            f'volume-{volume.id}@snapshot-{snapshot.id}'))
        self.assertEqual(pattern(1, MIB) + bytes(MIB),
                         self.export(f'volume-{clone.id}'))

    def test_long_chain_is_flattened_by_upkeep(self) -> None:
        self.driver = self.make(clone_depth_max=2)
        chain = [self.volume(seed=1)]
        for _ in range(4):
            clone = self.wish()
            self.driver.clone(chain[-1], clone)
            chain.append(clone)
        workbench.tend(self.driver, self.pool)
        depths = []
        for volume in chain:
            with self.link.image(
                self.pool, f'volume-{volume.id}'
            ) as image:
                depths.append(self.driver._parts().tending.depth(image))
            self.assertEqual(pattern(1, MIB), self.content(volume))
        self.assertLessEqual(max(depths), 2)

    def test_clone_inherits_neither_note_nor_host_nor_limits(self) -> None:
        source, clone = self.volume(seed=1), self.wish()
        self.driver.describe(source, {'name': 'source'})
        self.driver.limit(source, model.IoLimits(iops=500))
        self.driver.grant(
            source, model.Host('a', ('192.0.2.1',)), model.Access.WRITE)
        self.driver.clone(source, clone)
        with self.link.image(self.pool, f'volume-{clone.id}') as image:
            self.assertEqual({names.ID: clone.id}, image.notes())

    def test_limits_are_what_librbd_keeps_to(self) -> None:
        volume = self.volume()
        where = f'{self.pool}/volume-{volume.id}'
        self.driver.limit(volume, model.IoLimits(500, 1 << 20))
        for key, value in ('iops', '500'), ('bps', str(1 << 20)):
            found = self.cluster.run(
                'rbd', 'config', 'image', 'get', where,
                f'rbd_qos_{key}_limit')
            self.assertEqual(value, found.strip())

    def test_extents_since_a_snapshot_know_of_a_revert(self) -> None:
        volume = self.volume(size=16 * MIB)
        self.write(volume, 0, b'a')
        first = self.snapshot(volume)
        self.write(volume, 0, b'b')
        self.write(volume, 9 * MIB, b'b')
        second = self.snapshot(volume)
        self.driver.revert(first)
        old, new = self.content(second), self.content(volume)
        self.assertNotEqual(old, new)
        image = bytearray(old)
        for run in self.driver.extents(volume, second):
            end = run.offset_bytes + run.length_bytes
            image[run.offset_bytes:end] = (
                bytes(run.length_bytes) if run.is_zero
                else new[run.offset_bytes:end])
        self.assertEqual(new, bytes(image))

    def write(self, volume: model.Volume, at: int, letter: bytes) -> None:
        with self.driver.writer(volume) as writer:
            writer.seek(at)
            workbench.write_all(writer, letter * MIB)
            writer.commit()

    def test_revert_that_is_cut_off_anywhere_keeps_the_size(self) -> None:
        volume = self.volume(seed=1)
        snapshot = self.snapshot(volume)
        self.driver.resize(volume, 3 * MIB)
        for nth in range(1, 40):
            node = faults.FaultyNode(self.node.state_dir)
            driver = self.rbd(node, connect=rbd.lasting)
            driver.check()
            fill(self.driver, dataclasses.replace(
                volume, size_bytes=3 * MIB), pattern(2, 3 * MIB))
            node.arm(faults.Fault('crash', nth, is_late=True))
            with contextlib.suppress(faults.Crash):
                driver.revert(snapshot)
            self.driver.revert(snapshot)
            self.assertEqual(
                pattern(1, MIB) + bytes(2 * MIB), self.content(volume))
            if not node.fired:
                return
        self.fail('over 40 acts')

    def test_volume_grows_under_the_host_that_has_its_lock(self) -> None:
        volume = self.volume()
        host = Client(self, self.cluster.conf, rbd.user(),
                      f'{self.pool}/volume-{volume.id}')
        self.assertEqual('written', host.ask('write', 0, 'h'))
        self.driver.resize(volume, 2 * MIB)
        self.assertEqual('written', host.ask('write', MIB + 4096, 'h'))
        for do in (
            lambda: self.driver.revert(self.snapshot(volume)),
            lambda: self.driver.flatten(volume, lambda percent: None),
        ):
            # A watch that is nobody's is waited for; a host's is not.
            self.driver.grant(
                volume, model.Host('h'), model.Access.WRITE)
            with self.assertRaises(errors.Busy):
                do()


class TrashTest(Case):

    def test_deleted_volume_can_be_restored_until_its_time_is_over(
        self,
    ) -> None:
        self.driver = self.make(trash_delay_s=3600)
        volume = self.volume(seed=1)
        image_id = self.info(f'volume-{volume.id}')['id']
        self.driver.delete(volume)
        workbench.tend(self.driver, self.pool)
        pool, = (p for p in self.driver.pools() if p.name == self.pool)
        self.assertGreater(pool.hidden_bytes, 0)
        self.cluster.run(
            'rbd', 'trash', 'restore', '--pool', self.pool, image_id)
        self.assertEqual(pattern(1, MIB), self.content(volume))

    def test_trash_is_emptied_by_upkeep_alone(self) -> None:
        volume = self.volume(seed=1)
        self.driver.delete(volume)
        self.assertIn(f'volume-{volume.id}', self.trash())
        workbench.tend(self.driver, self.pool)
        self.assertNotIn(f'volume-{volume.id}', self.trash())

    def test_large_image_goes_in_pieces(self) -> None:
        volume = self.volume(size=200 << 30)
        self.driver.delete(volume)
        pieces = 0
        while self.driver.upkeep(self.pool):
            pieces += 1
        self.assertGreater(pieces, 3)
        self.assertNotIn(f'volume-{volume.id}', self.trash())

    def test_trash_of_others_is_left_alone(self) -> None:
        name = f'volume-{ids.new()}'
        self.cluster.run('rbd', 'create', '--size', '1M',
                         f'{self.pool}/{name}')
        self.cluster.run('rbd', 'trash', 'mv', f'{self.pool}/{name}')
        workbench.tend(self.driver, self.pool)
        self.assertIn(name, self.trash())


class TroubleTest(Case):
    """The cluster does not answer, or answers no."""

    def test_unknown_pool_is_named(self) -> None:
        with self.assertRaisesRegex(errors.Unavailable, 'no pool nowhere'):
            self.make(pools=[self.pool, 'nowhere'])

    def test_driver_that_is_dropped_leaves_no_connection(self) -> None:
        def threads() -> int:
            return len(os.listdir('/proc/self/task'))

        before = threads()
        driver = self.rbd(self.node)
        driver.check()
        self.assertGreater(threads(), before)
        del driver
        gc.collect()
        deadline = time.monotonic() + 30
        while threads() > before:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def test_wrong_options_are_refused(self) -> None:
        for options, words in (
            ({'pools': []}, 'pools'),
            ({'pools': ['a', 'a']}, 'twice'),
            ({'pools': ['a/b']}, 'no pool'),
            ({'ceph_conf': 'ceph.conf'}, 'ceph_conf'),
            ({'ceph_user': 'client admin'}, 'ceph_user'),
            ({'features': ['layering']}, 'exclusive-lock'),
            ({'features': ['layering', 'exclusive-lock', 'fast-diff']},
             'object-map'),
            ({'features': ['layering', 'exclusive-lock', 'magic']},
             'magic'),
        ):
            with self.assertRaisesRegex(errors.Invalid, words):
                self.make(**options)

    def test_cluster_that_is_away_is_unavailable(self) -> None:
        driver = self.rbd(self.node, ceph_conf='/nowhere/ceph.conf')
        with self.assertRaises(errors.Unavailable):
            driver.check()

    def test_silence_is_unknown_after_an_act_and_else_unavailable(
        self,
    ) -> None:
        volume = self.volume(seed=1)
        driver = self.rbd(self.node, timeout_s=5)
        driver.check()
        with driver.writer(volume) as writer:
            self.cluster.freeze('osd')
            try:
                with self.assertRaises(errors.Unknown):
                    writer.write(b'x' * 512)
                with self.assertRaises(errors.Unavailable):
                    driver.inspect(volume)
            finally:
                self.cluster.thaw('osd')
            with self.assertRaises(errors.Unknown):
                writer.commit()

    def test_release_is_judged(self) -> None:
        for text, is_secure in (
            ('ceph version 16.2.15 (618f) pacific (stable)', False),
            ('ceph version 19.2.5 (618f) squid (stable)', False),
            ('ceph version 19.2.6 (618f) squid (stable)', True),
            ('ceph version 20.2.3 (618f) tentacle (stable)', False),
            ('ceph version 20.2.10 (618f) tentacle (stable)', True),
            ('ceph version 21.1.0 (618f) umbrella (rc)', True),
            ('something else', False),
        ):
            self.assertEqual(is_secure, pools.is_secure(text), text)

    def test_old_ceph_is_a_warning_or_refused(self) -> None:
        overall = self.cluster.ceph('versions')['overall']
        if all(pools.is_secure(name) for name in overall):
            self.skipTest('this Ceph has no known flaws')
        with self.assertLogs('volume.drivers.rbd.pools', 'WARNING'):
            self.make()
        with self.assertRaisesRegex(errors.Unavailable, 'OSSN-0108'):
            self.make(require_secure_ceph=True)

    def test_environment_without_the_modules_says_what_to_do(self) -> None:
        code = (
            'import sys\n'
            'sys.modules["rados"] = None\n'
            'from volume.drivers.rbd import wire\n'
            'wire.load("rados")\n'
        )
        done = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True,
            timeout=60,
        )
        self.assertIn('Unavailable', done.stderr)
        self.assertIn('python3-rados', done.stderr)
        self.assertIn('tools/link_ceph.py', done.stderr)

    @unittest.skipUnless(PROOF, 'a watch outlives its client by 30 s')
    def test_watch_of_a_dead_writer_is_waited_for(self) -> None:
        volume = self.volume()
        dead = Client(self, self.cluster.conf, rbd.user(),
                      f'{self.pool}/volume-{volume.id}')
        self.assertEqual('written', dead.ask('write', 0, 'd'))
        dead.kill()
        fill(self.driver, volume, pattern(1, MIB))
        self.assertEqual(pattern(1, MIB), self.content(volume))

    def test_foreign_use_is_not_waited_for_without_end(self) -> None:
        volume = self.volume()
        Client(self, self.cluster.conf, rbd.user(),
               f'{self.pool}/volume-{volume.id}')
        with self.link.image(self.pool, f'volume-{volume.id}') as image:
            with self.assertRaisesRegex(errors.Busy, '127.0.0.1'):
                images.need_unused(image, 'delete', stale_s=0.0)
