# SPDX-License-Identifier: Apache-2.0
"""S40: disks over plain HTTP, to and from a simulated pool."""

import base64
import contextlib
import hashlib
import http.client
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import unittest
import uuid
from urllib.parse import parse_qs
from urllib.parse import urlsplit

from tests import vhds
from tests import xapi
from tests.integration.xapi_case import Case
from tests.integration.xapi_case import MIB
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.objects.guests import guests
from volume.sim.xapi.state.sessions import User

IO_ERROR = ['VDI_IO_ERROR', 'Device I/O errors']


class Who(Case):
    """Who may do it, where, and what is refused before any data."""

    def setUp(self):
        super().setUp()
        self.disk = self.vdi()

    def status(self, method='GET', path='/export_raw_vdi', **more):
        more.setdefault('vdi', self.disk)
        status, headers, _ = self.ask(method, path, **more)
        self.headers = headers
        return status

    def test_nobody_is_not_let_in(self):
        self.assertEqual(401, self.status(session_id='OpaqueRef:no'))
        self.assertEqual(401, self.status(session_id=''))
        self.assertIn('Basic', self.headers['WWW-Authenticate'])

    def test_a_wrong_password_is_not_let_in(self):
        for secret in ('root:wrong', 'root', 'no:secret'):
            text = base64.b64encode(secret.encode()).decode()
            self.assertEqual(401, self.status(
                headers={'Authorization': f'Basic {text}'}))

    def test_a_password_a_cookie_or_a_session_is_enough(self):
        text = base64.b64encode(b'root:secret').decode()
        session = self.session._session
        self.assertEqual(200, self.status(
            headers={'Authorization': f'Basic {text}'}))
        self.assertEqual(200, self.status(
            headers={'Cookie': f'session_id={session}; other=1'}))
        self.assertEqual(200, self.status())

    def test_a_password_leaves_no_session_behind(self):
        text = base64.b64encode(b'root:secret').decode()
        before = self.pool.rows.all('session')
        self.status(headers={'Authorization': f'Basic {text}'})
        self.assertEqual(before, self.pool.rows.all('session'))

    def test_a_disk_is_named_by_reference_or_by_uuid(self):
        self.assertEqual(200, self.status(
            vdi=self.x.VDI.get_uuid(self.disk)))

    def test_a_disk_that_is_not_there_is_not_found(self):
        self.assertEqual(404, self.status(vdi=str(uuid.uuid4())))

    def test_no_disk_at_all_is_a_bad_request(self):
        self.assertEqual(400, self.status(vdi=''))

    def test_an_unknown_format_is_not_found_and_fails_the_task(self):
        task = self.x.task.create('', '')
        self.assertEqual(404, self.status(format='spam', task_id=task))
        row = self.ended(task)
        self.assertEqual(
            ['INTERNAL_ERROR', 'Unknown format spam'], row['error_info'])

    def test_chunked_transfer_encoding_is_refused(self):
        task = self.x.task.create('', '')
        self.assertEqual(404, self.status(
            'PUT', '/import_raw_vdi', task_id=task,
            body=b'0\r\n\r\n', headers={'Transfer-Encoding': 'chunked'}))
        self.assertEqual('failure', self.ended(task)['status'])

    def test_framed_chunks_are_for_raw_alone(self):
        self.assertEqual(400, self.status(
            'PUT', '/import_raw_vdi', body=b'', chunked='true',
            format='vhd'))

    def test_a_new_disk_is_made_of_raw_data_alone(self):
        self.assertEqual(400, self.status(
            'PUT', '/import_raw_vdi', body=b'data', vdi='', sr_id=self.sr,
            format='vhd'))

    def test_a_disk_for_reading_is_not_written(self):
        vdi = self.vdi(read_only=True)
        task = self.x.task.create('', '')
        self.assertEqual(500, self.status(
            'PUT', '/import_raw_vdi', body=b'data', vdi=vdi, task_id=task))
        self.assertEqual(
            ['VDI_READONLY', vdi], self.ended(task)['error_info'])


