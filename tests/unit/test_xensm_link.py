# SPDX-License-Identifier: Apache-2.0
"""One session with the master, whichever host that is, and what is lost."""

import concurrent.futures
import contextlib
import hashlib
import os
import ssl
import threading
import time
import unittest

from tests import xapi
from volume import errors
from volume.drivers.xensm.driver import XenSmDriver
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.state.sessions import User
from volume.testing import fixtures
from volume.xenapi import failures
from volume.xenapi import options
from volume.xenapi.link import Link

PASSWORD = 'correct horse = battery'
SR = '6f0c7d5e-1f6e-4a6c-9c59-5e6f1a2b3c4d'


class Case(unittest.TestCase):

    def pool(self, **more):
        return xapi.simulator(self, password=PASSWORD, **more)

    def link(self, pool, **more):
        more.setdefault('addresses', [
            pool.url(host) for host in range(len(pool.hosts))
        ])
        more.setdefault('timeout_s', 10.0)
        conf = fixtures.settings(XenSmDriver, **{
            'sr_uuid': [SR], 'password': PASSWORD, **more,
        })
        link = Link(options.read(conf), fixtures.make_node(self))
        self.addCleanup(link.close)
        return link

    def sessions(self, pool):
        return [
            pool.rows.field('session', ref, 'originator')
            for ref in pool.rows.all('session')
        ]

    def tags(self, pool):
        return pool.rows.field('pool', pool.ref, 'tags')


class Sessions(Case):

    def test_many_threads_have_one_session_of_their_own_originator(self):
        pool = self.pool()
        link = self.link(pool)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(
                lambda _: link.call('pool.get_all_records'), range(40)
            ))
        self.assertEqual([link.originator], self.sessions(pool))
        other = self.link(pool)
        self.assertNotEqual(link.originator, other.originator)

    def test_session_ends_with_the_link(self):
        pool = self.pool()
        link = self.link(pool)
        link.call('pool.get_all_records')
        link.close()
        self.assertEqual([], self.sessions(pool))

    def test_session_ends_with_a_link_that_nobody_closes(self):
        pool = self.pool()
        link = self.link(pool)
        link = Link(link.settings, link.node)
        link.call('pool.get_all_records')
        del link
        deadline = time.monotonic() + 30
        while self.sessions(pool) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual([], self.sessions(pool))

    def test_slave_sends_us_to_its_master(self):
        pool = self.pool()
        link = self.link(pool, addresses=[pool.url(1)])
        self.assertIn(pool.ref, link.call('pool.get_all_records'))
        self.assertEqual(pool.url(0), link.session().url)

    def test_bare_address_of_a_master_keeps_the_port(self):
        pool = self.pool(bare_addresses=True)
        link = self.link(pool, addresses=[pool.url(1)])
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_ended_session_is_renewed_without_a_word(self):
        pool = self.pool()
        link = self.link(pool)
        link.call('pool.get_all_records')
        for ref in pool.rows.all('session'):
            pool.rows.delete('session', ref)
        link.call('pool.add_tags', pool.ref, 'x')
        self.assertEqual(['x'], self.tags(pool))

    def test_host_that_is_still_starting_is_waited_for(self):
        pool = self.pool(still_booting=True)
        link = self.link(pool)
        threading.Timer(1.5, lambda: setattr(pool, 'booting', False)).start()
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_wrong_password_is_denied_and_not_told(self):
        pool = self.pool()
        link = self.link(pool, password='wrong = and secret')
        with self.assertRaises(errors.Denied) as denied:
            link.call('pool.get_all_records')
        self.assertNotIn('secret', str(denied.exception))
        self.assertEqual(
            'SESSION_AUTHENTICATION_FAILED', failures.code(denied.exception)
        )

    def test_role_that_lacks_is_named(self):
        pool = self.pool(users={'low': User('pw', 'vm-admin')})
        link = self.link(pool, username='low', password='pw')
        with self.assertRaisesRegex(errors.Denied, 'vm-power-admin'):
            link.call('SR.scan', 'OpaqueRef:x')
        with self.assertRaisesRegex(errors.Denied, 'pool-operator'):
            link.call('pool.add_to_other_config', pool.ref, 'a', 'b')


