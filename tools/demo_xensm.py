# SPDX-License-Identifier: Apache-2.0
"""The tour of ``demo_story`` on XenAPI, and what only XenAPI has.

The disks are those of VMs of a simulated pool; the service formats its SRs
itself. Beyond the tour: the pool loses its master, a volume with an SR of
its own goes to a VM of another pool and back, and a LUN is wiped.
"""

from __future__ import annotations

from pathlib import Path

from demo_image import Image
from demo_screen import MIB
from demo_screen import size
from demo_service import Service
from demo_story import Demo
from demo_web import ImageServer
from demo_xen import LUN
from demo_xen import LUN_BYTES
from demo_xen import STORAGE
from demo_xen import XenDisk
from demo_xen import XenPool
from demo_xen import XenService
from service_process import until

from volume import errors

NAMES = ('fast', 'archive', 'single', 'luns')


class XenDemo(Demo):
    """The steps, in order."""

    through = 'by the guest'

    def make_service(self) -> Service:
        self.pool = XenPool(self.family, self.directory, 'home')
        self.other = XenPool(self.family, self.directory, 'other')
        with self.screen.step('pools') as step:
            self.pool.start(*STORAGE)
            self.other.start()
            # The master is to go later on, and not with our VMs.
            self.vms = [self.pool.make_vm(1) for _ in range(2)]
            self.far_vm = self.other.make_vm(0)
            step.done(
                'two pools of two hosts: XML-RPC, sessions, tasks, events; '
                'an NFS server, an array'
            )
        return XenService(
            self.family, self.directory, self.images, self.pool, self.other)

    def run(self) -> None:
        with ImageServer(self.images) as self.web:
            image = self.make_image()
            self.start()
            self.create(image)
            self.attach()
            self.verify(image)
            self.check_files()
            self.write()
            self.snapshot()
            self.spoil()
            self.clone()
            self.revert()
            self.grow()
            self.lose_master()
            self.crash(image)
            self.recover(image)
            self.lend(image)
            self.take_lun()
            self.audit()
            self.delete()
            self.stop()

    # The steps.

    def start(self) -> None:
        with self.screen.step('start') as step:
            self.service.start()
            # The service serves before its last SR is formatted.
            self.screen.checks += 1
            until(
                self.states, lambda found: (
                    found == dict.fromkeys(NAMES, 'up')),
                'all backends to be up',
            )
            step.done(
                'four SRs were formatted: NFS, LVM over iSCSI, NFS with an '
                'SR for each volume, whole LUNs'
            )

    def attach(self) -> None:
        with self.screen.step('attach') as step:
            self.disk = self.new_disk(self.volume_id)
            self.screen.check(
                self.disk.size_bytes == self.volume_bytes,
                'the VM\'s disk has another size',
            )
            step.done(f'VBD plugged into a VM of the pool as {self.disk.uri}, '
                      f'{size(self.volume_bytes)}; nothing introduced')

    def lose_master(self) -> None:
        """The pool goes on under another master; so do we."""
        with self.screen.step('failover') as step:
            word = self.random.randbytes(4096)
            # It dies when it has made the VDI, and before it says so.
            self.pool.control('POST', '/faults', {
                'method': 'VDI.create', 'kind': 'kill_master',
                'when': 'after',
            })
            volume_id = self.service.create('between', 4 * MIB)
            self.settle(volume_id, step)
            self.screen.check(
                self.pool.control('GET', '/state')['master']
                == self.pool.urls[1], 'the master is still the same',
            )
            self.disk.write(word, self.volume_bytes)
            made = self.pool.link.call(
                'VDI.get_by_name_label', f'volume-{volume_id}')
            self.screen.check(len(made) == 1, f'{len(made)} VDIs were made')
            self.service.delete('volume', volume_id)
            self.screen.check(
                self.disk.read(self.volume_bytes, len(word)) == word,
                'the VM\'s disk stopped with the master',
            )
            self.disk.write(bytes(len(word)), self.volume_bytes)
            step.done('master killed in mid-create: the other host is it, '
                      'the volume was made once, the VM works on')

    def lend(self, image: Image) -> None:
        """To a VM of another pool, by an SR that is never in two pools."""
        with self.screen.step('lend') as step:
            volume_id = self.service.create(
                'lent', self.volume_bytes, backend='single',
                image=self.web.url(image.qcow2),
            )
            self.settle(volume_id, step)
            disk = self.new_disk(volume_id, self.other)
            self.screen.check(
                disk.sr_uuid in self.other.plugged_srs()
                and disk.sr_uuid not in self.pool.plugged_srs(),
                'the SR is not in the other pool alone',
            )
            count = self.same(disk, image.raw)
            word = self.random.randbytes(4096)
            disk.write(word, self.volume_bytes - len(word))
            disk.detach()
            self.screen.check(
                disk.sr_uuid in self.pool.plugged_srs()
                and disk.sr_uuid not in self.other.plugged_srs(),
                'the SR did not come back',
            )
            back = self.new_disk(volume_id)
            self.screen.check(
                back.read(self.volume_bytes - len(word), len(word)) == word,
                'what was written in the other pool is not there',
            )
            back.detach()
            self.refuse_to_lend()
            self.service.delete('volume', volume_id)
            self.screen.check(
                not self.pool.violations(),
                f'two pools on one SR: {self.pool.violations()}',
            )
            step.done(
                f'its own SR in another pool and back, {size(count)} equal; '
                'an SR of many volumes is refused'
            )

    def refuse_to_lend(self) -> None:
        """See that an SR that has other volumes stays in its pool."""
        self.screen.checks += 1
        try:
            self.new_disk(next(iter(self.crashed)), self.other)
        except errors.VolumeError as refused:
            self.screen.check(
                'one pool at a time' in str(refused), str(refused))
        else:
            self.screen.check(False, 'a shared SR went to another pool')

    def take_lun(self) -> None:
        """A whole LUN, and zeros in all of it when it is given back."""
        with self.screen.step('LUN') as step:
            volume_id = self.service.create('lun', LUN_BYTES, backend='luns')
            self.settle(volume_id, step)
            disk = self.new_disk(volume_id)
            disk.write(self.random.randbytes(LUN_BYTES // 4), 0)
            disk.detach()
            step.doing('wiping')
            self.service.delete('volume', volume_id)
            left = Path(self.pool.world, 'luns', LUN).read_bytes()
            self.screen.check(
                left.count(0) == len(left) == LUN_BYTES,
                'the LUN is not zero after its volume',
            )
            step.done(
                f'{size(LUN_BYTES)} claimed by its SCSI id, written, given '
                'back: wiped, and all zero'
            )

    # What several steps need.

    def new_disk(
        self, volume_id: str, pool: XenPool | None = None
    ) -> XenDisk:
        """Attach to a VM of a pool; each disk of ours has a VM for itself."""
        if pool is self.other:
            vm = self.far_vm
        else:
            vm = self.vms[0 if volume_id == self.volume_id else 1]
        disk = XenDisk(
            self.service, self.family, volume_id, pool or self.pool, vm)
        disk.attach()
        return disk