class Roles(Case):

    def setUp(self):
        self.pool = xapi.simulator(self, users={
            'low': User('low', 'vm-operator'), 'high': User('h', 'vm-admin'),
        })
        self.session = xapi.login(self, self.pool)
        self.x = self.session.xenapi
        self.sr = self.x.SR.get_by_uuid(xapi.nfs_sr(self.pool))

    def test_it_takes_a_vm_admin(self):
        vdi = self.vdi()
        for name, password, wanted in (
            ('low', 'low', 403), ('high', 'h', 200),
        ):
            other = xapi.login(self, self.pool, name, password)
            for method, path in (
                ('GET', '/export_raw_vdi'), ('PUT', '/import_raw_vdi'),
            ):
                status, _, _ = self.ask(
                    method, path, b'' if method == 'PUT' else None, vdi=vdi,
                    session_id=other._session)
                self.assertEqual(wanted, status)


class Where(Case):
    """A host that does not see an SR sends its client to one that does."""

    def setUp(self):
        super().setUp()
        self.local = self.x.SR.get_by_uuid(xapi.ext_sr(self.pool, host=1))
        self.disk = self.vdi(sr=self.local)

    def test_the_client_is_sent_to_the_host_that_sees_the_sr(self):
        task = self.x.task.create('', '')
        status, headers, _ = self.ask(
            'PUT', '/import_raw_vdi', b'', vdi=self.disk, task_id=task)
        self.assertEqual(302, status)
        place = urlsplit(headers['Location'])
        self.assertEqual(self.pool.url(1), f'http://{place.netloc}')
        self.assertEqual('/import_raw_vdi', place.path)
        query = parse_qs(place.query)
        self.assertEqual([self.disk], query['vdi'])
        self.assertEqual([self.session._session], query['session_id'])
        self.assertEqual('pending', self.x.task.get_status(task))
        self.x.task.cancel(task)
        self.x.task.destroy(task)

    def test_a_slave_takes_the_data_itself(self):
        self.put(self.disk, b'spam', host=1)
        self.left(self.disk)
        body, _ = self.get(self.disk, host=1)
        self.assertEqual(b'spam', body[:4])

    def test_an_sr_that_no_host_sees_fails_the_task(self):
        vdi = self.vdi()
        for pbd in self.x.SR.get_PBDs(self.sr):
            self.x.PBD.unplug(pbd)
        task = self.x.task.create('', '')
        status, _, _ = self.ask(
            'GET', '/export_raw_vdi', vdi=vdi, task_id=task)
        self.assertEqual(500, status)
        self.assertEqual('failure', self.ended(task)['status'])


