# SPDX-License-Identifier: Apache-2.0
"""SRs: created once, introduced, plugged in again; what exists is kept."""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import unittest

from tests import xapi
from tests import xensm
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm.driver import XenSmDriver
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.published.datamodel import ROLES
from volume.sim.xapi.state.sessions import User
from volume.testing import faults
from volume.testing import fixtures
from volume.xenapi import srs
from volume.xenapi.options import lines

# A lost reply is tried everywhere in the long run only.
KINDS = ('crash', 'lost') if os.environ.get('VOLUME_PROOF') else ('crash',)
NFS = {'server': 'filer', 'serverpath': '/exports/a b=c'}


class Case(unittest.TestCase):

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.pool.world.add_nfs(*NFS.values())

    def driver(self, node=None, pool=None, **more):
        options = {
            'addresses': [(pool or self.pool).url()], 'password': 'secret',
            **more,
        }
        driver = XenSmDriver(
            fixtures.settings(XenSmDriver, **options),
            node or fixtures.make_node(self),
        )
        return driver

    def maker(self, node=None, config=NFS, **more):
        """Return a driver that may format an SR."""
        return self.driver(node, **{
            'sr_name': 'volumes', 'sr_type': 'nfs', 'create': True,
            'device_config': lines(config), **more,
        })

    def srs(self):
        return [
            self.pool.rows.field('SR', ref, 'uuid')
            for ref in self.pool.rows.all('SR')
        ]

    def locks(self):
        config = self.pool.rows.field('pool', self.pool.ref, 'other_config')
        return {k: v for k, v in config.items() if k.startswith('volume:')}

    def plugged(self):
        return [
            self.pool.rows.field('PBD', ref, 'currently_attached')
            for ref in self.pool.rows.all('PBD')
        ]


class Created(Case):

    def test_sr_is_made_once_by_services_that_start_together(self):
        drivers = [self.maker() for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(each.check) for each in drivers]:
                done.result()
        self.assertEqual(1, len(self.srs()))
        self.assertEqual({}, self.locks())
        self.assertEqual(
            {'volumes'}, {d.pools()[0].name for d in drivers}
        )

    def test_sr_is_found_again_by_its_name(self):
        driver = self.maker()
        driver.check()
        volume = model.Volume(ids.new(), 'volumes', 4 * model.MIB)
        handle = driver.create(volume)
        again = self.maker()
        again.check()
        self.assertEqual(handle, again.inspect(volume).handle)
        self.assertEqual(1, len(self.srs()))

    def test_service_that_dies_anywhere_leaves_one_sr(self):
        node = faults.FaultyNode(fixtures.state_dir(self))
        logging.disable(logging.WARNING)
        self.addCleanup(logging.disable, logging.NOTSET)
        ran = False
        for nth, late, kind in (
            (nth, late, kind) for nth in itertools.count(1)
            for late in (False, True) for kind in KINDS
        ):
            if ran:
                break
            self.forget()
            node.arm(faults.Fault(kind, nth, late))
            with contextlib.suppress(faults.Crash, errors.VolumeError):
                self.maker(node).check()
            ran = not node.fired
            node.arm(None)
            self.maker(node).check()
            with self.subTest(nth=nth, late=late, kind=kind):
                self.assertEqual(1, len(self.srs()))
                self.assertEqual({}, self.locks())
                self.assertEqual([True, True], self.plugged())

    def forget(self):
        """Let the pool be without an SR, as at the start."""
        with xensm.session(self.pool) as xenapi:
            for sr in xenapi.SR.get_all():
                for pbd in xenapi.SR.get_PBDs(sr):
                    xenapi.PBD.unplug(pbd)
                xenapi.SR.destroy(sr)

    def test_lock_of_a_dead_service_runs_out(self):
        link = self.link()
        now = [1000.0]
        ref, _ = srs.pool(link)
        link.call('pool.add_to_other_config', ref, 'volume:sr:volumes:1',
                  'other|1500.0')
        with self.assertRaisesRegex(errors.Busy, 'other'):
            with srs.lock(link, 'volumes', 'me', lambda: now[0], wait_s=0.0):
                pass
        now[0] = 1501.0
        with srs.lock(link, 'volumes', 'me', lambda: now[0], wait_s=0.0):
            with self.assertRaises(errors.Busy):
                with srs.lock(
                    link, 'volumes', 'you', lambda: now[0], wait_s=0.0,
                ):
                    pass
        self.assertEqual({}, self.locks())

    def test_lock_that_was_lost_is_not_taken_from_its_new_owner(self):
        link = self.link()
        now = [1000.0]
        with srs.lock(link, 'volumes', 'slow', lambda: now[0], wait_s=0.0):
            now[0] = 5000.0
            with contextlib.ExitStack() as stack:
                stack.enter_context(srs.lock(
                    link, 'volumes', 'new', lambda: now[0], wait_s=0.0))
                held = self.locks()
                self.assertEqual(2, len(held))
        self.assertEqual({}, self.locks())

    def link(self):
        driver = self.maker()
        driver.check()
        return driver._opened[1]

    def test_what_lies_there_is_not_formatted(self):
        other = xapi.simulator(self, world=self.pool.world, name='other')
        theirs = xapi.make_sr(other, 'nfs', dict(NFS))
        driver = self.maker()
        with self.assertRaisesRegex(errors.Conflict, theirs):
            driver.check()
        self.assertEqual([], self.srs())
        self.assertEqual({}, self.locks())

    def test_volume_group_that_lies_there_is_not_formatted(self):
        uuid = xapi.lvm_sr(self.pool)
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                xenapi.PBD.unplug(pbd)
            xenapi.SR.forget(sr)
        driver = self.maker(config={'device': '/dev/sdb'}, sr_type='lvm')
        with self.assertRaisesRegex(errors.Conflict, uuid):
            driver.check()
        self.assertEqual([], self.srs())

    def test_nothing_is_made_unless_it_is_said(self):
        driver = self.maker(create=False)
        with self.assertRaisesRegex(errors.Invalid, 'create = true'):
            driver.check()
        self.assertEqual([], self.srs())

    def test_wrong_keys_are_told_as_the_storage_tells_them(self):
        driver = self.maker(config={'server': 'nobody', 'serverpath': '/x'})
        with self.assertRaises(errors.VolumeError) as wrong:
            driver.check()
        self.assertIn('SR.', str(wrong.exception))
        self.assertEqual([], self.srs())
        self.assertEqual({}, self.locks())

    def test_reply_to_create_that_is_lost_makes_no_second_sr(self):
        for method in 'Async.SR.create', 'pool.add_to_other_config':
            self.pool.faults.add(Fault(method, 'lose_reply'))
        driver = self.maker()
        for _ in range(3):
            try:
                driver.check()
                break
            except (errors.Unknown, errors.Busy):
                pass
        self.assertEqual(1, len(self.srs()))
        self.assertEqual({}, self.locks())


