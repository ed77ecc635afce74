# SPDX-License-Identifier: Apache-2.0
"""The RPC door itself: what it lets in, and what it promises."""

import inspect
import logging
import pathlib
import socketserver
import struct
import threading
import unittest

from volume import conf as options
from volume import errors
from volume import rpc
from volume.context import Caller
from volume.core import LeaseTaken
from volume.manager import VolumeManager
from volume.model import GIB
from volume.rpcapi import VolumeAPI
from volume.rpcverb import verb
from volume.rpcverb import verbs_of

WAIT_S = 30
TOP = pathlib.Path(__file__).parents[2]
PAGE = TOP / 'doc/source/reference/rpc.rst'
CALLER = Caller(project_id='p', user_id='u')
CONTEXT = {
    'project_id': 'p', 'user_id': 'u', 'is_admin': False,
    'request_id': 'req-1',
}

# nova-volume's verbs and the arguments that its callers send.
HISTORICAL = {
    'create_volume': 'volume_id snapshot_id image_id reservations',
    'delete_volume': 'volume_id',
    'create_snapshot': 'volume_id snapshot_id',
    'delete_snapshot': 'snapshot_id',
    'copy_volume_to_image': 'volume_id image_id',
    'extend_volume': 'volume_id new_size',
    'initialize_connection': 'volume_id connector',
    'terminate_connection': 'volume_id connector',
    'attach_volume': 'volume_id instance_uuid mountpoint',
    'detach_volume': 'volume_id',
}
HERS = 'reserve_volume unreserve_volume begin_detaching roll_detaching'


class Inner:
    """Verbs for tests of the dispatcher alone."""

    def __init__(self):
        self.events = []
        self.calls = []

    def notify(self, event, payload):
        self.events.append((event, dict(payload)))

    def plain(self, caller):
        raise AssertionError('it was called')

    @verb()
    def inherited(self, caller):
        raise AssertionError('it was called')


class Endpoint(Inner):

    @verb('1.1')
    def echo(
        self,
        caller: Caller,
        thing: dict[str, object],
        count: int = 0,
        *,
        words: list[str] | None = None,
    ) -> dict[str, object]:
        self.calls.append((caller, thing, count, words))
        return thing

    @verb(error='thing.fail.error')
    def fail(self, caller: Caller, volume_id: str) -> None:
        raise self.failure

    def _hidden(self, caller):
        raise AssertionError('it was called')


