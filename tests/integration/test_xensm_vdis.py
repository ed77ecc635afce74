# SPDX-License-Identifier: Apache-2.0
"""VDIs as volumes: made once, found again, told from others' copies."""

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import unittest

from tests import xapi
from tests import xensm
from tests.integration import serving
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm import vdis
from volume.drivers.xensm.driver import XenSmDriver
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.state.sessions import User
from volume.testing import fixtures
from volume.xenapi import calls
from volume.xenapi.link import Link
from volume.xenapi.options import lines

SIZE = 4 * model.MIB
NOTE = {'id': 'x', 'name': 'disk "one" <é>', 'size_bytes': str(SIZE)}


class Case(unittest.TestCase):

    role = 'pool-admin'
    profile = 'xcp-ng-8.3'

    def setUp(self):
        self.pool = xapi.simulator(
            self, self.profile, users={'us': User('secret', self.role)},
            detach_delay_s=0.0,
        )
        self.sr_uuid = self.make_sr()
        self.node = fixtures.make_node(self)
        self.driver = self.make_driver()
        self.driver.check()
        self.calls = []
        self.link = self.driver._opened[1]
        self.link.records.append(self.calls.append)

    def make_sr(self):
        return xapi.nfs_sr(self.pool)

    def make_driver(self, **more):
        return XenSmDriver(fixtures.settings(XenSmDriver, **{
            'addresses': [self.pool.url(0), self.pool.url(1)],
            'username': 'us', 'password': 'secret', 'timeout_s': 10.0,
            'sr_uuid': [self.sr_uuid], **more,
        }), self.node)

    def wish(self, **more):
        return model.Volume(ids.new(), self.sr_uuid, SIZE, **more)

    def volume(self):
        volume = self.wish()
        return dataclasses.replace(
            volume, handle=self.driver.create(volume))

    def vdis(self):
        """Return what the pool has, but for base copies, by its uuid."""
        rows = self.pool.rows
        records = [rows.get('VDI', ref) for ref in rows.all('VDI')]
        return {r['uuid']: r for r in records if r['managed']}

    def field(self, volume, name):
        return self.vdis()[volume.handle][name]

    def shown(self):
        return {
            found.handle: found.id for found in self.driver.scan(self.sr_uuid)
        }


