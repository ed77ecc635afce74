# SPDX-License-Identifier: Apache-2.0
"""This node as a source, on a real file system; and sources of others."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sys
import tempfile
import unittest

import stevedore

from tests.integration.source_case import DATA
from tests.integration.source_case import read
from tests.integration.source_case import settings
from volume import errors
from volume.node import Node
from volume.transfer.file import FileSource
from volume.transfer.http import HttpSource
from volume.transfer.sources import Sources


class Files(unittest.TestCase):
    def setUp(self) -> None:
        self.root = os.path.realpath(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)
        self.images = os.path.join(self.root, 'images')
        os.mkdir(self.images)
        self.source = FileSource(
            settings(
                image_allowed_directories=[self.images],
                image_upload_directories=[self.images],
            ),
            Node(self.root),
        )

    def put(self, path: str, data: bytes = DATA) -> str:
        path = os.path.join(self.root, path)
        with open(path, 'wb') as f:
            f.write(data)
        return 'file://' + path

    def test_an_image_in_an_allowed_directory_is_read(self) -> None:
        url = self.put('images/an image.raw').replace(' ', '%20')
        stat = self.source.stat(url)
        self.assertEqual(len(DATA), stat.size_bytes)
        self.assertEqual(self.images + '/an image.raw', stat.path)
        self.assertEqual(DATA, read(self.source, url))
        with self.source.open(stat, len(DATA) - 5) as image:
            self.assertEqual(DATA[-5:], image.read(10))

    def test_nothing_outside_is_read(self) -> None:
        url = self.put('secret')
        self.put('images-not')
        os.symlink(self.root + '/secret', self.images + '/link')
        os.symlink(self.root, self.images + '/up')
        os.symlink('/', self.images + '/top')
        for path in (
            url, f'file://{self.images}/../secret', 'file:///etc/passwd',
            f'file://{self.images}/link', f'file://{self.images}/up/secret',
            f'file://{self.images}/top/etc/passwd',
            f'file://{self.images}/%2e%2e/secret',
            f'file://{self.root}/images-not',
        ):
            with (
                self.subTest(path),
                self.assertRaisesRegex(errors.Invalid, 'allowed_directories'),
            ):
                self.source.stat(path)

    def test_a_link_that_stays_inside_is_followed(self) -> None:
        self.put('images/a')
        os.symlink('a', self.images + '/b')
        self.assertEqual(DATA, read(self.source, f'file://{self.images}/b'))

    def test_without_an_allowed_directory_nothing_is_read(self) -> None:
        url = self.put('images/a')
        source = FileSource(settings(), Node(self.root))
        with self.assertRaises(errors.Invalid):
            source.stat(url)

    def test_what_is_no_regular_file_is_refused(self) -> None:
        os.mkfifo(self.images + '/fifo')
        os.mkdir(self.images + '/directory')
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.images + '/socket')
        for name in ('fifo', 'directory', 'socket'):
            with self.subTest(name), self.assertRaises(errors.VolumeError):
                self.source.stat(f'file://{self.images}/{name}')

    def test_malformed_urls_are_refused(self) -> None:
        self.put('images/a')
        for url in (
            'file://', 'file:a', 'file://host' + self.images + '/a',
            f'file://{self.images}/a?b', f'file://{self.images}/a#b',
            f'file://{self.images}/a%00', f'file://{self.images}/a%0a',
            f'file://{self.images}/', f'file://{self.images}/%ff',
            f'http://{self.images}/a', 'file://[', 'json:{}',
        ):
            with self.subTest(url), self.assertRaises(errors.Invalid):
                self.source.stat(url)

    def test_a_missing_image_is_not_found(self) -> None:
        with self.assertRaises(errors.NotFound):
            self.source.stat(f'file://{self.images}/none')

    def test_an_image_that_changed_is_a_conflict(self) -> None:
        url = self.put('images/a')
        stat = self.source.stat(url)
        os.utime(self.images + '/a', ns=(1, 1))
        with self.assertRaises(errors.Conflict), self.source.open(stat):
            pass
        stat = self.source.stat(url)
        os.unlink(self.images + '/a')
        self.put('images/a')
        with self.assertRaises(errors.Conflict), self.source.open(stat):
            pass

    def test_an_image_appears_whole_when_the_context_ends(self) -> None:
        url = f'file://{self.images}/new'
        with self.source.put(url) as image:
            image.write(DATA)
            self.assertFalse(os.path.exists(self.images + '/new'))
        self.assertEqual(DATA, read(self.source, url))
        self.assertEqual(['new'], os.listdir(self.images))
        self.assertEqual(0o600, os.stat(self.images + '/new').st_mode & 0o777)

    def test_an_image_that_failed_does_not_appear(self) -> None:
        with self.assertRaises(errors.Cancelled):
            with self.source.put(f'file://{self.images}/new') as image:
                image.write(DATA)
                raise errors.Cancelled('enough')
        self.assertEqual([], os.listdir(self.images))

    def test_no_image_is_replaced(self) -> None:
        url = self.put('images/a')
        with self.assertRaises(errors.Conflict), self.source.put(url):
            pass
        with self.assertRaises(errors.Conflict):
            with self.source.put(f'file://{self.images}/b') as image:
                image.write(b'mine')
                self.put('images/b', b'theirs')
        self.assertEqual(DATA, read(self.source, url))
        with open(self.images + '/b', 'rb') as f:
            self.assertEqual(b'theirs', f.read())

    def test_nothing_is_written_outside(self) -> None:
        os.symlink(self.root, self.images + '/up')
        os.symlink(self.root + '/x', self.images + '/.dangling.draft')
        for url in (
            f'file://{self.root}/x', f'file://{self.images}/../x',
            f'file://{self.images}/up/x', f'file://{self.images}/dangling',
        ):
            with self.subTest(url), self.assertRaises(errors.VolumeError):
                with self.source.put(url) as image:
                    image.write(DATA)
            self.assertFalse(os.path.exists(self.root + '/x'))

    def test_two_uploads_to_one_place_do_not_mix(self) -> None:
        url = f'file://{self.images}/new'
        with self.source.put(url) as image:
            image.write(DATA)
            with self.assertRaises(errors.Busy), self.source.put(url):
                pass
        self.assertEqual(DATA, read(self.source, url))

    def test_a_dead_upload_is_taken_over(self) -> None:
        with open(self.images + '/.new.draft', 'wb') as f:
            f.write(b'x' * 5_000_000)
        with self.source.put(f'file://{self.images}/new') as image:
            image.write(DATA)
        self.assertEqual(DATA, read(self.source, f'file://{self.images}/new'))

    def test_a_draft_that_has_become_an_image_is_left_alone(self) -> None:
        self.put('images/.new.draft')
        os.link(self.images + '/.new.draft', self.images + '/kept')
        with self.source.put(f'file://{self.images}/new') as image:
            image.write(b'other')
        with open(self.images + '/kept', 'rb') as f:
            self.assertEqual(DATA, f.read())
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Found(unittest.TestCase):
    def test_a_source_from_another_package_is_found(self) -> None:
        root = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, root)
        info = os.path.join(root, 'stranger-1.dist-info')
        os.mkdir(info)
        for name, text in (
            ('METADATA', 'Metadata-Version: 2.1\nName: stranger\nVersion: 1'),
            ('entry_points.txt',
             '[volume.sources]\nfile = volume.transfer.file:FileSource\n'
             'odd = volume.transfer.http:HttpSource\n'),
        ):
            with open(os.path.join(info, name), 'w') as f:
                f.write(text + '\n')
        sys.path.insert(0, root)
        self.addCleanup(sys.path.remove, root)
        # stevedore remembers what it has found for a process's life.
        known = stevedore.ExtensionManager.ENTRY_POINT_CACHE
        known.clear()
        self.addCleanup(known.clear)
        sources = Sources(settings(), Node('/x'))
        self.assertIsInstance(sources.find('file:///a'), FileSource)
        self.assertIsInstance(sources.find('ODD://a'), HttpSource)
        self.assertIs(sources.find('odd:b'), sources.find('odd:c'))
        for url in ('s3://u:hunter2@b', 'hunter2', ''):
            with (
                self.subTest(url),
                self.assertRaisesRegex(errors.Invalid, 'file, .*odd') as e,
            ):
                sources.find(url)
            self.assertNotIn('hunter2', str(e.exception))
