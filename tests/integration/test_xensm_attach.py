# SPDX-License-Identifier: Apache-2.0
"""Attaching by XenAPI: in the pool that owns an SR, and in another one."""

import contextlib
import threading
import unittest

from tests import xapi
from tests import xensm
from tests.xensm_hosts import ComputeHost
from tests.xensm_hosts import make_vm
from tests.xensm_hosts import record_calls
from tests.xensm_hosts import write_poolfile
from volume import errors
from volume import ids
from volume import model
from volume.drivers.xensm.driver import XenSmDriver
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.objects.guests import guests
from volume.testing import fixtures
from volume.testing import workbench
from volume.xenapi import plugs
from volume.xenapi.options import lines

MIB = model.MIB
NFS = {'server': 'filer', 'serverpath': '/export'}
WRITE, READ = model.Access.WRITE, model.Access.READ


class Case(unittest.TestCase):
    """A pool that owns an SR, and a host in it."""

    def setUp(self):
        self.pool = xapi.simulator(self, detach_delay_s=0.02)
        self.world = self.pool.world
        self.node = fixtures.make_node(self)

    def driver(self, **options):
        driver = XenSmDriver(fixtures.settings(XenSmDriver, **{
            'addresses': [self.pool.url()], 'password': 'secret', **options,
        }), self.node)
        driver.check()
        record_calls(self, driver._opened[1])
        return driver

    def volume(self, driver, size_bytes=4 * MIB):
        volume = model.Volume(
            ids.new(), driver.pools()[0].name, size_bytes)
        driver.create(volume)
        return volume

    def another_pool(self):
        """Return a second pool beside the same storage."""
        return xapi.simulator(
            self, world=self.world, name='other', detach_delay_s=0.02)

    def srs(self, pool):
        return {
            pool.rows.field('SR', ref, 'uuid')
            for ref in pool.rows.all('SR')
        }

    def plugged(self, pool, sr_uuid):
        """Return on how many hosts of a pool an SR is plugged in."""
        refs = pool.rows.find('SR', uuid=sr_uuid)
        return sum(
            pool.rows.field('PBD', pbd, 'currently_attached')
            for ref in refs for pbd in pool.rows.find('PBD', SR=ref)
        )

    def content(self, driver, volume):
        return workbench.content(driver, volume)