class Existing(Case):

    def setUp(self):
        super().setUp()
        self.uuid = xapi.make_sr(self.pool, 'nfs', dict(NFS))
        self.first = self.driver(sr_uuid=[self.uuid])
        self.first.check()
        self.volume = model.Volume(ids.new(), self.uuid, 4 * model.MIB)
        self.handle = self.first.create(self.volume)

    def unplug(self, forget=False, hosts=(0, 1)):
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                if xenapi.PBD.get_host(pbd) in map(self.pool.host, hosts):
                    xenapi.PBD.unplug(pbd)
            if forget:
                xenapi.SR.forget(sr)

    def test_sr_that_was_unplugged_is_plugged_in_again(self):
        self.unplug()
        with self.assertRaises(errors.Unavailable):
            self.first.pools()
        self.first.check()
        self.assertEqual([True, True], self.plugged())
        self.assertEqual(self.handle, self.first.inspect(self.volume).handle)

    def test_sr_is_left_unplugged_where_nobody_wants_repair(self):
        self.unplug()
        driver = self.driver(sr_uuid=[self.uuid], repair=False)
        with self.assertRaisesRegex(errors.Unavailable, 'not plugged in'):
            driver.check()
        self.assertEqual([False, False], self.plugged())

    def test_master_that_lacks_its_pbd_gets_one(self):
        self.unplug(hosts=(0,))
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                if xenapi.PBD.get_host(pbd) == self.pool.host(0):
                    xenapi.PBD.destroy(pbd)
        self.first.check()
        self.assertEqual([True, True], self.plugged())
        self.first.create(self.volume)

    def test_slave_that_has_lost_it_is_repaired_now_and_then(self):
        self.unplug(hosts=(1,))
        self.assertEqual([False, True], sorted(self.plugged()))
        with xensm.session(self.pool) as xenapi:
            xenapi.host.disable(self.pool.host(1))
        self.age(self.first)
        self.first.check()
        self.assertEqual([False, True], sorted(self.plugged()))
        with xensm.session(self.pool) as xenapi:
            xenapi.host.enable(self.pool.host(1))
        self.first.check()
        self.assertEqual([False, True], sorted(self.plugged()))
        self.age(self.first)
        self.first.check()
        self.assertEqual([True, True], self.plugged())

    def test_forgotten_sr_is_introduced_and_nothing_is_lost(self):
        self.unplug(forget=True)
        with self.assertRaisesRegex(errors.Unavailable, 'introduce'):
            self.first.check()
        driver = self.driver(
            sr_uuid=[self.uuid], sr_type='nfs', device_config=lines(NFS)
        )
        driver.check()
        self.assertEqual([self.uuid], self.srs())
        found = {each.handle for each in driver.scan(self.uuid)}
        self.assertEqual({self.handle}, found)
        self.assertGreater(driver.pools()[0].total_bytes, 0)

    def test_nothing_is_taken_for_gone_while_its_sr_is_away(self):
        self.unplug(forget=True)
        for driver in self.first, self.driver(sr_uuid=[self.uuid]):
            driver_calls = (driver.inspect, driver.delete, driver.create)
            for call in driver_calls:
                self.age(driver)
                with self.assertRaises(errors.Unavailable):
                    call(self.volume)

    def age(self, driver):
        """Let a driver's last look at its SRs be long ago."""
        for each in driver._storages.values():
            each._served_at = float('-inf')
            each._repair_at = 0.0

    def test_storage_that_is_away_and_back_needs_no_hand(self):
        self.pool.faults.put_sr_offline(self.uuid)
        other = model.Volume(ids.new(), self.uuid, 4 * model.MIB)
        with self.assertRaises(errors.Unavailable):
            self.first.create(other)
        self.pool.faults.put_sr_online(self.uuid)
        self.first.check()
        self.first.create(other)
        self.assertEqual(2, len(list(self.first.scan(self.uuid))))

    def test_pool_is_not_shown_while_its_plugged_storage_is_away(self):
        driver = self.driver(sr_uuid=[self.uuid])
        driver.check()
        self.pool.faults.put_sr_offline(self.uuid)
        for _ in range(2):
            driver._storages[self.uuid]._looked_at -= 3600
            with self.assertRaisesRegex(errors.Unavailable, 'is away'):
                driver.pools()
        # Not taken for back by a check that does not look.
        driver.check()
        with self.assertRaises(errors.Unavailable):
            driver.pools()
        self.pool.faults.put_sr_online(self.uuid)
        driver.check()
        self.assertEqual([self.uuid], [p.name for p in driver.pools()])

    def test_sr_that_is_away_takes_no_other_with_it(self):
        self.pool.world.add_nfs('two', '/x')
        second = xapi.make_sr(
            self.pool, 'nfs', {'server': 'two', 'serverpath': '/x'})
        driver = self.driver(sr_uuid=[self.uuid, second])
        driver.check()
        self.assertEqual(
            {self.uuid, second}, {p.name for p in driver.pools()})
        self.pool.faults.put_sr_offline(self.uuid)
        self.unplug()
        with self.assertLogs('volume.drivers.xensm', 'WARNING'):
            driver.check()
        self.assertEqual([second], [p.name for p in driver.pools()])
        driver.create(model.Volume(ids.new(), second, 4 * model.MIB))
        self.pool.faults.put_sr_online(self.uuid)
        driver.check()
        self.assertEqual(2, len(driver.pools()))
        self.assertEqual(self.handle, driver.inspect(self.volume).handle)

    def test_sr_of_the_name_that_lies_elsewhere_is_refused(self):
        with xensm.session(self.pool) as xenapi:
            xenapi.SR.set_name_label(
                xenapi.SR.get_by_uuid(self.uuid), 'volumes')
        before = self.plugged()
        for config in (
            {**NFS, 'server': 'other'}, {**NFS, 'serverpath': '/exports/b'},
        ):
            for create in False, True:
                with self.subTest(config, create=create):
                    driver = self.maker(config=config, create=create)
                    with self.assertRaisesRegex(
                        errors.Invalid, 'device_config has .* reach SR'
                    ):
                        driver.check()
        self.assertEqual(before, self.plugged())
        self.maker().check()
        # A key that the hosts have not is told, and no refusal.
        with self.assertLogs('volume', 'WARNING') as told:
            self.maker(config={**NFS, 'nfsversion': '4'}).check()
        self.assertIn('nfsversion=4', str(told.output))
        # By its uuid it is the right one, whatever the keys say.
        with self.assertLogs('volume', 'WARNING') as told:
            self.maker(
                config={**NFS, 'server': 'other'}, create=False,
                sr_uuid=[self.uuid],
            ).check()
        self.assertIn('server=other', str(told.output))

    def test_two_srs_of_one_name_are_not_guessed_between(self):
        with xensm.session(self.pool) as xenapi:
            xenapi.SR.set_name_label(
                xenapi.SR.get_by_uuid(self.uuid), 'volumes')
        self.pool.world.add_nfs('two', '/x')
        xapi.make_sr(
            self.pool, 'nfs', {'server': 'two', 'serverpath': '/x'},
            name='volumes',
        )
        with self.assertRaisesRegex(errors.Conflict, 'rename'):
            self.driver(sr_name='volumes').check()


