# SPDX-License-Identifier: Apache-2.0
"""The RPC door through a real RabbitMQ, to a real service."""

import contextlib
import logging
import os
import threading
import unittest

import kombu
import oslo_messaging as messaging
from oslo_config import cfg

from tests import ports
from tests import rabbit
from tests.integration.compute import CALLER
from tests.integration.compute import Compute
from tests.integration.serving import until
from tests.integration.serving import World
from volume import errors
from volume import ids
from volume import rpc
from volume.db import models
from volume.model import GIB
from volume.model import MIB
from volume.notifier import Notifier
from volume.rpcapi import VolumeAPI
from volume.rpcverb import verb

READY_S = 60
CONNECTOR = {
    'host': 'compute-1', 'ip': '127.0.0.1', 'initiator': 'iqn.x:y',
    'secret': 'sesame',
}
_broker = None


def setUpModule():
    global _broker
    _broker = rabbit.Rabbit()
    unittest.addModuleCleanup(_broker.remove)
    _broker.start()
    # What they say of a broker that is stopped on purpose is no news.
    for name in 'oslo.messaging', 'oslo_messaging', 'amqp':
        logging.getLogger(name).addHandler(logging.NullHandler())


class Brokered(unittest.TestCase):
    """What the tests here share: a client in this process."""

    def client(self, **options):
        made = VolumeAPI.connect(url=_broker.url, **options)
        self.addCleanup(made.close)
        return made

    def bus(self, **options):
        made = rpc.Remote(private(_broker.url), **options)
        self.addCleanup(made.close)
        return made