class In(Case):
    """What is sent is on the disk; how it went is in the task."""

    def setUp(self):
        super().setUp()
        self.chance = random.Random(11)
        self.disk = self.vdi(20 * MIB)

    def assertTask(self, task, error=None):
        self.assertEqual(
            ('failure', error) if error else ('success', []),
            (task['status'], task['error_info']))

    def test_raw_bytes(self):
        data = self.chance.randbytes(3 * MIB + 5)
        task = self.put(self.disk, data)
        self.assertTask(task)
        self.assertEqual(1.0, task['progress'])
        self.left(self.disk)
        self.assertEqual(
            data.ljust(20 * MIB, b'\0'), self.content(self.disk))

    def test_the_200_comes_before_the_data(self):
        place = urlsplit(self.pool.url())
        task = self.x.task.create('', '')
        with socket.create_connection(
            (place.hostname, place.port), timeout=30,
        ) as client:
            client.sendall((
                f'PUT /import_raw_vdi?session_id={self.session._session}'
                f'&vdi={self.disk}&task_id={task} HTTP/1.1\r\n'
                'Host: sim\r\nContent-Length: 4\r\n\r\n').encode())
            head = client.recv(4096).decode()
            self.assertIn('HTTP/1.1 200 OK', head)
            self.assertIn(f'task-id: {task}', head)
            self.assertEqual('pending', self.x.task.get_status(task))
            vbd, = self.x.VDI.get_VBDs(self.disk)
            self.assertTrue(self.x.VBD.get_currently_attached(vbd))
            client.sendall(b'spam')
            self.assertTask(self.ended(task))

    def test_a_stream_that_is_cut_off_fails_after_the_200(self):
        place = urlsplit(self.pool.url())
        task = self.x.task.create('', '')
        with socket.create_connection(
            (place.hostname, place.port), timeout=30,
        ) as client:
            client.sendall((
                f'PUT /import_raw_vdi?session_id={self.session._session}'
                f'&vdi={self.disk}&task_id={task} HTTP/1.1\r\n'
                'Host: sim\r\nContent-Length: 4000\r\n\r\nspam').encode())
            self.assertIn(b' 200 ', client.recv(4096))
            client.shutdown(socket.SHUT_WR)
            self.assertTask(self.ended(task), IO_ERROR)

    def test_an_image_that_is_too_large_fails_late(self):
        small = self.vdi(2 * MIB)
        data = self.chance.randbytes(3 * MIB)
        task = self.x.task.create('', '')
        status, _, _ = self.ask(
            'PUT', '/import_raw_vdi', data, vdi=small, task_id=task)
        self.assertEqual(200, status)
        self.assertTask(self.ended(task), IO_ERROR)
        self.left(small)
        self.assertEqual(data[:2 * MIB], self.content(small))

    def test_an_empty_body_is_a_way_to_ask(self):
        self.assertTask(self.put(self.disk, b''))

    def test_a_streamed_vhd_with_blocks_in_any_order(self):
        data = self.chance.randbytes(20 * MIB)
        image = vhds.craft(data, [7, 2, 0, 9], gap=2, unset=[1, 2, 3])
        self.assertTask(self.put(self.disk, image, format='vhd'))
        self.left(self.disk)
        self.assertEqual(vhds.naive(image), self.content(self.disk))

    def test_only_what_is_in_a_vhd_takes_room(self):
        image = vhds.craft(self.chance.randbytes(20 * MIB), [3])
        self.put(self.disk, image, format='vhd')
        self.left(self.disk)
        self.x.SR.scan(self.sr)
        used = int(self.x.VDI.get_physical_utilisation(self.disk))
        self.assertLess(used, 3 * MIB)

    def test_a_delta_is_laid_over_the_disk(self):
        below = self.chance.randbytes(20 * MIB)
        self.put(self.disk, below)
        self.left(self.disk)
        image = vhds.craft(
            self.chance.randbytes(20 * MIB), [4, 1], kind=4,
            parent=str(uuid.uuid4()), unset=range(9000, 9100))
        self.assertTask(self.put(self.disk, image, format='vhd'))
        self.left(self.disk)
        self.assertEqual(
            vhds.naive(image, vhds.craft(below, range(10))),
            self.content(self.disk))

    def test_a_damaged_vhd_fails_the_task(self):
        image = bytearray(vhds.craft(bytes(20 * MIB), [0]))
        image[600] ^= 1
        self.assertTask(
            self.put(self.disk, bytes(image), format='vhd'), IO_ERROR)

    def test_framed_chunks(self):
        wire = b''.join((
            struct.pack('<QI', 5 * MIB, 4), b'spam',
            struct.pack('<QI', 0, 3), b'egg', struct.pack('<QI', 0, 0),
        ))
        self.assertTask(self.put(self.disk, wire, chunked='true'))
        self.left(self.disk)
        whole = self.content(self.disk)
        self.assertEqual(b'egg\0', whole[:4])
        self.assertEqual(b'spam', whole[5 * MIB:5 * MIB + 4])

    def test_a_new_disk_is_made_for_raw_data(self):
        task = self.x.task.create('', '')
        self.ask('PUT', '/import_raw_vdi', b'spam' * 1000, sr_id=self.sr,
                 task_id=task)
        result = self.ended(task)['result']
        vdi = result.removeprefix('<value>').removesuffix('</value>')
        self.left(vdi)
        self.assertEqual(b'spam' * 1000, self.content(vdi)[:4000])

    def test_a_new_disk_whose_data_was_cut_off_is_gone(self):
        self.pool.faults.add(Fault('import_raw_vdi', 'partial', params=(9,)))
        before = {*self.x.VDI.get_all()}
        task = self.x.task.create('', '')
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.ask('PUT', '/import_raw_vdi', b'spam' * 1000,
                     sr_uuid=self.x.SR.get_uuid(self.sr), task_id=task)
        self.assertTask(self.ended(task), IO_ERROR)
        self.assertEqual(before, {*self.x.VDI.get_all()})

    def test_a_task_that_is_cancelled_ends_the_transfer(self):
        place = urlsplit(self.pool.url())
        task = self.x.task.create('', '')
        with socket.create_connection(
            (place.hostname, place.port), timeout=30,
        ) as client:
            client.sendall((
                f'PUT /import_raw_vdi?session_id={self.session._session}'
                f'&vdi={self.disk}&task_id={task} HTTP/1.1\r\n'
                'Host: sim\r\nContent-Length: 4000\r\n\r\n').encode())
            self.assertIn(b' 200 ', client.recv(4096))
            self.x.task.cancel(task)
            self.assertEqual('cancelled', self.ended(task)['status'])
            self.assertEqual(b'', client.recv(1))


