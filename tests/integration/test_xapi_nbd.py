# SPDX-License-Identifier: Apache-2.0
"""Disks of a simulated pool over NBD, as VDI.get_nbd_info names them."""

import random
import ssl
import subprocess
import tempfile
import urllib.parse

from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume import errors
from volume import nbd


class Nbd(Case):

    def setUp(self):
        super().setUp()
        self.data = random.Random(4).randbytes(3 * MIB)
        self.disk = self.vdi()
        self.put(self.disk, self.data)
        self.left(self.disk)
        self.network, = self.x.network.get_all()

    def serve(self, purpose='insecure_nbd'):
        self.x.network.add_purpose(self.network, purpose)
        return self.x.VDI.get_nbd_info(self.disk)

    def uri(self, info):
        name = urllib.parse.quote(info['exportname'], safe='')
        return f'nbd://{info["address"]}:{info["port"]}/{name}'

    def test_without_a_purpose_there_is_nothing_and_no_error(self):
        self.assertEqual([], self.x.VDI.get_nbd_info(self.disk))

    def test_each_host_that_sees_the_disk_serves_it(self):
        found = self.serve()
        self.assertEqual(2, len(found))
        self.assertEqual(2, len({info['port'] for info in found}))
        for info in found:
            client = nbd.NbdClient(self.uri(info))
            self.addCleanup(client.close)
            buffer = bytearray(8 * MIB)
            client.pread_into(buffer, 0)
            self.assertEqual(self.data.ljust(8 * MIB, b'\0'), bytes(buffer))
            self.assertTrue(client.is_read_only)

    def test_a_host_that_does_not_see_the_sr_is_left_out(self):
        sr = self.x.SR.get_by_uuid(xapi.ext_sr(self.pool, host=1))
        self.serve()
        self.assertEqual(
            1, len(self.x.VDI.get_nbd_info(self.vdi(sr=sr))))

    def test_qemu_reads_it(self):
        info = self.serve()[0]
        done = subprocess.run(
            ['qemu-img', 'info', '-f', 'raw', self.uri(info)],
            capture_output=True, text=True, timeout=60, check=True)
        self.assertIn(str(8 * MIB), done.stdout)

    def test_a_session_that_is_over_opens_nothing(self):
        info = self.serve()[0]
        name, _, session = info['exportname'].partition('?session_id=')
        for other in (name, f'{name}?session_id=OpaqueRef:no'):
            with self.assertRaises((errors.NotFound, errors.Unavailable)):
                nbd.NbdClient(self.uri({**info, 'exportname': other}))
        self.assertEqual(self.session._session, session)

    def test_the_disk_is_in_dom0_while_a_client_reads(self):
        client = nbd.NbdClient(self.uri(self.serve()[0]))
        vbd, = self.x.VDI.get_VBDs(self.disk)
        self.assertEqual('RO', self.x.VBD.get_mode(vbd))
        with self.refuses('VDI_IN_USE', self.disk, 'destroy'):
            self.x.VDI.destroy(self.disk)
        client.close()
        self.left(self.disk)
        self.x.VDI.destroy(self.disk)

    def test_two_purposes_do_not_go_together(self):
        self.serve()
        with self.refuses(
            'NETWORK_INCOMPATIBLE_PURPOSES', 'nbd', 'insecure_nbd',
        ):
            self.x.network.add_purpose(self.network, 'nbd')
        self.x.network.remove_purpose(self.network, 'insecure_nbd')
        self.assertEqual([], self.x.VDI.get_nbd_info(self.disk))

    def test_with_tls_a_client_that_speaks_plainly_gets_nothing(self):
        info = self.serve('nbd')[0]
        with self.assertRaises(errors.VolumeError):
            nbd.NbdClient(self.uri(info))

    def test_with_tls_qemu_reads_it_and_knows_the_host_by_its_subject(self):
        info = self.serve('nbd')[0]
        found = tempfile.TemporaryDirectory(prefix='vtn')
        self.addCleanup(found.cleanup)
        with open(f'{found.name}/ca-cert.pem', 'w') as file:
            file.write(info['cert'])
        for name, wanted in ((info['subject'], 0), ('another', 1)):
            done = subprocess.run([
                'qemu-io', '-r', '--object',
                f'tls-creds-x509,id=tls,dir={found.name},endpoint=client',
                '--image-opts', '-c', f'read -P {self.data[0]} 0 1',
                f'driver=nbd,host={info["address"]},port={info["port"]},'
                f'export={info["exportname"]},tls-creds=tls,'
                f'tls-hostname={name}',
            ], capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(wanted, done.returncode, done)

    def test_its_certificate_is_for_the_subject(self):
        info = self.serve('nbd')[0]
        context = ssl.create_default_context(cadata=info['cert'])
        self.assertEqual(1, len(context.get_ca_certs()))
        names = context.get_ca_certs()[0]['subjectAltName']
        self.assertIn(('DNS', info['subject']), names)