class Failover(Case):

    def test_dead_master_is_left_for_the_next(self):
        pool = self.pool(hosts=3)
        link = self.link(pool)
        link.call('pool.get_all_records')
        pool.kill_master()
        link.call('pool.add_tags', pool.ref, 'x')
        self.assertEqual(['x'], self.tags(pool))
        self.assertEqual(pool.url(), link.session().url)

    def test_master_that_became_a_slave_is_left(self):
        pool = self.pool()
        link = self.link(pool)
        link.call('pool.get_all_records')
        pool.set_master(1)
        link.call('pool.add_tags', pool.ref, 'x')
        self.assertEqual(['x'], self.tags(pool))

    def test_pool_without_a_master_did_nothing(self):
        pool = self.pool()
        link = self.link(pool)
        link.call('pool.get_all_records')
        for host in 0, 1:
            pool.stop_host(host)
        with self.assertRaises(errors.Unavailable):
            link.call('pool.add_tags', pool.ref, 'x')
        pool.start_host(0)
        link.call('pool.add_tags', pool.ref, 'x')

    def test_connection_that_was_closed_meanwhile_is_no_lost_reply(self):
        pool = self.pool()
        link = self.link(pool)
        for tag in 'abc':
            link.call('pool.add_tags', pool.ref, tag)
            pool.servers.hang_up(pool.master)
        self.assertEqual({'a', 'b', 'c'}, {*self.tags(pool)})


class Lost(Case):

    def test_lost_reply_to_a_change_is_unknown_and_sent_once(self):
        pool = self.pool()
        link = self.link(pool)
        link.call('pool.get_all_records')
        for kind, is_done in ('lose_reply', True), ('drop', False):
            pool.faults.add(Fault('pool.add_to_other_config', kind))
            with self.assertRaises(errors.Unknown):
                link.call('pool.add_to_other_config', pool.ref, kind, 'v')
            keys = pool.rows.field('pool', pool.ref, 'other_config')
            self.assertEqual(is_done, kind in keys)

    def test_lost_reply_to_a_question_is_asked_again(self):
        pool = self.pool()
        link = self.link(pool)
        pool.faults.add(Fault('pool.get_all_records', 'lose_reply', count=2))
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_lost_reply_to_a_login_is_no_matter(self):
        pool = self.pool()
        link = self.link(pool)
        pool.faults.add(Fault('session.login_with_password', 'lose_reply'))
        pool.faults.add(Fault('pool.get_all_records', 'drop'))
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_server_that_hangs_is_given_up(self):
        pool = self.pool()
        link = self.link(pool, timeout_s=1.0)
        # A slow machine may need more than that to log in.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(errors.VolumeError):
                link.call('pool.get_all_records')
                break
        pool.faults.add(Fault('pool.add_tags', 'delay', params=(30.0,)))
        with self.assertRaises(errors.Unknown):
            link.call('pool.add_tags', pool.ref, 'x')

    def test_failure_of_the_server_keeps_its_code(self):
        pool = self.pool()
        link = self.link(pool)
        with self.assertRaises(errors.NotFound) as gone:
            link.call('VDI.get_record', 'OpaqueRef:none')
        self.assertEqual('HANDLE_INVALID', failures.code(gone.exception))
        link.call('pool.add_to_other_config', pool.ref, 'a', 'b')
        with self.assertRaises(errors.Conflict) as twice:
            link.call('pool.add_to_other_config', pool.ref, 'a', 'b')
        self.assertEqual('MAP_DUPLICATE_KEY', failures.code(twice.exception))


class Certificates(Case):

    def fingerprint(self, pool, host):
        pair = pool.servers.certificate(pool.host(host))
        der = ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())
        return hashlib.sha256(der).hexdigest()

    def bundle(self, pool, *hosts):
        path = os.path.join(fixtures.state_dir(self), 'ca.pem')
        with open(path, 'w') as file:
            for host in hosts:
                pair = pool.servers.certificate(pool.host(host))
                file.write(pair.certificate.read_text())
        return path

    def test_unknown_certificate_is_refused_by_default(self):
        pool = self.pool(tls=True)
        with self.assertRaisesRegex(errors.Unavailable, '(?i)certificate'):
            self.link(pool).call('pool.get_all_records')
        self.assertEqual([], self.sessions(pool))

    def test_insecure_has_to_be_said(self):
        pool = self.pool(tls=True)
        link = self.link(pool, insecure=True)
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_file_of_authorities_decides_also_after_a_failover(self):
        pool = self.pool(tls=True)
        link = self.link(pool, ca_file=self.bundle(pool, 0))
        self.assertIn(pool.ref, link.call('pool.get_all_records'))
        pool.kill_master()
        with self.assertRaisesRegex(errors.Unavailable, '(?i)certificate'):
            link.call('pool.get_all_records')
        link = self.link(pool, ca_file=self.bundle(pool, 0, 1))
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_fingerprint_decides_also_after_a_failover(self):
        pool = self.pool(tls=True)
        first = self.fingerprint(pool, 0).upper()
        first = ':'.join(first[at:at + 2] for at in range(0, 64, 2))
        link = self.link(pool, fingerprints=[first])
        self.assertIn(pool.ref, link.call('pool.get_all_records'))
        pool.kill_master()
        before = len(self.sessions(pool))
        with self.assertRaisesRegex(errors.Unavailable, 'fingerprint'):
            link.call('pool.get_all_records')
        self.assertEqual(before, len(self.sessions(pool)))
        both = [first, self.fingerprint(pool, 1)]
        link = self.link(pool, fingerprints=both)
        self.assertIn(pool.ref, link.call('pool.get_all_records'))

    def test_connection_for_bytes_is_checked_too(self):
        pool = self.pool(tls=True)
        link = self.link(pool, fingerprints=[self.fingerprint(pool, 0)])
        url = link.session().url
        with contextlib.closing(link.open_http(url)) as http:
            http.request('GET', '/nothing')
            self.assertGreaterEqual(http.getresponse().status, 400)
        with self.assertRaises(errors.Unavailable):
            link.open_http(pool.url(1))


