# SPDX-License-Identifier: Apache-2.0
"""Whole LUNs as volumes: claimed by name, wiped, and proved to be zero."""

import concurrent.futures
import contextlib
import os
import re
import time
import unittest

from tests import xapi
from tests import xensm
from tests.xensm_hosts import make_vm
from tests.xensm_hosts import record_calls
from volume import errors
from volume import ids
from volume import model
from volume import progress
from volume.drivers.xensm.driver import XenSmDriver
from volume.node import Node
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.objects.guests import guests
from volume.testing import faults
from volume.testing import fixtures
from volume.testing import workbench

MIB = model.MIB
SIZE = 4 * MIB
LUNS = xensm.lun_ids(3)
PROOF = bool(os.environ.get('VOLUME_PROOF'))


class Case(unittest.TestCase):
    kind = 'iscsi'

    def setUp(self):
        self.pool = xapi.simulator(self, detach_delay_s=0.01)
        self.world = self.pool.world
        self.sr_uuid = xensm.lun_sr(self.pool, self.kind, len(LUNS), SIZE)
        self.node = fixtures.make_node(self)
        self.calls = []

    def driver(self, node=None, **options):
        driver = XenSmDriver(fixtures.settings(XenSmDriver, **{
            'addresses': [self.pool.url()], 'password': 'secret',
            'sr_uuid': [self.sr_uuid], 'luns': LUNS, **options,
        }), node or self.node)
        driver.check()
        driver._opened[1].records.append(self.calls.append)
        record_calls(self, driver._opened[1])
        return driver

    def wish(self, size_bytes=SIZE):
        return model.Volume(ids.new(), self.sr_uuid, size_bytes)

    def file(self, scsi_id):
        return self.world.lun_file(scsi_id)

    def put(self, scsi_id, data, at=0):
        """Write into a LUN behind everybody's back."""
        with open(self.file(scsi_id), 'r+b') as f:
            f.seek(at)
            f.write(data)

    def bytes_of(self, scsi_id):
        return self.file(scsi_id).read_bytes()

    def lun_of(self, driver, volume):
        """Return which LUN a volume has."""
        uuid = driver.inspect(volume).handle
        rows = self.pool.rows
        return rows.field(
            'VDI', rows.by_uuid('VDI', uuid), 'sm_config')['SCSIid']

    def scan(self):
        with xensm.session(self.pool) as xenapi:
            xenapi.SR.scan(xenapi.SR.get_by_uuid(self.sr_uuid))


