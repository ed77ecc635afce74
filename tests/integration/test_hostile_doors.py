# SPDX-License-Identifier: Apache-2.0
"""Wrong requests by REST, by RPC and on the command line.

Each is refused in words that name what is wrong, and leaves rows, claims
and files as they were.
"""

import copy
import logging
import os
import random
import unittest

from tests.integration import commands
from tests.integration import hostile_case
from tests.integration import serving
from volume import errors
from volume import ids
from volume import rpc
from volume.manager import VolumeManager
from volume.rpcverb import verbs_of
from volume.testing import fixtures

MIB = 1 << 20
CONTEXT = {
    'project_id': 'default', 'user_id': 'default', 'is_admin': False,
}
ROUNDS = 2000 if os.environ.get('VOLUME_PROOF') else 6
SIZES = (
    0, -1, '0', '-1', '2Gb', 'one', '', ' ', '1.5', '²', '1e3', True, 1.5,
    2**70, -2**70, '9' * 13, str(2**70), 10**4000, [1], {},
)
NOBODY = ids.new()
# A name, and the word of its refusal; without a word it is kept exactly.
NAMES = (
    ('a\nb', 'control character'), ('a\rb', 'control character'),
    ('\x1b[31mred', 'control character'), ('\x7f', 'control character'),
    ('a\x85b', 'control character'), ('\x9b2J', 'control character'),
    ('x' * 256, '255'), ('x' * 10000, '255'), ('\U0001f4be' * 256, '255'),
    ('a\x00b', 'character'), ('\ud800', 'not valid'),
    ('x' * 255, None), ('\U0001f4be' * 255, None), ("it's", None),
    ('"quoted" `id` $(id) \\', None), ('%s %n {0}', None), ('  two  ', None),
    ("'; DROP TABLE volumes; --", None), ('../../etc/passwd', None),
    ('e\u0301', None), ('\xe9', None), ('\u202eright to left', None),
    ('-rf', None), ('\u65e5\u672c', None), ('NULL', None), ('\\N', None),
)


