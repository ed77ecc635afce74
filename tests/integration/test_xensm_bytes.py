# SPDX-License-Identifier: Apache-2.0
"""Bytes between a volume and the pool: by which way, how many, with whom."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import ssl
import unittest
from typing import Any

from tests import xapi
from tests import xensm
from volume import errors
from volume import ids
from volume import model
from volume.flows import fill
from volume.testing import fixtures
from volume.testing import workbench
from volume.testing.workbench import pattern
from volume.transfer.file import FileSource
from volume.xenapi.link import Link
from volume.xenapi.options import read
from volume.xenapi.options import Settings

MIB = model.MIB
SIZE = 4 * MIB


class CountingLink(Link):
    """A link whose connections count what goes over them."""

    sent_bytes = 0

    def open_http(
        self, url: str, timeout_s: float | None = None
    ) -> http.client.HTTPConnection:
        connection = super().open_http(url, timeout_s)
        connection.sock = _Counted(connection.sock)  # type: ignore[assignment]
        return connection


class _Counted:
    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def sendall(self, data: Any) -> None:
        CountingLink.sent_bytes += len(data)
        self._sock.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class CountingDriver(xensm.XenSmDriver):
    """A driver over such a link."""

    def _open(self) -> tuple[Settings, Link]:
        if self._opened is None:
            settings = read(self.conf)
            self._opened = settings, CountingLink(settings, self.node)
        return self._opened


class Case(unittest.TestCase):
    def make(
        self, local_to: int | None = None, **switches: Any
    ) -> None:
        """Make a pool with an SR, of all hosts or of one."""
        self.simulator: Any = xapi.simulator(
            self, hosts=2, detach_delay_s=0.02, **switches)
        if local_to is None:
            self.sr_uuid = str(xapi.nfs_sr(self.simulator))
        else:
            self.sr_uuid = str(xapi.ext_sr(self.simulator, host=local_to))
        self.node = fixtures.make_node(self)

    def driver(self, **options: Any) -> xensm.XenSmDriver:
        made = CountingDriver(fixtures.settings(xensm.XenSmDriver, **{
            'addresses': [self.simulator.url()], 'password': 'secret',
            'sr_uuid': [self.sr_uuid], **options,
        }), self.node)
        made.check()
        return made

    def volume(
        self, driver: xensm.XenSmDriver, size_bytes: int = SIZE
    ) -> model.Volume:
        volume = model.Volume(ids.new(), self.sr_uuid, size_bytes)
        driver.create(volume)
        return volume

    def fingerprint(self, host: int) -> str:
        pair = self.simulator.servers.certificate(
            self.simulator.host(host))
        der = ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())
        return hashlib.sha256(der).hexdigest()


class WayTest(Case):
    """Who is spoken to."""

    def test_bytes_go_where_the_pool_sends_them_with_tls(self) -> None:
        self.make(local_to=1, tls=True)
        driver = self.driver(
            fingerprints=[self.fingerprint(0), self.fingerprint(1)])
        volume = self.volume(driver)
        workbench.fill(driver, volume, pattern(1, SIZE))
        self.assertEqual(
            pattern(1, SIZE), workbench.content(driver, volume))

    def test_host_that_is_not_known_gets_no_bytes(self) -> None:
        self.make(local_to=1, tls=True)
        driver = self.driver(fingerprints=[self.fingerprint(0)])
        volume = self.volume(driver)
        with self.assertRaisesRegex(errors.Unavailable, 'fingerprint'):
            workbench.fill(driver, volume, pattern(1, SIZE))
        with self.assertRaisesRegex(errors.Unavailable, 'fingerprint'):
            workbench.content(driver, volume)

    def test_nbd_is_spoken_with_tls_to_the_host_that_was_named(self) -> None:
        self.make(tls=True)
        xensm.serve_nbd(self.simulator)
        driver = self.driver(
            fingerprints=[self.fingerprint(0), self.fingerprint(1)])
        volume = self.volume(driver)
        workbench.fill(driver, volume, pattern(1, SIZE))
        exports = self.count('export_raw_vdi')
        self.assertEqual(
            pattern(1, SIZE), workbench.content(driver, volume))
        self.assertEqual(exports, self.count('export_raw_vdi'))

    def count(self, handler: str) -> int:
        with xensm.session(self.simulator) as xenapi:
            return sum(
                handler in record['name_label']
                for record in xenapi.task.get_all_records().values()
            )


class ReadBackTest(Case):
    """What was sent is compared with what is there."""

    FAR = 100 * MIB

    def fill(self, driver: xensm.XenSmDriver, wrong_at: int) -> None:
        """Fill a volume, of which a byte is lost before it is read back."""
        volume = self.volume(driver, 128 * MIB)
        link = driver._open()[1]
        uuid = driver.inspect(volume).handle
        sr = self.simulator.rows.by_uuid('SR', self.sr_uuid)

        def lose(method: str) -> None:
            # How to read it is asked for when all of it was sent.
            if method == 'VDI.get_nbd_info' and self.is_sent:
                manager = self.simulator.sm.manager(sr)
                with manager.open(uuid, True) as disk:
                    disk.pwrite(wrong_at, b'?')

        self.is_sent = False
        link.records.append(lose)
        runs = [
            model.Extent(0, MIB, False),
            model.Extent(MIB, self.FAR - MIB, True),
            model.Extent(self.FAR, MIB, False),
            model.Extent(self.FAR + MIB, 27 * MIB, True),
        ]
        with driver.writer(volume) as writer:
            writer.expect(runs)
            for at in 0, self.FAR:
                writer.seek(at)
                writer.write(b'x' * MIB)
            self.is_sent = True
            writer.commit()

    def test_byte_that_is_wrong_is_found(self) -> None:
        self.make()
        last = self.FAR + MIB - 1
        for wrong_at, options in (
            (0, {}), (last, {'read_back': 'whole'}),
        ):
            with self.subTest(wrong_at, **options):
                with self.assertRaisesRegex(errors.Corrupt, 'not those'):
                    self.fill(self.driver(**options), wrong_at)
        # Without NBD nobody looks so far, unless it is asked for.
        self.fill(self.driver(), last)
        xensm.serve_nbd(self.simulator)
        with self.assertRaisesRegex(errors.Corrupt, 'not those'):
            self.fill(self.driver(), last)


class SparseTest(Case):
    """What is empty does not travel."""

    def setUp(self) -> None:
        self.make()
        self.root = self.node.state_dir

    def image(self, size_bytes: int) -> tuple[str, str]:
        """Make a raw image, a quarter of it data; return path and digest."""
        path = os.path.join(self.root, 'image.raw')
        chance = random.Random(5)
        with open(path, 'wb') as file:
            file.truncate(size_bytes)
            for at in range(0, size_bytes, 16 * MIB):
                file.seek(at)
                file.write(chance.randbytes(4 * MIB))
        with open(path, 'rb') as file:
            return path, hashlib.file_digest(file, 'sha256').hexdigest()

    def test_import_of_a_quarter_sends_a_quarter(self) -> None:
        size = 64 * MIB
        path, digest = self.image(size)
        driver = self.driver()
        volume = self.volume(driver, size)
        settings = type('Settings', (), {
            'image_allowed_directories': [self.root],
            'image_upload_directories': [self.root],
        })()
        before = CountingLink.sent_bytes
        fill.fill_from_image(
            driver, volume, FileSource(settings, self.node),
            f'file://{path}', declared_format='raw',
            spool_directory=os.path.join(self.root, 'spool'), token='t',
            node=self.node, fresh=True,
        )
        self.assertLess(
            CountingLink.sent_bytes - before, 0.3 * size)
        found = workbench.content(driver, volume)
        self.assertEqual(digest, hashlib.sha256(found).hexdigest())


class ChangedTest(Case):
    """What a volume has written since a snapshot."""

    def check(self, by: str, **options: Any) -> None:
        self.make()
        driver = self.driver(**options)
        calls: list[str] = []
        driver._opened[1].records.append(calls.append)
        volume = self.volume(driver)
        workbench.fill(driver, volume, pattern(1, SIZE))
        snapshot = model.Snapshot(ids.new(), volume, SIZE)
        driver.snapshot(snapshot)
        self.assertEqual([], list(driver.extents(volume, snapshot)))
        workbench.fill(driver, volume, pattern(2, SIZE))
        image = bytearray(pattern(1, SIZE))
        for run in driver.extents(volume, snapshot):
            end = run.offset_bytes + run.length_bytes
            image[run.offset_bytes:end] = pattern(2, SIZE)[
                run.offset_bytes:end]
        self.assertEqual(pattern(2, SIZE), bytes(image))
        self.assertEqual(by == 'bitmap', 'VDI.enable_cbt' in calls)
        with xensm.session(self.simulator) as xenapi:
            tracked = xenapi.VDI.get_cbt_enabled(
                xenapi.VDI.get_by_uuid(driver.inspect(volume).handle))
        self.assertEqual(by == 'bitmap', tracked)

    def test_is_told_by_the_server_if_it_tracks_that(self) -> None:
        self.check('bitmap', cbt=True)

    def test_is_told_by_an_export_if_it_does_not(self) -> None:
        self.check('export')
