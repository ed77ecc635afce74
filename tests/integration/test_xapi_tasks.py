# SPDX-License-Identifier: Apache-2.0
"""The simulated pool: waiting operations, tasks, events (S38, S39)."""

import collections
import threading
import time
import unittest
import xmlrpc.client

import XenAPI

from tests import xapi
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.faults import Fault
from volume.sim.xapi.registry import Ctx
from volume.sim.xapi.registry import Session


class Waiting(unittest.TestCase):
    """S38: what excludes one another waits, and is not refused."""

    def setUp(self):
        self.pool = xapi.simulator(self, gc_delay_s=0, operation_wait_s=30)
        self.sr = xapi.nfs_sr(self.pool)
        self.xenapi = xapi.login(self, self.pool).xenapi

    def test_operations_on_one_sr_come_one_after_another(self):
        ref = self.xenapi.SR.get_by_uuid(self.sr)
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        ended = threading.Event()

        def create():
            client = xapi.login(self, self.pool, originator='other').xenapi
            xapi.vdi(client, self.sr)
            ended.set()

        with self.pool.operations.sr(ctx, ref, 'scan'):
            self.assertEqual(
                {'OpaqueRef:t': 'scan'},
                self.xenapi.SR.get_current_operations(ref),
            )
            thread = threading.Thread(target=create)
            thread.start()
            self.assertFalse(ended.wait(0.3))
            self.assertEqual([], self.xenapi.VDI.get_all())
        thread.join()
        self.assertTrue(ended.is_set())
        self.assertEqual(1, len(self.xenapi.VDI.get_all()))
        self.assertEqual({}, self.xenapi.SR.get_current_operations(ref))

    def test_the_longest_wait_ends_with_who_is_in_the_way(self):
        self.pool.limits.operation_wait_s = 0.1
        ref = self.xenapi.SR.get_by_uuid(self.sr)
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        with self.pool.operations.sr(ctx, ref, 'vdi_clone'):
            with self.assertRaises(XenAPI.Failure) as caught:
                xapi.vdi(self.xenapi, self.sr)
        self.assertEqual(
            ['OTHER_OPERATION_IN_PROGRESS', 'SR', ref, 'vdi_clone',
             'OpaqueRef:t'],
            caught.exception.details,
        )

    def test_a_call_is_not_in_its_own_way(self):
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        ref = self.xenapi.SR.get_by_uuid(self.sr)
        with self.pool.operations.sr(ctx, ref, 'vdi_clone'):
            with self.pool.operations.sr(ctx, ref, 'vdi_create'):
                self.assertEqual(
                    ['vdi_clone'], self.pool.operations.current('SR', ref))
            self.assertEqual(
                ['vdi_clone'], self.pool.operations.current('SR', ref))

    def test_who_waited_for_the_end_of_an_object_finds_it_gone(self):
        vdi = xapi.vdi(self.xenapi, self.sr)
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        failures = []

        def late():
            other = Ctx(Session('', 'pool-admin'), '', 'OpaqueRef:u')
            try:
                with self.pool.operations.vdi(other, vdi, 'resize'):
                    pass
            except Failure as failure:
                failures.append(failure.code)

        with self.pool.operations.vdi(ctx, vdi, 'destroy'):
            thread = threading.Thread(target=late)
            thread.start()
            self.pool.rows.delete('VDI', vdi)
        thread.join()
        self.assertEqual(['HANDLE_INVALID'], failures)


