# SPDX-License-Identifier: Apache-2.0
"""VBDs of a simulated pool: who may use a disk, and what else is said."""

import threading

from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume.sim.xapi.objects.guests import guests


class Create(Case):
    """S34, S35: what VBD.create refuses."""

    def test_a_device_that_is_taken_already_exists_by_any_name(self):
        vm, vdi = self.vm(), self.vdi()
        self.vbd(vm, vdi, device='1')
        for device in ('1', 'xvdb', 'hdb', 'sdb'):
            with (
                self.subTest(device=device),
                self.refuses('DEVICE_ALREADY_EXISTS', device),
            ):
                self.vbd(vm, vdi, device=device)

    def test_a_malformed_device_is_invalid(self):
        for device in ('spam', '-1', '', 'xvdz9x'):
            with (
                self.subTest(device=device),
                self.refuses('INVALID_DEVICE', device),
            ):
                self.vbd(self.vm(), self.vdi(), device=device)

    def test_autodetect_takes_the_first_that_is_free(self):
        vm, vdi = self.vm(), self.vdi()
        self.vbd(vm, vdi, device='0')
        vbd = self.vbd(vm, vdi)
        self.assertEqual('1', self.x.VBD.get_userdevice(vbd))
        self.assertNotIn('1', self.x.VM.get_allowed_VBD_devices(vm))
        self.assertIn('2', self.x.VM.get_allowed_VBD_devices(vm))

    def test_a_read_only_disk_is_not_given_for_writing(self):
        vdi = self.vdi(read_only=True)
        with self.refuses('VDI_READONLY', vdi):
            self.vbd(self.vm(), vdi)
        self.vbd(self.vm(), vdi, 'RO')

    def test_only_a_cd_drive_may_be_empty_and_must_be_read_only(self):
        with self.refuses('VBD_NOT_REMOVABLE_MEDIA', 'in constructor'):
            self.vbd(self.vm(), self.vdi(), empty=True)
        with self.refuses('VBD_CDS_MUST_BE_READONLY'):
            self.vbd(self.vm(), self.vdi(), type='CD')

    def test_a_member_that_is_missing_is_an_internal_error(self):
        with self.refuses('INTERNAL_ERROR'):
            self.x.VBD.create({'VM': self.vm(), 'VDI': self.vdi()})

    def test_a_disk_that_is_in_use_elsewhere_can_have_another_vbd(self):
        vdi = self.vdi()
        self.plugged(vdi)
        self.vbd(self.vm(), vdi)


