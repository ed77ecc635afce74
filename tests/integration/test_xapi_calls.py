# SPDX-License-Identifier: Apache-2.0
"""The simulated pool: sessions, roles, what a call must look like.

Asked by PyPI's XenAPI and by a plain JSON-RPC client; S1 to S8 are the
numbers of the behaviours in the simulator's page.
"""

import contextlib
import http.client
import json
import re
import ssl
import threading
import time
import unittest
import xmlrpc.client
from urllib.parse import urlsplit

import XenAPI

from tests import xapi
from volume.sim.xapi.state.sessions import User

DEAD = 'OpaqueRef:00000000-0000-0000-0000-000000000000'
USERS = {
    role: User('pass', role) for role in (
        'read-only', 'vm-operator', 'vm-admin', 'vm-power-admin',
        'pool-operator', 'pool-admin',
    )
}


class Calls(unittest.TestCase):

    def refused(self, function, *args):
        """Return code and parameters that a call is refused with."""
        with self.assertRaises(XenAPI.Failure) as caught:
            function(*args)
        return caught.exception.details


class Sessions(Calls):
    """S1 to S3 and S7."""

    def test_a_wrong_password_is_refused_after_a_while(self):
        pool = xapi.simulator(self, auth_delay_s=0.3)
        begun = time.monotonic()
        details = self.refused(
            xapi.stranger(self, pool.url()).login_with_password, 'root',
            'wrong',
        )
        self.assertGreaterEqual(time.monotonic() - begun, 0.3)
        self.assertEqual(
            ['SESSION_AUTHENTICATION_FAILED', 'root'], details[:2],
        )
        self.assertNotIn('wrong', str(details))

    def test_the_delay_is_five_seconds_unless_told_otherwise(self):
        from volume.sim.xapi.state.limits import Limits
        self.assertEqual(5.0, Limits().auth_delay_s)

    def test_a_slave_names_the_master_to_who_logs_in(self):
        pool = xapi.simulator(self)
        address = urlsplit(pool.url()).netloc
        self.assertEqual(['HOST_IS_SLAVE', address], self.refused(
            xapi.stranger(self, pool.url(1)).login_with_password, 'root',
            'secret',
        ))

    def test_a_slave_with_a_bare_address_is_named_by_it(self):
        pool = xapi.simulator(self, bare_addresses=True)
        self.assertEqual(['HOST_IS_SLAVE', '127.0.0.1'], self.refused(
            xapi.stranger(self, pool.url(1)).login_with_password, 'root',
            'secret',
        ))
        self.assertEqual('127.0.0.2', urlsplit(pool.url(1)).hostname)
        self.assertEqual(
            urlsplit(pool.url(0)).port, urlsplit(pool.url(1)).port,
        )

    def test_a_session_of_the_master_is_turned_away_by_a_slave(self):
        pool = xapi.simulator(self)
        session = xapi.login(self, pool)
        other = xapi.Json(self, pool.url(1))
        self.assertEqual(
            {'code': 1, 'message': 'HOST_IS_SLAVE',
             'data': [urlsplit(pool.url()).netloc]},
            other.raw('pool.get_all', session.handle)['error'],
        )

    def test_a_session_that_was_never_or_is_no_more_is_invalid(self):
        pool = xapi.simulator(self)
        session = xapi.login(self, pool)
        handle = session.handle
        other = xapi.Json(self, pool.url())
        other.session = handle
        other.call('pool.get_all')
        session.xenapi.session.logout()
        for ref in (handle, DEAD, ''):
            self.assertEqual(
                ['SESSION_INVALID', ref],
                self._error(other.raw('pool.get_all', ref)),
            )

    def _error(self, answer):
        return [answer['error']['message'], *answer['error']['data']]

    def test_a_session_unused_for_a_day_has_expired(self):
        pool = xapi.simulator(self)
        session = xapi.login(self, pool)
        pool.advance(23 * 3600)
        session.xenapi.pool.get_all()
        pool.advance(23 * 3600)
        session.xenapi.pool.get_all()
        handle = session.handle
        pool.advance(25 * 3600)
        other = xapi.Json(self, pool.url())
        self.assertEqual(
            ['SESSION_INVALID', handle],
            self._error(other.raw('pool.get_all', handle)),
        )

    def test_the_oldest_session_of_an_originator_ends_over_the_limit(self):
        pool = xapi.simulator(self, sessions_per_originator=3)
        client = xapi.Json(self, pool.url())
        mine = [
            client.login(originator='mine').session for _ in range(3)
        ]
        other = client.login(originator='other').session
        for ref in reversed(mine):
            client.raw('pool.get_all', ref)
        # The first was used last, so the last is the one that goes.
        client.login(originator='mine')
        self.assertEqual([False, False, True, False], [
            'error' in client.raw('pool.get_all', ref)
            for ref in (*mine, other)
        ])

    def test_a_user_and_roots_unnamed_sessions_have_limits_too(self):
        pool = xapi.simulator(
            self, users=USERS, sessions_per_user=1, sessions=1,
        )
        client = xapi.Json(self, pool.url())
        for user, password in (('vm-admin', 'pass'), ('root', 'secret')):
            first = client.login(user, password, '').session
            second = client.login(user, password, '').session
            self.assertIn('error', client.raw('pool.get_all', first))
            self.assertNotIn('error', client.raw('pool.get_all', second))

    def test_an_emergency_session_of_a_slave_makes_it_the_master(self):
        pool = xapi.simulator(self, hosts=3)
        pool.stop_host(0)
        local = xapi.Json(self, pool.url(2))
        local.session = local.raw(
            'session.slave_local_login_with_password', 'root', 'secret',
        )['result']
        self.assertEqual('SESSION_INVALID', local.raw(
            'pool.get_all', local.session)['error']['message'])
        local.call('pool.emergency_transition_to_master')
        session = xapi.login(self, pool, host=2)
        self.assertEqual(
            pool.host(2), session.xenapi.pool.get_master(pool.ref),
        )

    def test_a_server_that_has_just_started_says_so(self):
        pool = xapi.simulator(self, still_booting=True)
        self.assertEqual(['HOST_STILL_BOOTING'], self.refused(
            xapi.stranger(self, pool.url()).login_with_password, 'root',
            'secret',
        ))
        pool.booting = False
        xapi.login(self, pool)