class Serving(Brokered):
    """A whole service, asked by a process that has no database."""

    def setUp(self):
        self.world = World(self, settings=f'transport_url = {_broker.url}')
        self.await_consumers()
        self.own_id = ids.new()

    def await_consumers(self):
        """Return when the service answers."""
        client = self.client()

        def is_there():
            try:
                client.get_volume(CALLER, ids.new())
            except errors.NotFound:
                return True
            except errors.VolumeError:
                return False

        until(is_there, bool)

    def settled(self, api, volume_id):
        return until(
            lambda: look(api, volume_id),
            lambda found: found and found['status'] in ('available', 'error'),
        )

    def rows(self):
        return self.world.core.db.read(
            lambda s: s.query(models.Volume).all()
        )

    def stored(self):
        return [
            name for name in os.listdir(self.world.pool)
            if name == f'{self.own_id}.raw'
        ]

    def test_a_compute_service_needs_no_database(self):
        compute = Compute(self, _broker.url)
        instance = ids.new()
        compute.create_volume(
            self.own_id, confirm=False, size=1, tags=['ssd'], name='n'
        )
        found = until(
            lambda: look(compute, self.own_id),
            lambda found: found and found['status'] == 'available',
        )
        self.assertEqual(
            (GIB, 'n', 'p'),
            (found['size_bytes'], found['display_name'],
             found['project_id']),
        )
        self.assertEqual(1, len(self.stored()))
        compute.reserve_volume(self.own_id)
        info = compute.initialize_connection(self.own_id, CONNECTOR)
        self.assertEqual('local', info['driver_volume_type'])
        compute.attach_volume(self.own_id, instance, '/dev/vdb')
        self.assertEqual('in-use', compute.get_volume(self.own_id)['status'])
        compute.begin_detaching(self.own_id)
        compute.terminate_connection(self.own_id, CONNECTOR)
        compute.detach_volume(self.own_id)
        found = compute.get_volume(self.own_id)
        self.assertEqual('available', found['status'])
        compute.delete_volume(self.own_id)
        until(lambda: look(compute, self.own_id), lambda found: found is None)
        loaded = compute.loaded()
        self.assertIn('volume.rpcapi', loaded)
        for name in 'sqlalchemy', 'volume.db', 'volume.verbs', 'volume.node':
            self.assertNotIn(name, loaded)

    def test_a_call_returns_when_it_is_promised_and_raises_our_kinds(self):
        compute = Compute(self, _broker.url)
        made = compute.create_volume(self.own_id, size_bytes=MIB)
        self.assertEqual((self.own_id, MIB), (made['id'], made['size_bytes']))
        self.assertEqual(
            [self.own_id], [row.id for row in self.rows()]
        )
        for kind, word, ask in (
            (errors.Conflict, 'another way', lambda: (
                compute.create_volume(self.own_id, size_bytes=2 * MIB))),
            (errors.NoSpace, 'without room', lambda: (
                compute.create_volume(ids.new(), size=100))),
            (errors.NotFound, 'could not be found', lambda: (
                compute.get_volume(ids.new()))),
            (errors.Invalid, 'size must be', lambda: (
                compute.create_volume(ids.new(), size=1.5))),
            (errors.Invalid, 'not a UUID', lambda: (
                compute.create_volume('../x', size=1))),
            (errors.Invalid, 'not attached', lambda: (
                compute.detach_volume(self.settled(
                    self.client(), self.own_id)['id']))),
        ):
            with self.subTest(word), self.assertRaises(kind) as caught:
                ask()
            self.assertIn(word, str(caught.exception))
            self.assertNotIn('Traceback', str(caught.exception))
        self.assertEqual(1, len(self.rows()))

    def test_casts_again_and_out_of_order_make_what_one_makes(self):
        api = self.client()
        early = ids.new()
        api.delete_volume(CALLER, early)
        for _ in range(5):
            api.create_volume(CALLER, self.own_id, confirm=False, size=1)
        until(lambda: len(self.rows()), lambda count: count == 2)
        api.create_volume(CALLER, early, confirm=False, size=1)
        self.settled(api, self.own_id)
        self.assertEqual(
            'deleted', api.create_volume(CALLER, early, size=1)['status']
        )
        self.assertEqual(2, len(self.rows()))
        jobs = self.world.core.db.read(lambda s: s.query(models.Job).count())
        self.assertEqual(1, jobs)

    def test_what_the_door_does_not_have_is_refused_over_the_wire(self):
        bus = self.bus()
        for kind, version, method, args in (
            (errors.Unsupported, '1.99', 'get_volume', {'volume_id': 'x'}),
            (errors.Unsupported, '2.0', 'create_volume', {
                'volume_id': self.own_id, 'size': 1}),
            (errors.Invalid, '1.0', '_is_extended', {}),
            (errors.Invalid, '1.0', '__init__', {'core': None}),
            (errors.Invalid, '1.0', 'core', {}),
            (errors.Invalid, '1.0', 'create_volume', {
                'volume_id': self.own_id, 'size': 1, 'colour': 'red'}),
            (errors.Invalid, '1.0', 'create_volume', {'size': 1}),
            (errors.Invalid, '1.0', 'create_volume', {
                'volume_id': self.own_id, 'tags': 'ssd', 'size': 1}),
        ):
            with self.subTest(method, version=version, args=args):
                with self.assertRaises(kind):
                    bus.call(CALLER, version, method, args)
                bus.cast(CALLER, version, method, args)
        with self.assertRaises(errors.Invalid):
            bus.call({'user_id': 'u'}, '1.0', 'get_volume', {
                'volume_id': self.own_id})
        self.assertEqual([], self.rows())

    def test_garbage_in_the_queue_does_not_stop_the_service(self):
        deep = '[' * 100_000 + ']' * 100_000
        url = _broker.url.replace('rabbit', 'amqp')
        with kombu.Connection(url) as connection:
            producer = connection.Producer()
            for body, kind in (
                (b'\xff\xfe', 'application/json'),
                (b'', 'text/plain'),
                (b'{"method": 5}', 'application/json'),
                (b'[1, 2]', 'application/json'),
                (deep.encode(), 'application/json'),
                (b'{"oslo.version": "2.0", "oslo.message": "{"}',
                 'application/json'),
                (b'{"oslo.version": "9.0", "oslo.message": "{}"}',
                 'application/json'),
                (b'\x80\x04N.', 'application/x-python-serialize'),
            ):
                producer.publish(
                    body, exchange='volume', routing_key='volume',
                    content_type=kind, content_encoding='utf-8',
                )
            # As nova-volume's own callers wrote it: no envelope, no version.
            producer.publish(
                {
                    'method': 'create_volume',
                    'args': {'volume_id': self.own_id, 'size': '1'},
                    '_context_project_id': 'p', '_context_user_id': 'u',
                    '_context_is_admin': False,
                },
                exchange='volume', routing_key='volume', serializer='json',
            )
        self.settled(self.client(), self.own_id)
        self.assertEqual([self.own_id], [row.id for row in self.rows()])

    def test_one_service_can_be_named(self):
        api = self.client()
        self.assertEqual(
            MIB, api.create_volume(
                CALLER, self.own_id, size_bytes=MIB, host='node-1'
            )['size_bytes'],
        )
        with self.assertRaises(errors.Unavailable) as caught:
            api.get_volume(CALLER, self.own_id, host='node-9')
        self.assertIn('volume.node-9', str(caught.exception))
        with self.assertRaises(errors.Unavailable):
            api.delete_volume(CALLER, self.own_id, host='node-9')

    def test_casts_wait_for_a_service_that_is_being_restarted(self):
        api = self.client()
        self.world.stop()
        api.create_volume(CALLER, self.own_id, confirm=False, size=1)
        self.assertEqual([], self.stored())
        self.world.start()
        self.settled(api, self.own_id)
        self.assertEqual(1, len(self.stored()))

    def test_a_broker_that_goes_and_comes_back_costs_nothing(self):
        api = self.client(timeout_s=20)
        api.create_volume(CALLER, self.own_id, size_bytes=MIB)
        self.settled(api, self.own_id)
        _broker.stop()
        try:
            with self.assertRaises(errors.VolumeError) as caught:
                self.client(retries=0).get_volume(CALLER, self.own_id)
            self.assertIs(errors.Unavailable, type(caught.exception))
        finally:
            _broker.start()
        other = ids.new()
        until(lambda: made(api, other), bool)
        self.settled(api, other)
        self.assertEqual(
            {self.own_id, other}, {row.id for row in self.rows()}
        )

    def test_no_secret_of_a_connection_is_logged(self):
        with everything_logged() as lines:
            api = self.client()
            api.create_volume(CALLER, self.own_id, size_bytes=MIB)
            self.settled(api, self.own_id)
            info = api.initialize_connection(CALLER, self.own_id, CONNECTOR)
            api.terminate_connection(CALLER, self.own_id, CONNECTOR)
            with self.assertRaises(errors.Invalid):
                api.initialize_connection(
                    CALLER, self.own_id, {'secret': 'sesame'}
                )
        self.assertIn('driver_volume_type', info)
        self.assertIn('Invalid', '\n'.join(lines))
        self.assertNotIn('sesame', '\n'.join(lines))


