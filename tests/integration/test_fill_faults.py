# SPDX-License-Identifier: Apache-2.0
"""Images in and out, with a fault at every act.

By default an act gets two of the six faults, in turn: the next act, and the
same one of the next format, get two others. With ``VOLUME_PROOF=1`` each
gets all six.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable

from tests import images
from tests.integration import fill_case
from tests.integration.fill_case import Case
from volume import errors
from volume import model
from volume.drivers import base
from volume.flows import fill
from volume.node import Node
from volume.testing import faults
from volume.transfer import formats
from volume.transfer.base import Source
from volume.transfer.file import FileSource

PROOF = bool(os.environ.get('VOLUME_PROOF'))

setUpModule = fill_case.setUpModule


class Faults(Case):
    """Whatever goes wrong at whichever act, the next try is right."""

    def setUp(self) -> None:
        super().setUp()
        # What a lost reply has opened is closed by nobody.
        self.enterContext(warnings.catch_warnings())
        warnings.simplefilter('ignore', ResourceWarning)

    def runs(
        self, work: Callable[[Node, base.Driver], object],
        prove: Callable[[], object], turn: int,
    ) -> int:
        count = 0
        for nth in itertools.count(1):
            fired = False
            every = [*faults.every(nth)]
            for fault in every if PROOF else every[(nth + turn) % 3::3]:
                node = faults.FaultyNode(self.node.state_dir, None)
                driver = self.make_driver(node)
                node.arm(fault)
                with (
                    self.subTest(fault),
                    contextlib.suppress(faults.Crash, errors.VolumeError),
                ):
                    work(node, driver)
                fired |= node.fired
                with self.subTest(fault):
                    work(self.node, self.driver)
                    prove()
                count += 1
            if not fired:
                return count
        return count

    def test_a_fill_that_failed_anywhere_is_right_the_next_time(self) -> None:
        self.data = images.disk(images.MIB)
        for turn, (kind, is_file) in enumerate((
            ('raw', False), ('qcow2', True), ('qcow2', False),
        )):
            path = self.image(kind)
            source, url = self.both(path)[0 if is_file else 1]
            volume = self.volume(2 * images.MIB, dirt=b'\xee')

            def work(
                node: Node, driver: base.Driver, v: model.Volume = volume,
                s: Source = source, u: str = url,
            ) -> None:
                self.fill(
                    v, type(s)(self.settings, node), u,  # type: ignore
                    node=node, driver=driver)

            def prove(v: model.Volume = volume) -> None:
                expected = self.data + bytes(images.MIB)
                self.assertTrue(self.bytes_of(v) == expected)
                self.assert_no_spool()

            with self.subTest(kind, url=url):
                self.assertGreater(self.runs(work, prove, turn), 20)

    def test_an_upload_that_failed_anywhere_is_there_once(self) -> None:
        self.data = images.disk(images.MIB)
        volume = self.volume(images.MIB)
        with open(self.path(volume), 'r+b') as f:
            f.write(self.data)
        for turn, image_format in enumerate(('raw', 'qcow2', 'vhd')):

            def work(
                node: Node, driver: base.Driver, f: str = image_format
            ) -> None:
                if f == 'vhd':
                    # Not by QEMU: made while the volume is read.
                    driver = fill_case.Remote(self.section, node)
                fill.upload(
                    driver, volume, FileSource(self.settings, node),
                    f'file://{self.images}/up', format=f, node=node,
                    spool_directory=self.spool, token='job.1')

            def prove(f: str = image_format) -> None:
                path = f'{self.images}/up'
                self.assertEqual(['up'], os.listdir(self.images))
                info = formats.inspect(path, f)
                self.assertEqual(images.MIB, info.virtual_size_bytes)
                target = self.volume(images.MIB)
                self.fill(target, self.file, f'file://{path}')
                self.assertTrue(self.bytes_of(target) == self.data)
                self.driver.delete(target)
                os.unlink(path)

            with self.subTest(image_format):
                self.assertGreater(self.runs(work, prove, turn), 20)
