# SPDX-License-Identifier: Apache-2.0
"""A driver from another package: installed, found, and held to the suites."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import volume
from tests import process

SOURCE = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'stranger')
TOP = os.path.dirname(os.path.dirname(volume.__file__))
LIMIT_S = 300


class Stranger(unittest.TestCase):
    """The example of the documentation, copied out of this tree."""

    @classmethod
    def setUpClass(cls):
        for module in 'pip', 'setuptools':
            if importlib.util.find_spec(module) is None:
                raise unittest.SkipTest(f'no {module} to install with')
        cls.root = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.site = os.path.join(cls.root, 'site')
        copy = os.path.join(cls.root, 'copy')
        shutil.copytree(
            SOURCE, copy,
            ignore=shutil.ignore_patterns('__pycache__', '*.egg-info'),
        )
        cls.tests = os.path.join(cls.root, 'tests')
        shutil.move(os.path.join(copy, 'tests'), cls.tests)
        cls.python(
            '-m', 'pip', 'install', '--quiet', '--no-input', '--no-index',
            '--no-deps', '--no-build-isolation', '--no-cache-dir',
            '--disable-pip-version-check', '--target', cls.site, copy,
        )
        shutil.rmtree(copy)

    @classmethod
    def python(cls, *argv):
        """Run Python as one does who has installed the package."""
        done = subprocess.run(
            [sys.executable, *argv], cwd=cls.root, timeout=LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                'PYTHONPATH': os.pathsep.join((cls.site, TOP)),
                'PYTHONDONTWRITEBYTECODE': '1',
            },
        )
        if done.returncode:
            raise AssertionError(f'{argv} failed:\n{done.stdout}')
        return done.stdout

    def test_driver_is_found_by_its_entry_point(self):
        entry, = (
            entry
            for found in importlib.metadata.distributions(path=[self.site])
            for entry in found.entry_points
            if entry.group == 'volume.drivers'
        )
        self.assertEqual('chunks', entry.name)
        self.assertEqual('stranger.chunks:ChunksDriver', entry.value)
        said = self.python(
            '-c', 'import stevedore.driver as d\n'
            'print(d.DriverManager("volume.drivers", "chunks").driver)',
        )
        self.assertIn('stranger.chunks.ChunksDriver', said)

    def test_driver_serves_volumes_by_a_config_section_alone(self):
        service = process.ServiceProcess(
            self, '[b]\ndriver = chunks\nroot = {root}/pool\n',
            path=os.pathsep.join((self.site, TOP)), directories=('images',),
        )
        image = os.path.join(service.root, 'images', 'i.raw')
        content = bytes(1 << 20) + b'x' * (3 << 20)
        with open(image, 'wb') as f:
            f.write(content)
        service.configure(
            '[b]\ndriver = chunks\nroot = {root}/pool\n',
            extra=f'image_allowed_directories = {service.root}/images\n'
            f'image_upload_directories = {service.root}/images',
        )
        service.start()
        first = service.create(
            size_bytes=5 << 20, imageRef=f'file://{image}', name='first'
        )
        self.assertEqual('available', service.wait(
            first, 'available', 'error'
        )['status'])
        second = service.create(size_bytes=5 << 20, source_volid=first)
        service.wait(second, 'available')
        service.action(second, 'os-extend', {'new_size_bytes': 6 << 20})
        service.wait(second, 'available')
        service.kill()
        service.start()
        out = os.path.join(service.root, 'images', 'out.raw')
        service.action(second, 'os-volume_upload_image', {
            'image_name': f'file://{out}', 'disk_format': 'raw',
        })
        service.wait(second, 'available')
        with open(out, 'rb') as f:
            self.assertEqual(content + bytes(2 << 20), f.read())
        for each in first, second:
            service.call('DELETE', f'/volumes/{each}')
            service.wait(each, 'gone')
        found = service.manage('reconcile', '--dry-run')
        self.assertEqual('nothing differs', found.stdout.strip())

    def test_driver_keeps_the_contract_and_survives_every_fault(self):
        said = self.python(
            '-m', 'unittest', 'discover', '-s', self.tests, '-t', self.tests
        )
        self.assertRegex(said, r'Ran \d{2,} tests')
        self.assertRegex(said, r'\nOK')
