# SPDX-License-Identifier: Apache-2.0
"""The simulated pool: what a test makes go wrong, and what survives."""

import contextlib
import http.client
import os
import tempfile
import threading
import time
import unittest

import XenAPI

from tests import xapi
from tests.integration import serving
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.registry import Session

GONE = (http.client.HTTPException, OSError)
ROOM = 100 << 30


class Faults(unittest.TestCase):

    def setUp(self):
        self.pool = xapi.simulator(self, hosts=3, gc_delay_s=0)
        self.sr = xapi.nfs_sr(self.pool)
        self.client = xapi.Json(self, self.pool.url()).login()
        # The connection that a fault cuts is another one.
        self.session = self.client.session

    def create(self, method='VDI.create'):
        client = xapi.Json(self, self.pool.url())
        return client.raw(method, self.session, {
            'name_label': 'disk', 'virtual_size': 1 << 30, 'type': 'user',
            'SR': self.pool.rows.by_uuid('SR', self.sr), 'sharable': False,
            'read_only': False, 'other_config': {},
        })

    def disks(self):
        client = xapi.Json(self, self.pool.url())
        return client.raw(
            'VDI.get_by_name_label', self.session, 'disk')['result']

    def test_a_lost_reply_is_of_a_call_that_was_done(self):
        self.pool.faults.add(Fault('VDI.create', 'lose_reply'))
        with self.assertRaises(GONE):
            self.create()
        self.assertEqual(1, len(self.disks()))
        self.create()
        self.assertEqual(2, len(self.disks()))
        self.assertEqual(
            [('VDI.create', 'lose_reply')], self.pool.faults.happened)

    def test_a_lost_reply_of_an_async_call_is_of_a_task_that_runs(self):
        self.pool.faults.add(Fault('VDI.create', 'lose_reply'))
        with self.assertRaises(GONE):
            self.create('Async.VDI.create')
        (task,) = self.client.call('task.get_all')
        xenapi = xapi.login(self, self.pool).xenapi
        self.assertEqual('success', xapi.wait(xenapi, task)['status'])
        self.assertEqual(1, len(self.disks()))

    def test_a_dropped_call_is_not_done(self):
        self.pool.faults.add(Fault('*', 'drop'))
        with self.assertRaises(GONE):
            self.create()
        self.assertEqual([], self.disks())

    def test_a_refusal_before_does_nothing_and_one_after_has_done_it(self):
        for when, done in (('before', 0), ('after', 1)):
            self.pool.faults.add(Fault(
                'VDI.create', 'refuse', when,
                params=('SR_BACKEND_FAILURE_47', '', 'gone')))
            self.assertEqual(
                'SR_BACKEND_FAILURE_47', self.create()['error']['message'])
            self.assertEqual(done, len(self.disks()))

    def test_a_refusal_by_its_plain_name_fails_the_task(self):
        xenapi = xapi.login(self, self.pool).xenapi
        self.pool.faults.add(Fault('VDI.create', 'refuse', params=('X', 'y')))
        record = xapi.wait(xenapi, self.create('Async.VDI.create')['result'])
        self.assertEqual(
            ('failure', ['X', 'y']), (record['status'], record['error_info']))
        self.pool.faults.add(
            Fault('Async.VDI.create', 'refuse', params=('X',)))
        self.assertEqual(
            'X', self.create('Async.VDI.create')['error']['message'])

    def test_a_fault_happens_as_often_as_ordered_and_after_so_many(self):
        self.pool.faults.add(Fault(
            'VDI.create', 'refuse', count=2, params=('X',), after_matches=1))
        self.assertEqual([False, True, True, False], [
            'error' in self.create() for _ in range(4)
        ])
        self.assertEqual([], self.pool.faults.waiting)

    def test_a_delay_delays_and_no_other_call(self):
        self.pool.faults.add(Fault('VDI.create', 'delay', params=(60,)))
        done = threading.Event()

        def late():
            with self.assertRaises(GONE):
                self.create()
            done.set()

        thread = threading.Thread(target=late)
        thread.start()
        self.assertEqual([], self.disks())
        self.assertFalse(done.is_set())
        self.pool.stop()
        thread.join(30)
        self.assertFalse(thread.is_alive())

    def test_the_master_dies_before_or_after_a_call_and_another_goes_on(self):
        old = self.pool.master
        self.pool.faults.add(Fault('VDI.create', 'kill_master'))
        with self.assertRaises(GONE):
            self.create()
        self.assertNotEqual(old, self.pool.master)
        # Sessions are in the database that all members share.
        self.assertEqual([], self.disks())
        with self.assertRaises(GONE):
            xapi.Json(self, self.pool.url(0)).raw('pool.get_all', '')
        self.plug_everywhere()
        self.pool.faults.add(Fault('VDI.create', 'kill_master', 'after'))
        with self.assertRaises(GONE):
            self.create()
        self.assertEqual(1, len(self.disks()))
        self.assertEqual(self.pool.host(2), self.pool.master)

    def plug_everywhere(self):
        for pbd in self.pool.rows.all('PBD'):
            self.assertTrue(
                self.pool.rows.field('PBD', pbd, 'currently_attached'))

    def test_a_task_of_a_master_that_dies_is_given_up(self):
        self.pool.faults.add(Fault('VDI.create', 'kill_master', 'after'))
        # It may die with the answer on its tongue.
        with contextlib.suppress(GONE):
            self.create('Async.VDI.create')
        serving.until(lambda: self.pool.rows.all('task'), bool)
        [task] = self.pool.rows.all('task')
        xenapi = None
        for host in (1, 2):
            if self.pool.host(host) == self.pool.master:
                xenapi = xapi.login(self, self.pool, host=host).xenapi
        if xenapi is None:  # the answer was faster than the death
            self.wait_for_death()
            xenapi = xapi.login(self, self.pool).xenapi
        record = xapi.wait(xenapi, task)
        self.assertEqual('cancelled', record['status'])
        self.assertEqual(1, len(self.disks()))

    def test_what_waits_on_a_master_that_dies_is_never_done(self):
        sr = self.pool.rows.by_uuid('SR', self.sr)
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        with self.pool.operations.sr(ctx, sr, 'scan'):
            task = self.create('Async.VDI.create')['result']
            self.pool.kill_master()
        self.end_of_work()
        self.assertEqual([], self.disks())
        self.assertEqual(
            'cancelled', self.pool.rows.field('task', task, 'status'))

    def test_how_work_on_a_dead_master_ends_is_told_to_nobody(self):
        self.pool.faults.add(Fault(
            'VDI.create', 'delay', 'after', params=(3.0,)))
        task = self.create('Async.VDI.create')['result']
        while not self.pool.faults.happened:
            time.sleep(0.01)
        self.pool.kill_master()
        self.end_of_work()
        self.assertEqual(
            'cancelled', self.pool.rows.field('task', task, 'status'))

    def end_of_work(self):
        for thread in threading.enumerate():
            if thread.name.startswith('xapi-VDI'):
                thread.join(30)

    def wait_for_death(self):
        with self.pool.rows.changed:
            self.assertTrue(self.pool.rows.changed.wait_for(
                lambda: self.pool.master != self.pool.host(0), 30))

    def test_a_host_that_comes_back_is_a_slave(self):
        self.pool.kill_master()
        self.pool.start_host(0)
        answer = xapi.Json(self, self.pool.url(0)).raw(
            'pool.get_all', self.session)
        self.assertEqual('HOST_IS_SLAVE', answer['error']['message'])
        metrics = self.pool.rows.field('host', self.pool.host(0), 'metrics')
        self.assertTrue(
            self.pool.rows.field('host_metrics', metrics, 'live'))

    def test_a_designated_master_takes_over_and_nothing_is_lost(self):
        self.create()
        xenapi = xapi.login(self, self.pool).xenapi
        xenapi.pool.designate_new_master(self.pool.host(1))
        self.assertEqual(1, len(self.disks()))
        self.assertEqual(self.pool.url(1), self.pool.url())

    def test_storage_out_of_reach_fails_and_comes_back(self):
        self.pool.faults.put_sr_offline(self.sr)
        code = self.create()['error']['message']
        self.assertIn('SR_BACKEND_FAILURE_4', code)
        self.pool.faults.put_sr_online(self.sr)
        self.assertIn('result', self.create())

    def test_a_fault_that_makes_no_sense_is_refused(self):
        for bad in (
            {'method': '*', 'kind': 'explode'},
            {'method': '*', 'kind': 'drop', 'when': 'never'},
            {'method': '*', 'kind': 'refuse', 'params': 'SOME_CODE'},
            {'method': '*', 'kind': 'refuse'},
            {'method': '*', 'kind': 'delay', 'params': ['x']},
            {'method': 'import_raw_vdi', 'kind': 'partial'},
        ):
            with self.assertRaises(ValueError):
                Fault(**bad)


