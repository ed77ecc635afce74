# SPDX-License-Identifier: Apache-2.0
"""A simulated pool with a client, and ways to say what is refused."""

import pathlib
import unittest

import XenAPI

from tests import xapi

GIB = 1 << 30
MIB = 1 << 20


class Case(unittest.TestCase):
    """A pool of two hosts, and a client of it."""

    maxDiff = None

    def setUp(self):
        self.pool = xapi.simulator(self, gc_delay_s=0.0)
        self.api = xapi.login(self, self.pool).xenapi
        self.hosts = self.pool.hosts

    def refused(self, *wanted):
        """Return a context that wants a failure with these details."""
        return Refused(self, wanted)

    def create(
        self, kind='nfs', shared=True, host=0, sm_config=None, **config,
    ):
        return self.api.SR.create(
            self.hosts[host], config, '0', f'{kind} storage', '', kind,
            'user', shared, sm_config or {})

    def nfs(self, **more):
        self.pool.world.add_nfs('filer', '/export', size_bytes=GIB)
        return self.create(server='filer', serverpath='/export', **more)

    def vdi(self, sr, size=4 << 20, **more):
        return self.api.VDI.create({
            'SR': sr, 'virtual_size': str(size), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {},
            'name_label': 'disk', **more})

    def plugged(self, sr):
        """Return for each host that has a PBD whether it is plugged."""
        pbds = map(self.api.PBD.get_record, self.api.SR.get_PBDs(sr))
        return {pbd['host']: pbd['currently_attached'] for pbd in pbds}

    def unplug_all(self, sr):
        for pbd in self.api.SR.get_PBDs(sr):
            self.api.PBD.unplug(pbd)


class Refused:
    """A with-statement in which a call is refused."""

    def __init__(self, test, wanted):
        self._test = test
        self._wanted = [*wanted]

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self._test.fail(f'it was not refused with {self._wanted}')
        if not isinstance(error, XenAPI.Failure):
            return False
        self.details = error.details
        self._test.assertEqual(
            self._wanted, error.details[:len(self._wanted)])
        return True


class VdiCase(Case):

    def lvm(self, size=GIB, **more):
        self.pool.world.add_lun('360a', size, adapter='FC')
        return self.create('lvmohba', SCSIid='360a', **more)

    def files(self, sr):
        """Return the files of an SR by name, journals left out."""
        manager = self.pool.sm.manager(sr)
        directory = pathlib.Path(manager.chains.directory)
        return {
            path.name: path for path in directory.iterdir()
            if not path.name.startswith('.')}

    def record(self, vdi):
        return self.api.VDI.get_record(vdi)

    def size(self, vdi):
        return int(self.api.VDI.get_virtual_size(vdi))

    def used(self, sr):
        return int(self.api.SR.get_physical_utilisation(sr))

    def write(self, vdi, offset, data):
        """Write as a guest would."""
        manager = self.pool.sm.manager(self.api.VDI.get_SR(vdi))
        with manager.open(self.api.VDI.get_uuid(vdi), True) as disk:
            disk.pwrite(offset, data)

    def read(self, vdi, offset, length):
        manager = self.pool.sm.manager(self.api.VDI.get_SR(vdi))
        with manager.open(self.api.VDI.get_uuid(vdi)) as disk:
            return disk.pread(offset, length)

    def plug(self, vdi):
        """Plug a VDI into dom0, as a guest that writes has it."""
        vbd = self.api.VBD.create({
            'VM': self.api.host.get_control_domain(self.hosts[0]),
            'VDI': vdi, 'userdevice': 'autodetect', 'bootable': False,
            'mode': 'RW', 'type': 'Disk', 'empty': False, 'other_config': {},
            'qos_algorithm_type': '', 'qos_algorithm_params': {}})
        self.api.VBD.plug(vbd)
        return vbd

    def collected(self, sr):
        self.assertTrue(self.pool.sm.wait_collected(sr, 60))

    def hold_collector(self):
        self.pool.faults.gc_paused = True
        self.pool.sm.gc_changed()

    def release_collector(self):
        self.pool.faults.gc_paused = False
        self.pool.sm.gc_changed()
