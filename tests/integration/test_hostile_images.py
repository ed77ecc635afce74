# SPDX-License-Identifier: Apache-2.0
"""Hostile images and servers, met by the whole service.

What the layers below refuse is shown in ``test_fill`` and ``test_sources``;
here it is what a caller sees: a volume in error that says why, no bytes, no
claim, and a service that serves on.
"""

import logging
import os
import resource
import socket
import unittest

from tests import bombs
from tests import images
from tests.integration import hostile_case
from tests.integration import serving
from tests.webserver import Web
from volume import errors
from volume import ids
from volume import rpc
from volume.manager import VolumeManager
from volume.node import Node
from volume.testing import fixtures
from volume.transfer import convert

MIB = 1 << 20
SIZE = images.VIRTUAL
GROWTH_BYTES_MAX = 96 << 20
CONTEXT = {'project_id': 'default', 'user_id': 'default', 'is_admin': False}
SETTINGS = """
image_allowed_networks = 127.0.0.1/32
image_http_timeout_s = 3
image_http_attempts = 2
image_redirects_max = 3
job_retry_s = 0.5
sweep_interval_s = 0.1
"""
CHOSEN = (
    'qcow2 with a backing file', 'qcow2 with a data file',
    'qcow2 declared raw', 'vmdk with a foreign flat extent',
    'vmdk with a parent', 'differencing vhd', 'luks', 'nothing',
    'vmdk descriptor declared raw', 'qcow2 of absurd size',
    'vhd whose table points beyond its end',
)