class Process(unittest.TestCase):
    """``volume-xapi-sim``: killed, it goes on where it was."""

    def test_a_killed_simulator_goes_on_with_what_it_answered(self):
        sim = xapi.Process(self, storage=[{
            'what': 'nfs', 'server': 'filer', 'path': '/x',
            'size_bytes': ROOM,
        }]).start()
        client = xapi.Json(self, sim.url()).login()
        host = client.call('host.get_all')[0]
        sr = client.call(
            'SR.create', host, {'server': 'filer', 'serverpath': '/x'}, 0,
            'sr', '', 'nfs', 'user', True, {})
        disk = {
            'name_label': 'disk', 'virtual_size': 1 << 30, 'type': 'user',
            'SR': sr, 'sharable': False, 'read_only': False,
            'other_config': {'volume:id': 'one'},
        }
        first = client.call('VDI.create', disk)
        token = client.call('event.from', ['vdi'], '', 0.0)['token']
        before = client.call('VDI.get_record', first)
        sim.control('POST', '/faults', {
            'method': 'VDI.destroy', 'kind': 'delay', 'params': [600]})
        task = client.call('Async.VDI.destroy', first)
        sim.kill()
        told = sim.told
        sim.start()
        self.assertEqual(told['urls'], sim.told['urls'])
        again = xapi.Json(self, sim.url())
        again.session = client.session
        self.assertEqual(before, again.call('VDI.get_record', first))
        self.assertEqual(
            'cancelled', again.call('task.get_status', task))
        # A token of before still tells what comes after it.
        second = again.call('VDI.create', {**disk, 'name_label': 'two'})
        events = again.call('event.from', ['vdi'], token, 30.0)['events']
        self.assertIn(second, [event['ref'] for event in events])
        again.call('VDI.destroy', first)
        again.call('SR.scan', sr)
        self.assertEqual([second], again.call('SR.get_VDIs', sr))
        self.assertEqual(0, sim.stop())

    def test_two_processes_do_not_have_one_state(self):
        made = tempfile.TemporaryDirectory(prefix='vtxp', dir='/tmp')
        self.addCleanup(made.cleanup)
        state = made.name
        sim = xapi.Process(self, directory=state).start()
        other = xapi.Process(self, directory=state)
        with self.assertRaisesRegex(AssertionError, 'another simulator'):
            other.start()
        again = xapi.Json(self, sim.url()).login()
        self.assertEqual(1, len(again.call('pool.get_all')))
        self.assertEqual(0, sim.stop())
        other.start()
        self.assertEqual(0, other.stop())

    def test_what_was_never_answered_may_be_found_by_a_scan(self):
        sim = xapi.Process(self, storage=[{
            'what': 'nfs', 'server': 'filer', 'path': '/x',
            'size_bytes': ROOM,
        }], switches={'gc_delay_s': 3600}).start()
        client = xapi.Json(self, sim.url()).login()
        host = client.call('host.get_all')[0]
        sr = client.call(
            'SR.create', host, {'server': 'filer', 'serverpath': '/x'}, 0,
            'sr', '', 'nfs', 'user', True, {})
        sim.control('POST', '/faults', {
            'method': 'VDI.create', 'kind': 'delay', 'when': 'after',
            'params': [600]})
        task = client.call('Async.VDI.create', {
            'name_label': 'lost', 'virtual_size': 1 << 30, 'type': 'user',
            'SR': sr, 'sharable': False, 'read_only': False,
            'other_config': {}})
        while not sim.control('GET', '/state')['happened']:
            time.sleep(0.05)
        sim.kill()
        sim.start()
        client = xapi.Json(self, sim.url()).login()
        client.call('SR.scan', sr)
        self.assertLessEqual(len(client.call('VDI.get_all')), 1)
        self.assertNotEqual('pending', client.raw(
            'task.get_status', client.session, task).get('result'))

    def test_the_control_port_does_what_it_says(self):
        sim = xapi.Process(self, hosts=2, users={
            'root': {'password': 'secret'},
            'reader': {'password': 'other', 'role': 'read-only'},
        }).start()
        state = sim.control('GET', '/state')
        self.assertEqual(
            [True, True], [host['up'] for host in state['hosts']])
        sim.control('POST', '/hosts/1/stop')
        with self.assertRaises(GONE):
            xapi.Json(self, sim.url(1)).raw('pool.get_all', '')
        sim.control('POST', '/hosts/1/start')
        self.assertEqual(
            {'master': sim.url(1)},
            sim.control('POST', '/master', {'host': 1}),
        )
        reader = xapi.Json(self, sim.url(1)).login('reader', 'other')
        now = reader.call('host.get_servertime', reader.call(
            'host.get_all')[0])
        calls = sim.control('GET', '/calls')
        self.assertEqual(
            (1, 1), (calls['host.get_all'], calls['host.get_servertime']))
        later = sim.control('POST', '/clock', {'advance_s': 86000})['now']
        self.assertGreater(later, now)
        sim.control('POST', '/booting', {'booting': True})
        self.assertEqual('HOST_STILL_BOOTING', reader.raw(
            'pool.get_all', reader.session)['error']['message'])
        sim.control('POST', '/booting', {'booting': False})
        sim.control('POST', '/faults', {
            'method': '*', 'kind': 'refuse', 'count': -1, 'params': ['X']})
        self.assertEqual('X', reader.raw(
            'pool.get_all', reader.session)['error']['message'])
        self.assertEqual(1, len(sim.control('GET', '/state')['faults']))
        sim.control('DELETE', '/faults')
        self.assertEqual(1, len(reader.call('pool.get_all')))
        for method, path, body in (
            ('GET', '/nothing', None), ('POST', '/faults', {'kind': 'x'}),
            ('POST', '/faults', {}), ('POST', '/hosts/9/stop', None),
            ('POST', '/srs/1/painted', {}), ('POST', '/clock', b'{'),
            ('POST', '/srs/1/offline', {}), ('POST', '/gc', {'pausd': True}),
            ('POST', '/faults', {'method': 'VDI.creat', 'kind': 'drop'}),
        ):
            with self.assertRaises(AssertionError):
                sim.control(method, path, body)
        self.assertEqual(0, sim.stop())

    def test_a_password_stands_in_no_argument_and_in_no_log(self):
        sim = xapi.Process(self, users={'root': {'password': 'hush-hush'}})
        sim.start()
        with open(f'/proc/{sim.told["pid"]}/cmdline', 'rb') as f:
            self.assertNotIn(b'hush-hush', f.read())
        session = xapi.stranger(self, sim.url())
        with self.assertRaises(XenAPI.Failure):
            session.login_with_password('root', 'hush-hush-no')
        self.assertNotIn('hush', sim.log())

    def test_settings_that_make_no_sense_are_told(self):
        for config, text in (
            ({'nonsense': 1}, 'nonsense'),
            ({'profile': 'windows'}, 'windows'),
            ({'users': {'root': {'password': 'x', 'role': 'king'}}}, 'king'),
        ):
            sim = xapi.Process(self, **config)
            with self.assertRaises(AssertionError) as caught:
                sim.start()
            self.assertIn(text, str(caught.exception))
            self.assertNotIn('Traceback', str(caught.exception))

    def test_it_leaves_no_process_behind(self):
        sim = xapi.Process(self).start()
        sim.kill()
        self.assertFalse(os.path.exists(f'/proc/{sim.told["pid"]}'))