class Plug(Case):
    """S34, S35: what VBD.plug refuses."""

    def test_a_vm_that_does_not_run_has_a_bad_power_state(self):
        vm = self.vm()
        vbd = self.vbd(vm, self.vdi())
        with self.refuses('VM_BAD_POWER_STATE', vm, 'running', 'halted'):
            self.x.VBD.plug(vbd)

    def test_what_is_plugged_is_attached_already(self):
        _, vbd = self.plugged(self.vdi())
        with self.refuses('DEVICE_ALREADY_ATTACHED', vbd):
            self.x.VBD.plug(vbd)

    def test_a_second_writer_is_refused(self):
        vdi = self.vdi()
        self.plugged(vdi)
        for mode in ('RW', 'RO'):
            other = self.vbd(self.running(), vdi, mode)
            with self.subTest(mode=mode), self.refuses('VDI_IN_USE', vdi):
                self.x.VBD.plug(other)

    def test_a_writer_beside_a_reader_is_refused(self):
        vdi = self.vdi()
        self.plugged(vdi, 'RO')
        other = self.vbd(self.running(), vdi)
        with self.refuses('VDI_IN_USE', vdi):
            self.x.VBD.plug(other)

    def test_readers_share_a_disk(self):
        vdi = self.vdi()
        self.plugged(vdi, 'RO')
        self.plugged(vdi, 'RO')

    def test_writers_share_a_disk_that_is_sharable(self):
        vdi = self.vdi(sharable=True)
        first, _ = self.plugged(vdi)
        second, _ = self.plugged(vdi)
        self.write(first, b'from the first', 4096)
        self.assertEqual(
            b'from the first', self.read(second, 4096, 14))

    def test_dom0_is_exempt(self):
        vdi = self.vdi()
        self.plugged(vdi)
        dom0 = self.x.host.get_control_domain(self.x.host.get_all()[0])
        vbd = self.vbd(dom0, vdi)
        self.x.VBD.plug(vbd)
        self.assertIn('sm/backend/', self.x.VBD.get_device(vbd))
        self.x.VBD.unplug(vbd)

    def test_a_vm_does_not_start_with_a_disk_that_is_in_use(self):
        vdi, vm = self.vdi(), self.vm()
        self.plugged(vdi)
        self.vbd(vm, self.vdi())
        self.vbd(vm, vdi)
        with self.refuses('VDI_IN_USE', vdi):
            self.x.VM.start(vm, False, False)
        self.assertEqual('Halted', self.x.VM.get_power_state(vm))
        self.assertEqual([False, False], [
            self.x.VBD.get_currently_attached(vbd)
            for vbd in self.x.VM.get_VBDs(vm)
        ])

    def test_a_guest_without_drivers_gets_no_disk_while_it_runs(self):
        vm = self.vm(HVM_boot_policy='BIOS order')
        guests(self.pool).behaviour(
            self.x.VM.get_uuid(vm)).has_pv_drivers = False
        self.x.VM.start(vm, False, False)
        vbd = self.vbd(vm, self.vdi())
        with self.refuses('VM_MISSING_PV_DRIVERS', vm):
            self.x.VBD.plug(vbd)

    def test_an_hvm_guest_has_its_disks_for_writing(self):
        vm = self.running(HVM_boot_policy='BIOS order')
        vbd = self.vbd(vm, self.vdi(), 'RO')
        with self.refuses('DISK_VBD_MUST_BE_READWRITE_FOR_HVM', vbd):
            self.x.VBD.plug(vbd)

    def test_a_base_copy_is_not_managed(self):
        vdi = self.vdi()
        self.x.VDI.snapshot(vdi)
        base, = (
            ref for ref, row in self.x.VDI.get_all_records().items()
            if not row['managed']
        )
        vbd = self.vbd(self.running(), base, 'RO')
        with self.refuses('VDI_NOT_MANAGED', vbd):
            self.x.VBD.plug(vbd)

    def test_it_waits_for_what_is_done_to_the_disk(self):
        vdi = self.vdi()
        vbd = self.vbd(self.running(), vdi)
        entered, done = threading.Event(), threading.Event()

        def resize():
            from volume.sim.xapi.registry import Ctx
            ctx = Ctx(None, self.pool.master, 'OpaqueRef:resize')
            with self.pool.operations.vdi(ctx, vdi, 'resize'):
                entered.set()
                done.wait(20)

        thread = threading.Thread(target=resize)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(done.set)
        entered.wait(20)
        task = self.x.Async.VBD.plug(vbd)
        self.until(lambda: self.x.VBD.get_current_operations(vbd))
        self.assertFalse(self.x.VBD.get_currently_attached(vbd))
        self.assertEqual('pending', self.x.task.get_status(task))
        done.set()
        self.assertEqual('success', self.ended(task)['status'])
        self.assertTrue(self.x.VBD.get_currently_attached(vbd))

    def test_a_disk_of_an_sr_that_is_not_on_the_host_is_refused(self):
        sr = self.x.SR.get_by_uuid(xapi.ext_sr(self.pool, host=1))
        vm = self.vm()
        self.x.VM.start_on(vm, self.pool.host(0), False, False)
        vbd = self.vbd(vm, self.vdi(sr=sr))
        with self.refuses('SR_NOT_ATTACHED', sr):
            self.x.VBD.plug(vbd)