class Claiming(Case):

    def test_only_named_luns_are_used(self):
        driver = self.driver(luns=LUNS[1:2])
        for scsi_id in LUNS[0], LUNS[2]:
            self.put(scsi_id, b'another\'s')
        volume = self.wish()
        driver.create(volume)
        self.assertEqual(LUNS[1], self.lun_of(driver, volume))
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        (pool,) = driver.pools()
        self.assertEqual((SIZE, 0), (pool.total_bytes, pool.free_bytes))
        for scsi_id in LUNS[0], LUNS[2]:
            self.assertEqual(b'another\'s', self.bytes_of(scsi_id)[:9])

    def test_section_that_names_no_lun_is_refused(self):
        with self.assertRaises(errors.Invalid) as caught:
            self.driver(luns=[])
        self.assertIn('luns', str(caught.exception))

    def test_smallest_that_fits_is_taken(self):
        for number, size in enumerate((16, 8, 12)):
            self.world.update(self.world.lun(LUNS[number]),
                              size_bytes=size * MIB)
            os.truncate(self.file(LUNS[number]), size * MIB)
        self.scan()
        driver = self.driver()
        volume = self.wish(9 * MIB)
        driver.create(volume)
        self.assertEqual(LUNS[2], self.lun_of(driver, volume))
        self.assertEqual(12 * MIB, driver.inspect(volume).size_bytes)
        with self.assertRaises(errors.Conflict):
            driver.create(model.Volume(
                volume.id, volume.pool, 10 * MIB))

    def test_lun_that_holds_something_is_refused_shown_and_kept(self):
        driver = self.driver(luns=LUNS[:1])
        for at, magic, what in (
            (512, b'LABELONE', 'LVM'),
            (1080, b'\x53\xef', 'ext'),
            (SIZE - 512, b'EFI PART', 'GPT'),
            (SIZE - 512, b'conectix', 'VHD'),
            (SIZE // 2 + 7, b'no magic', 'data at'),
        ):
            with self.subTest(what):
                self.put(LUNS[0], magic, at)
                before = self.bytes_of(LUNS[0])
                with self.assertRaises(errors.NoSpace) as caught:
                    driver.create(self.wish())
                self.assertIn(f'{LUNS[0]} holds', str(caught.exception))
                self.assertIn(what, str(caught.exception))
                self.assertEqual(before, self.bytes_of(LUNS[0]))
                (found,) = driver.scan(self.sr_uuid)
                self.assertIsNone(found.id)
                self.put(LUNS[0], bytes(len(magic)), at)
        adopted = self.wish()
        self.put(LUNS[0], b'old')
        driver.adopt(found.handle, adopted)
        self.assertEqual(b'old', workbench.content(driver, adopted)[:3])

    def test_with_luns_erase_such_a_lun_is_wiped_first(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        self.put(LUNS[0], b'LABELONE', 512)
        self.put(LUNS[0], b'x' * 999, 3 * MIB)
        volume = self.wish()
        driver.create(volume)
        self.assertEqual(bytes(SIZE), workbench.content(driver, volume))
        self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[0]))

    def test_lun_that_another_sr_has_is_never_taken_whatever_is_said(self):
        taken = '36001405taken'
        self.world.add_lun(
            taken, 64 * MIB, lun_id=len(LUNS), iqn=xensm.IQN)
        other = xapi.make_sr(self.pool, 'lvmoiscsi', {
            'target': xensm.TARGET, 'targetIQN': xensm.IQN,
            'SCSIid': taken})
        driver = self.driver(luns=[taken], luns_erase=True)
        with self.assertRaises(errors.NoSpace) as caught:
            driver.create(self.wish())
        self.assertIn(f'{taken} is used by SR {other}', str(caught.exception))
        self.assertEqual(b'LABELONE', self.bytes_of(taken)[512:520])
        (found,) = driver.scan(self.sr_uuid)
        with self.assertRaises(errors.Conflict):
            driver.adopt(found.handle, self.wish())
        with xensm.session(self.pool) as xenapi:
            ref = xenapi.SR.get_by_uuid(other)
            for pbd in xenapi.SR.get_PBDs(ref):
                xenapi.PBD.unplug(pbd)
            xenapi.SR.forget(ref)
        driver.create(self.wish())
        self.assertEqual(bytes(64 * MIB), self.bytes_of(taken))

    def test_volume_whose_lun_another_sr_has_by_now_is_not_wiped(self):
        driver = self.driver(luns=[LUNS[0]])
        volume = self.wish()
        driver.create(volume)
        other = xapi.make_sr(self.pool, 'lvmoiscsi', {
            'target': xensm.TARGET, 'targetIQN': xensm.IQN,
            'SCSIid': LUNS[0]})
        with self.assertRaisesRegex(errors.Busy, f'used by SR {other}'):
            driver.delete(volume)
        self.assertEqual(b'LABELONE', self.bytes_of(LUNS[0])[512:520])

    def test_lun_that_is_a_volume_by_another_sr_is_not_taken(self):
        both = '36001405both'
        self.world.add_lun(
            both, SIZE, lun_id=len(LUNS), iqn=xensm.IQN, adapter='FC')
        self.driver(luns=[both]).create(self.wish())
        hba = xapi.make_sr(self.pool, 'hba', {'type': 'FC'})
        other = self.driver(sr_uuid=[hba], luns=[both], luns_erase=True)
        with self.assertRaises(errors.NoSpace) as caught:
            other.create(model.Volume(ids.new(), hba, SIZE))
        self.assertIn('is used by SR', str(caught.exception))

    def test_services_that_start_together_take_different_luns(self):
        drivers = [
            self.driver(fixtures.make_node(self)) for _ in range(3)
        ]
        volumes = [self.wish() for _ in drivers]
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            list(threads.map(
                lambda pair: pair[0].create(pair[1]),
                zip(drivers, volumes, strict=True),
            ))
        self.assertEqual(set(LUNS), {
            self.lun_of(drivers[0], volume) for volume in volumes
        })

    def test_lun_that_was_away_for_a_scan_is_still_its_volumes(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        volume = self.wish()
        driver.create(volume)
        with driver.writer(volume) as writer:
            writer.write(b'kept')
            writer.commit()
        lun = self.world.lun(LUNS[0])
        self.world.remove(lun)
        self.scan()
        with self.assertRaises(errors.Unavailable):
            driver.inspect(volume)
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        self.world.add(lun)
        self.scan()
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        self.assertEqual(b'kept', workbench.content(driver, volume)[:4])

    def test_what_was_disowned_is_never_erased(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        volume = self.wish()
        driver.create(volume)
        with driver.writer(volume) as writer:
            writer.write(b'somebody\'s')
            writer.commit()
        driver.disown(volume)
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        self.assertEqual(b'somebody\'s', self.bytes_of(LUNS[0])[:10])


class Free(Case):
    """What is told as free space is what a volume could have."""

    def free(self, driver):
        (pool,) = driver.pools()
        return pool.free_bytes

    def test_lun_that_holds_something_is_free_again_once_it_is_empty(self):
        driver = self.driver(luns=LUNS[:2])
        self.put(LUNS[0], b'LABELONE', 512)
        self.put(LUNS[1], b'LABELONE', 512)
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        self.assertEqual(0, self.free(driver))
        # With luns_erase it could be had.
        self.assertEqual(
            2 * SIZE, self.free(self.driver(luns=LUNS[:2], luns_erase=True)))
        self.put(LUNS[0], bytes(8), 512)
        # Another service looks at both, each in a piece of its own.
        other = self.driver(luns=LUNS[:2])
        self.assertTrue(other.upkeep(self.sr_uuid))
        self.assertFalse(other.upkeep(self.sr_uuid))
        self.assertFalse(other.upkeep(self.sr_uuid))
        self.assertEqual(SIZE, self.free(driver))
        volume = self.wish()
        driver.create(volume)
        self.assertEqual(LUNS[0], self.lun_of(driver, volume))
        self.assertEqual(b'LABELONE', self.bytes_of(LUNS[1])[512:520])

    def test_lun_that_another_sr_has_is_not_free_until_that_is_gone(self):
        driver = self.driver(luns=LUNS[:1])
        other = xapi.make_sr(self.pool, 'lvmoiscsi', {
            'target': xensm.TARGET, 'targetIQN': xensm.IQN,
            'SCSIid': LUNS[0]})
        self.assertEqual(0, self.free(driver))
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        self.assertFalse(driver.upkeep(self.sr_uuid))
        with xensm.session(self.pool) as xenapi:
            ref = xenapi.SR.get_by_uuid(other)
            for pbd in xenapi.SR.get_PBDs(ref):
                xenapi.PBD.unplug(pbd)
            xenapi.SR.forget(ref)
        driver.upkeep(self.sr_uuid)
        self.assertEqual(0, self.free(driver))  # it holds a volume group
        with open(self.file(LUNS[0]), 'wb') as f:
            f.truncate(SIZE)
        self.driver(luns=LUNS[:1]).upkeep(self.sr_uuid)
        self.assertEqual(SIZE, self.free(driver))

    def test_what_was_let_go_of_is_never_free_space(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        volume = self.wish()
        driver.create(volume)
        driver.disown(volume)
        self.assertFalse(driver.upkeep(self.sr_uuid))
        self.assertEqual(0, self.free(driver))


class NeverHandedOut(Case):
    """What a LUN holds whose volume was not born may be another's."""

    def test_lun_that_could_not_be_looked_at_is_not_wiped_with_its_volume(
        self
    ):
        driver = self.driver(luns=LUNS[:1])
        self.put(LUNS[0], b'LABELONE', 512)
        self.pool.faults.add(Fault(
            'export_raw_vdi', 'refuse', params=('SR_BACKEND_FAILURE_46',)))
        volume = self.wish()
        with self.assertRaises(errors.VolumeError) as caught:
            driver.create(volume)
        self.assertNotIsInstance(caught.exception, errors.NoSpace)
        self.assertEqual([], self.pool.faults.waiting)
        driver.delete(volume)
        self.assertEqual(b'LABELONE', self.bytes_of(LUNS[0])[512:520])
        with self.assertRaisesRegex(errors.NoSpace, 'LVM'):
            driver.create(volume)

    def test_first_wipe_that_was_ended_is_not_done_only_to_let_go(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        self.put(LUNS[0], b'x' * 999, 3 * MIB)
        volume = self.wish()

        def stop(done_bytes, total_bytes):
            raise errors.Cancelled('stop')

        with progress.watching(stop), self.assertRaises(errors.Cancelled):
            driver.create(volume)
        with self.assertRaises(errors.NotFound):
            driver.inspect(volume)
        self.calls.clear()
        driver.delete(volume)
        self.assertNotIn('task.create', self.calls)  # nothing was sent
        self.assertEqual(b'x' * 999, self.bytes_of(LUNS[0])[3 * MIB:][:999])
        (pool,) = driver.pools()
        self.assertEqual(SIZE, pool.free_bytes)
        # Nor is it taken for clean.
        driver.create(self.wish())
        self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[0]))


class Wiping(Case):

    def filled(self, driver):
        volume = self.wish()
        driver.create(volume)
        with driver.writer(volume) as writer:
            writer.write(b'\xff' * SIZE)
            writer.commit()
        self.calls.clear()
        return volume

    def test_deleted_volume_leaves_zeros_in_all_of_its_lun(self):
        driver = self.driver()
        volume = self.filled(driver)
        scsi_id = self.lun_of(driver, volume)
        driver.delete(volume)
        self.assertEqual(bytes(SIZE), self.bytes_of(scsi_id))
        self.assertNotIn('VDI.destroy', self.calls)
        self.assertNotIn('Async.VDI.destroy', self.calls)
        driver.delete(volume)
        again = self.wish()
        self.calls.clear()
        driver.create(again)
        # Proved zero once is enough.
        self.assertNotIn('task.create', self.calls)

    def test_wipe_that_breaks_off_is_done_again_before_release(self):
        driver = self.driver(luns=LUNS[:1])
        volume = self.filled(driver)
        self.pool.faults.add(Fault(
            'import_raw_vdi', 'partial', params=(MIB,)))
        with self.assertRaises(errors.VolumeError):
            driver.delete(volume)
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        driver.delete(volume)
        self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[0]))
        driver.create(self.wish())

    def test_a_wipe_says_how_far_it_is_and_keeps_to_a_rate(self):
        driver = self.driver()
        volume = self.filled(driver)
        heard = []
        with progress.watching(
            lambda *told: heard.append(told), 3 * MIB
        ):
            driver.delete(volume)
        self.assertEqual((0, SIZE), heard[0])
        # A second's worth is free, and a third of one is waited for.
        self.assertEqual((SIZE, SIZE), heard[-1])

    def test_wipe_that_is_cancelled_leaves_the_volume_to_be_deleted(self):
        vm = make_vm(self.pool)
        helper = Helper(self.pool, vm, fixtures.state_dir(self))
        for node, options in (
            (None, {}), (helper, {'helper_vm': vm}),
        ):
            with self.subTest(**options):
                driver = self.driver(node, luns=LUNS[:1], **options)
                volume = self.filled(driver)

                def stop(done_bytes, total_bytes):
                    if done_bytes:
                        raise errors.Cancelled('stop')

                with progress.watching(stop, MIB):
                    with self.assertRaises(errors.Cancelled):
                        driver.delete(volume)
                self.nothing_is_plugged()
                # It is the volume's still, and nobody else gets it.
                self.assertEqual(SIZE, driver.inspect(volume).size_bytes)
                with self.assertRaises(errors.NoSpace):
                    driver.create(self.wish())
                self.put(LUNS[0], b'left', SIZE // 2)
                driver.delete(volume)
                self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[0]))
                self.nothing_is_plugged()
                (pool,) = driver.pools()
                self.assertEqual(SIZE, pool.free_bytes)

    def nothing_is_plugged(self):
        deadline = time.monotonic() + 20.0
        while self.pool.rows.all('VBD'):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def test_lun_that_does_not_read_zero_is_never_handed_out(self):
        driver = self.driver(luns=LUNS[:1], luns_erase=True)
        volume = self.filled(driver)
        link = driver._opened[1]

        def spoil(method):
            # After the zeros were sent, before they are read.
            if method == 'task.create':
                self.put(LUNS[0], b'\xff' * SIZE)

        link.records.append(spoil)
        with self.assertRaises(errors.Corrupt):
            driver.delete(volume)
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        link.records.remove(spoil)
        driver.delete(volume)
        self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[0]))

    def test_helper_vm_writes_the_zeros_where_there_is_one(self):
        vm = make_vm(self.pool)
        node = Helper(self.pool, vm, fixtures.state_dir(self))
        driver = self.driver(node, helper_vm=vm)
        volume = self.filled(driver)
        scsi_id = self.lun_of(driver, volume)
        node.devices.clear()
        driver.delete(volume)
        self.assertEqual(['/dev/xvda'], node.devices)
        self.assertEqual(bytes(SIZE), self.bytes_of(scsi_id))
        self.assertEqual([], self.pool.rows.find(
            'VBD', VM=self.pool.rows.by_uuid('VM', vm)))

    def test_volume_in_use_is_not_wiped(self):
        driver = self.driver()
        volume = self.filled(driver)
        with xensm.session(self.pool) as xenapi:
            vbd = xenapi.VBD.create({
                'VM': xenapi.VM.get_by_uuid(make_vm(self.pool)),
                'VDI': xenapi.VDI.get_by_uuid(
                    driver.inspect(volume).handle),
                'userdevice': 'autodetect', 'bootable': False, 'mode': 'RW',
                'type': 'Disk', 'empty': False, 'other_config': {},
                'qos_algorithm_type': '', 'qos_algorithm_params': {},
            })
            xenapi.VBD.plug(vbd)
            with self.assertRaises(errors.Busy):
                driver.delete(volume)
            xenapi.VBD.unplug(vbd)
            xenapi.VBD.destroy(vbd)
        self.assertEqual(
            b'\xff' * SIZE, workbench.content(driver, volume))


