# SPDX-License-Identifier: Apache-2.0
"""Disks of every kind of SR go in and out the same way, and fail the same."""

import http.client
import random

from tests import vhds
from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.objects.guests import guests

SIZE = 8 * MIB


class Families(Case):

    def setUp(self):
        super().setUp()
        self.data = random.Random(9).randbytes(SIZE)

    def goes_through(self, sr, host=None, **more):
        """Check that what goes in comes out, in each format."""
        sr = self.x.SR.get_by_uuid(sr)
        vdi = self.vdi(SIZE, sr, **more)
        size = int(self.x.VDI.get_virtual_size(vdi))
        whole = self.data.ljust(size, b'\0')
        image = vhds.craft(self.data, [3, 1, 0, 2])
        for format, body in (('raw', self.data), ('vhd', image)):
            with self.subTest(format=format):
                task = self.put(vdi, body, format=format, host=host)
                self.assertEqual('success', task['status'], task)
                self.left(vdi)
                body, task = self.get(vdi, format=format, host=host)
                self.assertEqual('success', task['status'], task)
                found = vhds.naive(body) if format == 'vhd' else body
                self.assertEqual(whole, found)
                self.left(vdi)
        return vdi

    def test_ext(self):
        self.goes_through(xapi.ext_sr(self.pool))

    def test_lvm(self):
        self.goes_through(xapi.lvm_sr(self.pool))

    def test_raw_volumes_of_a_group(self):
        self.goes_through(
            xapi.lvm_sr(self.pool), sm_config={'type': 'raw'})

    def test_a_local_sr_of_the_second_host(self):
        self.goes_through(xapi.ext_sr(self.pool, host=1), host=1)

    def test_qcow2_files(self):
        self.goes_through(
            self.x.SR.get_uuid(self.sr),
            sm_config={'image-format': 'qcow2'})

    def test_a_lun(self):
        self.goes_through(
            xapi.hba_sr(self.pool, ('3600a0b80', SIZE)))

    def test_a_delta_of_qcow2_files(self):
        vdi = self.goes_through(
            self.x.SR.get_uuid(self.sr),
            sm_config={'image-format': 'qcow2'})
        base = self.x.VDI.snapshot(vdi)
        self.put(vdi, b'new')
        self.left(vdi)
        delta, task = self.get(vdi, format='vhd', base=base)
        self.assertEqual('success', task['status'], task)
        self.assertLess(len(delta), 3 * MIB)
        bottom, _ = self.get(base, format='vhd')
        self.assertEqual(
            b'new' + self.data[3:], vhds.naive(delta, bottom))

    def test_a_lun_is_no_base_of_a_delta(self):
        vdi = self.goes_through(
            xapi.hba_sr(self.pool, ('3600a0b80', SIZE)))
        _, task = self.get(vdi, format='vhd', base=vdi)
        self.assertEqual(['VDI_NOT_SPARSE', vdi], task['error_info'])

    def test_a_vhd_leaves_the_old_bytes_of_a_lun_between_its_blocks(self):
        """A server takes every disk for new, also a LUN that is not."""
        vdi = self.goes_through(
            xapi.hba_sr(self.pool, ('3600a0b80', SIZE)))
        self.put(vdi, vhds.craft(bytes(SIZE), [0]), format='vhd')
        self.left(vdi)
        self.assertEqual(
            bytes(2 * MIB) + self.data[2 * MIB:], self.content(vdi))

    def test_a_server_that_does_not_takes_nothing_for_new(self):
        self.pool._switches['zeroes_unsent'] = True
        vdi = self.goes_through(
            xapi.hba_sr(self.pool, ('3600a0b80', SIZE)))
        image = vhds.craft(self.data, [2])
        self.put(vdi, image, format='vhd')
        self.left(vdi)
        self.assertEqual(vhds.naive(image), self.content(vdi))

    def test_a_vhd_on_a_raw_volume_has_zeros_between_its_blocks(self):
        vdi = self.goes_through(
            xapi.lvm_sr(self.pool), sm_config={'type': 'raw'})
        image = vhds.craft(self.data, [2])
        self.put(vdi, image, format='vhd')
        self.left(vdi)
        self.assertEqual(vhds.naive(image), self.content(vdi))


