# SPDX-License-Identifier: Apache-2.0
"""A service with one qcow backend, and a compute service that uses it.

The verbs come through ``VolumeAPI``, as a compute service sends them; jobs
run inline, so that every state can be looked at.
"""

import unittest

from sqlalchemy import select

from tests.fault.world import CALLER
from tests.fault.world import World
from volume import errors
from volume import ids
from volume.context import Caller
from volume.db import models
from volume.drivers.qcow import QcowDriver
from volume.manager import VolumeManager
from volume.rpcapi import VolumeAPI
from volume.testing import faults
from volume.testing import fixtures
from volume.verbs import volumes

MIB = 1 << 20
HOST = {'host': 'compute-1', 'ip': '192.0.2.1', 'initiator': 'iqn.x:1'}
OTHER = {'host': 'compute-2', 'ip': '192.0.2.2'}
ADMIN = Caller(project_id='admin', user_id='root', is_admin=True)


class TroubledQcow(QcowDriver):
    """The qcow driver, with an error for a verb where a test says so."""

    def __init__(self, conf, node):
        super().__init__(conf, node)
        self.troubles = {}

    def _meet(self, verb):
        if verb in self.troubles:
            raise self.troubles[verb]

    def create(self, volume):
        self._meet('create')
        return super().create(volume)

    def delete(self, volume):
        self._meet('delete')
        super().delete(volume)

    def snapshot(self, snapshot):
        self._meet('snapshot')
        return super().snapshot(snapshot)

    def delete_snapshot(self, snapshot):
        self._meet('delete_snapshot')
        super().delete_snapshot(snapshot)


class AcceptanceCase(unittest.TestCase):
    """A service with one qcow backend, and its compute service."""

    def setUp(self):
        directory = fixtures.plain_directory(self)
        self.world = World(
            self, f'driver = qcow\ndirectories = {directory}\ncapacity_gib=4',
            blockd=True,
        )
        self.boot()

    def boot(self):
        """Take the world's new process; its driver can be troubled."""
        backend = self.world.backends['b']
        self.driver = TroubledQcow(backend.conf, self.world.node)
        self.driver.check()
        backend.driver = self.driver
        self.api = VolumeAPI.local(VolumeManager(self.world.core))

    def make(self, **wish):
        """Return the id of a volume that is available."""
        volume_id = ids.new()
        self.api.create_volume(
            CALLER, volume_id, **{'size_bytes': MIB, **wish}
        )
        self.assertEqual('available', self.status(volume_id))
        return volume_id

    def snap(self, volume_id, **wish):
        snapshot_id = ids.new()
        self.api.create_snapshot(
            CALLER, volume_id, snapshot_id, confirm=True, **wish
        )
        return snapshot_id

    def get(self, volume_id):
        return self.api.get_volume(CALLER, volume_id)

    def status(self, volume_id):
        return self.get(volume_id)['status']

    def snapshot_status(self, snapshot_id):
        return self.api.get_snapshot(CALLER, snapshot_id)['status']

    def delete(self, volume_id, **how):
        self.api.delete_volume(CALLER, volume_id, confirm=True, **how)

    def gone(self, volume_id):
        with self.assertRaises(errors.NotFound):
            self.get(volume_id)

    def attach(self, volume_id, host=HOST):
        """Attach as nova-compute does; return the connection_info."""
        self.api.reserve_volume(CALLER, volume_id)
        info = self.api.initialize_connection(CALLER, volume_id, host)
        self.api.attach_volume(CALLER, volume_id, ids.new(), '/dev/vdb')
        return info

    def exported(self):
        return self.world.backends['b'].exporter.exported()

    def reset(self, volume_id, status):
        volumes.reset_status(self.world.core, ADMIN, volume_id, status)

    def row(self, volume_id):
        return self.world.db.read(lambda s: s.get(models.Volume, volume_id))

    def claimed(self):
        return self.world.db.read(
            lambda s: s.scalars(select(models.Pool)).one().claimed_bytes
        )

    def crash(self, verb):
        """Die at the first thing that is done to the storage."""
        self.world.node.arm(faults.Fault('crash', 1, True, 'run qemu-img'))
        with self.assertRaises(faults.Crash):
            verb()
        self.world.restart()
        self.boot()

    def fail_at_once(self, verb, *args):
        """Ask, and let the hour pass in which a job is tried again."""
        wait = self.world.wait

        def later(job_id, timeout_s):
            self.world.now += 3601
            return wait(job_id, timeout_s)

        object.__setattr__(self.world.core, 'wait', later)
        try:
            verb(*args)
        finally:
            object.__setattr__(self.world.core, 'wait', wait)