class Hba(Case):
    """The server chooses a LUN by its size alone; we want a certain one."""

    kind = 'hba'

    def test_luns_that_were_not_meant_are_given_back_untouched(self):
        for scsi_id in LUNS[:2]:
            self.put(scsi_id, b'another\'s')
        driver = self.driver(luns=LUNS[2:])
        volume = self.wish()
        driver.create(volume)
        self.assertEqual(LUNS[2], self.lun_of(driver, volume))
        managed = {
            self.pool.rows.field('VDI', ref, 'sm_config')['SCSIid']
            for ref in self.pool.rows.all('VDI')
            if self.pool.rows.field('VDI', ref, 'managed')
        }
        self.assertEqual({LUNS[2]}, managed)
        for scsi_id in LUNS[:2]:
            self.assertEqual(b'another\'s', self.bytes_of(scsi_id)[:9])
        driver.delete(volume)
        self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[2]))

    def test_service_that_dies_anywhere_leaves_no_lun_lost_or_dirty(self):
        node = faults.FaultyNode(fixtures.state_dir(self))
        driver = self.driver(node, luns=LUNS[1:2])
        volume = self.wish()

        def create():
            driver.create(volume)
            with driver.writer(volume) as writer:
                writer.write(b'\xff' * SIZE)
                writer.commit()

        node.arm(None)
        create()
        made = list(node.trace)
        node.arm(None)
        driver.delete(volume)
        self.addCleanup(self.end_tasks)
        deleted = list(node.trace)
        for trace in made, deleted:
            changes = [
                (nth, what) for nth, what in enumerate(trace, 1)
                if not re.search(r'\.get_|event\.|vdi ', what)
            ]
            for nth, what in changes[::1 if PROOF else 7]:
                with self.subTest(what, nth=nth):
                    node.arm(None)
                    if trace is deleted:
                        create()
                    node.arm(faults.Fault('crash', nth, True))
                    with contextlib.suppress(
                        faults.Crash, errors.VolumeError
                    ):
                        (driver.delete if trace is deleted
                         else driver.create)(volume)
                    node.arm(None)
                    driver.check()
                    if trace is made:
                        driver.create(volume)
                        self.assertEqual(
                            bytes(SIZE), self.bytes_of(LUNS[1]))
                    driver.delete(volume)
                    self.assertEqual(bytes(SIZE), self.bytes_of(LUNS[1]))
                    (pool,) = driver.pools()
                    self.assertEqual(SIZE, pool.free_bytes)

    def end_tasks(self):
        """End the tasks of those who have died, as the server would."""
        with xensm.session(self.pool) as xenapi:
            for ref, task in xenapi.task.get_all_records().items():
                if task['status'] == 'pending':
                    xenapi.task.destroy(ref)


    def test_refused_lun_is_looked_at_again_and_given_back(self):
        driver = self.driver(luns=LUNS[2:])
        self.put(LUNS[2], b'another\'s')
        with self.assertRaises(errors.NoSpace):
            driver.create(self.wish())
        other = self.driver(luns=LUNS[2:])
        self.assertFalse(other.upkeep(self.sr_uuid))
        (pool,) = driver.pools()
        self.assertEqual(0, pool.free_bytes)
        self.put(LUNS[2], bytes(9))
        self.driver(luns=LUNS[2:]).upkeep(self.sr_uuid)
        (pool,) = driver.pools()
        self.assertEqual(SIZE, pool.free_bytes)
        self.assertFalse(any(
            self.pool.rows.field('VDI', ref, 'managed')
            for ref in self.pool.rows.all('VDI')))


class Helper(Node):
    """The node of a service that runs in a VM of the pool."""

    def __init__(self, pool, vm, state_dir):
        super().__init__(state_dir)
        self.pool, self.vm, self.devices = pool, vm, []

    def run(self, *argv, **options):
        if argv[0] != 'blkdiscard':
            return super().run(*argv, **options)
        _, zeroout, offset, length, device = argv
        assert zeroout == '--zeroout', argv
        assert offset.startswith('--offset='), argv
        assert length.startswith('--length='), argv
        self.devices.append(device)
        disk = guests(self.pool).disk(self.vm, os.path.basename(device))
        disk.zero(int(offset[9:]), int(length[9:]))
        return ''