class Tasks(unittest.TestCase):
    """S38: calls that nobody waits for."""

    def setUp(self):
        self.pool = xapi.simulator(self, gc_delay_s=0)
        self.sr = xapi.nfs_sr(self.pool)
        self.xenapi = xapi.login(self, self.pool).xenapi

    def started(self, **more):
        return self.xenapi.Async.VDI.create({
            'name_label': 'x', 'SR': self.xenapi.SR.get_by_uuid(self.sr),
            'virtual_size': str(1 << 30), 'type': 'user', 'sharable': False,
            'read_only': False, 'other_config': {}, **more,
        })

    def test_a_result_is_xml_in_a_string(self):
        record = xapi.wait(self.xenapi, self.started())
        self.assertEqual('success', record['status'])
        (vdi,) = self.xenapi.VDI.get_all()
        self.assertEqual(f'<value>{vdi}</value>', record['result'])
        self.assertEqual(1.0, record['progress'])
        self.assertEqual('Async.VDI.create', record['name_label'])
        self.assertEqual(['destroy'], record['allowed_operations'])
        record = xapi.wait(
            self.xenapi, self.xenapi.Async.VDI.destroy(vdi))
        self.assertEqual(('success', ''), (record['status'], record['result']))

    def test_a_failure_is_in_error_info(self):
        record = xapi.wait(
            self.xenapi, self.started(virtual_size=str(1 << 60)))
        self.assertEqual('failure', record['status'])
        self.assertTrue(
            record['error_info'][0].startswith('SR_BACKEND_FAILURE'),
            record['error_info'],
        )

    def test_a_bad_call_is_refused_before_there_is_a_task(self):
        with self.assertRaises(XenAPI.Failure) as caught:
            self.xenapi.Async.VDI.create('x')
        self.assertEqual('FIELD_TYPE_ERROR', caught.exception.details[0])
        self.assertEqual([], self.xenapi.task.get_all())

    def test_one_that_waits_for_an_sr_can_be_cancelled_and_did_nothing(self):
        ref = self.xenapi.SR.get_by_uuid(self.sr)
        ctx = Ctx(Session('', 'pool-admin'), self.pool.master, 'OpaqueRef:t')
        with self.pool.operations.sr(ctx, ref, 'scan'):
            task = self.started()
            end = time.monotonic() + 30
            while 'cancel' not in self.xenapi.task.get_allowed_operations(
                task,
            ):
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
            self.xenapi.task.cancel(task)
            record = xapi.wait(self.xenapi, task)
        self.assertEqual('cancelled', record['status'])
        self.assertEqual(['TASK_CANCELLED', task], record['error_info'])
        self.assertEqual([], self.xenapi.VDI.get_all())

    def test_one_that_is_over_cannot_be_cancelled(self):
        task = self.started()
        xapi.wait(self.xenapi, task)
        with self.assertRaises(XenAPI.Failure) as caught:
            self.xenapi.task.cancel(task)
        self.assertEqual('OPERATION_NOT_ALLOWED', caught.exception.details[0])
        self.xenapi.task.destroy(task)
        with self.assertRaises(XenAPI.Failure) as caught:
            self.xenapi.task.get_record(task)
        self.assertEqual(['HANDLE_INVALID', 'task', task],
                         caught.exception.details)

    def test_a_client_keeps_a_task_of_its_own(self):
        task = self.xenapi.task.create('upload', 'by hand')
        self.xenapi.task.set_progress(task, 0.5)
        self.xenapi.task.add_to_other_config(task, 'key', 'value')
        record = self.xenapi.task.get_record(task)
        self.assertEqual(
            ('pending', 0.5, {'key': 'value'}),
            (record['status'], record['progress'], record['other_config']),
        )
        self.xenapi.task.set_status(task, 'success')
        with self.assertRaises(XenAPI.Failure):
            self.xenapi.task.set_progress(task, 0.6)

    def test_old_tasks_are_collected(self):
        self.pool.limits.tasks = 3
        old = self.xenapi.task.create('pending', '')
        tasks = [self.started() for _ in range(5)]
        for task in tasks:
            self.wait_gone_or_done(task)
        self.pool.collect()
        kept = set(self.xenapi.task.get_all())
        self.assertIn(old, kept)
        self.assertEqual(3, len(kept - {old}))
        self.pool.advance(66 * 60)
        self.assertEqual([old], self.xenapi.task.get_all())
        # The client asks now and then, as its session must not expire.
        self.pool.advance(22 * 3600)
        self.xenapi.pool.get_all()
        self.pool.advance(3 * 3600)
        self.assertEqual([], self.xenapi.task.get_all())
        self.pool.tasks.abandon(old)

    def wait_gone_or_done(self, task):
        end = time.monotonic() + 30
        while not self.pool.tasks.is_finished(task):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)