class Out(Case):
    """What comes is the disk."""

    def setUp(self):
        super().setUp()
        chance = random.Random(12)
        self.disk = self.vdi(20 * MIB)
        self.whole = bytearray(20 * MIB)
        self.whole[:5000] = chance.randbytes(5000)
        self.whole[9 * MIB:11 * MIB] = chance.randbytes(2 * MIB)
        self.put(self.disk, bytes(self.whole[:11 * MIB]))
        self.left(self.disk)

    def stored(self, data, name):
        if not hasattr(self, 'directory'):
            found = tempfile.TemporaryDirectory()
            self.addCleanup(found.cleanup)
            self.directory = found.name
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as file:
            file.write(data)
        return path

    def test_raw_has_its_own_type_and_a_name(self):
        _, headers, body = self.ask(
            'GET', '/export_raw_vdi', vdi=self.disk)
        self.assertEqual(bytes(self.whole), body)
        self.assertEqual('application/octet-stream', headers['content-type'])
        self.assertIn(
            f'{self.x.VDI.get_uuid(self.disk)}.raw',
            headers['content-disposition'])

    @unittest.skipIf(vhds.Libvhdi.missing(), vhds.Libvhdi.missing())
    def test_a_vhd_is_the_disk_to_libvhdi(self):
        _, headers, body = self.ask(
            'GET', '/export_raw_vdi', vdi=self.disk, format='vhd')
        self.assertEqual('application/vhd', headers['content-type'])
        found = vhds.Libvhdi(type(self)).ask(self.stored(body, 'a.vhd'))
        self.assertEqual(
            hashlib.sha256(self.whole).hexdigest(), found['digest'])

    def test_a_qcow2_is_the_disk_to_qemu(self):
        body, task = self.get(self.disk, format='qcow2')
        self.assertEqual('success', task['status'])
        path = self.stored(body, 'a.qcow2')
        raw = os.path.join(self.directory, 'a.raw')
        subprocess.run(
            ['qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', path, raw],
            check=True, timeout=60)
        with open(raw, 'rb') as file:
            self.assertEqual(bytes(self.whole), file.read())

    def test_a_qcow2_and_a_tar_come_back_as_they_went(self):
        for format in ('qcow2', 'tar', 'vhd', 'raw'):
            with self.subTest(format=format):
                body, _ = self.get(self.disk, format=format)
                self.left(self.disk)
                other = self.vdi(20 * MIB)
                task = self.put(other, body, format=format)
                self.assertEqual('success', task['status'], task)
                self.left(other)
                self.assertEqual(bytes(self.whole), self.content(other))

    def test_a_delta_over_its_base_is_the_disk(self):
        first = self.x.VDI.snapshot(self.disk)
        self.put(self.disk, b'x' * 70_000)
        self.left(self.disk)
        second = self.x.VDI.snapshot(self.disk)
        delta, _ = self.get(
            second, format='vhd', base=self.x.VDI.get_uuid(first))
        self.assertLess(len(delta), 3 * MIB)
        bottom, _ = self.get(first, format='vhd')
        self.whole[:70_000] = b'x' * 70_000
        self.assertEqual(bytes(self.whole), vhds.naive(delta, bottom))
        self.left(first)
        # And as a client restores it: one laid over the other.
        other = self.vdi(20 * MIB)
        self.put(other, bottom, format='vhd')
        self.left(other)
        self.put(other, delta, format='vhd')
        self.left(other)
        self.assertEqual(bytes(self.whole), self.content(other))

    def test_a_base_is_for_formats_that_have_one(self):
        status, _, _ = self.ask(
            'GET', '/export_raw_vdi', vdi=self.disk, base=self.disk)
        self.assertEqual(400, status)

    def test_a_failure_may_be_found_in_the_body(self):
        uuid_ = self.x.SR.get_uuid(self.sr)
        self.pool.faults.add(
            Fault('export_raw_vdi', 'refuse', 'before', params=('SPAM',)))
        body, task = self.get(self.disk)
        self.assertEqual(['SPAM'], task['error_info'])
        self.assertIn(b'HTTP/1.1 500 Internal Server Error', body)
        self.assertFalse(self.pool.faults.is_sr_offline(uuid_))

    def test_a_transfer_that_breaks_off_fails_the_task_alone(self):
        self.pool.faults.add(
            Fault('export_raw_vdi', 'partial', params=(3 * MIB,)))
        task = self.x.task.create('', '')
        status, _, body = self.ask(
            'GET', '/export_raw_vdi', vdi=self.disk, task_id=task)
        self.assertEqual((200, bytes(self.whole[:3 * MIB])), (status, body))
        self.assertEqual(IO_ERROR, self.ended(task)['error_info'])

    def test_a_client_that_leaves_fails_the_task(self):
        place = urlsplit(self.pool.url())
        task = self.x.task.create('', '')
        connection = http.client.HTTPConnection(place.hostname, place.port)
        connection.request(
            'GET', f'/export_raw_vdi?session_id={self.session._session}'
            f'&vdi={self.disk}&task_id={task}')
        connection.getresponse().read(10)
        connection.close()
        self.assertEqual('failure', self.ended(task)['status'])
        self.left(self.disk)

    def test_dom0_lets_go_a_while_after_the_task(self):
        guests(self.pool).linger_s = 2.0
        self.get(self.disk)
        vbd, = self.x.VDI.get_VBDs(self.disk)
        row = self.x.VBD.get_record(vbd)
        self.assertTrue(self.x.VM.get_is_control_domain(row['VM']))
        self.assertTrue(row['currently_attached'])
        self.assertEqual('RO', row['mode'])
        with self.refuses('VDI_IN_USE', self.disk, 'destroy'):
            self.x.VDI.destroy(self.disk)
        self.left(self.disk)
        self.x.VDI.destroy(self.disk)

    def test_what_a_dead_server_had_in_dom0_is_gone_after_its_restart(self):
        guests(self.pool).linger_s = 60
        self.get(self.disk)
        vbd, = self.x.VDI.get_VBDs(self.disk)
        world = self.pool.world
        directory = tempfile.TemporaryDirectory(prefix='vtx')
        self.addCleanup(directory.cleanup)
        self.pool.rows.flush()
        # What is on the disk now, before any clean end.
        left = shutil.copytree(
            self.pool.directory, os.path.join(directory.name, 'pool'))
        self.pool.stop()
        pool = xapi.simulator(self, world=world, directory=left)
        self.assertTrue(pool.rows.exists('VDI', self.disk))
        self.assertFalse(pool.rows.exists('VBD', vbd))