class Settings(unittest.TestCase):

    def read(self, **more):
        return options.read(fixtures.settings(XenSmDriver, **{
            'addresses': ['h1', 'https://h2:8443'], 'sr_uuid': [SR],
            'password': PASSWORD, **more,
        }))

    def test_address_may_be_a_host_or_a_url(self):
        self.assertEqual(
            ('https://h1', 'https://h2:8443'), self.read().urls
        )

    def test_value_keeps_its_spaces_and_signs(self):
        found = self.read(
            sr_uuid=[], sr_name='s', sr_type='nfs', device_config=(
                '\nserver=filer\n  serverpath = /a b=c,d \noptions=vers=4.1'
            ),
        )
        self.assertEqual({
            'server': 'filer', 'serverpath': '/a b=c,d',
            'options': 'vers=4.1',
        }, found.device_config)

    def test_secrets_are_not_shown(self):
        found = self.read(
            sr_uuid=[], sr_name='s', sr_type='lvmoiscsi', device_config=(
                'target=t\ntargetIQN=i\nSCSIid=s\nchappassword=hush'
            ),
        )
        self.assertEqual({PASSWORD, 'hush'}, {*found.secrets()})
        self.assertNotIn('hush', repr(found))
        self.assertNotIn('battery', repr(found))

    def test_password_comes_from_a_file_of_ones_own(self):
        path = os.path.join(fixtures.state_dir(self), 'pw')
        with open(path, 'w') as file:
            file.write(f'{PASSWORD}\nsecond line\n')
        with self.assertRaisesRegex(errors.Invalid, 'chmod'):
            os.chmod(path, 0o644)
            self.read(password=None, password_file=path)
        os.chmod(path, 0o600)
        found = self.read(password=None, password_file=path)
        self.assertEqual(PASSWORD, found.password)

    def test_what_cannot_be_meant_is_refused_with_its_name(self):
        for word, more in (
            ('addresses', {'addresses': []}),
            ('addresses', {'addresses': ['ftp://h']}),
            ('addresses', {'addresses': ['https://u:p@h']}),
            ('insecure', {'addresses': ['http://filer.example']}),
            ('password', {'password': None}),
            ('fingerprints', {'fingerprints': ['abc']}),
            ('insecure', {'insecure': True, 'ca_file': '/x'}),
            ('sr_uuid', {'sr_uuid': ['mine']}),
            ('sr_uuid', {'sr_uuid': []}),
            ('create', {'create': True}),
            ('sr_type', {'sr_uuid': [], 'sr_name': 's', 'create': True}),
            ('iso', {'sr_type': 'iso'}),
            ('serverpath', {
                'sr_type': 'nfs', 'device_config': 'server=x'}),
            ('bogus', {'sr_type': 'nfs', 'device_config':
                       'server=x\nserverpath=/\nbogus=1'}),
            ('SRmaster', {'sr_type': 'nfs', 'device_config':
                          'server=x\nserverpath=/\nSRmaster=true'}),
            ('line 2', {'sr_type': 'nfs', 'device_config': 'server=x\nhush'}),
            ('twice', {'sr_type': 'nfs', 'device_config': 'a=1\na=2'}),
            ('luns', {'sr_type': 'hba'}),
            ('sr_per_volume', {'sr_per_volume': True, 'sr_type': 'ext'}),
        ):
            with self.subTest(word, **more):
                with self.assertRaisesRegex(errors.Invalid, word) as wrong:
                    self.read(**more)
                self.assertNotIn('hush', str(wrong.exception))
