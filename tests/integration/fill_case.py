# SPDX-License-Identifier: Apache-2.0
"""A pool, a place for images, a server: what tests of filling stand on."""

from __future__ import annotations

import logging
import os
import shutil
import types
import unittest
from typing import Any

from tests import images
from tests.webserver import Web
from volume import ids
from volume import model
from volume.drivers import base
from volume.drivers.file import FileDriver
from volume.flows import fill
from volume.node import Node
from volume.testing import fixtures
from volume.transfer.base import Source
from volume.transfer.file import FileSource
from volume.transfer.http import HttpSource

SIZE = images.VIRTUAL
SPARE = 3 * images.MIB


def setUpModule() -> None:
    inspectors = logging.getLogger('oslo_utils.imageutils.format_inspector')
    unittest.addModuleCleanup(inspectors.setLevel, inspectors.level)
    inspectors.setLevel(logging.CRITICAL)  # it tells of each refusal


class Remote(base.Driver):
    """A driver with its eight methods and nothing that QEMU could open."""

    def __init__(self, conf: Any, node: Node) -> None:
        self.inner = FileDriver(conf, node)
        for name in ('check', 'pools', 'create', 'delete', 'inspect', 'scan',
                     'reader', 'writer'):
            setattr(self, name, getattr(self.inner, name))

    check = pools = create = delete = inspect = scan = None  # type: ignore
    reader = writer = None  # type: ignore


class Case(unittest.TestCase):
    """A pool, a place for images, a server, and both sources."""

    def setUp(self) -> None:
        if shutil.which('qemu-img') is None:
            self.skipTest('qemu-img is not installed')
        self.node = fixtures.make_node(self)
        root = self.node.state_dir
        self.pool, self.images, self.spool = (
            os.path.join(root, name) for name in ('pool', 'images', 'spool')
        )
        os.mkdir(self.pool)
        os.mkdir(self.images)
        self.section = types.SimpleNamespace(directories=[self.pool])
        self.settings = types.SimpleNamespace(
            image_allowed_directories=[self.images],
            image_upload_directories=[self.images],
            image_allowed_networks=['127.0.0.0/8'],
            image_http_timeout_s=10.0,
            image_http_attempts=3,
            image_redirects_max=3,
            image_size_bytes_max=1 << 40,
            image_ca_file='',
        )
        self.driver = self.make_driver(self.node)
        self.file = FileSource(self.settings, self.node)
        self.http = HttpSource(self.settings, self.node)
        self.data = images.disk(SIZE)

    def make_driver(
        self, node: Node, kind: type[base.Driver] = FileDriver
    ) -> base.Driver:
        driver = kind(self.section, node)
        driver.check()
        return driver

    def volume(
        self, size: int = SIZE + SPARE, dirt: bytes = b''
    ) -> model.Volume:
        volume = model.Volume(ids.new(), 'pool', size)
        self.driver.create(volume)
        if dirt:
            with open(self.path(volume), 'r+b') as f:
                f.write(dirt * size)
        return volume

    def path(self, volume: model.Volume) -> str:
        return os.path.join(self.pool, f'{volume.id}.raw')

    def bytes_of(self, volume: model.Volume) -> bytes:
        with open(self.path(volume), 'rb') as f:
            return f.read()

    def image(self, kind: str, name: str = '') -> str:
        """Make a good image; return its path."""
        path = os.path.join(self.images, name or f'i.{kind}')
        return images.make(kind, path, self.data)

    def fill(
        self, volume: model.Volume, source: Source, url: str, **more: Any
    ) -> fill.Filled:
        ways = {
            'spool_directory': self.spool, 'token': 'job.1',
            'node': self.node, 'driver': self.driver, **more,
        }
        return fill.fill_from_image(
            ways.pop('driver'), volume, source, url, **ways
        )

    def upload(
        self, volume: model.Volume, name: str, image_format: str, **more: Any
    ) -> Any:
        ways = {
            'spool_directory': self.spool, 'token': 'job.1',
            'node': self.node, 'driver': self.driver, **more,
        }
        return fill.upload(
            ways.pop('driver'), volume, self.file,
            f'file://{self.images}/{name}', format=image_format, **ways,
        )

    def assert_filled(self, volume: model.Volume) -> None:
        tail = bytes(volume.size_bytes - SIZE)
        self.assertTrue(
            self.bytes_of(volume) == self.data + tail, 'other bytes'
        )
        self.assert_no_spool()

    def assert_no_spool(self) -> None:
        if os.path.exists(self.spool):
            self.assertEqual([], os.listdir(self.spool))

    def both(self, path: str) -> list[tuple[Source, str]]:
        """Return an image as both sources have it."""
        with open(path, 'rb') as f:
            data = f.read()
        name = '/' + os.path.basename(path)
        return [(self.file, f'file://{path}'),
                (self.http, self.web.put(name, data))]

    @property
    def web(self) -> Web:
        if not hasattr(self, '_web'):
            self._web = Web(self)
        return self._web