class SamePool(Case):

    def setUp(self):
        super().setUp()
        self.sr_uuid = xapi.nfs_sr(self.pool)
        self.its = self.driver(sr_uuid=[self.sr_uuid])
        self.host = ComputeHost(self, self.pool)

    def test_vm_gets_a_disk_and_nothing_is_introduced(self):
        volume = self.volume(self.its)
        calls = []
        self.host.connector._link.records.append(calls.append)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        device = self.host.connector.attach(connection)
        self.assertEqual('/dev/xvda', device)
        self.host.write(device, 5000, b'guest')
        self.assertEqual({self.sr_uuid}, self.srs(self.pool))
        self.assertEqual(set(), {
            'SR.introduce', 'PBD.create', 'PBD.plug', 'SR.scan',
        }.intersection(calls))
        self.host.connector.detach(connection)
        self.its.revoke(volume, self.host.host())
        self.assertEqual([], self.host.vbds())
        self.assertEqual(
            b'\0guest\0', self.content(self.its, volume)[4999:5006])

    def test_what_a_host_had_is_not_filled_as_if_it_were_empty(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        device = self.host.connector.attach(connection)
        self.host.write(device, 3 * MIB, b'guest')
        self.host.connector.detach(connection)
        self.its.revoke(volume, self.host.host())
        with self.its.writer(volume) as writer:
            writer.expect([
                model.Extent(0, MIB, False),
                model.Extent(MIB, volume.size_bytes - MIB, True),
            ])
            writer.write(b'x' * MIB)
            writer.zero(MIB, volume.size_bytes - MIB)
            writer.commit()
        self.assertEqual(
            b'x' * MIB + bytes(volume.size_bytes - MIB),
            self.content(self.its, volume),
        )

    def test_connection_says_where_the_disk_is_and_no_key_more(self):
        volume = self.volume(self.its)
        handle = self.its.inspect(volume).handle
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.assertEqual('xensm', connection.protocol)
        self.assertEqual({
            'sr_uuid': self.sr_uuid, 'sr_type': 'nfs', 'vdi_uuid': handle,
            'volume_id': volume.id, 'name_label': 'nfs storage',
            'introduce_sr_keys': ['sr_type'], 'pool': self.pool.uuid,
            'host': self.host.name, 'access': 'rw',
        }, dict(connection.fields))
        self.assertEqual({}, dict(connection.secrets))

    def test_every_step_may_be_repeated(self):
        volume = self.volume(self.its)
        found = [
            self.its.grant(volume, self.host.host(), WRITE)
            for _ in range(2)
        ]
        self.assertEqual(*found)
        for _ in range(2):
            self.assertEqual(
                '/dev/xvda', self.host.connector.attach(found[0]))
        self.assertEqual(1, len(self.host.vbds()))
        for _ in range(2):
            self.host.connector.detach(found[0])
        for _ in range(2):
            self.its.revoke(volume, self.host.host())
        self.assertEqual([], self.host.vbds())
        self.its.delete(volume)
        self.its.revoke(volume, self.host.host())

    def test_revoke_ends_what_the_host_left_plugged(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        device = self.host.connector.attach(connection)
        self.host.write(device, 0, b'kept')
        self.its.revoke(volume, self.host.host())
        self.assertEqual([], self.host.vbds())
        self.assertEqual(b'kept', self.content(self.its, volume)[:4])

    def test_host_that_comes_after_the_revoke_gets_nothing(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.its.revoke(volume, self.host.host())
        with self.assertRaises(errors.Denied):
            self.host.connector.attach(connection)
        self.assertEqual([], self.host.vbds())

    def test_revoke_leaves_another_hosts_disk_alone(self):
        volume = self.volume(self.its)
        other = ComputeHost(self, self.pool, 1)
        for host in self.host, other:
            connection = self.its.grant(volume, host.host(), READ)
            host.connector.attach(connection)
        self.its.revoke(volume, self.host.host())
        self.assertEqual([], self.host.vbds())
        self.assertEqual(['RO'], [each['mode'] for each in other.vbds()])
        self.its.revoke(volume, other.host())
        self.assertEqual([], other.vbds())

    def test_guest_that_refuses_is_asked_again_and_then_no_more(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.host.connector.attach(connection)
        behaviour = guests(self.pool).behaviour(self.host.vm)
        behaviour.refuses_detach = True
        pauses = []

        def pause(pause_s):
            pauses.append(pause_s)
            behaviour.refuses_detach = len(pauses) < 3

        self.host.connect(self.host.vm, sleep=pause).detach(connection)
        self.assertEqual(3, len(pauses))
        self.assertEqual([], self.host.vbds())

    def test_disk_that_a_guest_never_gives_up_is_busy(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.host.connector.attach(connection)
        guests(self.pool).behaviour(self.host.vm).refuses_detach = True
        link = self.host.connector._link
        (vbd,) = plugs.vbds(
            link, plugs.find(link, 'VDI', connection.fields['vdi_uuid']))
        with self.assertRaises(errors.Busy):
            plugs.end_vbd(link, vbd, wait_s=0)
        self.assertEqual(1, len(self.host.vbds()))
        plugs.end_vbd(link, vbd, wait_s=0, by_force=True)
        self.assertEqual([], self.host.vbds())

    def test_reader_gets_no_disk_to_write_to(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), READ)
        self.host.connector.attach(connection)
        self.assertEqual(['RO'], [v['mode'] for v in self.host.vbds()])
        wanting = self.its.grant(volume, self.host.host(), WRITE)
        with self.assertRaises(errors.Conflict):
            self.host.connector.attach(wanting)

    def test_second_writer_is_refused_and_leaves_no_disk(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.host.connector.attach(connection)
        other = ComputeHost(self, self.pool, 1)
        theirs = self.its.grant(volume, other.host(), WRITE)
        with self.assertRaises(errors.Busy):
            other.connect(
                other.vm, sleep=lambda _: None).attach(theirs)
        self.assertEqual([], other.vbds())
        self.assertEqual(1, len(self.host.vbds()))

    def test_halted_vm_has_the_disk_when_it_starts(self):
        volume = self.volume(self.its)
        vm = make_vm(self.pool, is_running=False)
        connector = self.host.connect(vm)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.assertEqual('', connector.attach_to(connection, vm))
        (vbd,) = self.host.vbds(vm)
        self.assertFalse(vbd['currently_attached'])
        connector.detach_from(connection, vm)
        self.assertEqual([], self.host.vbds(vm))

    def test_lost_replies_leave_one_disk_and_then_none(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        for method in 'VBD.create', 'VBD.plug':
            self.pool.faults.add(
                Fault(method, 'lose_reply', when='after', count=1))
        self.assertEqual(
            '/dev/xvda', self.host.connector.attach(connection))
        self.assertEqual(
            [True], [v['currently_attached'] for v in self.host.vbds()])
        for method in 'VBD.unplug', 'VBD.destroy':
            self.pool.faults.add(
                Fault(method, 'lose_reply', when='after', count=1))
        self.host.connector.detach(connection)
        self.assertEqual([], self.host.vbds())

    def test_disks_of_one_vm_are_plugged_one_after_the_other(self):
        volumes = [self.volume(self.its) for _ in range(4)]
        connections = [
            self.its.grant(volume, self.host.host(), WRITE)
            for volume in volumes
        ]
        begun, most, guard = [], [], threading.Lock()

        def record(method):
            if method == 'VBD.plug':
                with guard:
                    begun.append(method)
                    most.append(len(begun))

        def attach(connection):
            connector = self.host.connect(self.host.vm)
            connector._link.records.append(record)
            connector.attach(connection)
            with guard:
                begun.pop()

        threads = [
            threading.Thread(target=attach, args=(each,))
            for each in connections
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([1, 1, 1, 1], most)
        self.assertEqual(4, len(self.host.vbds()))
        self.assertEqual(
            4, len({each['device'] for each in self.host.vbds()}))
        for connection in connections:
            self.host.connector.detach(connection)

    def test_host_that_says_no_pool_is_known_by_name_or_refused(self):
        volume = self.volume(self.its)
        record = self.pool.rows.get('host', self.pool.host(0))
        self.its.grant(volume, model.Host(record['name_label']), WRITE)
        with self.assertRaises(errors.Invalid) as caught:
            self.its.grant(volume, model.Host('stranger'), WRITE)
        self.assertIn('xensm_pool', str(caught.exception))

    def test_snapshot_of_a_lent_out_disk_has_no_hosts(self):
        volume = self.volume(self.its)
        connection = self.its.grant(volume, self.host.host(), WRITE)
        self.host.connector.attach(connection)
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        self.its.snapshot(snapshot)
        clone = model.Volume(ids.new(), volume.pool, volume.size_bytes)
        self.its.clone(snapshot, clone)
        self.its.revoke(clone, self.host.host())
        self.assertEqual(1, len(self.host.vbds()))
        self.its.revoke(volume, self.host.host())
        self.assertEqual([], self.host.vbds())


class OtherPool(Case):
    """An SR of many volumes stays where it is."""

    def test_shared_sr_of_many_volumes_is_refused_with_the_reason(self):
        sr_uuid = xapi.nfs_sr(self.pool)
        driver = self.driver(sr_uuid=[sr_uuid])
        volume = self.volume(driver)
        host = ComputeHost(self, self.another_pool())
        with self.assertRaises(errors.Unsupported) as caught:
            driver.grant(volume, host.host(), WRITE)
        self.assertIn('one pool at a time', str(caught.exception))
        self.assertIn('sr_per_volume', str(caught.exception))
        self.assertEqual(2, self.plugged(self.pool, sr_uuid))


class Lent(Case):
    """A volume with an SR of its own goes to another pool and back."""

    def setUp(self):
        super().setUp()
        self.world.add_nfs(*NFS.values(), size_bytes=100 << 30)
        self.other = self.another_pool()
        self.host = ComputeHost(self, self.other)
        self.its = self.make()
        self.its_volume = self.volume(self.its)

    def make(self):
        return self.driver(
            sr_type='nfs', device_config=lines(NFS), sr_per_volume=True,
            peers=[write_poolfile(fixtures.state_dir(self), self.other)],
        )

    def lend(self):
        connection = self.its.grant(
            self.its_volume, self.host.host(), WRITE)
        return connection, self.host.connector.attach(connection)

    def test_bytes_that_a_guest_writes_there_come_back(self):
        with self.its.writer(self.its_volume) as writer:
            writer.write(b'before')
            writer.commit()
        connection, device = self.lend()
        sr_uuid = connection.fields['sr_uuid']
        self.assertEqual(b'before', self.host.read(device, 0, 6))
        self.host.write(device, MIB, b'there')
        self.assertEqual(0, self.plugged(self.pool, sr_uuid))
        self.assertEqual(2, self.plugged(self.other, sr_uuid))
        self.host.connector.detach(connection)
        self.assertEqual(set(), self.srs(self.other))
        self.its.revoke(self.its_volume, self.host.host())
        self.assertEqual(2, self.plugged(self.pool, sr_uuid))
        found = self.content(self.its, self.its_volume)
        self.assertEqual(
            (b'before', b'there'), (found[:6], found[MIB:MIB + 5]))
        self.its.delete(self.its_volume)
        self.assertEqual([], list(self.its.scan(self.its_volume.pool)))

    def test_connection_tells_how_the_sr_is_introduced(self):
        connection, _ = self.lend()
        self.assertEqual(
            ['server', 'serverpath', 'sr_type'],
            connection.fields['introduce_sr_keys'],
        )
        self.assertEqual('filer', connection.fields['server'])
        self.assertEqual(self.pool.uuid, connection.fields['pool'])
        self.its.revoke(self.its_volume, self.host.host())

    def test_every_verb_is_busy_until_it_is_back(self):
        self.lend()
        volume = self.its_volume
        snapshot = model.Snapshot(ids.new(), volume, volume.size_bytes)
        near = ComputeHost(self, self.pool)
        for verb in (
            lambda: self.its.delete(volume),
            lambda: self.its.inspect(volume),
            lambda: self.its.resize(volume, 8 * MIB),
            lambda: self.its.snapshot(snapshot),
            lambda: self.its.delete_snapshot(snapshot),
            lambda: self.its.revert(snapshot),
            lambda: self.its.grant(volume, near.host(), WRITE),
            lambda: self.its.describe(volume, {}),
            lambda: self.its.reader(volume).__enter__(),
            lambda: self.its.writer(volume).__enter__(),
        ):
            with self.assertRaises(errors.Busy) as caught:
                verb()
            self.assertIn(self.other.uuid, str(caught.exception))
        self.its.revoke(volume, self.host.host())
        self.its.inspect(volume)

    def test_check_does_not_plug_in_what_is_lent(self):
        connection, device = self.lend()
        self.its.check()
        self.make().check()
        self.assertEqual(
            0, self.plugged(self.pool, connection.fields['sr_uuid']))
        self.host.write(device, 0, b'on')
        self.its.revoke(self.its_volume, self.host.host())

    def test_revoke_ends_what_is_plugged_in_the_other_pool(self):
        _, device = self.lend()
        self.host.write(device, 0, b'left')
        self.its.revoke(self.its_volume, self.host.host())
        self.assertEqual([], self.host.vbds())
        self.assertEqual(set(), self.srs(self.other))
        self.assertEqual(
            b'left', self.content(self.its, self.its_volume)[:4])

    def test_volume_stays_lent_while_the_other_pool_cannot_be_asked(self):
        connection, _ = self.lend()
        self.other.faults.add(Fault('*', 'drop', when='before', count=-1))
        with self.assertRaises(errors.VolumeError):
            self.its.revoke(self.its_volume, self.host.host())
        self.other.faults.clear()
        self.assertEqual(
            0, self.plugged(self.pool, connection.fields['sr_uuid']))
        with self.assertRaises(errors.Busy):
            self.its.inspect(self.its_volume)
        self.its.revoke(self.its_volume, self.host.host())
        self.its.inspect(self.its_volume)

    def test_host_that_comes_after_the_revoke_gets_nothing(self):
        connection = self.its.grant(
            self.its_volume, self.host.host(), WRITE)
        self.its.revoke(self.its_volume, self.host.host())
        with self.assertRaises(errors.Denied):
            self.host.connector.attach(connection)
        self.assertEqual(set(), self.srs(self.other))

    def test_revoke_in_mid_attach_has_the_last_word(self):
        volume, host = self.its_volume, self.host.host()
        for method in 'pool.get_all_records', 'SR.introduce', 'VBD.plug':
            with self.subTest(method):
                connection = self.its.grant(volume, host, WRITE)
                connector = self.host.connect(self.host.vm)
                revoking = threading.Thread(
                    target=self.its.revoke, args=(volume, host))

                def revoke(called, method=method, revoking=revoking):
                    if called == method and not revoking.ident:
                        revoking.start()

                connector._link.records.append(revoke)
                # It may be told no, or lose its disk a moment later.
                with contextlib.suppress(errors.VolumeError):
                    connector.attach(connection)
                revoking.join()
                self.assertEqual([], self.host.vbds())
                self.assertEqual(set(), self.srs(self.other))
                self.its.inspect(volume)

    def test_pool_that_is_no_peer_gets_nothing(self):
        third = xapi.simulator(self, world=self.world, name='third')
        stranger = ComputeHost(self, third)
        with self.assertRaises(errors.Unsupported) as caught:
            self.its.grant(self.its_volume, stranger.host(), WRITE)
        self.assertIn('peers', str(caught.exception))
        self.its.inspect(self.its_volume)

    def test_sr_that_another_client_brought_is_not_forgotten(self):
        connection = self.its.grant(
            self.its_volume, self.host.host(), WRITE)
        sr_uuid = connection.fields['sr_uuid']
        with xensm.session(self.other) as xenapi:
            ref = xenapi.SR.introduce(
                sr_uuid, 'by hand', '', 'nfs', 'user', True, {})
            for host in xenapi.host.get_all():
                xenapi.PBD.plug(xenapi.PBD.create({
                    'host': host, 'SR': ref, 'device_config': NFS,
                    'other_config': {},
                }))
            xenapi.SR.scan(ref)
        self.host.connector.attach(connection)
        self.host.connector.detach(connection)
        self.assertEqual({sr_uuid}, self.srs(self.other))
        self.assertEqual(2, self.plugged(self.other, sr_uuid))
        self.its.revoke(self.its_volume, self.host.host())
        self.assertEqual(0, self.plugged(self.other, sr_uuid))

    def test_attach_that_fails_leaves_nothing_behind(self):
        connection = self.its.grant(
            self.its_volume, self.host.host(), WRITE)
        for method in 'PBD.plug', 'SR.scan', 'VBD.create', 'VBD.plug':
            with self.subTest(method):
                self.other.faults.add(Fault(
                    method, 'refuse', when='before', count=8,
                    params=('HOST_OFFLINE', 'x'),
                ))
                with self.assertRaises(errors.VolumeError):
                    self.host.connector.attach(connection)
                self.other.faults.clear()
                self.assertEqual(set(), self.srs(self.other))
                self.assertEqual([], self.host.vbds())
        self.its.revoke(self.its_volume, self.host.host())

    def test_grant_interrupted_anywhere_is_repeated_or_taken_back(self):
        volume, host = self.its_volume, self.host.host()
        calls = []
        self.its._opened[1].records.append(calls.append)
        self.its.grant(volume, host, WRITE)
        self.its.revoke(volume, host)
        changes = [m for m in calls if not m.split('.')[1].startswith('get')]
        self.assertIn('PBD.unplug', changes)
        for method in dict.fromkeys(changes):
            for when in 'before', 'after':
                if method.split('.')[0] in ('event', 'task'):
                    continue
                with self.subTest(method, when=when):
                    self.pool.faults.add(Fault(
                        method, 'lose_reply' if when == 'after' else 'drop',
                        when=when, count=4,
                    ))
                    for act in (
                        lambda: self.its.grant(volume, host, WRITE),
                        lambda: self.its.revoke(volume, host),
                    ):
                        try:
                            act()
                        except errors.VolumeError:
                            pass
                    self.pool.faults.clear()
                    self.its.grant(volume, host, WRITE)
                    self.its.revoke(volume, host)
                    self.assertEqual(
                        volume.id, self.its.inspect(volume).id)


class Luns(Case):
    """A LUN goes to another pool: nobody here has it plugged."""

    def test_lun_goes_to_another_pool_and_back(self):
        other = self.another_pool()
        host = ComputeHost(self, other)
        sr_uuid = xensm.lun_sr(self.pool, 'iscsi', 3, 4 * MIB)
        driver = self.driver(
            sr_uuid=[sr_uuid], luns=xensm.lun_ids(3),
            peers=[write_poolfile(fixtures.state_dir(self), other)],
        )
        volume = self.volume(driver)
        connection = driver.grant(volume, host.host(), WRITE)
        self.assertEqual(
            ['sr_type', 'target', 'targetIQN'],
            connection.fields['introduce_sr_keys'],
        )
        device = host.connector.attach(connection)
        host.write(device, 0, b'there')
        with self.assertRaises(errors.Busy):
            driver.delete(volume)
        host.connector.detach(connection)
        self.assertEqual(set(), self.srs(other))
        driver.revoke(volume, host.host())
        self.assertEqual(b'there', self.content(driver, volume)[:5])
        driver.delete(volume)

    def test_hba_says_why_its_luns_stay(self):
        sr_uuid = xensm.lun_sr(self.pool, 'hba', 1, 4 * MIB)
        driver = self.driver(sr_uuid=[sr_uuid], luns=xensm.lun_ids(1))
        volume = self.volume(driver)
        host = ComputeHost(self, self.another_pool())
        with self.assertRaises(errors.Unsupported) as caught:
            driver.grant(volume, host.host(), WRITE)
        self.assertIn('rawhba', str(caught.exception))