class Events(unittest.TestCase):
    """S39."""

    def setUp(self):
        self.pool = xapi.simulator(self)
        self.xenapi = xapi.login(self, self.pool).xenapi
        self.from_ = getattr(self.xenapi.event, 'from')

    def test_without_a_token_all_there_is_is_new(self):
        batch = self.from_(['host', 'PIF'], '', 30.0)
        self.assertEqual(
            [('add', 'host')] * 2 + [('add', 'pif')] * 2,
            sorted((e['operation'], e['class']) for e in batch['events']),
        )
        self.assertEqual({'host': 2, 'pif': 2}, batch['valid_ref_counts'])
        event = next(e for e in batch['events'] if e['class'] == 'host')
        self.assertEqual(
            self.xenapi.host.get_record(event['ref']), event['snapshot'])
        self.assertRegex(batch['token'], r'^\d{20},\d{20}$')

    def test_a_batch_has_each_object_once_and_as_it_is_now(self):
        token = self.from_(['*'], '', 0.0)['token']
        for number in range(3):
            self.xenapi.pool.set_name_label(self.pool.ref, f'n{number}')
        batch = self.from_(['pool'], token, 30.0)
        self.assertEqual(
            [('mod', 'n2')],
            [(e['operation'], e['snapshot']['name_label'])
             for e in batch['events']],
        )
        self.assertGreater(batch['token'], token)

    def test_what_went_has_no_snapshot_and_what_came_and_went_is_silent(self):
        message = self.note()
        token = self.from_(['message'], '', 0.0)['token']
        self.xenapi.message.destroy(message)
        self.xenapi.message.destroy(self.note())
        (event,) = self.from_(['message'], token, 30.0)['events']
        self.assertEqual(
            ('del', message), (event['operation'], event['ref']))
        self.assertNotIn('snapshot', event)

    def note(self):
        return self.xenapi.message.create(
            'NOTE', '1', 'Pool', self.pool.uuid, '')

    def test_nothing_new_is_waited_for_until_the_time_is_over(self):
        token = self.from_(['pool'], '', 0.0)['token']
        begun = time.monotonic()
        batch = self.from_(['pool'], token, 0.4)
        self.assertGreaterEqual(time.monotonic() - begun, 0.4)
        self.assertEqual([], batch['events'])
        self.assertGreaterEqual(batch['token'], token)

    def test_who_waits_is_woken_by_a_change_of_what_it_wants(self):
        token = self.from_(['pool'], '', 0.0)['token']
        client = xapi.Json(self, self.pool.url()).login()
        got = []

        def listen():
            got.append(client.call('event.from', ['pool'], token, 60.0))

        thread = threading.Thread(target=listen)
        thread.start()
        self.note()  # wakes nobody
        thread.join(0.3)
        self.assertTrue(thread.is_alive())
        self.xenapi.pool.set_name_label(self.pool.ref, 'new')
        thread.join(30)
        self.assertEqual('new', got[0]['events'][0]['snapshot']['name_label'])

    def test_one_object_is_followed_by_its_reference(self):
        one, other = self.note(), self.note()
        batch = self.from_([f'Message/{one}'], '', 30.0)
        self.assertEqual([one], [e['ref'] for e in batch['events']])
        token = batch['token']
        self.xenapi.message.destroy(other)
        self.xenapi.message.destroy(one)
        self.assertEqual([('del', one)], [
            (e['operation'], e['ref']) for e in
            self.from_([f'message/{one}'], token, 30.0)['events']
        ])

    def test_a_new_child_is_an_event_of_its_parent(self):
        host = self.pool.master
        token = self.from_(['host'], '', 0.0)['token']
        ref = self.pool.rows.new('PIF', host=host, device='eth1')
        (event,) = self.from_(['host'], token, 30.0)['events']
        self.assertIn(ref, event['snapshot']['PIFs'])
        self.pool.rows.update('PIF', ref, host=self.pool.host(1))
        events = self.from_(['host'], token, 30.0)['events']
        self.assertEqual({host, self.pool.host(1)}, {
            event['ref'] for event in events
        })

    def test_a_token_that_is_none_is_refused(self):
        for bad in ('x', '1', '-1,0', '1,2,3'):
            with self.assertRaises(XenAPI.Failure) as caught:
                self.from_(['*'], bad, 0.0)
            self.assertEqual(
                ['EVENT_FROM_TOKEN_PARSE_FAILURE', bad],
                caught.exception.details,
            )
        with self.assertRaises(XenAPI.Failure) as caught:
            self.from_(['a/b/c'], '', 0.0)
        self.assertEqual(
            'EVENT_SUBSCRIPTION_PARSE_FAILURE', caught.exception.details[0])

    def test_an_injected_event_comes_after_its_token(self):
        token = self.xenapi.event.inject('pool', self.pool.ref)
        batch = self.from_(['pool'], token, 30.0)
        self.assertEqual(
            [('mod', self.pool.ref)],
            [(e['operation'], e['ref']) for e in batch['events']],
        )
        with self.assertRaises(XenAPI.Failure):
            self.xenapi.event.inject('pool', 'OpaqueRef:x')

    def test_secrets_and_sessions_make_no_events(self):
        self.xenapi.secret.create({'value': 'quiet', 'other_config': {}})
        batch = self.from_(['*'], '', 0.0)
        self.assertFalse({'secret', 'session'} & {
            *batch['valid_ref_counts'], *(e['class'] for e in batch['events'])
        })
        self.assertNotIn('quiet', str(batch))

    def test_a_session_that_ends_stops_its_waiting(self):
        client = xapi.Json(self, self.pool.url()).login()
        token = client.call('event.from', ['pool'], '', 0.0)['token']
        answers = []
        thread = threading.Thread(target=lambda: answers.append(client.raw(
            'event.from', client.session, ['pool'], token, 60.0)))
        thread.start()
        thread.join(0.3)
        self.assertTrue(thread.is_alive())
        self.pool.sessions.logout(client.session)
        thread.join(30)
        self.assertEqual(
            'SESSION_INVALID', answers[0]['error']['message'])

    def test_the_old_way_needs_a_registration(self):
        with self.assertRaises(XenAPI.Failure) as caught:
            self.xenapi.event.next()
        self.assertEqual(
            'SESSION_NOT_REGISTERED', caught.exception.details[0])
        self.xenapi.event.register(['message'])
        refs = [self.note(), self.note()]
        self.assertEqual(
            refs, [e['ref'] for e in self.xenapi.event.next()])
        self.xenapi.event.unregister(['message'])