class Images(unittest.TestCase):
    """One service with a file backend and a qcow backend, for all tests."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        inspectors = logging.getLogger(
            'oslo_utils.imageutils.format_inspector')
        cls.addClassCleanup(inspectors.setLevel, inspectors.level)
        inspectors.setLevel(logging.CRITICAL)  # it tells of each refusal
        cls.world = serving.World(
            _Adds(cls), names='fast, layers', settings=SETTINGS,
            sections='[layers]\ndriver = qcow\ndirectories = '
            f'{fixtures.directory(_Adds(cls))}\ncapacity_gib = 8\n',
        )
        cls.addClassCleanup(cls.world.service.node.blockd.stop)
        cls.addClassCleanup(cls.world.service.stop)
        bus = rpc.Local(VolumeManager(cls.world.core))
        cls.addClassCleanup(bus.close)
        cls.bus = bus
        cls.web = Web(_Adds(cls))

    def image(self, data, name='image'):
        path = os.path.join(self.world.images, name)
        with open(path, 'wb') as f:
            f.write(data)
        return f'file://{path}'

    def refused(self, url, words, **wish):
        """Ask by both doors for what cannot be; it is said, and nothing
        is stored.
        """
        hostile_case.quiet(self.world.core)
        before, files = self.promised(), self.files()
        hints = {
            hint: wish.pop(key) for key, hint in (
                ('format', 'image_format'), ('checksum', 'image_checksum'),
            ) if key in wish
        }
        wish = {'size_bytes': SIZE, 'volume_type': 'fast', **wish}
        asked = self.world.ask('POST', '/v3/volumes', {
            'volume': {'imageRef': url, **wish},
            'OS-SCH-HNT:scheduler_hints': hints,
        })
        self.assertEqual(202, asked.status, asked.text)
        by_rest, by_rpc = asked.json['volume']['id'], ids.new()
        self.bus.cast(CONTEXT, '1.0', 'create_volume', {
            'volume_id': by_rpc, **wish, 'image': {
                'url': url,
                **{key.removeprefix('image_'): value
                   for key, value in hints.items()},
            },
        })
        for volume_id in by_rest, by_rpc:
            row = self.world.settled(volume_id)
            self.assertEqual('error', row['status'])
            self.assertRegex(row['reason'], words)
            self.assertLess(len(row['reason']), 1000)
        hostile_case.quiet(self.world.core)
        self.assertEqual(files, self.files())
        self.assertEqual(before, self.promised())
        for volume_id in by_rest, by_rpc:
            self.world.ask('DELETE', f'/v3/volumes/{volume_id}')
            self.world.gone(volume_id)

    def promised(self):
        kept = hostile_case.kept(self.world.core)
        return kept['pools'], kept['devices']

    def files(self):
        """Return what lies in the pools; no image, and no draft."""
        found = hostile_case.files(self.world.pool)
        spool = os.path.join(self.world.directory, 'state', 'spool')
        return found | hostile_case.files(spool)

    def test_no_hostile_image_becomes_a_volume(self):
        for name in CHOSEN:
            declared, make, words = images.HOSTILE[name]
            url = self.image(make())
            how = {'format': declared} if declared else {}
            with self.subTest(name):
                self.refused(url, words or 'refused', **how)
                self.refused(
                    self.web.put('/i', make()), words or 'refused', **how)

    def test_an_image_that_does_not_fit_or_is_cut_off_is_said_to(self):
        data = images.disk(SIZE)
        path = images.make(
            'qcow2', os.path.join(self.world.images, 'q'), data)
        with open(path, 'rb') as f:
            whole = f.read()
        cut = whole[:len(whole) * 3 // 4]
        for url in f'file://{path}', self.web.put('/q', whole):
            self.refused(url, '1 GiB or more', size_bytes=SIZE - 512)
        for url in self.image(cut, 'cut'), self.web.put('/cut', cut):
            self.refused(url, 'damaged or cut off')
        for url in self.image(data, 'raw'), self.web.put('/raw', data):
            self.refused(
                url, 'sha256 is', format='raw',
                checksum='sha256:' + '0' * 64,
            )

    def test_servers_that_misbehave_are_told_apart(self):
        data = images.disk(SIZE)
        inner = Web(self)
        inner.put('/i', data)
        for words, page in (
            ('404|not found|could not be found', {'status': 404}),
            ('403|forbidden|refuse', {'status': 403}),
            ('over 3 times', {'redirect': '/p'}),
            ('not at a public', {
                'redirect': f'http://[::ffff:127.0.0.2]:{inner.port}/i'}),
            ('not at a public', {
                'redirect': f'http://localhost.:{inner.port}/i'}
             if self.has_two_addresses() else {
                'redirect': f'http://127.0.0.2:{inner.port}/i'}),
            ('not at a public', {
                'redirect': 'http://169.254.169.254/latest/meta-data'}),
            ('malformed', {'redirect': 'file:///etc/passwd'}),
            ('next to nothing', {'data': data, 'stalls_after': 1000}),
            ('lost|cannot go on', {
                'data': data, 'claims': len(data) + 1, 'ranges': False}),
            ('how large', {'data': data, 'chunked': True, 'ranges': False}),
            ('encoding', {'data': data, 'encoding': 'gzip'}),
        ):
            url = self.web.put('/p', **{'data': b'', **page})
            with self.subTest(words, page=str(page)[:60]):
                self.refused(url, words, size_bytes=2 * SIZE)
        self.assertEqual([], inner.log)

    def has_two_addresses(self):
        # Where the name is also ::1, of which no network is allowed.
        found = socket.getaddrinfo('localhost', 80)
        return len({entry[4][0] for entry in found}) > 1

    def test_what_changes_on_the_way_is_no_success(self):
        data = images.disk(SIZE)

        def change(page, sent):
            if sent:
                page.etag, page.data = f'"{sent}"', page.data[::-1]

        for kind in {}, {'drops': [MIB]}:
            url = self.web.put('/c', data, **kind)
            self.web.pages['/c'].before = change
            with self.subTest(kind):
                self.refused(url, 'changed|was looked at', format='raw')

    def test_an_address_that_policy_forbids_is_never_dialled(self):
        port = self.web.port
        asked = len(self.web.log)
        for host in (
            '127.0.0.2', '2130706434', '0x7f000002', '0177.0.0.2', '127.2',
            '[::1]', '[::]', '[::ffff:7f00:2]', '0', '0.0.0.0',
        ):
            with self.subTest(host):
                self.refused(
                    f'http://{host}:{port}/i', 'not at a public|resolved')
        for url in (
            'file:///etc/passwd', f'file://{self.world.images}/../x',
            'file:///proc/self/environ', f'file://{self.world.pool}/x.raw',
        ):
            with self.subTest(url):
                self.refused(url, 'image_allowed_directories')
        self.assertEqual(asked, len(self.web.log))

    def test_a_guests_header_never_names_a_format(self):
        """A guest writes what looks like a qcow2 over its raw disk."""
        trap = images.qcow2(backing=images.PASSWD).ljust(SIZE, b'\0')
        made = self.world.make(
            size=None, size_bytes=SIZE, volume_type='fast')['id']
        path = os.path.join(self.world.pool, f'{made}.raw')
        with open(path, 'r+b') as f:
            f.write(trap)
        clone = self.world.make(
            size=None, size_bytes=2 * SIZE, source_volid=made)['id']
        action = f'/v3/volumes/{made}/action'
        self.world.ask('POST', action, {
            'os-extend': {'new_size_bytes': 2 * SIZE}})
        self.world.settled(made)
        other = self.world.make(
            size=None, size_bytes=2 * SIZE, source_volid=clone,
            volume_type='layers')['id']
        for name in made, clone:
            with open(os.path.join(self.world.pool, f'{name}.raw'), 'rb') as f:
                self.assertTrue(f.read() == trap + bytes(SIZE), name)
        out = os.path.join(self.world.images, 'guest.raw')
        self.world.ask('POST', f'/v3/volumes/{other}/action', {
            'os-volume_upload_image': {
                'image_name': f'file://{out}', 'disk_format': 'raw'}})
        self.world.settled(other)
        with open(out, 'rb') as f:
            self.assertTrue(f.read() == trap + bytes(SIZE), 'uploaded')
        # And whoever brings it back as raw is told what it looks like.
        self.refused(
            f'file://{out}', 'its bytes are qcow2', format='raw',
            size_bytes=2 * SIZE)

    def test_a_bomb_is_stopped_and_the_service_serves_on(self):
        before = hostile_case.resident_bytes()
        for make, words in (
            # Where the pool has no such room, that is found out first.
            (bombs.memory, 'memory|free'), (bombs.flood, 'printed over'),
        ):
            path = os.path.join(self.world.images, 'bomb')
            make(path)
            with self.subTest(words):
                self.refused(f'file://{path}', words, size_bytes=64 * MIB)
            self.world.make(size=None, size_bytes=512)
        self.assertLess(
            hostile_case.resident_bytes() - before, GROWTH_BYTES_MAX)
        # No helper came to have more than its limit.
        self.assertLess(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            convert.ADDRESS_BYTES,
        )

    def test_a_bomb_of_memory_or_words_is_refused_once_and_for_all(self):
        """What it is told as is Invalid, which no job tries again."""
        path = os.path.join(self.world.images, 'bomb')
        for make, words in (
            (bombs.memory, 'bytes of memory'), (bombs.flood, 'printed over'),
        ):
            make(path)
            with self.subTest(words):
                with self.assertRaisesRegex(errors.Invalid, words):
                    convert.check(
                        Node(self.world.directory),
                        convert.image_node(path, 'qcow2'), 'qcow2', MIB,
                    )

    def test_a_bomb_of_work_is_stopped_by_its_processor_time(self):
        path = os.path.join(self.world.images, 'bomb')
        bombs.processor(path)
        if os.environ.get('VOLUME_PROOF'):
            self.refused(f'file://{path}', 'more processor time')
            return
        # With a second for the ten that the service gives it.
        with self.assertRaisesRegex(errors.Invalid, 'more processor time'):
            convert.check(
                Node(self.world.directory), convert.image_node(path, 'qcow2'),
                'qcow2', MIB, cpu_s=1,
            )
        self.world.make(size=None, size_bytes=512)


class _Adds:
    """A class that stands for a test, where a fixture wants one."""

    def __init__(self, case):
        self.addCleanup = case.addClassCleanup