class Doors(unittest.TestCase):
    """A service, asked by REST and by RPC."""

    def setUp(self):
        self.world = serving.World(
            self, names='fast, layers',
            sections='[layers]\ndriver = qcow\ndirectories = '
            f'{fixtures.directory(self)}\ncapacity_gib = 8\n',
        )
        self.addCleanup(self.world.service.node.blockd.stop)
        self.addCleanup(self.world.service.stop)
        self.core = self.world.core
        bus = rpc.Local(VolumeManager(self.core))
        self.addCleanup(bus.close)
        self.bus = bus

    def call(self, method, **args):
        return self.bus.call(CONTEXT, '1.1', method, args)

    def rest(self, status, body, path='/v3/volumes', hints=None):
        """Ask what must be refused; return the words."""
        if hints is not None:
            body = {**body, 'OS-SCH-HNT:scheduler_hints': hints}
        before = hostile_case.kept(self.core), self.files()
        asked = self.world.ask('POST', path, body)
        self.assertEqual(status, asked.status, f'{body!r:.300} {asked.text}')
        self.assertLess(len(asked.text), 2000)
        hostile_case.quiet(self.core)
        self.assertEqual(before, (
            hostile_case.kept(self.core), self.files()
        ), body)
        return asked.message

    def rpc(self, kind, method, **args):
        """Call what must be refused; return the words."""
        before = hostile_case.kept(self.core), self.files()
        with self.assertRaises(kind) as caught:
            self.call(method, **args)
        self.assertIs(kind, type(caught.exception), caught.exception)
        self.assertLess(len(str(caught.exception)), 2000)
        hostile_case.quiet(self.core)
        self.assertEqual(before, (
            hostile_case.kept(self.core), self.files()
        ), f'{args!r:.300}')
        return str(caught.exception)

    def files(self):
        return hostile_case.files(self.world.pool, self.world.images)

    def make(self, **wish):
        made = self.world.make(size=None, **{'size_bytes': MIB, **wish})
        hostile_case.quiet(self.core)
        return made['id']

    # Sizes.

    def test_a_size_is_a_positive_number_within_reason_by_every_door(self):
        with self.assertNoLogs('volume', logging.ERROR):
            for size in SIZES:
                if size == 10**4000:
                    size = 10**4200  # as long as a number may be in JSON
                for key in 'size', 'size_bytes':
                    with self.subTest(f'{size!r:.40}', key=key):
                        self.assertRegex(
                            self.rest(400, {'volume': {key: size}}),
                            'size|number',
                        )
                        self.assertIn('size', self.rpc(
                            errors.Invalid, 'create_volume',
                            volume_id=ids.new(), **{key: size},
                        ))

    def test_a_volume_grows_only_to_a_size_that_makes_sense(self):
        volume_id = self.make()
        path = f'/v3/volumes/{volume_id}/action'
        for size in SIZES:
            with self.subTest(f'{size!r:.40}'):
                self.rest(400, {'os-extend': {'new_size': size}}, path)
                self.rpc(errors.Invalid, 'extend_volume',
                         volume_id=volume_id, new_size=size)
        self.rest(400, {'os-extend': {'new_size_bytes': 512}}, path)
        self.rpc(errors.Invalid, 'extend_volume', volume_id=volume_id,
                 new_size_bytes=512)

    def test_no_size_is_no_way_to_say_the_sources_size(self):
        source = self.make()
        for size in {'size': 0}, {'size_bytes': 0}:
            self.rest(400, {'volume': {'source_volid': source, **size}})
            self.rpc(errors.Invalid, 'create_volume', volume_id=ids.new(),
                     source_volume_id=source, **size)

    # What is not there.

    def test_what_is_not_there_is_named_by_every_door(self):
        small = {'size_bytes': MIB}
        hint = {'volume': small}
        for key, value, words in (
            ('backend', 'tape', "there is no backend 'tape'"),
            ('tags', ['tape'], '2 without the tags'),
            ('pool', 'lagoon', '2 of another name'),
            ('backend', "x' OR '1'='1", 'there is no backend "x'),
        ):
            with self.subTest(key):
                self.assertIn(
                    words, self.rest(413, hint, hints={key: value})
                )
                self.assertIn(words, self.rpc(
                    errors.NoSpace, 'create_volume', volume_id=ids.new(),
                    refuse=True, **small, **{key: value},
                ))
        for key, over, status in (
            ('snapshot_id', 'snapshot_id', 404),
            ('source_volid', 'source_volume_id', 404),
        ):
            with self.subTest(key):
                self.assertIn(NOBODY, self.rest(
                    status, {'volume': {**small, key: NOBODY}}
                ))
                self.assertIn(NOBODY, self.rpc(
                    errors.NotFound, 'create_volume', volume_id=ids.new(),
                    **small, **{over: NOBODY},
                ))
        self.assertIn('tape', self.rest(
            404, {'volume': {**small, 'volume_type': 'tape'}}
        ))
        self.assertIn('mars', self.rest(
            400, {'volume': {**small, 'availability_zone': 'mars'}}
        ))

    def test_a_volume_that_is_not_there_is_named_by_every_verb(self):
        host = {'host': 'h'}
        for verb, args in (
            ('get_volume', {}), ('reserve_volume', {}),
            ('unreserve_volume', {}), ('begin_detaching', {}),
            ('roll_detaching', {}), ('detach_volume', {}),
            ('extend_volume', {'new_size': 1}),
            ('create_snapshot', {'snapshot_id': ids.new()}),
            ('initialize_connection', {'connector': host}),
            ('terminate_connection', {'connector': host}),
            ('attach_volume', {'instance_uuid': ids.new(),
                               'mountpoint': '/dev/vdb'}),
            ('copy_volume_to_image', {'image_id': 'file:///x'}),
        ):
            with self.subTest(verb):
                self.assertIn(NOBODY, self.rpc(
                    errors.NotFound, verb, volume_id=NOBODY, **args
                ))
        for action in (
            {'os-extend': {'new_size': 1}}, {'os-reserve': None},
            {'os-initialize_connection': {'connector': host}},
            {'os-attach': {'host_name': 'h', 'mountpoint': '/x'}},
        ):
            with self.subTest(action):
                self.assertIn(NOBODY, self.rest(
                    404, action, f'/v3/volumes/{NOBODY}/action'
                ))

    def test_an_image_that_is_not_there_is_an_error_and_stores_nothing(self):
        url = f'file://{self.world.images}/none.raw'
        before = self.files()
        by_rest = self.world.make(size=None, size_bytes=MIB, imageRef=url)
        by_rpc = ids.new()
        self.call('create_volume', volume_id=by_rpc, size_bytes=MIB,
                  image={'url': url})
        for volume_id in by_rest['id'], by_rpc:
            row = self.world.settled(volume_id)
            self.assertEqual('error', row['status'])
            self.assertIn('none.raw', row['reason'])
        self.assertEqual(before, self.files())
        hostile_case.quiet(self.core)
        self.assertEqual(0, hostile_case.kept(self.core)['pools'])

    # Names.

    def test_a_name_is_kept_to_the_letter_or_refused(self):
        for name, words in NAMES:
            wishes = [
                {'name': name}, {'description': name},
                {'metadata': {'k': name}}, {'metadata': {name: 'v'}},
            ]
            if not words:
                wishes = [{
                    'name': name, 'description': name,
                    'metadata': {'k': name, name: 'v'},
                }]
            for wish in wishes:
                wish['size_bytes'] = 512
                with self.subTest(f'{name!r:.40}', key=next(iter(wish))):
                    if words:
                        self.assertIn(
                            words, self.rest(400, {'volume': wish}))
                        self.assertIn(words, self.rpc(
                            errors.Invalid, 'create_volume',
                            volume_id=ids.new(), **wish))
                        continue
                    shown = self.shown_by_both(wish)
                    self.assertEqual(
                        wish, {**shown, 'size_bytes': 512}
                    )

    def shown_by_both(self, wish):
        """Make it by one door; look at it through the other."""
        made = self.make(**wish)
        found = self.call('get_volume', volume_id=made)
        by_rpc = {
            'name': found['display_name'], 'metadata': found['metadata'],
            'description': found['display_description'],
        }
        other = ids.new()
        self.call('create_volume', volume_id=other, **wish)
        by_rest = self.world.settled(other)
        self.assertEqual('available', by_rest['status'])
        for key in set(wish) - {'size_bytes'}:
            self.assertEqual(by_rpc[key], by_rest[key])
        return by_rpc

    def test_a_name_is_found_again_by_its_very_letters(self):
        for name, words in NAMES:
            if words is None and name.strip() == name:
                self.make(name=name, size_bytes=512)
        for name, words in NAMES:
            if words is None and name.strip() == name:
                with self.subTest(name):
                    request = self.world.ask(
                        'GET', '/v3/volumes?name=' + _quoted(name)
                    )
                    self.assertEqual(
                        [name],
                        [each['name'] for each in request.json['volumes']],
                    )

    def test_renaming_and_describing_follow_the_same_rules(self):
        volume_id = self.make()
        path = f'/v3/volumes/{volume_id}'
        for name, words in NAMES:
            asked = self.world.ask('PUT', path, {'volume': {'name': name}})
            again = self.world.ask(
                'POST', f'{path}/metadata', {'metadata': {'k': name}}
            )
            with self.subTest(f'{name!r:.40}'):
                for each in asked, again:
                    self.assertEqual(400 if words else 200, each.status)
                if not words:
                    row = self.world.ask('GET', path).json['volume']
                    self.assertEqual(
                        (name, name), (row['name'], row['metadata']['k'])
                    )

    def test_snapshots_names_follow_the_same_rules(self):
        volume_id = self.make(volume_type='layers')
        for name, words in NAMES[::3]:
            wish = {'name': name, 'metadata': {'k': name}}
            with self.subTest(f'{name!r:.40}'):
                if words:
                    self.rest(400, {'snapshot': {
                        'volume_id': volume_id, **wish}}, '/v3/snapshots')
                    self.rpc(errors.Invalid, 'create_snapshot',
                             volume_id=volume_id, snapshot_id=ids.new(),
                             **wish)
                    continue
                snapshot_id = ids.new()
                self.call('create_snapshot', volume_id=volume_id,
                          snapshot_id=snapshot_id, **wish)
                row = self.world.settled(snapshot_id, 'snapshot')
                self.assertEqual(
                    (name, name), (row['name'], row['metadata']['k'])
                )

    def test_a_host_has_a_name_that_can_be_told(self):
        volume_id = self.make()
        for host in ('', 'a\nb', 'x' * 256, 7, None, ['h']):
            with self.subTest(host):
                self.rest(400, {'os-initialize_connection': {
                    'connector': {'host': host}}},
                    f'/v3/volumes/{volume_id}/action')
                self.rpc(errors.Invalid, 'initialize_connection',
                         volume_id=volume_id, connector={'host': host})

    # Arguments of messages.

    def test_messages_of_chance_are_refused_whole_or_done(self):
        """Missing, extra and mistyped arguments; versions of the future."""
        chance = random.Random(hostile_case.seed(self.id()))
        verbs = verbs_of(VolumeManager(self.core))
        for _ in range(ROUNDS):
            volume_id = self.make()
            for name, verb in verbs.items():
                good = {
                    'volume_id': chance.choice((volume_id, NOBODY)),
                    'snapshot_id': ids.new(), 'size_bytes': 512,
                    'connector': {'host': 'h', 'ip': '192.0.2.1'},
                    'instance_uuid': NOBODY, 'mountpoint': '/dev/vdb',
                    'image_id': 'file:///x', 'new_size': 1, 'job_id': NOBODY,
                }
                args = hostile_case.spoil(chance, {
                    key: value for key, value in good.items()
                    if key in verb.parameters
                })
                if not isinstance(args, dict):
                    args = {'volume_id': args}
                if name == 'create_volume' and args.get(
                    'volume_id') == volume_id:
                    args['volume_id'] = ids.new()
                version = chance.choice(
                    ('1.0', '1.1', '1.1', '1.1', '1.2', '2.0', '', 'x')
                )
                self.send(name, args, version)

    def send(self, name, args, version):
        before = hostile_case.kept(self.core)
        what = f'{name} {version} {args!r:.500}'
        try:
            with self.assertNoLogs('volume', logging.ERROR):
                self.bus.call(CONTEXT, version, name, copy.deepcopy(args))
        except errors.VolumeError as refused:
            hostile_case.quiet(self.core)
            # Unknown is how the door tells of a bug of ours.
            self.assertNotIsInstance(refused, errors.Unknown, what)
            self.assertEqual(before, hostile_case.kept(self.core), what)
        hostile_case.quiet(self.core)

    def test_a_context_of_nonsense_does_nothing(self):
        before = hostile_case.kept(self.core)
        for value in hostile_case.VALUES:
            for context in (
                value, {**CONTEXT, 'project_id': value},
                {**CONTEXT, 'is_admin': value}, {**CONTEXT, 'user_id': value},
                {**CONTEXT, 'request_id': value},
            ):
                with self.subTest(f'{context!r:.80}'):
                    try:
                        self.bus.call(context, '1.0', 'create_volume', {
                            'volume_id': ids.new(), 'size': 0})
                    except errors.VolumeError as refused:
                        self.assertNotIsInstance(refused, errors.Unknown)
        self.assertEqual(before, hostile_case.kept(self.core))


