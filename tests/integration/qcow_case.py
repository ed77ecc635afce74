# SPDX-License-Identifier: Apache-2.0
"""What the tests of the qcow driver share: a pool, and QEMU's own eyes."""

import json
import os
import subprocess
import tempfile
import unittest

from volume import errors
from volume import ids
from volume import model
from volume.drivers import qcow
from volume.node import Node
from volume.testing import fixtures

CLUSTER = 65536
MIB = model.MIB


class HookedNode(Node):
    """A node that does something else right after one act."""

    hook = ('', None)

    def act(self, what, effect):
        done = super().act(what, effect)
        words, deed = self.hook
        if deed and what.startswith(words):
            self.hook = ('', None)
            deed()
        return done


class QcowCase(unittest.TestCase):

    has_daemon = False
    options = {}

    def setUp(self):
        super().setUp()
        self.node = HookedNode(fixtures.state_dir(self))
        if self.has_daemon:
            fixtures.serve_blocks(self, self.node)
        self.directory = fixtures.directory(self)
        self.pool = os.path.basename(self.directory)
        self.driver = self.make_driver(**self.options)

    def make_driver(self, **options):
        options = {'merge_bytes_per_s': 0, **options}
        conf = fixtures.settings(
            qcow.QcowDriver, directories=[self.directory], **options
        )
        driver = qcow.QcowDriver(conf, self.node)
        driver.check()
        return driver

    # Things.

    def wish(self, size_bytes=MIB):
        return model.Volume(ids.new(), self.pool, size_bytes)

    def volume(self, fill=0, size_bytes=MIB):
        volume = self.wish(size_bytes)
        self.driver.create(volume)
        if fill:
            self.write(volume, fill, 0, size_bytes)
        return volume

    def snapshot(self, volume):
        size_bytes = self.driver.inspect(volume).size_bytes
        snapshot = model.Snapshot(ids.new(), volume, size_bytes)
        self.driver.snapshot(snapshot)
        return snapshot

    def clone(self, source, size_bytes=MIB):
        volume = self.wish(size_bytes)
        self.driver.clone(source, volume)
        return volume

    def tend(self):
        while self.driver.upkeep(self.pool):
            pass

    # Bytes, by QEMU's own tools.

    def write(self, volume, fill, offset, length):
        words = f'write -P {fill} {offset} {length}'
        self.qemu_io(words, self.json(volume))

    def json(self, source, is_read_only=False):
        node = dict(self.driver.blocknode(source))
        if is_read_only:
            node['read-only'] = True
            node['file'] = {**node['file'], 'read-only': True}
        return 'json:' + json.dumps(node)

    def qemu_io(self, words, *target):
        done = self.qemu('qemu-io', '-c', words, '-c', 'flush', *target)
        self.assertNotIn(b'failed', done.stdout, words)

    def content(self, source):
        return self.converted(self.json(source, True))

    def converted(self, *source):
        with tempfile.NamedTemporaryFile() as target:
            self.qemu('qemu-img', 'convert', '-O', 'raw', *source,
                      target.name)
            return target.read()

    def qemu(self, *argv):
        done = subprocess.run(argv, capture_output=True, timeout=60)
        self.assertEqual(0, done.returncode, done.stderr)
        return done

    def assert_holds(self, source, *runs):
        """Fail unless it is runs of ``(byte, length)``, and nothing more."""
        wanted = b''.join(bytes([fill]) * length for fill, length in runs)
        found = self.content(source)
        self.assertEqual(len(wanted), len(found))
        if wanted != found:
            at = next(i for i, b in enumerate(wanted) if found[i] != b)
            self.fail(f'byte {at} is {found[at]}, not {wanted[at]}')

    # Files.

    def path(self, *parts):
        return os.path.join(self.directory, *parts)

    def layers(self):
        return sorted(os.listdir(self.path('layers')))

    def layer(self, source):
        """Return the path of what a volume or snapshot stands on."""
        if isinstance(source, model.Volume):
            pointer = self.path('volumes', source.id)
        else:
            pointer = self.path(
                'snapshots', f'{source.volume.id}@{source.id}'
            )
        return os.path.realpath(pointer)

    def depth(self, source):
        node, count = self.driver.blocknode(source), 0
        while node:
            node, count = node['backing'], count + 1
        return count

    def hidden_bytes(self):
        pool, = self.driver.pools()
        return pool.hidden_bytes

    def assert_busy(self, *calls):
        for call in calls:
            self.assertRaises(errors.Busy, call)