class Roles(Case):
    """The user of a section is told which role it has not."""

    def setUp(self):
        self.pool = xapi.simulator(self, users={
            role: User('secret', role)
            for role in (*ROLES[:-1], 'pool-admin')
        })
        self.pool.world.add_nfs(*NFS.values())
        self.uuid = xapi.make_sr(self.pool, 'nfs', dict(NFS))

    def test_who_may_not_make_volumes_is_told_by_check(self):
        for role in 'read-only', 'vm-operator':
            with self.subTest(role):
                driver = self.driver(username=role, sr_uuid=[self.uuid])
                for _ in range(2):
                    with self.assertRaisesRegex(
                        errors.Denied, f'user {role} .* role vm-admin'
                    ):
                        driver.check()

    def test_who_lacks_what_helps_is_warned_once(self):
        driver = self.driver(username='vm-admin', sr_uuid=[self.uuid])
        with self.assertLogs('volume', 'WARNING') as told:
            driver.check()
            driver.check()
        self.assertEqual(
            ['pool-operator', 'vm-power-admin'],
            sorted(
                role for line in told.output
                if (role := line.partition('the role ')[2].partition(':')[0])
            ))

    def test_who_has_the_roles_is_told_nothing(self):
        for user in 'pool-operator', 'pool-admin', 'root':
            with self.subTest(user), self.assertNoLogs(
                'volume.drivers.xensm', 'WARNING'
            ):
                self.driver(username=user, sr_uuid=[self.uuid]).check()

    def test_srs_for_each_volume_need_more(self):
        driver = self.driver(
            username='vm-power-admin', sr_per_volume=True, sr_type='nfs',
            device_config=lines(NFS), sr_uuid=[self.uuid])
        with self.assertRaisesRegex(errors.Denied, 'role pool-operator'):
            driver.check()