class Dispatching(unittest.TestCase):
    """Any endpoint: what is checked before a verb is called."""

    def setUp(self):
        self.endpoint = Endpoint()
        self.bus = rpc.Local(self.endpoint)
        self.addCleanup(self.bus.close)

    def call(self, method, args=None, version='1.0', context=CONTEXT):
        return self.bus.call(context, version, method, args or {})

    def refused(self, kind, *words, **message):
        with self.assertRaises(kind) as caught:
            self.call(**{'method': 'echo', **message})
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertEqual([], self.endpoint.calls)

    def test_a_verb_gets_its_caller_and_arguments(self):
        self.assertEqual({'a': 1}, self.call(
            'echo', {'thing': {'a': 1}, 'words': ['x']}
        ))
        ((caller, thing, count, words),) = self.endpoint.calls
        self.assertEqual(
            Caller('p', 'u', False, 'req-1'), caller
        )
        self.assertEqual(({'a': 1}, 0, ['x']), (thing, count, words))

    def test_only_declared_verbs_can_be_called(self):
        for name in (
            '_hidden', 'plain', 'inherited', '__init__', '__class__',
            'notify', 'events', '', 'no_such', None, 7, ['echo'],
        ):
            with self.subTest(name):
                self.refused(errors.Invalid, 'no verb', method=name)

    def test_a_missing_version_is_the_first(self):
        self.assertEqual({}, self.call('echo', {'thing': {}}, version=None))

    def test_a_future_version_is_unsupported_and_says_ours(self):
        for version in '1.2', '1.99', '2.0', '0.9':
            with self.subTest(version):
                self.refused(
                    errors.Unsupported, version, rpc.VERSION,
                    args={'thing': {}}, version=version,
                )

    def test_a_version_that_is_none_is_refused(self):
        for version in 'one', '1', '1.0.0', 1.0, [1], '1.-1', '1.0\n':
            with self.subTest(version):
                self.refused(
                    errors.Invalid, 'version',
                    args={'thing': {}}, version=version,
                )

    def test_wrong_arguments_are_named(self):
        for word, args in (
            ('needs the argument thing', {}),
            ("no argument 'other'", {'thing': {}, 'other': 1}),
            ("no argument 'self'", {'thing': {}, 'self': 1}),
            ("no argument 'caller'", {'thing': {}, 'caller': 1}),
            ('thing must be a mapping, not text', {'thing': 'x'}),
            ('thing must be a mapping, not null', {'thing': None}),
            ('count must be a whole number', {'thing': {}, 'count': True}),
            ('count must be a whole number', {'thing': {}, 'count': 1.5}),
            ('words must be a list of text or null', {
                'thing': {}, 'words': [1],
            }),
        ):
            with self.subTest(word):
                self.refused(errors.Invalid, word, args=args)

    def test_a_refusal_does_not_repeat_the_value(self):
        with self.assertRaises(errors.Invalid) as caught:
            self.call('echo', {'thing': 'auth_password=sesame'})
        self.assertNotIn('sesame', str(caught.exception))

    def test_what_is_no_json_is_refused(self):
        for bad in {'thing': {'x': float('nan')}}, {'thing': {'x': {1}}}:
            with self.subTest(bad):
                self.refused(errors.Invalid, 'no JSON', args=bad)

    def test_a_huge_message_is_refused(self):
        self.refused(
            errors.Invalid, 'bytes',
            args={'thing': {'x': 'y' * rpc.MESSAGE_BYTES_MAX}},
        )

    def test_args_that_are_no_mapping_are_refused(self):
        dispatcher = rpc.Dispatcher(self.endpoint)
        for args in None, [], 'x', 7:
            with self.subTest(args), self.assertRaises(errors.Invalid):
                dispatcher.run(
                    CONTEXT, {'method': 'echo', 'args': args}, waits=True
                )
        for message in None, [], 'x':
            with self.subTest(message), self.assertRaises(errors.Invalid):
                dispatcher.run(CONTEXT, message, waits=True)

    def test_what_a_verb_got_is_a_copy_as_over_a_wire(self):
        sent = {'thing': {'pair': (1, 2)}}
        answer = self.call('echo', sent)
        self.assertEqual({'pair': [1, 2]}, answer)
        answer['pair'].append(3)
        self.assertEqual({'pair': [1, 2]}, self.endpoint.calls[0][1])
        self.assertEqual((1, 2), sent['thing']['pair'])

    def test_a_malformed_context_is_refused(self):
        for change in (
            {'project_id': ''}, {'project_id': None}, {'project_id': 7},
            {'user_id': 'x' * 256}, {'user_id': 'a\nb'},
            {'is_admin': 'yes'}, {'is_admin': 1},
            {'request_id': 'a b'}, {'request_id': 'x\ny'},
            {'request_id': 'r' * 65}, {'request_id': 5},
        ):
            with self.subTest(change):
                self.refused(
                    errors.Invalid, 'context', args={'thing': {}},
                    context={**CONTEXT, **change},
                )
        for context in None, [], 'x':
            with self.subTest(context):
                self.refused(
                    errors.Invalid, 'context', args={'thing': {}},
                    context=context,
                )

    def test_other_fields_of_a_context_are_left_alone(self):
        self.call('echo', {'thing': {}}, context={
            **CONTEXT, 'roles': ['member'], 'tenant': 'p',
        })
        self.assertEqual(1, len(self.endpoint.calls))

    def test_an_administrator_may_have_no_project(self):
        self.call('echo', {'thing': {}}, context={'is_admin': True})
        self.assertTrue(self.endpoint.calls[0][0].is_admin)

    def test_each_kind_of_error_comes_back_as_itself(self):
        for kind in errors.KINDS.values():
            self.endpoint.failure = kind('why')
            with self.subTest(kind), self.assertRaises(kind) as caught:
                self.call('fail', {'volume_id': 'v'})
            self.assertIs(kind, type(caught.exception))
            self.assertEqual('why', str(caught.exception))

    def test_an_inner_error_comes_back_as_the_kind_it_is(self):
        self.endpoint.failure = LeaseTaken('held')
        with self.assertRaises(errors.Busy) as caught:
            self.call('fail', {'volume_id': 'v'})
        self.assertIs(errors.Busy, type(caught.exception))

    def test_a_bug_is_unknown_and_its_words_stay_in_the_log(self):
        self.endpoint.failure = KeyError('inner words')
        with self.assertLogs('volume.rpc', 'ERROR') as logged:
            with self.assertRaises(errors.Unknown) as caught:
                self.call('fail', {'volume_id': 'v'})
        self.assertIn('req-1', str(caught.exception))
        self.assertNotIn('inner words', str(caught.exception))
        self.assertIn('inner words', '\n'.join(logged.output))

    def test_a_failed_cast_is_told_and_a_failed_call_raises_only(self):
        self.endpoint.failure = errors.Conflict('why')
        with self.assertRaises(errors.Conflict):
            self.call('fail', {'volume_id': 'v'})
        self.assertEqual([], self.endpoint.events)
        with self.assertLogs('volume.rpc', 'WARNING') as logged:
            self.bus.cast(CONTEXT, '1.0', 'fail', {'volume_id': 'v'})
        self.assertIn('Conflict: why', '\n'.join(logged.output))
        ((event, payload),) = self.endpoint.events
        self.assertEqual('thing.fail.error', event)
        self.assertEqual(
            ('v', 'Conflict', 'why', 'p', 'req-1'),
            tuple(payload[name] for name in (
                'volume_id', 'error_kind', 'reason', 'tenant_id',
                'request_id',
            )),
        )


