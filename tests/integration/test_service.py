# SPDX-License-Identifier: Apache-2.0
"""The real service as a process: start, reload, drain, restart, refusals."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import unittest
import uuid

from tests.process import BIN
from tests.process import Refused
from tests.process import ServiceProcess
from volume import errors
from volume.nbd import NbdClient
from volume.service import GIVEN_UP

MIB = 1 << 20
FILE = '[b]\ndriver = file\ndirectories = {root}/pool\nexporter = local\n'
QCOW = '[b]\ndriver = qcow\ndirectories = {root}/pool\n'
WAIT_S = 60


@contextlib.contextmanager
def opened(uri):
    """Have an export open, as a host has it."""
    with contextlib.closing(NbdClient(uri)) as disk:
        yield disk


def read(disk, offset, length):
    data = bytearray(length)
    disk.pread_into(data, offset)
    return bytes(data)


class ServiceCase(unittest.TestCase):
    def service(self, sections=QCOW, **options):
        return ServiceProcess(self, sections, **options)

    def started(self, sections=QCOW, **options):
        service = self.service(sections, **options)
        service.start()
        return service

    def refusal(self, service):
        """Start a service that must not start; return what it says."""
        done = subprocess.run(
            [f'{BIN}/volume-service', '--config-file', service.conf_file],
            capture_output=True, text=True, timeout=WAIT_S,
        )
        self.assertEqual((1, ''), (done.returncode, done.stdout))
        self.assertNotIn('Traceback', done.stderr)
        return done.stderr

    def until(self, look, is_right=bool):
        deadline = time.monotonic() + WAIT_S
        while not is_right(found := look()):
            self.assertLess(time.monotonic(), deadline, found)
            time.sleep(0.02)
        return found

    def ask(self, service, statement):
        """Ask the database beside the service."""
        return service.sql(statement)

    def backends(self, service):
        found = service.call('GET', '/os-volume-backends')['backends']
        return {row['name']: row for row in found}

    def attach(self, service, volume_id):
        """Return the attachment of a host that uses the volume."""
        made = service.call('POST', '/attachments', {'attachment': {
            'volume_uuid': volume_id, 'instance_uuid': str(uuid.uuid4()),
            'connector': {'host': 'compute-1'}, 'mode': 'rw',
        }})['attachment']
        service.call(
            'POST', f'/attachments/{made["id"]}/action', {'os-complete': {}}
        )
        return made

    def make(self, service, **wish):
        volume_id = service.create(**{'size_bytes': 4 * MIB, **wish})
        service.wait(volume_id, 'available')
        return volume_id


class Starts(ServiceCase):
    def test_a_second_service_on_a_state_directory_is_refused(self):
        service = self.started()
        self.assertIn('in use by another process', self.refusal(service))
        service.volumes()  # the first one serves on

    def test_a_database_of_a_newer_release_is_refused_and_left_alone(self):
        service = self.started()
        service.stop()
        self.ask(service, "UPDATE alembic_version SET version_num = '9999'")
        self.ask(service, "UPDATE compatibility SET oldest = '9999'")
        self.assertIn('newer', self.refusal(service))
        self.assertEqual(
            [('9999',)], self.ask(service, 'SELECT * FROM alembic_version')
        )

    def test_open_doors_to_the_world_are_refused(self):
        service = self.service(QCOW + '[api]\nlisten = 0.0.0.0\n')
        said = self.refusal(service)
        self.assertIn('auth', said)
        self.assertIn('0.0.0.0', said)

    def test_a_backend_that_fails_its_check_leaves_the_others_serving(self):
        service = self.started(
            QCOW + '[away]\ndriver = file\ndirectories = {root}/mount\n'
            'exporter = local\n[odd]\ndriver = tape\n'
            '[cheap]\ndriver = file\ncost = cheap\n',
            backends='away, odd, cheap, b',
        )
        found = self.backends(service)
        self.assertEqual(
            {'away': 'down', 'odd': 'down', 'cheap': 'down', 'b': 'up'},
            {name: row['state'] for name, row in found.items()},
        )
        for name, word in (
            ('away', 'mount'), ('odd', 'tape'), ('cheap', 'cost'),
        ):
            self.assertIn(word, found[name]['reason'])
        self.make(service)
        # What was missing comes back, and nobody has to say so.
        os.mkdir(os.path.join(service.root, 'mount'))
        self.until(
            lambda: self.backends(service)['away']['state'],
            lambda state: state == 'up',
        )


class Reloads(ServiceCase):
    def reload(self, service, sections, names):
        service.configure(sections, backends=names)
        service.process.send_signal(signal.SIGHUP)

    def state_of(self, service, name):
        found = self.backends(service).get(name)
        return found['state'] if found else None

    def wish(self, service, name):
        return service.call('POST', '/volumes', {
            'volume': {'size_bytes': MIB},
            'OS-SCH-HNT:scheduler_hints': {'backend': name},
        })['volume']['id']

    def test_a_backend_comes_and_goes_without_a_restart(self):
        more = FILE.replace('[b]', '[c]').replace('pool', 'other')
        service = self.started(directories=('pool', 'other'))
        kept = self.make(service)
        self.reload(service, QCOW + more, 'b, c')
        self.until(lambda: self.state_of(service, 'c') == 'up')
        made = self.wish(service, 'c')
        service.wait(made, 'available')
        self.reload(service, QCOW, 'b')
        self.until(lambda: self.state_of(service, 'c') == 'down')
        with self.assertRaises(Refused) as refused:
            self.wish(service, 'c')
        self.assertEqual(413, refused.exception.status)
        self.assertEqual('available', service.volume(kept)['status'])
        self.make(service)
        # What lies on it waits for it, and is served when it is back.
        service.call('DELETE', f'/volumes/{made}')
        self.assertEqual('deleting', service.volume(made)['status'])
        self.reload(service, QCOW + more, 'b, c')
        service.wait(made, 'gone')

    def test_a_database_that_is_away_is_no_end(self):
        service = self.started(directories=('pool', 'other'))
        kept = self.make(service)
        service.sql('ALTER TABLE pools RENAME TO away')
        self.reload(
            service, QCOW + FILE.replace('[b]', '[c]').replace(
                'pool', 'other'), 'b, c',
        )
        self.until(lambda: 'backends now: b, c' in service.tail())
        service.sql('ALTER TABLE away RENAME TO pools')
        self.until(lambda: self.state_of(service, 'c') == 'up')
        self.assertEqual('available', service.volume(kept)['status'])
        # The next signal is heard as well.
        service.process.send_signal(signal.SIGTERM)
        self.assertEqual(0, service.process.wait(WAIT_S))

    def test_a_file_that_is_wrong_changes_nothing(self):
        service = self.started()
        kept = self.make(service)
        for count, wrong in enumerate((
            b'this is no option\n', b'tags = \xff\n', None,
        ), 1):
            with self.subTest(wrong=wrong):
                if wrong is None:
                    os.unlink(service.conf_file)
                    os.mkdir(service.conf_file)
                else:
                    with open(service.conf_file, 'ab') as f:
                        f.write(wrong)
                service.process.send_signal(signal.SIGHUP)
                self.until(lambda count=count: service.tail().count(
                    'kept as it was') == count)
                self.assertEqual('available', service.volume(kept)['status'])
        self.make(service)


class Drains(ServiceCase):
    def slow(self, seconds_to_end, rate=1500000, extra=''):
        """Return a service, and a volume that takes seconds to fill."""
        service = self.service(directories=('pool', 'images'))
        service.configure(QCOW, extra=(
            f'image_allowed_directories = {service.root}/images\n'
            f'image_rate_bytes_per_s = {rate}\n'
            f'graceful_shutdown_timeout_s = {seconds_to_end}\n{extra}'
        ))
        image = os.path.join(service.root, 'images', 'image.raw')
        self.content = os.urandom(4 * MIB)
        with open(image, 'wb') as f:
            f.write(self.content)
        service.start()
        volume_id = service.create(
            size_bytes=4 * MIB, imageRef=f'file://{image}'
        )
        service.wait(volume_id, 'downloading')
        return service, volume_id

    def holds(self, service, volume_id):
        uri = self.attach(service, volume_id)['connection_info']['uri']
        with opened(uri) as disk:
            self.assertEqual(self.content, read(disk, 0, 4 * MIB))

    def test_a_running_job_ends_before_the_service_does(self):
        service, _ = self.slow(60)
        service.stop()
        self.assertEqual(
            [('available',)], self.ask(service, 'SELECT status FROM volumes')
        )
        self.assertEqual(
            [], self.ask(service, "SELECT id FROM jobs WHERE state = 'open'")
        )

    def test_a_job_that_takes_too_long_goes_on_at_the_next_start(self):
        service, volume_id = self.slow(0)
        service.stop()
        self.assertEqual(
            [('open', None)],
            self.ask(service, "SELECT state, owner FROM jobs"),
        )
        self.assertEqual([], self.ask(service, 'SELECT * FROM services'))
        service.start()
        service.wait(volume_id, 'available')
        self.holds(service, volume_id)

    def test_who_cannot_start_leaves_his_jobs_to_the_next(self):
        service, _ = self.slow(60, rate=40000)
        service.kill()
        with socket.create_server(('127.0.0.1', 0)) as taken:
            with open(service.conf_file) as f:
                text = f.read()
            with open(service.conf_file, 'w') as f:
                port = taken.getsockname()[1]
                f.write(text.replace('port = 0', f'port = {port}'))
            self.assertIn('cannot listen', self.refusal(service))
        self.assertEqual(
            [('open', 0.0)],
            self.ask(service, 'SELECT state, expires_at FROM jobs'),
        )
        self.assertEqual([], self.ask(service, 'SELECT * FROM services'))

    def test_who_drains_is_heard_of_and_hears_that_it_was_fenced(self):
        service, _ = self.slow(60, rate=300000, extra='lease_s = 1\n')
        service.process.send_signal(signal.SIGTERM)
        self.until(lambda: 'and drains' in service.tail())
        heard_at = 'SELECT heard_at FROM services'
        before = self.ask(service, heard_at)
        self.assertTrue(self.until(
            lambda: self.ask(service, heard_at), lambda now: now != before
        ))
        service.sql('UPDATE services SET is_fenced = :yes', yes=True)
        self.assertEqual(GIVEN_UP, service.process.wait(WAIT_S))

    def test_the_end_is_told_by_the_exit_code(self):
        service = self.started()
        service.process.send_signal(signal.SIGTERM)
        self.assertEqual(0, service.process.wait(WAIT_S))
        with open(service.log) as f:
            told = f.read().partition('was told to end (SIGTERM), and drains')
        self.assertTrue(told[2].endswith(' has ended\n'), told)

    def test_a_configuration_that_is_not_there_is_one_line(self):
        for path, said in (
            ('/nonexistent/x', 'file /nonexistent/x does not exist'),
            ('/', 'cannot be read'),
        ):
            for program in 'volume-service', 'volume-manage':
                with self.subTest(program=program, path=path):
                    done = subprocess.run(
                        [f'{BIN}/{program}', '--config-file', path]
                        + ['check'] * (program == 'volume-manage'),
                        capture_output=True, text=True, timeout=WAIT_S,
                    )
                    self.assertEqual(1, done.returncode)
                    self.assertEqual(1, done.stderr.count('\n'), done.stderr)
                    self.assertIn(said, done.stderr)


class Attached(ServiceCase):
    """What a host has open outlives everything but its own end."""

    def setUp(self):
        self.server = self.started()
        self.volume_id = self.make(self.server)
        self.made = self.attach(self.server, self.volume_id)
        self.uri = self.made['connection_info']['uri']

    def read(self):
        with opened(self.uri) as disk:
            return read(disk, MIB, MIB)

    def write(self):
        with opened(self.uri) as disk:
            disk.pwrite(b'a' * MIB, MIB)
            disk.flush()

    def daemon(self):
        with open(os.path.join(self.server.state, 'blockd', 'pid')) as f:
            return int(f.read())

    def comes_back(self):
        def look():
            with contextlib.suppress(errors.VolumeError, OSError):
                return self.read()

        return self.until(look)

    def test_its_url_reads_on_while_the_service_restarts(self):
        self.write()
        pid = self.daemon()
        with opened(self.uri) as disk:
            self.server.stop()
            self.assertEqual(b'a' * MIB, read(disk, MIB, MIB))
            self.server.start()
            self.assertEqual(b'a' * MIB, read(disk, MIB, MIB))
        self.server.kill()
        self.assertEqual(b'a' * MIB, self.read())
        self.server.start()
        self.assertEqual(b'a' * MIB, self.read())
        self.assertEqual(pid, self.daemon())
        self.assertEqual(
            'in-use', self.server.volume(self.volume_id)['status']
        )

    def test_the_storage_daemons_death_is_mended_under_the_same_url(self):
        self.write()
        pid = self.daemon()
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(b'a' * MIB, self.comes_back())
        self.assertNotEqual(pid, self.daemon())

    def test_a_reboot_is_mended_at_the_start(self):
        self.write()
        self.server.kill()
        os.kill(self.daemon(), signal.SIGKILL)
        self.server.start()
        self.assertEqual(b'a' * MIB, self.comes_back())

    def test_after_its_end_the_url_reads_no_more(self):
        with opened(self.uri) as disk:
            self.server.call('DELETE', f'/attachments/{self.made["id"]}')
            with self.assertRaises((errors.VolumeError, OSError)):
                read(disk, 0, 512)
        with self.assertRaises((errors.VolumeError, OSError)):
            self.read()
        self.assertEqual(
            'available', self.server.volume(self.volume_id)['status']
        )


class Reservations(ServiceCase):
    def test_a_reservation_that_nobody_uses_ends(self):
        service = self.started(extra='reservation_timeout_s = 3\n')
        volume_id = self.make(service)
        service.action(volume_id, 'os-reserve')
        self.assertEqual('attaching', service.volume(volume_id)['status'])
        service.wait(volume_id, 'available')

    def test_a_detach_that_the_host_forgot_is_rolled_back(self):
        service = self.started(extra='reservation_timeout_s = 1\n')
        volume_id = self.make(service)
        uri = self.attach(service, volume_id)['connection_info']['uri']
        service.action(volume_id, 'os-begin_detaching')
        service.wait(volume_id, 'in-use')
        with opened(uri) as disk:
            self.assertEqual(bytes(512), read(disk, 0, 512))

    def test_a_host_that_is_connected_keeps_its_reservation(self):
        service = self.started(extra='reservation_timeout_s = 1\n')
        volume_id = self.make(service)
        service.action(volume_id, 'os-reserve')
        info = service.action(volume_id, 'os-initialize_connection', {
            'connector': {'host': 'compute-1'},
        })['connection_info']
        other = self.make(service)
        service.action(other, 'os-reserve')
        service.wait(other, 'available')  # so long it would have taken
        with opened(info['data']['uri']) as disk:
            self.assertEqual(bytes(512), read(disk, 0, 512))
        self.assertEqual('attaching', service.volume(volume_id)['status'])