class WithPassword(Case):

    CONFIG = {
        'target': xensm.TARGET, 'targetIQN': xensm.IQN,
        'SCSIid': '36001405chap', 'chapuser': 'me', 'chappassword': 'hush',
    }

    def setUp(self):
        super().setUp()
        self.pool.world.add_target(xensm.TARGET, xensm.IQN)
        self.pool.world.add_lun(
            '36001405chap', 10 * model.GIB, iqn=xensm.IQN)
        self.uuid = xapi.make_sr(self.pool, 'lvmoiscsi', self.CONFIG)

    def break_off(self, destroys):
        with xensm.session(self.pool) as xenapi:
            sr = xenapi.SR.get_by_uuid(self.uuid)
            for pbd in xenapi.SR.get_PBDs(sr):
                xenapi.PBD.unplug(pbd)
                if destroys and (
                    xenapi.PBD.get_host(pbd) == self.pool.host(0)
                ):
                    xenapi.PBD.destroy(pbd)

    def test_what_is_only_unplugged_needs_no_password(self):
        self.break_off(destroys=False)
        self.driver(sr_uuid=[self.uuid]).check()
        self.assertEqual([True, True], self.plugged())

    def test_what_is_gone_is_made_anew_with_the_password(self):
        self.break_off(destroys=True)
        with self.assertRaisesRegex(errors.Unavailable, 'password'):
            self.driver(sr_uuid=[self.uuid]).check()
        self.driver(
            sr_uuid=[self.uuid], sr_type='lvmoiscsi',
            device_config=lines(self.CONFIG),
        ).check()
        self.assertEqual([True, True], self.plugged())
