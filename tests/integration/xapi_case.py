# SPDX-License-Identifier: Apache-2.0
"""A simulated pool with disks and VMs, as clients see it that are not ours."""

import http.client
import time
import unittest
from urllib.parse import urlencode
from urllib.parse import urlsplit

from tests import xapi
from tests.integration.xapi_storage_case import Refused
from volume.sim.xapi.objects.guests import guests

MIB = 1 << 20
WAIT_S = 20.0


class Case(unittest.TestCase):
    """One pool with an SR on NFS; a test may ask for another."""

    profile = 'xcp-ng-8.3'
    switches = {}

    def setUp(self):
        self.pool = xapi.simulator(
            self, self.profile, detach_delay_s=0.05, **self.switches)
        self.session = xapi.login(self, self.pool)
        self.x = self.session.xenapi
        self.sr = self.x.SR.get_by_uuid(xapi.nfs_sr(self.pool))

    # -- refusals -----------------------------------------------------------

    def refuses(self, *description):
        """Check a refusal: its code, and as many parameters as given."""
        return Refused(self, description)

    # -- objects ------------------------------------------------------------

    def vdi(self, size=8 * MIB, sr=None, **more):
        return self.x.VDI.create({
            'SR': sr or self.sr, 'virtual_size': str(size), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {},
            'name_label': 'disk', **more,
        })

    def vm(self, **more):
        """Return a VM that is halted."""
        number = '0'
        return self.x.VM.create({
            'name_label': 'guest', 'name_description': '',
            'user_version': number, 'is_a_template': False,
            'affinity': 'OpaqueRef:NULL', 'memory_static_max': number,
            'memory_dynamic_max': number, 'memory_dynamic_min': number,
            'memory_static_min': number, 'VCPUs_params': {},
            'VCPUs_max': '1', 'VCPUs_at_startup': '1',
            'actions_after_shutdown': 'destroy',
            'actions_after_reboot': 'restart',
            'actions_after_crash': 'restart', 'PV_bootloader': '',
            'PV_kernel': '', 'PV_ramdisk': '', 'PV_args': '',
            'PV_bootloader_args': '', 'PV_legacy_args': '',
            'HVM_boot_policy': '', 'HVM_boot_params': {}, 'platform': {},
            'PCI_bus': '', 'other_config': {}, 'recommendations': '',
            **more,
        })

    def running(self, **more):
        vm = self.vm(**more)
        self.x.VM.start(vm, False, False)
        return vm

    def vbd(self, vm, vdi, mode='RW', device='autodetect', **more):
        return self.x.VBD.create({
            'VM': vm, 'VDI': vdi, 'userdevice': device, 'bootable': False,
            'mode': mode, 'type': 'Disk', 'empty': False, 'other_config': {},
            'qos_algorithm_type': '', 'qos_algorithm_params': {}, **more,
        })

    def plugged(self, vdi, mode='RW', **more):
        """Return a VM, and its VBD that has the disk plugged."""
        vm = self.running(**more)
        vbd = self.vbd(vm, vdi, mode)
        self.x.VBD.plug(vbd)
        return vm, vbd

    def write(self, vm, data, offset=0, device='0'):
        """Write as a guest does."""
        guests(self.pool).write(
            self.x.VM.get_uuid(vm), device, offset, data)

    def read(self, vm, offset, length, device='0'):
        """Read as a guest does."""
        return guests(self.pool).read(
            self.x.VM.get_uuid(vm), device, offset, length)

    # -- HTTP ---------------------------------------------------------------

    def ask(self, method, path, body=None, headers=None, host=None, **query):
        """Return status, head and body of a request."""
        if 'session_id' not in query and not (headers or {}).keys() & {
            'Cookie', 'Authorization',
        }:
            query['session_id'] = self.session._session
        place = urlsplit(self.pool.url(host))
        connection = http.client.HTTPConnection(
            place.hostname, place.port, timeout=60)
        self.addCleanup(connection.close)
        try:
            connection.request(
                method, f'{path}?{urlencode(query)}', body, headers or {})
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was sent; the answer is there
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def put(self, vdi, body, **more):
        """Import, and return the task's record as it ended."""
        task = self.x.task.create('import', '')
        self.ask(
            'PUT', '/import_raw_vdi', body, vdi=vdi, task_id=task, **more)
        return self.ended(task)

    def get(self, vdi, **more):
        """Export, and return the bytes and the task's record."""
        task = self.x.task.create('export', '')
        _, _, body = self.ask(
            'GET', '/export_raw_vdi', vdi=vdi, task_id=task, **more)
        return body, self.ended(task)

    def content(self, vdi):
        """Return all bytes of a disk that is not plugged."""
        body, task = self.get(vdi)
        self.assertEqual('success', task['status'], task)
        self.left(vdi)
        return body

    def ended(self, task):
        """Return a task's record when it is no longer pending."""
        self.until(lambda: self.x.task.get_status(task) not in (
            'pending', 'cancelling'))
        return self.x.task.get_record(task)

    def left(self, vdi):
        """Wait until dom0 has let go of a disk."""
        self.until(lambda: not any(
            row['VDI'] == vdi and 'task_id' in row['other_config']
            for row in self.x.VBD.get_all_records().values()))

    def until(self, holds):
        """Wait for something, and fail if it never comes."""
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                self.fail('it did not come about')
            time.sleep(0.01)
