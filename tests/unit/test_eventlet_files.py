# SPDX-License-Identifier: Apache-2.0
"""Under eventlet no file of a pool or an image is touched among greenthreads.

Its file system may hang, as that of a server that is gone does; then one
volume waits, and not the whole service.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest

# Says each touch of a file under the root that was not in a native thread.
WATCH = """
import os, sys, traceback
from volume import concurrency
concurrency.start('eventlet')
native = concurrency.native()
root, green, is_on = sys.argv[1], native.get_ident(), [False]
readlink = os.readlink

def look(what, path):
    if not is_on[0] or native.get_ident() != green:
        return
    is_on[0] = False
    if isinstance(path, int):
        try:
            path = readlink(f'/proc/self/fd/{path}')
        except OSError:
            path = ''
    if str(path).startswith(root + '/pool'):
        print(what, path, *traceback.format_list(
            traceback.extract_stack()[-8:-1]))
    is_on[0] = True

def watch(name):
    real = getattr(os, name)
    def watched(path, *words, **options):
        look(name, path)
        return real(path, *words, **options)
    setattr(os, name, watched)

for name in 'stat', 'lstat', 'readlink', 'close', 'fstat', 'lseek':
    watch(name)
sys.addaudithook(lambda event, args: event in (
    'open', 'os.listdir', 'os.scandir', 'os.link', 'os.rename', 'os.remove',
    'os.utime', 'fcntl.flock', 'fcntl.fcntl', 'fcntl.ioctl',
) and look(event, args[0]))

from volume import ids, model
from volume.blockd import Blockd
from volume.node import Node
from volume.testing import fixtures

MIB = 1 << 20
node = Node(f'{root}/s')

def volume(driver, make):
    made = model.Volume(ids.new(), 'pool', 4 * MIB)
    return model.Volume(made.id, 'pool', 4 * MIB, make(made))
"""

DRIVER = """
from volume.exports.base import Export
from volume.exports.local import LocalExporter
from volume.exports.nbd import NbdExporter
from volume.drivers.{name} import {Name}Driver as Driver

node.blockd = Blockd(node, f'{{root}}/s/blockd')
driver = Driver(
    fixtures.settings(Driver, directories=[f'{{root}}/pool']), node)
is_on[0] = True
driver.check()
first = volume(driver, driver.create)
with driver.writer(first) as writer:
    writer.write(b'a' * MIB)
    writer.commit()
with driver.reader(first) as reader:
    reader.read(MIB)
if '{name}' == 'qcow':
    moment = model.Snapshot(ids.new(), first, 4 * MIB)
    driver.snapshot(moment)
    clone = volume(driver, lambda made: driver.clone(moment, made))
    with driver.reader(clone) as reader:
        reader.read(MIB)
    driver.delete(clone)
    driver.delete_snapshot(moment)
    while driver.upkeep('pool'):
        pass
driver.resize(first, 8 * MIB)
device = driver.map(first, model.Access.WRITE)
for exporter in LocalExporter(None, node), NbdExporter(None, node):
    wanted = Export(ids.new(), first.id, (
        driver.blocknode(first) if isinstance(exporter, NbdExporter)
        else device
    ), model.Host('h'), model.Access.WRITE, 8 * MIB)
    exporter.check()
    exporter.export(wanted)
    exporter.unexport(wanted.attachment_id)
driver.unmap(first)
driver.describe(first, {{'a': 'b'}})
is_on[0] = False  # what is not ours is made as somebody else does it
driver.node.run('qemu-img', 'create', '-f', '{format}',
                f'{{root}}/pool/odd', '1M')
is_on[0] = True
print(len(list(driver.scan('pool'))))
second = volume(driver, lambda made: driver.adopt('odd', made))
driver.inspect(second)
driver.pools()
driver.delete(second)
driver.delete(first)
is_on[0] = False
node.blockd.stop()
"""

IMAGES = """
import types
from volume.transfer import copy
from volume.transfer.file import FileSource

source = FileSource(types.SimpleNamespace(
    image_allowed_directories=[f'{root}/pool'],
    image_upload_directories=[f'{root}/pool'],
), node)
url = f'file://{root}/pool/image'
is_on[0] = True
with source.put(url) as file:
    file.write(b'a' * MIB)
with source.open(source.stat(url)) as image:
    print(len(image.read(MIB)))
    copy.digest_of(image, MIB, 'sha256')
is_on[0] = False
"""


class Files(unittest.TestCase):
    def says(self, script):
        root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, root, ignore_errors=True)
        os.mkdir(f'{root}/pool')
        done = subprocess.run(
            [sys.executable, '-c', WATCH + script, root],
            capture_output=True, text=True, timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        return done.stdout

    def test_of_a_pool_of_files(self):
        self.assertEqual('2\n', self.says(DRIVER.format(
            name='file', Name='File', format='raw',
        )))

    def test_of_a_pool_of_layers(self):
        self.assertEqual('2\n', self.says(DRIVER.format(
            name='qcow', Name='Qcow', format='qcow2',
        )))

    def test_of_images(self):
        self.assertEqual(f'{1 << 20}\n', self.says(IMAGES))