class Large(Case):

    def test_the_largest_vhd_goes_out_and_comes_in_by_its_blocks(self):
        size = 2040 << 30
        data = random.Random(2).randbytes(MIB)
        vdi = self.vdi(size)
        vm, _ = self.plugged(vdi)
        self.write(vm, data, size - MIB)
        self.x.VM.hard_shutdown(vm)
        image, task = self.get(vdi, format='vhd')
        self.assertEqual('success', task['status'], task)
        self.assertLess(len(image), 8 * MIB)
        other = self.vdi(size)
        self.assertEqual(
            'success', self.put(other, image, format='vhd')['status'])
        vm, _ = self.plugged(other)
        self.assertEqual(data, self.read(vm, size - MIB, MIB))

    def test_a_disk_that_is_larger_is_too_large_for_a_vhd(self):
        size = 2042 << 30
        vdi = self.vdi(size)
        status, _, _ = self.ask(
            'GET', '/export_raw_vdi', vdi=vdi, format='vhd')
        self.assertEqual(500, status)
        _, task = self.get(vdi, format='vhd')
        self.assertEqual(
            ['VDI_TOO_LARGE', vdi, str(2040 << 30)], task['error_info'])


class Trouble(Case):

    def setUp(self):
        super().setUp()
        self.disk = self.vdi()

    def test_an_sr_that_is_away_takes_and_gives_no_data(self):
        self.pool.faults.put_sr_offline(self.x.SR.get_uuid(self.sr))
        task = self.put(self.disk, b'data')
        self.assertEqual('failure', task['status'])
        self.assertRegex(task['error_info'][0], 'SR_BACKEND_FAILURE_4[67]')

    def test_a_master_that_dies_during_a_transfer_takes_its_task_along(self):
        self.pool.faults.add(
            Fault('import_raw_vdi', 'kill_master', 'after'))
        task = self.x.task.create('', '')
        try:
            self.ask('PUT', '/import_raw_vdi', b'spam', vdi=self.disk,
                     task_id=task)
        except OSError:
            pass
        self.until(lambda: not self.pool.is_up(self.pool.host(0)))
        x = xapi.login(self, self.pool).xenapi
        self.assertEqual('cancelled', x.task.get_status(task))
        self.pool.start_host(0)

    def test_an_answer_that_is_lost_leaves_the_data_and_the_task(self):
        self.pool.faults.add(Fault('import_raw_vdi', 'lose_reply'))
        task = self.x.task.create('', '')
        with self.assertRaises(http.client.RemoteDisconnected):
            self.ask('PUT', '/import_raw_vdi', b'spam', vdi=self.disk,
                     task_id=task)
        self.assertEqual('success', self.ended(task)['status'])
        self.left(self.disk)
        self.assertEqual(b'spam', self.content(self.disk)[:4])

    def test_a_copy_of_a_host_that_died_leaves_a_disk_behind(self):
        self.put(self.disk, b'spam')
        self.left(self.disk)
        self.pool.faults.add(
            Fault('VDI.copy', 'delay', 'after', params=(0.3,)))
        before = {*self.pool.rows.all('VDI')}
        self.x.Async.VDI.copy(self.disk, self.sr)
        self.until(lambda: {*self.pool.rows.all('VDI')} - before)
        self.pool.kill_master()
        self.until(lambda: not self.pool.operations.current(
            'VDI', self.disk))
        self.assertEqual(
            1, len({*self.pool.rows.all('VDI')} - before))
        self.pool.start_host(0)

    def test_a_second_transfer_does_not_wait_for_the_first_to_leave(self):
        guests(self.pool).linger_s = 0.5
        for data in (b'first', b'other'):
            task = self.put(self.disk, data)
            self.assertEqual('success', task['status'])
        self.left(self.disk)
        self.assertEqual(b'other', self.content(self.disk)[:5])