class Shape(Calls):
    """S4, S5 and S8."""

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.session = xapi.login(self, self.pool)
        self.xenapi = self.session.xenapi

    def test_an_unknown_method_is_named(self):
        self.assertEqual(
            ['MESSAGE_METHOD_UNKNOWN', 'VDI.frobnicate'],
            self.refused(self.xenapi.VDI.frobnicate, DEAD),
        )
        self.assertEqual(
            ['MESSAGE_METHOD_UNKNOWN', 'Async.nothing'],
            self.refused(self.xenapi.Async.nothing),
        )

    def test_a_wrong_count_is_told_with_what_was_expected(self):
        self.assertEqual(
            ['MESSAGE_PARAMETER_COUNT_MISMATCH', 'VDI.resize', '2', '1'],
            self.refused(self.xenapi.VDI.resize, DEAD),
        )
        self.assertEqual(
            ['MESSAGE_PARAMETER_COUNT_MISMATCH', 'pool.get_all', '0', '2'],
            self.refused(self.xenapi.pool.get_all, '1', '2'),
        )

    def test_a_name_may_have_an_underscore_for_its_dot(self):
        client = xapi.Json(self, self.pool.url()).login()
        self.assertEqual(
            client.call('VDI.get_all'), client.call('VDI_get_all'),
        )
        self.assertEqual(2, len(client.call('host_metrics_get_all')))

    def test_a_call_without_an_async_form_is_an_rpc_fault(self):
        with self.assertRaises(xmlrpc.client.Fault) as caught:
            self.xenapi.Async.pool.get_all()
        self.assertIn('No async mode', str(caught.exception))

    def test_a_dead_reference_is_named_with_its_class(self):
        for call in (
            self.xenapi.VDI.get_record, self.xenapi.VDI.get_name_label,
            self.xenapi.VDI.destroy,
        ):
            self.assertEqual(
                ['HANDLE_INVALID', 'VDI', DEAD], self.refused(call, DEAD),
            )

    def test_a_uuid_of_nothing_is_invalid(self):
        self.assertEqual(
            ['UUID_INVALID', 'SR', 'no-such'],
            self.refused(self.xenapi.SR.get_by_uuid, 'no-such'),
        )

    def test_a_value_of_another_type_is_refused_with_its_name(self):
        for value in ('many', '1_0', ' 1', str(1 << 63), True, {}):
            self.assertEqual(
                ['FIELD_TYPE_ERROR', 'size'],
                self.refused(self.xenapi.VDI.resize, DEAD, value),
            )
        # A timeout is a double, and nothing else.
        self.assertEqual(
            ['FIELD_TYPE_ERROR', 'timeout'],
            self.refused(getattr(self.xenapi.event, 'from'), [], '', '1'),
        )

    def test_a_record_without_a_required_member_is_an_internal_error(self):
        details = self.refused(self.xenapi.VDI.create, {'name_label': 'x'})
        self.assertEqual('INTERNAL_ERROR', details[0])
        self.assertIn('Dispatcher_FieldNotFound', details[1])

    def test_a_message_of_another_release_is_unknown_or_removed(self):
        self.assertEqual(['MESSAGE_REMOVED'], self.refused(
            self.xenapi.VDI.resize_online, DEAD, '1'))
        self.assertEqual(
            ['MESSAGE_METHOD_UNKNOWN', 'VDI.revert'],
            self.refused(self.xenapi.VDI.revert, DEAD),
        )
        old = xapi.simulator(self, 'xenserver-6.5')
        self.assertEqual('HANDLE_INVALID', self.refused(
            xapi.login(self, old).xenapi.VDI.resize_online, DEAD, '1')[0])
        new = xapi.simulator(self, 'head')
        for name in ('resize_online', 'revert'):
            args = (DEAD, '1')[:1 + (name == 'resize_online')]
            details = self.refused(
                getattr(xapi.login(self, new).xenapi.VDI, name), *args,
            )
            self.assertNotIn('MESSAGE', details[0])

    def test_known_and_not_simulated_is_not_implemented_and_listed(self):
        self.assertEqual(
            ['NOT_IMPLEMENTED', 'host.dmesg'],
            self.refused(self.xenapi.host.dmesg, self.pool.master),
        )
        self.assertIn('host.dmesg', self.pool.missing())
        self.assertNotIn('VDI.create', self.pool.missing())

    def test_a_map_refuses_a_key_that_it_has(self):
        add = self.xenapi.pool.add_to_other_config
        ref = self.pool.ref
        add(ref, 'key', 'one')
        self.assertEqual(
            ['MAP_DUPLICATE_KEY', 'pool', 'other_config', ref, 'key'],
            self.refused(add, ref, 'key', 'two'),
        )
        self.xenapi.pool.remove_from_other_config(ref, 'key')
        self.xenapi.pool.remove_from_other_config(ref, 'key')
        add(ref, 'key', 'two')
        self.assertEqual(
            'two', self.xenapi.pool.get_other_config(ref)['key'],
        )

    def test_one_of_many_that_add_a_key_at_once_wins(self):
        won, lost = [], []

        def add(number):
            client = xapi.Json(self, self.pool.url()).login()
            answer = client.raw(
                'pool.add_to_other_config', client.session, self.pool.ref,
                'lock', str(number),
            )
            (lost if 'error' in answer else won).append(str(number))

        threads = [
            threading.Thread(target=add, args=(n,)) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((1, 7), (len(won), len(lost)))
        self.assertEqual(won[0], self.xenapi.pool.get_other_config(
            self.pool.ref)['lock'])

    def test_records_are_found_by_a_condition(self):
        find = self.xenapi.host.get_all_records_where
        for text, expected in (
            ('field "name_label"="pool-host-2"', 1),
            ('not field "name__label"="pool-host-2"', 1),
            ('field "enabled"="true" and (true or false)', 2),
            ('field "hostname" = field "name_label"', 2),
            ('false or field "uuid"="x"', 0),
        ):
            self.assertEqual(expected, len(find(text)), text)
        for bad in ('', 'field', 'field "a"', 'field "uuid"="x" and', '('):
            self.assertEqual('INTERNAL_ERROR', self.refused(find, bad)[0])

    def test_methods_are_listed(self):
        names = xapi.Json(self, self.pool.url()).raw(
            'system.listMethods')['result']
        self.assertIn('VDI.create', names)
        self.assertNotIn('VDI.resize_online', names)


class Roles(Calls):
    """S6."""

    def test_a_role_too_low_is_refused_and_names_the_permission(self):
        pool = xapi.simulator(self, users=USERS)
        uses = {
            'read-only': ('SR', 'get_all', ()),
            'vm-admin': ('VDI', 'destroy', (DEAD,)),
            'vm-power-admin': ('SR', 'scan', (DEAD,)),
            'pool-operator': ('SR', 'destroy', (DEAD,)),
            'pool-admin': ('pool', 'enable_tls_verification', ()),
        }
        order = list(USERS)
        for user in order:
            session = xapi.login(self, pool, user, 'pass')
            for role, (cls, name, args) in uses.items():
                may = order.index(user) >= order.index(role)
                with self.subTest(user=user, call=f'{cls}.{name}'):
                    code, params = self._code(session, cls, name, args)
                    self.assertEqual(
                        not may, code == 'RBAC_PERMISSION_DENIED', params,
                    )
                    if not may:
                        self.assertEqual(f'{cls}.{name}'.lower(), params[0])

    def _code(self, session, cls, name, args):
        try:
            getattr(getattr(session.xenapi, cls), name)(*args)
        except XenAPI.Failure as failure:
            return failure.details[0], failure.details[1:]
        return '', []

    def test_a_task_of_somebody_else_is_not_touched(self):
        pool = xapi.simulator(self, users=USERS)
        mine = xapi.login(self, pool, 'vm-admin', 'pass').xenapi
        task = mine.task.create('mine', '')
        other = xapi.login(self, pool, 'read-only', 'pass').xenapi
        for call in (other.task.destroy, other.task.cancel):
            self.assertEqual(
                'RBAC_PERMISSION_DENIED', self.refused(call, task)[0],
            )
        xapi.login(self, pool, 'pool-operator', 'pass').xenapi.task.destroy(
            task)


class Wire(Calls):
    """S8, in bytes."""

    def setUp(self):
        self.pool = xapi.simulator(self)
        parts = urlsplit(self.pool.url())
        self.connection = http.client.HTTPConnection(
            parts.hostname, parts.port, timeout=60,
        )
        self.addCleanup(self.connection.close)

    def post(self, path, body, headers=()):
        try:
            self.connection.request('POST', path, body, dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was sent; the answer is there
        answer = self.connection.getresponse()
        return answer.status, answer.read()

    def test_a_body_of_more_than_300_kib_is_refused(self):
        status, _ = self.post('/', b' ' * (300 * 1024 + 1))
        self.assertEqual(413, status)
        status, _ = self.post('/', b' ' * (300 * 1024))
        self.assertEqual(200, status)

    def test_numbers_are_strings_and_times_are_times_in_xml(self):
        session = xapi.login(self, self.pool)
        record = session.xenapi.host_metrics.get_all_records().popitem()[1]
        self.assertIsInstance(record['memory_total'], str)
        self.assertIsInstance(record['live'], bool)
        self.assertIsInstance(
            record['last_updated'], xmlrpc.client.DateTime)
        self.assertRegex(
            record['last_updated'].value, r'^\d{8}T\d\d:\d\d:\d\dZ$')
        for path in ('/', '/RPC2'):
            body = xmlrpc.client.dumps(
                (session.handle,), 'event.get_current_id')
            status, answer = self.post(path, body)
            self.assertEqual(200, status)
            self.assertTrue(re.search(
                rb'<name>Value</name><value>\d+</value>', answer), answer)

    def test_a_refusal_is_http_200_with_a_description(self):
        status, answer = self.post('/', xmlrpc.client.dumps(
            ('x',), 'pool.get_all'))
        self.assertEqual(200, status)
        ((told,), _) = xmlrpc.client.loads(answer)
        self.assertEqual({
            'Status': 'Failure', 'ErrorDescription': ['SESSION_INVALID', 'x'],
        }, told)

    def test_what_is_no_call_is_a_fault(self):
        for body in (b'', b'<methodCall>', b'<a/>', b'\xff', b'{}'):
            status, answer = self.post('/RPC2', body)
            self.assertEqual(200, status)
            with self.assertRaises(xmlrpc.client.Fault):
                xmlrpc.client.loads(answer)

    def test_json_of_both_versions_tells_errors_its_own_way(self):
        old = xapi.Json(self, self.pool.url(), '1.0')
        self.assertEqual(
            {'result': None, 'error': ['SESSION_INVALID', 'x'], 'id': 1},
            old.raw('pool.get_all', 'x'),
        )
        new = xapi.Json(self, self.pool.url(), '2.0')
        self.assertEqual({
            'jsonrpc': '2.0', 'id': 1, 'error': {
                'code': 1, 'message': 'SESSION_INVALID', 'data': ['x'],
            },
        }, new.raw('pool.get_all', 'x'))
        new.login()
        metrics = new.call('host_metrics.get_all_records').popitem()[1]
        self.assertEqual(32 << 30, metrics['memory_total'])

    def test_json_takes_numbers_and_strings_and_ids_of_both_kinds(self):
        client = xapi.Json(self, self.pool.url()).login()
        for size in (5, '5'):
            self.assertEqual('HANDLE_INVALID', client.raw(
                'VDI.resize', client.session, DEAD, size,
            )['error']['message'])
        call = {'method': 'pool.get_all', 'params': [client.session]}
        for id_ in (1, 'one'):
            _, answer = self.post('/jsonrpc', json.dumps(
                {**call, 'id': id_}))
            self.assertEqual(id_, json.loads(answer)['id'])
        for bad in (call, [call], 7, {**call, 'id': None}):
            _, answer = self.post('/jsonrpc', json.dumps(bad))
            self.assertTrue(json.loads(answer)['error'])

    def test_numbers_may_be_strings_in_json_too(self):
        pool = xapi.simulator(self, json_int_strings=True)
        client = xapi.Json(self, pool.url()).login()
        metrics = client.call('host_metrics.get_all_records').popitem()[1]
        self.assertEqual(str(32 << 30), metrics['memory_total'])

    def test_a_name_that_xml_cannot_carry_breaks_no_listing(self):
        client = xapi.Json(self, self.pool.url()).login()
        name = 'a\x01<b>&"\u00e9\U0001f4be'
        client.call('pool.set_name_label', self.pool.ref, name)
        self.assertEqual(
            name.replace('\x01', '?'),
            xapi.login(self, self.pool).xenapi.pool.get_name_label(
                self.pool.ref),
        )

    def test_other_paths_and_methods_are_not_found(self):
        self.assertEqual(404, self.post('/nothing', b'')[0])


class Tls(Calls):

    def test_each_host_has_its_own_certificate_that_can_be_pinned(self):
        pool = xapi.simulator(self, tls=True)
        session = xapi.login(self, pool)
        told = [
            session.xenapi.host.get_server_certificate(host)
            for host in pool.hosts
        ]
        self.assertEqual(2, len(set(told)))
        for host, text in enumerate(told):
            parts = urlsplit(pool.url(host))
            context = ssl.create_default_context(cadata=text)
            with contextlib.closing(http.client.HTTPSConnection(
                parts.hostname, parts.port, context=context, timeout=30,
            )) as connection:
                connection.request('POST', '/', b'')
                self.assertEqual(200, connection.getresponse().status)
        with self.assertRaises(ssl.SSLCertVerificationError):
            context = ssl.create_default_context(cadata=told[1])
            connection = http.client.HTTPSConnection(
                parts.hostname, urlsplit(pool.url(0)).port, context=context,
                timeout=30,
            )
            with contextlib.closing(connection):
                connection.connect()


class Secrets(Calls):

    def test_secrets_and_messages_come_and_go(self):
        pool = xapi.simulator(self)
        xenapi = xapi.login(self, pool).xenapi
        secret = xenapi.secret.create({'value': 'quiet', 'other_config': {}})
        uuid = xenapi.secret.get_uuid(secret)
        self.assertEqual('quiet', xenapi.secret.get_value(
            xenapi.secret.get_by_uuid(uuid)))
        xenapi.secret.destroy(secret)
        self.assertEqual([], xenapi.secret.get_all())
        before = xmlrpc.client.DateTime('20000101T00:00:00Z')
        message = xenapi.message.create(
            'NOTE', '3', 'Pool', pool.uuid, 'body')
        self.assertEqual([message], list(xenapi.message.get(
            'Pool', pool.uuid, before)))
        self.assertEqual({}, xenapi.message.get_since(
            xmlrpc.client.DateTime('21000101T00:00:00Z')))
        self.assertEqual('UUID_INVALID', self.refused(
            xenapi.message.create, 'NOTE', '3', 'SR', 'x', '')[0])
        xenapi.message.destroy(message)
        self.assertEqual({}, xenapi.message.get_all_records())