class Made(Case):

    def test_volume_costs_three_calls_with_its_note(self):
        self.driver.inspect(self.volume())
        self.calls.clear()
        for _ in range(20):
            volume = self.wish(note=NOTE)
            with self.assertRaises(errors.NotFound):
                self.driver.inspect(volume)
            self.driver.create(volume)
            self.driver.describe(volume, NOTE)
        self.assertLessEqual(len(self.calls), 60)
        self.assertEqual(NOTE, self.driver.inspect(volume).sidecar)

    def test_volumes_made_side_by_side_cost_three_calls(self):
        self.volume()
        self.calls.clear()
        wishes = [self.wish() for _ in range(40)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            made = set(threads.map(self.driver.create, wishes))
        self.assertEqual(made, set(self.vdis()) & made)
        self.assertLessEqual(len(self.calls), 120)

    def test_vdi_says_whose_it_is(self):
        volume = self.volume()
        self.assertEqual(f'volume-{volume.id}',
                         self.field(volume, 'name_label'))
        self.assertEqual([vdis.TAG], self.field(volume, 'tags'))
        self.assertIn('volume-service',
                      self.field(volume, 'name_description'))

    def test_lost_reply_makes_one_vdi_at_every_call(self):
        for method in 'VDI.create', 'VDI.get_record', 'VDI.get_by_name_label':
            for kind in 'lose_reply', 'drop':
                volume = self.wish()
                before = len(self.vdis())
                self.pool.faults.add(Fault(method, kind, count=5))
                with self.assertRaises(errors.VolumeError):
                    self.driver.create(volume)
                self.pool.faults.clear()
                with self.subTest(method, kind=kind):
                    handle = self.driver.create(volume)
                    self.assertEqual(before + 1, len(self.vdis()))
                    self.assertEqual(handle, self.driver.create(volume))
                    self.assertEqual(
                        handle, self.driver.inspect(volume).handle)

    def test_master_that_dies_in_mid_create_leaves_one_vdi(self):
        for when in 'before', 'after':
            volume = self.wish()
            before = len(self.vdis())
            self.pool.faults.add(Fault(
                'VDI.create', 'kill_master', when=when))
            with self.assertRaises(errors.Unknown):
                self.driver.create(volume)
            with self.subTest(when):
                handle = self.driver.create(volume)
                self.assertEqual(before + 1, len(self.vdis()))
                self.assertIn(handle, self.vdis())
            for host in 0, 1:
                if not self.pool.is_up(self.pool.host(host)):
                    self.pool.start_host(host)

    def test_create_that_takes_too_long_is_waited_for_and_leaves_nothing(
        self
    ):
        driver = self.make_driver(timeout_s=3.0)
        driver.check()
        sr = self.pool.rows.by_uuid('SR', self.sr_uuid)
        volume = self.wish()
        with self.pool.sm.manager(sr).lock:
            with self.assertRaises(errors.Unknown):
                driver.create(volume)
            for act in driver.create, driver.delete:
                with self.assertRaisesRegex(errors.Unavailable, 'being made'):
                    act(volume)
        serving.until(self.vdis, bool)
        self.driver.delete(volume)
        self.assertEqual({}, self.vdis())

    def test_create_that_may_be_pending_is_waited_for(self):
        volume = self.wish()
        self.driver._storages[self.sr_uuid]._settled_at = float('-inf')
        task = self.pool.tasks.create('Async.VDI.create')
        with self.assertRaisesRegex(errors.Unavailable, 'being made'):
            self.driver.create(volume)
        self.pool.tasks.succeed(task)
        self.driver.create(volume)

    def test_delete_whose_reply_is_lost_is_done(self):
        for method in 'Async.VDI.destroy', 'event.from', 'task.destroy':
            volume = self.volume()
            self.pool.faults.add(Fault(method, 'lose_reply', count=9))
            try:
                self.driver.delete(volume)
            except (errors.Unknown, errors.Unavailable):
                pass
            self.pool.faults.clear()
            with self.subTest(method):
                self.driver.delete(volume)
                self.assertNotIn(volume.handle, self.vdis())

    def test_full_storage_is_no_space(self):
        self.pool.faults.fill_sr(self.sr_uuid, 0)
        with self.assertRaises(errors.NoSpace):
            self.driver.create(self.wish())

    def test_growth_whose_reply_is_lost_is_done(self):
        volume = self.volume()
        self.pool.faults.add(Fault('Async.VDI.resize', 'lose_reply'))
        with self.assertRaises(errors.Unknown):
            self.driver.resize(volume, 2 * SIZE)
        self.driver.resize(volume, 2 * SIZE)
        self.assertEqual(2 * SIZE, self.driver.inspect(volume).size_bytes)
        self.driver.resize(volume, 2 * SIZE)
        with self.assertRaises(errors.Invalid):
            self.driver.resize(volume, SIZE)

    def test_note_is_replaced_whatever_was_lost(self):
        volume = self.volume()
        for method in 'VDI.add_to_other_config', (
            'VDI.remove_from_other_config'
        ):
            for text in 'one', 'two':
                self.pool.faults.add(Fault(method, 'lose_reply'))
                try:
                    self.driver.describe(volume, {'name': text})
                except errors.Unknown:
                    self.driver.describe(volume, {'name': text})
                self.pool.faults.clear()
                self.assertEqual(
                    {'name': text}, self.driver.inspect(volume).sidecar)


class Found(Case):

    def test_vdi_that_was_renamed_is_found(self):
        volume = self.volume()
        with xensm.session(self.pool) as xenapi:
            xenapi.VDI.set_name_label(
                xenapi.VDI.get_by_uuid(volume.handle), 'my disk')
        self.assertEqual(volume.handle, self.driver.inspect(volume).handle)
        self.driver.delete(volume)
        self.assertEqual({}, self.vdis())

    def test_vdi_that_was_moved_is_found_by_its_key(self):
        self.pool.world.add_nfs('two', '/x')
        other = xapi.make_sr(
            self.pool, 'nfs', {'server': 'two', 'serverpath': '/x'})
        for renames in False, True:
            volume = self.volume()
            with xensm.session(self.pool) as xenapi:
                old = xenapi.VDI.get_by_uuid(volume.handle)
                new = xenapi.VDI.copy(old, xenapi.SR.get_by_uuid(other))
                # As migration does, which keeps what a copy does not.
                config = xenapi.VDI.get_other_config(old)
                xenapi.VDI.set_other_config(new, config)
                if renames:
                    xenapi.VDI.set_name_label(new, 'moved')
                xenapi.VDI.destroy(old)
                uuid = xenapi.VDI.get_uuid(new)
            with self.subTest(renames=renames):
                self.assertEqual(uuid, self.driver.inspect(volume).handle)
                self.driver.delete(volume)
                self.assertNotIn(uuid, self.vdis())

    def test_clone_by_another_tool_is_not_taken_for_the_volume(self):
        for is_described in True, False:
            volume = self.volume()
            if is_described:
                self.driver.describe(volume, {'name': 'x'})
            with xensm.session(self.pool) as xenapi:
                copy = xenapi.VDI.clone(
                    xenapi.VDI.get_by_uuid(volume.handle))
                uuid = xenapi.VDI.get_uuid(copy)
            with self.subTest(is_described=is_described):
                self.assertEqual(
                    volume.handle, self.driver.inspect(volume).handle)
                self.assertIsNone(self.shown()[uuid])
                if is_described:
                    self.assertEqual(
                        volume.id, self.shown()[volume.handle])
                else:
                    # Nothing tells, and nobody guesses.
                    bare = dataclasses.replace(volume, handle='')
                    with self.assertRaises(errors.Conflict):
                        self.driver.inspect(bare)
                self.driver.delete(volume)
                self.assertIn(uuid, self.vdis())

    def test_snapshot_by_another_tool_is_foreign_and_stays(self):
        volume = self.volume()
        with xensm.session(self.pool) as xenapi:
            copy = xenapi.VDI.snapshot(xenapi.VDI.get_by_uuid(volume.handle))
            uuid = xenapi.VDI.get_uuid(copy)
        self.assertEqual(
            {volume.handle: volume.id, uuid: None}, self.shown())
        self.driver.delete(volume)
        self.assertEqual({uuid}, set(self.vdis()))

    def test_base_copies_are_not_shown(self):
        volume = self.volume()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        self.assertEqual({volume.id, snapshot.id}, set(self.shown().values()))


class Adopted(Case):

    def foreign(self):
        return xensm.foreign(self.pool, self.sr_uuid, b'\xa5' * 4096)

    def test_adopted_vdi_keeps_its_uuid_and_gets_its_name_back(self):
        uuid, volume = self.foreign(), self.wish()
        self.assertIn((uuid, None), self.shown().items())
        for _ in range(2):
            self.assertEqual(uuid, self.driver.adopt(uuid, volume))
        self.assertEqual(volume.id, self.shown()[uuid])
        self.assertEqual(uuid, self.driver.inspect(volume).handle)
        self.assertEqual([vdis.TAG], self.vdis()[uuid]['tags'])
        for _ in range(2):
            self.driver.disown(volume)
        record = self.vdis()[uuid]
        self.assertEqual("somebody's", record['name_label'])
        self.assertEqual([], record['tags'])
        self.assertEqual({}, {
            key: value for key, value in record['other_config'].items()
            if key.startswith('volume:')
        })

    def test_adoption_may_be_broken_off_anywhere(self):
        methods = ('VDI.add_to_other_config', 'VDI.set_name_label',
                   'VDI.add_tags', 'VDI.remove_from_other_config',
                   'VDI.remove_tags')
        for method in methods:
            for nth in range(3):
                uuid, volume = self.foreign(), self.wish()
                volume = dataclasses.replace(volume, handle=uuid)
                for verb, args in (
                    (self.driver.adopt, (uuid, volume)),
                    (self.driver.disown, (volume,)),
                ):
                    self.pool.faults.add(Fault(
                        method, 'lose_reply', after_matches=nth))
                    with contextlib.suppress(errors.Unknown):
                        verb(*args)
                    self.pool.faults.clear()
                    verb(*args)
                with self.subTest(method, nth=nth):
                    self.assertIsNone(self.shown()[uuid])
                    self.assertEqual(
                        "somebody's", self.vdis()[uuid]['name_label'])

    def test_what_can_be_no_volume_is_refused(self):
        volume = self.volume()
        with self.assertRaises(errors.Conflict):
            self.driver.adopt(volume.handle, self.wish())
        with self.assertRaises(errors.NotFound):
            self.driver.adopt(ids.new(), self.wish())
        with self.assertRaises(errors.Invalid):
            self.driver.adopt('../x', self.wish())
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        rows = self.pool.rows
        base = [
            rows.field('VDI', ref, 'uuid') for ref in rows.all('VDI')
            if not rows.field('VDI', ref, 'managed')
        ]
        with self.assertRaises(errors.Invalid):
            self.driver.adopt(base[0], self.wish())
        with xensm.session(self.pool) as xenapi:
            ref = xenapi.VDI.snapshot(
                xenapi.VDI.get_by_uuid(self.foreign()))
            uuid = xenapi.VDI.get_uuid(ref)
        with self.assertRaises(errors.Invalid):
            self.driver.adopt(uuid, self.wish())


class Capacity(Case):

    def test_what_a_deleted_snapshot_leaves_is_told_until_it_is_merged(self):
        volume = self.volume()
        with self.driver.writer(volume) as writer:
            writer.write(b'\x5a' * SIZE)
            writer.commit()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.pool.faults.gc_paused = True
        self.driver.snapshot(snapshot)
        self.assertEqual(0, self.look().hidden_bytes)
        used = self.look().free_bytes
        self.driver.delete_snapshot(snapshot)
        self.assertGreaterEqual(self.look().hidden_bytes, SIZE)
        self.assertLessEqual(self.look().free_bytes, used + model.MIB)

    def look(self):
        """Return the pool as of now, and not of half a minute ago."""
        storage = self.driver._storages[self.sr_uuid]
        storage._looked_at = float('-inf')
        storage._count_at = 0.0
        return self.driver.pools()[0]


class Thick(Case):

    def make_sr(self):
        return xapi.lvm_sr(self.pool)

    def test_volume_takes_its_size_at_once(self):
        before = self.driver.pools()[0]
        self.assertFalse(before.thin)
        big = dataclasses.replace(self.wish(), size_bytes=10 * model.GIB)
        self.driver.create(big)
        self.driver._storages[self.sr_uuid]._looked_at = float('-inf')
        after = self.driver.pools()[0]
        self.assertGreaterEqual(
            before.free_bytes - after.free_bytes, 10 * model.GIB)
        with self.assertRaises(errors.NoSpace):
            self.driver.create(dataclasses.replace(
                self.wish(), size_bytes=95 * model.GIB))


class Role(Case):
    """Work on an SR that is there and plugged in takes little."""

    role = 'vm-admin'

    def test_daily_work_needs_no_more_than_vm_admin(self):
        volume = self.volume()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        clone = self.wish()
        self.driver.snapshot(snapshot)
        self.driver.clone(snapshot, clone)
        self.driver.resize(volume, 2 * SIZE)
        self.driver.describe(volume, NOTE)
        self.driver.delete_snapshot(snapshot)
        self.driver.delete(volume)
        self.driver.delete(clone)
        self.assertEqual({}, self.vdis())
        self.driver._storages[self.sr_uuid]._looked_at = float('-inf')
        self.assertGreater(self.driver.pools()[0].total_bytes, 0)
        made = {call.removeprefix('Async.') for call in self.calls}
        self.assertEqual(set(), made - set(calls.ROLE))

    def test_repair_says_which_role_it_lacks(self):
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.sr_uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                xenapi.PBD.unplug(pbd)
        with self.assertRaisesRegex(errors.Unavailable, 'pool-operator'):
            self.driver.check()


class Oldest(Case):
    """The oldest release that we claim."""

    profile = 'xenserver-7.6'

    def test_life_of_a_volume(self):
        volume = self.volume()
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        self.driver.snapshot(snapshot)
        self.driver.revert(snapshot)
        self.driver.delete_snapshot(snapshot)
        self.driver.delete(volume)
        self.assertEqual({}, self.vdis())


class Secrets(unittest.TestCase):

    def test_no_secret_is_told_whatever_goes_wrong(self):
        told = io.StringIO()
        handler = logging.StreamHandler(told)
        root = logging.getLogger('volume')
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        self.addCleanup(root.removeHandler, handler)
        self.addCleanup(root.setLevel, level)
        pool = xapi.simulator(self, password='pool-hush')
        pool.world.add_target(xensm.TARGET, xensm.IQN)
        pool.world.add_lun('36001405secret', model.GIB, iqn=xensm.IQN)
        config = {
            'target': xensm.TARGET, 'targetIQN': xensm.IQN,
            'SCSIid': '36001405secret', 'chapuser': 'me',
            'chappassword': 'chap-hush',
        }
        texts = []
        for wrong in ({}, {'SCSIid': 'none'}, {'targetIQN': 'iqn.none'},
                      {'target': '192.0.2.99'}):
            driver = XenSmDriver(fixtures.settings(
                XenSmDriver, addresses=[pool.url()], password='pool-hush',
                sr_name='volumes', sr_type='lvmoiscsi', create=True,
                device_config=lines({**config, **wrong}),
            ), fixtures.make_node(self))
            pool.faults.add(Fault(
                'SR.get_by_name_label', 'refuse',
                params=('INTERNAL_ERROR', 'chap-hush pool-hush'),
            ))
            for _ in range(2):
                try:
                    driver.check()
                except errors.VolumeError as failed:
                    texts += [str(failed), repr(failed),
                              repr(failed.__cause__)]
            texts += [repr(driver._opened), repr(vars(driver))]
            if not wrong:
                session = driver._opened[1].session().ref
            driver._opened[1].close()
        everything = '\n'.join([*texts, told.getvalue()])
        for secret in 'chap-hush', 'pool-hush', session:
            self.assertNotIn(secret, everything)
        self.assertTrue(texts)


class Queues(Case):

    def test_changes_of_an_sr_are_made_one_at_a_time(self):
        running, most = set(), [0]

        class Watched(Link):
            def call(link, method, *args):
                if method != 'VDI.create':
                    return super().call(method, *args)
                running.add(id(args))
                most[0] = max(most[0], len(running))
                try:
                    return super().call(method, *args)
                finally:
                    running.discard(id(args))

        self.link.__class__ = Watched
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(self.driver.create, [
                self.wish() for _ in range(16)]))
        self.assertEqual(1, most[0])