class Endpoint:
    """An endpoint whose verb waits until it is told."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()
        self.told = []

    def notify(self, event, payload):
        self.told.append((event, payload['reason']))

    @verb()
    def slow(self, caller):
        self.begun.set()
        self.go.wait(READY_S)
        return {'auth_password': 'sesame'}

    @verb()
    def quick(self, caller):
        return 'here'

    @verb(error='volume.create.error')
    def refuse(self, caller, volume_id: str):
        raise errors.Invalid('no')


class Transporting(Brokered):
    """The server and the client without a service behind them."""

    def serve(self, endpoint, **options):
        """Return a bus to a server of our own, and its host's name."""
        host = f'h-{ids.new()}'
        self.server = rpc.Server(private(_broker.url), endpoint, host)
        self.server.start()
        self.addCleanup(self.server.stop)
        self.assertTrue(self.server.wait_ready(READY_S))
        return self.bus(**options), host

    def test_a_reply_that_is_late_is_unknown_and_never_logged(self):
        endpoint = Endpoint()
        self.addCleanup(endpoint.go.set)
        with everything_logged() as lines:
            bus, host = self.serve(endpoint, timeout_s=5)
            with self.assertRaises(errors.Unknown) as caught:
                bus.call(CALLER, '1.0', 'slow', {}, host)
            endpoint.go.set()
            # Two further replies come by the same queue, after the late one.
            for _ in range(2):
                bus.call(CALLER, '1.0', 'quick', {}, host)
        self.assertIn('may have happened', str(caught.exception))
        self.assertNotIn('sesame', '\n'.join(lines))

    def test_a_failure_is_told_by_a_notification_where_nobody_waits(self):
        endpoint = Endpoint()
        bus, host = self.serve(endpoint, timeout_s=READY_S)
        with self.assertRaises(errors.Invalid):
            bus.call(CALLER, '1.0', 'refuse', {'volume_id': 'v'}, host)
        self.assertEqual([], endpoint.told)
        bus.cast(CALLER, '1.0', 'refuse', {'volume_id': 'v'}, host)
        until(lambda: endpoint.told, bool)
        self.assertEqual([('volume.create.error', 'no')], endpoint.told)

    def test_a_stop_waits_for_what_was_taken(self):
        endpoint = Endpoint()
        bus, host = self.serve(endpoint, timeout_s=READY_S)
        answers = []
        caller = threading.Thread(target=lambda: answers.append(
            bus.call(CALLER, '1.0', 'slow', {}, host)
        ))
        caller.start()
        self.assertTrue(endpoint.begun.wait(READY_S))
        stopping = threading.Thread(target=self.server.stop)
        stopping.start()
        endpoint.go.set()
        stopping.join(READY_S)
        caller.join(READY_S)
        self.assertEqual([{'auth_password': 'sesame'}], answers)

    def test_without_a_broker_nothing_hangs(self):
        port = ports.free()
        url = f'rabbit://guest:sesame@127.0.0.1:{port}/'
        api = VolumeAPI.connect(url=url, retries=0)
        self.addCleanup(api.close)
        with self.assertRaises(errors.Unavailable) as caught:
            api.get_volume(CALLER, ids.new())
        self.assertIn(f'127.0.0.1:{port}', str(caught.exception))
        self.assertNotIn('sesame', str(caught.exception))
        with self.assertRaises(errors.VolumeError) as caught:
            api.delete_volume(CALLER, ids.new())
        self.assertNotIn('sesame', str(caught.exception))
        server = rpc.Server(private(url), Endpoint(), 'h')
        server.start()
        self.assertFalse(server.wait_ready(0.1))
        server.stop()

    def test_a_wrong_password_is_told_and_not_shown(self):
        bad = _broker.url.replace('guest@', 'sesame@')
        api = VolumeAPI.connect(url=bad, retries=0, timeout_s=5)
        self.addCleanup(api.close)
        for ask in api.delete_volume, api.get_volume:
            with self.subTest(ask), self.assertRaises(
                errors.Unavailable
            ) as caught:
                ask(CALLER, ids.new())
            self.assertNotIn('sesame', str(caught.exception))