class Unplug(Case):
    """S34: what VBD.unplug and VBD.destroy refuse."""

    def test_what_is_not_plugged_is_detached_already(self):
        vbd = self.vbd(self.running(), self.vdi())
        with self.refuses('DEVICE_ALREADY_DETACHED', vbd):
            self.x.VBD.unplug(vbd)

    def test_a_halted_vm_has_a_bad_power_state(self):
        vm = self.vm()
        vbd = self.vbd(vm, self.vdi())
        with self.refuses('VM_BAD_POWER_STATE', vm, 'running', 'halted'):
            self.x.VBD.unplug(vbd)

    def test_one_that_is_not_unpluggable_stays(self):
        vm = self.running()
        vbd = self.vbd(vm, self.vdi(), unpluggable=False)
        self.x.VBD.plug(vbd)
        with self.refuses('VBD_NOT_UNPLUGGABLE', vbd):
            self.x.VBD.unplug(vbd)

    def test_a_guest_may_refuse_and_force_does_not_ask_it(self):
        vm, vbd = self.plugged(self.vdi())
        guests(self.pool).behaviour(
            self.x.VM.get_uuid(vm)).refuses_detach = True
        with self.refuses('DEVICE_DETACH_REJECTED', 'VBD', vbd):
            self.x.VBD.unplug(vbd)
        self.assertTrue(self.x.VBD.get_currently_attached(vbd))
        self.x.VBD.unplug_force(vbd)
        self.assertFalse(self.x.VBD.get_currently_attached(vbd))

    def test_a_guest_may_not_answer(self):
        vm, vbd = self.plugged(self.vdi())
        guests(self.pool).behaviour(
            self.x.VM.get_uuid(vm)).hangs_at_detach = True
        with self.refuses('DEVICE_DETACH_TIMEOUT', 'VBD', vbd):
            self.x.VBD.unplug(vbd)

    def test_what_is_plugged_is_not_destroyed(self):
        vm, vbd = self.plugged(self.vdi())
        uuid, owner = self.x.VBD.get_uuid(vbd), self.x.VM.get_uuid(vm)
        with self.refuses(
            'OPERATION_NOT_ALLOWED',
            f"VBD '{uuid}' still attached to '{owner}'",
        ):
            self.x.VBD.destroy(vbd)
        self.x.VBD.unplug(vbd)
        self.x.VBD.destroy(vbd)
        with self.refuses('HANDLE_INVALID', 'VBD', vbd):
            self.x.VBD.get_uuid(vbd)


class Bytes(Case):
    """What a guest writes is on its disk, wherever that is by then."""

    def test_what_a_guest_wrote_is_read_by_the_next(self):
        vdi = self.vdi()
        vm, _ = self.plugged(vdi)
        self.write(vm, b'spam', 3 * MIB)
        self.x.VM.clean_shutdown(vm)
        self.assertEqual(
            b'spam', self.content(vdi)[3 * MIB:3 * MIB + 4])

    def test_a_guest_goes_on_while_its_disk_is_split_and_joined(self):
        vdi = self.vdi()
        vm, _ = self.plugged(vdi)
        self.write(vm, b'1', 0)
        first = self.x.VDI.snapshot(vdi)
        self.write(vm, b'2', 0)
        second = self.x.VDI.snapshot(vdi)
        self.write(vm, b'3', 0)
        self.assertEqual(b'1', self.content(first)[:1])
        self.assertEqual(b'2', self.content(second)[:1])
        self.x.VDI.destroy(first)
        self.x.VDI.destroy(second)
        self.pool.gc(self.sr)
        self.assertEqual(b'3', self.read(vm, 0, 1))
        self.write(vm, b'4', 1)
        self.x.VM.clean_shutdown(vm)
        self.assertEqual(b'34', self.content(vdi)[:2])

    def test_what_was_plugged_still_is_after_a_restart(self):
        vdi = self.vdi()
        vm, vbd = self.plugged(vdi)
        self.write(vm, b'spam', 512)
        uuid, world = self.x.VM.get_uuid(vm), self.pool.world
        self.pool.stop()
        pool = xapi.simulator(
            self, world=world, directory=self.pool.directory)
        self.assertTrue(
            pool.rows.field('VBD', vbd, 'currently_attached'))
        self.assertEqual(b'spam', guests(pool).read(uuid, 'xvda', 512, 4))