class OldServer(Case):
    """A server that knows no qcow2."""

    profile = 'xenserver-7.6'

    def test_qcow2_is_an_unknown_format_to_it(self):
        status, _, _ = self.ask(
            'GET', '/export_raw_vdi', vdi=self.vdi(), format='qcow2')
        self.assertEqual(404, status)


class Secure(Case):
    """Over TLS the same."""

    def test_bytes_go_in_and_come_out(self):
        pool = xapi.simulator(self, tls=True)
        session = xapi.login(self, pool)
        sr = session.xenapi.SR.get_by_uuid(xapi.nfs_sr(pool))
        vdi = session.xenapi.VDI.create({
            'SR': sr, 'virtual_size': str(8 * MIB), 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {},
        })
        data = random.Random(3).randbytes(8 * MIB)
        place = urlsplit(pool.url())
        context = ssl._create_unverified_context()
        for method, path, body in (
            ('PUT', '/import_raw_vdi', data), ('GET', '/export_raw_vdi', None),
        ):
            connection = http.client.HTTPSConnection(
                place.hostname, place.port, timeout=60, context=context)
            self.addCleanup(connection.close)
            connection.request(
                method, f'{path}?session_id={session._session}&vdi={vdi}',
                body)
            answer = connection.getresponse()
            self.assertEqual(200, answer.status)
            found = answer.read()
        self.assertEqual(data, found)