class Notifying(Brokered):
    """Notifications as another service receives them."""

    def make(self, url, **options):
        conf = private(url)
        conf.set_override(
            'driver', ['messagingv2'], group='oslo_messaging_notifications'
        )
        return Notifier(conf, 'node-1', **options), conf

    def test_another_service_gets_them_in_order(self):
        notify, conf = self.make(_broker.url)
        transport = messaging.get_notification_transport(conf)
        heard = Heard(2)
        listener = messaging.get_notification_listener(
            transport, [messaging.Target(topic='notifications')], [heard],
        )
        listener.start()
        self.addCleanup(listener.wait)
        self.addCleanup(listener.stop)
        notify('volume.create.start', {'status': 'creating'})
        notify('volume.create.end', {'status': 'available'})
        notify.stop()
        self.assertTrue(heard.done.wait(READY_S))
        self.assertEqual(
            [
                ('volume.node-1', 'volume.create.start', 'creating'),
                ('volume.node-1', 'volume.create.end', 'available'),
            ],
            heard.events,
        )

    def test_nobody_waits_for_a_broker_that_is_away(self):
        port = ports.free()
        notify, conf = self.make(
            f'rabbit://guest:guest@127.0.0.1:{port}/', pending_max=3
        )
        conf.set_override('retry', 1, group='oslo_messaging_notifications')
        with self.assertLogs('volume.notifier', 'WARNING') as logged:
            for number in range(20):
                notify(f'volume.create.{number}', {})
            notify.stop(timeout_s=0.1)
        # Once more if the sender takes its one event out after the first.
        self.assertIn(
            sum('dropped' in line for line in logged.output), (1, 2)
        )


class Heard:
    """Keeps the notifications of publisher, event and status."""

    def __init__(self, count):
        self.events, self.done, self._count = [], threading.Event(), count

    def info(self, context, publisher, event, payload, metadata):
        self.events.append((publisher, event, payload['status']))
        if len(self.events) == self._count:
            self.done.set()


def private(url):
    """Return options that nobody shares."""
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[], default_config_dirs=[])
    rpc.register_opts(conf)
    conf.set_override('transport_url', url)
    return conf


def look(api, volume_id):
    """Return a volume, or ``None`` if there is none."""
    who = () if isinstance(api, Compute) else (CALLER,)
    try:
        return api.get_volume(*who, volume_id)
    except errors.NotFound:
        return None


def made(api, volume_id):
    """Ask as a compute service does: again, until it is known."""
    try:
        return api.create_volume(CALLER, volume_id, size_bytes=MIB)
    except (errors.Unknown, errors.Unavailable):
        return None


@contextlib.contextmanager
def everything_logged():
    """Collect what is logged, at DEBUG and of every library."""
    lines = []

    class Collector(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    collector, root = Collector(), logging.getLogger()
    level = root.level
    root.addHandler(collector)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.setLevel(level)
        root.removeHandler(collector)
