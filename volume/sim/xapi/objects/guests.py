# SPDX-License-Identifier: Apache-2.0
"""Who has a VDI open: guests through their VBDs, and dom0 for a while.

There are no guests here: a test is the guest. It reads and writes what a
VM has plugged, in this process or by the control port, and says how the
guest behaves when a disk is taken from it.

For an import, an export or a copy the server plugs the VDI into its control
domain. That VBD goes a while after the task has ended, as on a real server.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TYPE_CHECKING

from volume.sim.xapi import registry
from volume.sim.xapi.disk import cbt
from volume.sim.xapi.disk.disks import Disk
from volume.sim.xapi.disk.disks import Passed
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.objects import devices
from volume.sim.xapi.sm.base import Manager

if TYPE_CHECKING:
    from volume.sim.xapi.pool import Pool

# What marks a VBD that the server made for itself, as in xapi.
TASK_KEY = 'task_id'
GATES = 64


@dataclasses.dataclass
class Behaviour:
    """How a guest takes it when a disk comes or goes."""

    has_pv_drivers: bool = True
    hotplug: str = 'unspecified'  # yes, no
    refuses_detach: bool = False
    hangs_at_detach: bool = False


class Guests:
    """All that is plugged in a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.RLock()
        self._disks: dict[str, Disk] = {}
        self._vdis: dict[str, str] = {}
        self._writers: collections.Counter[str] = collections.Counter()
        self._gates = [threading.RLock() for _ in range(GATES)]
        self._behaviour: dict[str, Behaviour] = {}
        self._leaving: dict[str, tuple[str, threading.Timer]] = {}
        self._going: set[str] = set()
        self.stopping = threading.Event()
        self.linger_s = float(pool.switch('detach_delay_s'))
        self.detach_timeout_s = float(pool.switch('detach_timeout_s'))

    def behaviour(self, vm_uuid: str) -> Behaviour:
        """Return how a VM behaves; what is changed in it counts at once."""
        return self._behaviour.setdefault(vm_uuid, Behaviour())

    # -- what a guest does --------------------------------------------------

    def read(
        self, vm_uuid: str, device: str, offset: int, length: int
    ) -> bytes:
        """Return what a VM reads from its disk."""
        return self.disk(vm_uuid, device).pread(offset, length)

    def write(
        self, vm_uuid: str, device: str, offset: int, data: bytes
    ) -> None:
        """Write as a VM does, and flush."""
        disk = self.disk(vm_uuid, device)
        disk.pwrite(offset, data)
        disk.flush()

    def disk(self, vm_uuid: str, device: str) -> Disk:
        """Return a disk of a VM by its number or name.

        :raises Failure: DEVICE_NOT_ATTACHED, the VM has no such disk now
        """
        rows = self._pool.rows
        vm = rows.by_uuid('VM', vm_uuid)
        for vbd in rows.find('VBD', VM=vm):
            row = rows.get('VBD', vbd)
            if row['currently_attached'] and devices.is_taken(
                device, [row['userdevice']]
            ):
                with self._lock:
                    if vbd not in self._disks:
                        self.attach(vbd)  # it was, before a restart
                    return self._disks[vbd]
        raise Failure('DEVICE_NOT_ATTACHED', device)

    # -- what the server does -----------------------------------------------

    def attach(self, vbd: str) -> None:
        """Open what a VBD points at."""
        row = self._pool.rows.get('VBD', vbd)
        with self._lock:
            self._disks[vbd] = self.open(row['VDI'], row['mode'] == 'RW')
            self._vdis[vbd] = row['VDI']

    def detach(self, vbd: str) -> None:
        """Close it; what was written is durable then."""
        with self._lock:
            disk = self._disks.pop(vbd, None)
            vdi = self._vdis.pop(vbd, '')
        if disk is not None:
            self.close(disk, vdi)

    def open(self, vdi: str, is_writable: bool) -> Disk:
        """Open a VDI; what is written to it is tracked if it wants that."""
        pool = self._pool
        row = pool.rows.get('VDI', vdi)
        manager = self.manager(vdi)
        uuid = row['uuid']
        if is_writable:
            with self._lock:
                self._writers[uuid] += 1
                if self._writers[uuid] == 1:
                    was_tracked = uuid in cbt.logs(pool)
                    if cbt.logs(pool).opened(uuid) is None and was_tracked:
                        pool.rows.update('VDI', vdi, cbt_enabled=False)
        try:
            disk: Disk = manager.open(uuid, is_writable)
        except BaseException:
            if is_writable:
                self._stop_writing(uuid)
            raise
        if not is_writable:
            return disk
        return _Tracked(disk, uuid, cbt.logs(pool), self._gate(uuid))

    def manager(self, vdi: str) -> Manager:
        """Return the driver of the SR that a VDI lies in."""
        sr = self._pool.rows.field('VDI', vdi, 'SR')
        return self._pool.sm.manager(sr)

    def close(self, disk: Disk, vdi: str) -> None:
        """Close what ``open`` gave."""
        if disk.is_writable:
            disk.flush()
        disk.close()
        if disk.is_writable:
            uuid = self._pool.rows.field('VDI', vdi, 'uuid')
            self._stop_writing(uuid)

    @contextlib.contextmanager
    def quiet(self, vdi_uuid: str) -> Iterator[None]:
        """Hold back who writes to a VDI, so that its log can be split."""
        with self._gate(vdi_uuid):
            yield

    def is_written(self, vdi_uuid: str) -> bool:
        """Say if somebody may write to a VDI now."""
        return self._writers[vdi_uuid] > 0

    def _gate(self, uuid: str) -> AbstractContextManager[object]:
        return self._gates[hash(uuid) % GATES]

    def _stop_writing(self, uuid: str) -> None:
        with self._lock:
            self._writers[uuid] -= 1
            if not self._writers[uuid]:
                del self._writers[uuid]
                cbt.logs(self._pool).closed(uuid)

    # -- dom0 ---------------------------------------------------------------

    @contextlib.contextmanager
    def in_dom0(
        self, vdi: str, mode: str, host: str, task: str = ''
    ) -> Iterator[Disk]:
        """Plug a VDI into a host's control domain for the time of it.

        The bytes are durable when it ends; the VBD goes later.
        """
        vbd = self._new_in_dom0(vdi, mode, host, task)
        try:
            self.attach(vbd)
            with self._lock:
                disk = self._disks[vbd]
            yield disk
            if mode == 'RW':
                disk.flush()
        finally:
            self._leave(vbd)

    def _new_in_dom0(self, vdi: str, mode: str, host: str, task: str) -> str:
        rows = self._pool.rows
        vm = rows.field('host', host, 'control_domain')
        row = rows.get('VDI', vdi)
        sr = rows.field('SR', row['SR'], 'uuid')
        with self._lock:
            used = [
                rows.field('VBD', other, 'userdevice')
                for other in rows.find('VBD', VM=vm)
            ]
            return rows.new(
                'VBD', VM=vm, VDI=vdi, userdevice=devices.free(used)[0],
                device=f'sm/backend/{sr}/{row["uuid"]}', bootable=False,
                mode=mode, type='Disk', unpluggable=True, empty=False,
                currently_attached=True,
                other_config={TASK_KEY: task, 'related_to': row['uuid']},
            )

    def _leave(self, vbd: str) -> None:
        timer = threading.Timer(self.linger_s, self._leave_now, [vbd])
        timer.daemon = True
        with self._lock:
            self._leaving[vbd] = self._vdis.get(vbd, ''), timer
        if self.stopping.is_set():
            self._leave_now(vbd)
        else:
            timer.start()

    def _leave_now(self, vbd: str) -> None:
        with self._lock:
            if vbd not in self._leaving or vbd in self._going:
                return
            self._going.add(vbd)
        try:
            self.detach(vbd)
        finally:
            with contextlib.suppress(Failure):
                self._pool.rows.delete('VBD', vbd)
            with self._lock:
                del self._leaving[vbd]
                self._going.discard(vbd)

    def wait_left(self, vdi: str, timeout_s: float) -> bool:
        """Wait until no dom0 is about to let go of a VDI; say if so."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                leaving = {one for one, _ in self._leaving.values()}
            if vdi not in leaving:
                return True
            time.sleep(0.01)
        return False

    # -- begin and end ------------------------------------------------------

    def recover(self) -> None:
        """Remove what a server that died had plugged for itself.

        What it had tracked of disks that were written to is lost with it.
        """
        rows = self._pool.rows
        for uuid in cbt.logs(self._pool).drop_broken():
            for vdi in rows.find('VDI', uuid=uuid):
                rows.update('VDI', vdi, cbt_enabled=False)
        for vbd in rows.all('VBD'):
            if TASK_KEY in rows.field('VBD', vbd, 'other_config'):
                rows.delete('VBD', vbd)

    def stop(self) -> None:
        """Close all; what guests have plugged stays plugged in the rows."""
        self.stopping.set()
        with self._lock:
            leaving = dict(self._leaving)
        for vbd, (_, timer) in leaving.items():
            timer.cancel()
            self._leave_now(vbd)
        for vbd in list(self._disks):
            self.detach(vbd)


class _Tracked(Passed):
    """A disk that is open for writing: what changes is noted."""

    def __init__(
        self,
        disk: Disk,
        uuid: str,
        logs: cbt.Logs,
        gate: AbstractContextManager[object],
    ) -> None:
        super().__init__(disk)
        self._uuid = uuid
        self._logs = logs
        self._gate = gate

    def pwrite(self, offset: int, data: Any) -> None:
        with self._gate:
            self._logs.written(self._uuid, offset, len(data))
            super().pwrite(offset, data)

    def zero(self, offset: int, length: int) -> None:
        with self._gate:
            self._logs.written(self._uuid, offset, length)
            super().zero(offset, length)


def guests(pool: Pool) -> Guests:
    """Return what is plugged in a pool."""
    return pool.part(Guests)


@registry.daemon
def _start(pool: Pool) -> registry.Stop:
    guests(pool).recover()
    return guests(pool).stop