class Many(unittest.TestCase):
    """Ten thousand disks are no burden."""

    COUNT = 10_000

    def test_they_are_listed_and_told_of_in_one_call_each(self):
        pool = xapi.simulator(self)
        sr = pool.rows.new('SR', name_label='big', type='nfs', shared=True)
        for number in range(self.COUNT):
            pool.rows.new(
                'VDI', SR=sr, name_label=f'disk {number % 100}',
                virtual_size=1 << 30, type='user', other_config={'a': 'b'},
            )
        pool.rows.flush()
        client = xapi.Json(self, pool.url()).login()
        self.assertEqual(
            self.COUNT, len(client.call('VDI.get_all_records')))
        self.assertEqual(
            100, len(client.call('VDI.get_by_name_label', 'disk 7')))
        self.assertEqual(self.COUNT, len(client.call('SR.get_VDIs', sr)))
        batch = client.call('event.from', ['vdi'], '', 30.0)
        self.assertEqual(self.COUNT, len(batch['events']))
        self.assertEqual({'vdi': self.COUNT}, batch['valid_ref_counts'])
        # What one change costs does not grow with what there is.
        pool.rows._latest = looked = Counted(pool.rows._latest)
        ref = batch['events'][5]['ref']
        client.call('VDI.add_tags', ref, 'seen')
        batch = client.call('event.from', ['vdi'], batch['token'], 30.0)
        self.assertEqual([ref], [e['ref'] for e in batch['events']])
        self.assertLess(looked.count, 50)


class Counted(collections.OrderedDict):
    """Counts what is looked at, newest first."""

    count = 0

    def items(self):
        return Backwards(self, super().items())


class Backwards:

    def __init__(self, owner, items):
        self._owner, self._items = owner, items

    def __reversed__(self):
        for item in reversed(self._items):
            self._owner.count += 1
            yield item


class Found(unittest.TestCase):
    """What PyPI's client makes of the values."""

    def test_a_fault_of_a_test_is_what_the_client_sees(self):
        pool = xapi.simulator(self)
        xenapi = xapi.login(self, pool).xenapi
        pool.faults.add(Fault('pool.get_all', 'refuse', params=('X', 'y')))
        with self.assertRaises(XenAPI.Failure) as caught:
            xenapi.pool.get_all()
        self.assertEqual(['X', 'y'], caught.exception.details)
        self.assertEqual([pool.ref], xenapi.pool.get_all())
        self.assertIsInstance(
            xenapi.host.get_servertime(pool.master), xmlrpc.client.DateTime)


class Kept(unittest.TestCase):

    def test_hosts_stay_in_order_whatever_they_are_called(self):
        pool = xapi.simulator(self, hosts=12)
        hosts = pool.hosts
        pool.rows.update('host', hosts[3], name_label='a')
        directory, world = pool.directory, pool.world
        pool.stop()
        again = xapi.simulator(self, directory=directory, world=world)
        self.assertEqual(hosts, again.hosts)
        self.assertEqual(
            [f'pool-host-{n}' for n in (1, 2, 3)],
            [again.rows.field('host', host, 'name_label')
             for host in again.hosts[:3]],
        )

    def test_a_day_without_a_call_ends_a_session_uncollected_too(self):
        pool = xapi.simulator(self, session_s=0.2)
        client = xapi.Json(self, pool.url()).login()
        end = time.monotonic() + 30
        while 'error' not in (answer := client.raw(
            'pool.get_all', client.session,
        )):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.3)
        self.assertEqual('SESSION_INVALID', answer['error']['message'])