class Surface(unittest.TestCase):
    """The names and arguments of the door are a promise."""

    def setUp(self):
        self.verbs = verbs_of(VolumeManager(core=None))

    def test_the_historical_verbs_have_their_arguments_in_order(self):
        for name, words in HISTORICAL.items():
            known = words.split()
            with self.subTest(name):
                found = self.verbs[name]
                self.assertEqual('1.0', found.since)
                self.assertEqual(known, list(found.parameters)[:len(known)])
        for name in HERS.split():
            self.assertEqual(['volume_id'], [*self.verbs[name].parameters])

    def test_what_came_later_has_a_default(self):
        for name, words in HISTORICAL.items():
            for each in list(self.verbs[name].parameters.values())[
                len(words.split()):
            ]:
                with self.subTest(f'{name}.{each.name}'):
                    self.assertIsNot(each.empty, each.default)

    def test_the_page_names_every_verb_and_argument(self):
        page = PAGE.read_text()
        for name, found in self.verbs.items():
            entry = page.partition(f'* - ``{name}``')[2].partition('* - ``')
            with self.subTest(name):
                self.assertEqual([], [
                    each for each in found.parameters
                    if f'``{each}``' not in entry[0]
                ])

    def test_the_client_has_every_verb_and_sends_what_it_takes(self):
        bus = Recorder()
        client = VolumeAPI(bus)
        for name, found in self.verbs.items():
            method = getattr(client, name)
            for is_full in False, True:
                with self.subTest(name, full=is_full):
                    method(CALLER, **arguments(method, is_full))
                    _, context, version, sent, args = bus.sent.pop()
                    self.assertEqual(name, sent)
                    found.check(rpc.wire(args))
                    self.assertLessEqual(found.since, version)
                    self.assertEqual(CALLER, rpc.caller_of(context))

    def test_the_client_sends_the_oldest_version_that_will_do(self):
        bus = Recorder()
        client = VolumeAPI(bus)
        client.create_volume(CALLER, 'v', 's', confirm=False)
        client.create_volume(CALLER, 'v', confirm=False, size=1)
        client.create_volume(CALLER, 'v', size=1)
        client.terminate_connection(CALLER, 'v', {})
        client.terminate_connection(CALLER, 'v', {}, force=True)
        self.assertEqual(
            [
                ('cast', '1.0'), ('cast', '1.1'), ('call', '1.1'),
                ('call', '1.0'), ('call', '1.1'),
            ],
            [(how, version) for how, _, version, *_ in bus.sent],
        )

    def test_the_client_takes_other_services_contexts(self):
        class RequestContext:
            project_id, user_id, is_admin = 'p', 'u', None
            request_id = 'req-7'

        for caller in RequestContext(), vars(RequestContext):
            bus = Recorder()
            VolumeAPI(bus).get_volume(caller, 'v')
            self.assertEqual(
                Caller('p', 'u', False, 'req-7'),
                rpc.caller_of(bus.sent[0][1]),
            )
        with self.assertRaises(errors.Invalid):
            VolumeAPI(Recorder()).get_volume(object(), 'v')


