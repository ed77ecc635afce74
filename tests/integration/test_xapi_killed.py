# SPDX-License-Identifier: Apache-2.0
"""A simulator that is killed while it works, and started again."""

import contextlib
import http.client
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import unittest
from xml.parsers import expat

import XenAPI

from tests import xapi
from volume.sim.xapi.world import World

GIB, MIB = 1 << 30, 1 << 20
MAIN = 'import sys; from volume.sim.xapi.main import main; sys.exit(main())'
SIZE = 8 * MIB
ROUNDS = 12 if os.environ.get('VOLUME_PROOF') else 2


class Killed(unittest.TestCase):
    """What it acknowledged is there, what it did not is whole or absent."""

    def setUp(self):
        self.seed = int(os.environ.get('VOLUME_SEED', '0')) or (
            random.randrange(1 << 32))
        self.random = random.Random(self.seed)
        made = tempfile.TemporaryDirectory(prefix='vtxapi', dir='/tmp')
        self.addCleanup(made.cleanup)
        self.directory = pathlib.Path(made.name)
        World(self.directory / 'world').add_nfs(
            'filer', '/export', size_bytes=8 * GIB)
        World(self.directory / 'world').add_lun(
            '360a', 8 * GIB, adapter='FC')
        self.live = {}  # uuid to the byte that it starts with
        self.gone = set()

    def test_a_file_sr_outlives_kills(self):
        self.rounds('nfs', {'server': 'filer', 'serverpath': '/export'})

    def test_a_volume_group_outlives_kills(self):
        self.rounds('lvmohba', {'SCSIid': '360a'})

    def rounds(self, kind, config):
        print(f'seed {self.seed}', file=sys.stderr)
        uuid = self.prepare(kind, config)
        for _ in range(ROUNDS):
            process, url = self.start()
            try:
                client = threading.Thread(target=self.work, args=(url, uuid))
                client.start()
                client.join(self.random.uniform(0.1, 0.7))
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            client.join()
            self.check(uuid)

    def prepare(self, kind, config):
        pool = self.pool()
        uuid = xapi.make_sr(pool, kind, config)
        api = xapi.login(self, pool).xenapi
        sr = api.SR.get_by_uuid(uuid)
        for at in range(2):
            vdi = api.VDI.create(self.record(sr))
            name = api.VDI.get_uuid(vdi)
            with pool.sm.manager(sr).open(name, True) as disk:
                disk.pwrite(0, bytes([at + 1]) * 3 * MIB)
            self.live[name] = at + 1
        pool.stop()
        return uuid

    def pool(self):
        return xapi.simulator(
            self, world=World(self.directory / 'world'),
            directory=self.directory / 'pool', gc_delay_s=0.0)

    def record(self, sr):
        return {
            'SR': sr, 'virtual_size': str(SIZE), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {}}

    def start(self):
        config = self.directory / 'sim.json'
        config.write_text(json.dumps({
            'directory': str(self.directory / 'pool'),
            'world': str(self.directory / 'world'),
            'users': {'root': {'password': 'secret'}},
            'switches': {'gc_delay_s': 0.0},
        }))
        process = subprocess.Popen(
            [sys.executable, '-c', MAIN, '--config', str(config)],
            stdout=subprocess.PIPE, text=True)
        return process, json.loads(process.stdout.readline())['master']

    def work(self, url, sr_uuid):
        """Do one thing after another until nobody answers."""
        with contextlib.suppress(
            OSError, http.client.HTTPException, expat.ExpatError,
        ):
            session = XenAPI.Session(url)
            session.login_with_password('root', 'secret', '1.0', 'kill')
            api = session.xenapi
            sr = api.SR.get_by_uuid(sr_uuid)
            while True:
                self.one(api, sr)

    def one(self, api, sr):
        verb = self.random.choice(
            ('snapshot', 'snapshot', 'clone', 'create', 'destroy', 'scan'))
        name = self.random.choice(sorted(self.live))
        try:
            if verb == 'scan':
                api.SR.scan(sr)
            elif verb == 'create':
                made = api.VDI.get_uuid(api.VDI.create(self.record(sr)))
                self.live[made] = 0
            elif verb == 'destroy':
                if len(self.live) > 3:
                    byte = self.live.pop(name)
                    self.gone.add(name)
                    self.doubtful = (name, byte)
                    api.VDI.destroy(api.VDI.get_by_uuid(name))
                    self.doubtful = None
            else:
                made = api.VDI.get_uuid(
                    getattr(api.VDI, verb)(api.VDI.get_by_uuid(name)))
                self.live[made] = self.live[name]
        except XenAPI.Failure as refused:
            if refused.details[0] not in (
                'SR_BACKEND_FAILURE_109', 'SR_BACKEND_FAILURE_44',
            ):
                raise

    doubtful = None

    def check(self, uuid):
        pool = self.pool()
        api = xapi.login(self, pool).xenapi
        sr = api.SR.get_by_uuid(uuid)
        for pbd in api.SR.get_PBDs(sr):
            self.assertTrue(api.PBD.get_currently_attached(pbd))
        api.SR.scan(sr)
        self.assertTrue(pool.sm.wait_collected(sr, 60))
        rows = [api.VDI.get_record(vdi) for vdi in api.SR.get_VDIs(sr)]
        found = {row['uuid'] for row in rows if row['managed']}
        if self.doubtful and self.doubtful[0] in found:
            self.gone.discard(self.doubtful[0])
            self.live[self.doubtful[0]] = self.doubtful[1]
        self.doubtful = None
        self.assertEqual(set(), set(self.live) - found, 'lost')
        self.assertEqual(set(), self.gone & found, 'back again')
        manager = pool.sm.manager(sr)
        nodes = manager.chains.nodes()
        self.assertEqual({row['uuid'] for row in rows}, {*nodes})
        for row in rows:
            self.assertEqual(
                nodes[row['uuid']].parent,
                row['sm_config'].get('vhd-parent', ''))
        for name in found:
            with manager.open(name) as disk:
                head = disk.pread(0, 3 * MIB)
                self.assertEqual(bytes(5 * MIB), disk.pread(3 * MIB, 5 * MIB))
            byte = head[0]
            self.assertEqual(bytes([byte]) * 3 * MIB, head)
            self.assertEqual(byte, self.live.get(name, byte))
            self.live[name] = byte  # what nobody was told of is found
        pool.stop()


if __name__ == '__main__':
    unittest.main()