class CommandLine(commands.Cli):
    """The same by the tool that people use."""

    def test_sizes_and_names_are_refused_in_one_line_or_kept(self):
        for size in '0', '-1G', '2Gb', '0G', '1180591620717411303424':
            with self.subTest(size):
                done = commands.run('create', '--size', size, url=self.url)
                self.assertNotIn('Traceback', done.stderr)
                self.assertIn(done.returncode, (1, 2))
                self.assertEqual(1, done.stderr.count('\n'), done.stderr)
        before = hostile_case.kept(self.world.core)
        for name, words in NAMES[:8:3]:
            with self.subTest(name):
                self.assertIn(words, self.refused(
                    'create', '--size', '1M', f'--name={name}'))
        self.assertEqual(before, hostile_case.kept(self.world.core))
        name = 'it\'s "\U0001f4be" -rf $(id)'
        made = self.json('create', '--size', '1M', f'--name={name}')
        self.assertEqual(name, made['name'])
        self.assertEqual(made['id'], self.json('show', name)['id'])

    def test_what_is_not_there_is_named_in_one_line(self):
        for words, told, code in (
            (('show', 'nobody'), 'nobody', 3),
            (('delete', NOBODY), NOBODY, 3),
            (('create', '--size', '1M', '--backend', 'tape'), 'backend', 1),
            (('create', '--size', '1M', '--tag', 'tape'), 'tags', 1),
            (('create', '--snapshot', 'none'), 'none', 3),
        ):
            with self.subTest(words):
                self.assertIn(told, self.refused(*words, code=code))
        url = f'file://{self.world.images}/none.raw'
        self.assertIn('none.raw', self.refused(
            'create', '--size', '1M', '--image', url, '--image-format', 'raw'
        ))


def _quoted(text):
    return ''.join(f'%{byte:02x}' for byte in text.encode())