class Refusing(socketserver.StreamRequestHandler):
    """A broker that does not know its client, as one newly set up."""

    def handle(self):
        if self.rfile.read(8) != b'AMQP\0\0\x09\x01':
            return
        self.say(10, b'\0\x09' + bytes(4) + text('AMQPLAIN') + text('en_US'))
        _, _, length = struct.unpack('>BHI', self.rfile.read(7))
        self.rfile.read(length + 1)
        self.server.refused.release()
        self.say(50, struct.pack('>HB4x', 403, 0))
        self.rfile.read()

    def say(self, method, arguments):
        payload = struct.pack('>HH', 10, method) + arguments
        self.wfile.write(
            struct.pack('>BHI', 1, 0, len(payload)) + payload + b'\xce'
        )


def text(words):
    return struct.pack('>I', len(words)) + words.encode()


class Consuming(unittest.TestCase):
    def test_a_broker_that_refuses_us_is_asked_again(self):
        logger = logging.getLogger('oslo.messaging')
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        broker = socketserver.ThreadingTCPServer(('127.0.0.1', 0), Refusing)
        broker.daemon_threads = True
        broker.refused = threading.Semaphore(0)
        self.addCleanup(broker.server_close)
        threading.Thread(target=broker.serve_forever, daemon=True).start()
        self.addCleanup(broker.shutdown)
        conf = options.load([], [])
        rpc.register_opts(conf)
        host, port = broker.server_address
        conf.set_override('transport_url', f'rabbit://u:p@{host}:{port}/')
        server = rpc.Server(conf, Inner(), 'h')
        server.retry_s = 0.01
        server.start()
        # It ends while a broker answers; afterwards it would never end.
        self.addCleanup(server._thread.join, WAIT_S)
        self.addCleanup(server.stop)
        for _ in range(3):
            self.assertTrue(broker.refused.acquire(timeout=WAIT_S))


class Recorder:
    """A bus that goes nowhere."""

    def __init__(self):
        self.sent = []

    def call(self, *message):
        self.sent.append(('call', *message[:4]))

    def cast(self, *message):
        self.sent.append(('cast', *message[:4]))


def arguments(method, is_full):
    """Return arguments for each parameter, or for those without default."""
    samples = {
        'connector': {'host': 'h'}, 'metadata': {'a': 'b'}, 'size': 1,
        'image': {'url': 'file:///x'}, 'tags': {'x', 'y'}, 'new_size': 2,
        'reservations': [], 'size_bytes': GIB, 'new_size_bytes': GIB,
        'multiattach': True, 'force': True, 'cascade': True,
    }
    skip = {'caller', 'host', 'confirm'}
    return {
        name: samples.get(name, 'text')
        for name, each in inspect.signature(method).parameters.items()
        if name not in skip and (is_full or each.default is each.empty)
    }
