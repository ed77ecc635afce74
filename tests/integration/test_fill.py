# SPDX-License-Identifier: Apache-2.0
"""Volumes from images, with real tools and servers.

Every claim is about bytes: what a volume holds afterwards, to its last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from tests import images
from tests import vhds
from tests.integration import fill_case
from tests.integration.fill_case import Case
from tests.integration.fill_case import Remote
from volume import errors
from volume import model
from volume.flows import fill
from volume.transfer import convert

SIZE = images.VIRTUAL
SPARE = 3 * images.MIB


setUpModule = fill_case.setUpModule


class Filling(Case):
    def test_every_format_by_both_ways_fills_the_same_bytes(self) -> None:
        for kind in images.GOOD:
            declared = kind.split('-')[0]
            for source, url in self.both(self.image(kind)):
                for given in (None, declared):
                    if kind == 'vhd-fixed' and given is None:
                        continue
                    volume = self.volume()
                    with self.subTest(kind, url=url, declared=given):
                        filled = self.fill(
                            volume, source, url, declared_format=given,
                            fresh=True,
                        )
                        self.assertEqual(declared, filled.format)
                        self.assertEqual(SIZE, filled.virtual_size_bytes)
                        self.assert_filled(volume)
                    self.driver.delete(volume)

    def test_a_driver_that_qemu_cannot_open_is_filled_as_well(self) -> None:
        remote = self.make_driver(self.node, Remote)
        for kind in images.GOOD:
            for source, url in self.both(self.image(kind)):
                volume = self.volume(dirt=b'\xee')
                with self.subTest(kind, url=url):
                    self.fill(
                        volume, source, url, driver=remote,
                        declared_format=kind.split('-')[0],
                    )
                    self.assert_filled(volume)
                self.driver.delete(volume)

    def test_nothing_old_stays_in_a_volume_that_was_half_filled(self) -> None:
        digest = 'sha256:' + hashlib.sha256(self.data).hexdigest()
        for kind in ('raw', 'qcow2', 'vhd', 'vmdk'):
            for source, url in self.both(self.image(kind)):
                volume = self.volume(dirt=b'\xee')
                with self.subTest(kind, url=url):
                    self.fill(
                        volume, source, url,
                        checksum=digest if kind == 'raw' else None,
                    )
                    self.assert_filled(volume)
                self.driver.delete(volume)

    def test_an_image_of_the_volume_s_very_size_fits(self) -> None:
        for kind in ('raw', 'qcow2'):
            for source, url in self.both(self.image(kind)):
                volume = self.volume(SIZE)
                self.fill(volume, source, url)
                self.assert_filled(volume)

    def test_a_raw_image_of_odd_size_is_padded_with_zeros(self) -> None:
        path = os.path.join(self.images, 'odd')
        data = self.data[-5_000_001:]
        images.make('raw', path, data)
        digest = hashlib.md5(data).hexdigest()
        for source, url in self.both(path):
            for checksum in (None, digest):
                volume = self.volume(dirt=b'\xee')
                self.fill(volume, source, url, checksum=checksum)
                self.assertTrue(
                    self.bytes_of(volume)
                    == data + bytes(SIZE + SPARE - len(data))
                )

    def test_a_filled_volume_is_sparse(self) -> None:
        self.data = bytes(SIZE - images.MIB) + self.data[-images.MIB:]
        for kind in ('raw', 'qcow2', 'vhd', 'vmdk'):
            for source, url in self.both(self.image(kind)):
                volume = self.volume()
                self.fill(volume, source, url, fresh=True)
                self.assert_filled(volume)
                stored = os.stat(self.path(volume)).st_blocks * 512
                with self.subTest(kind, url=url):
                    self.assertLessEqual(stored, 2 * images.MIB)

    def test_names_that_mean_something_to_qemu_mean_nothing(self) -> None:
        for name in ('json:{"driver":"null-co"}', 'a,b=c', 'nbd:x', '-n',
                     'a b\u00e9%41', "'", '#'):
            path = os.path.join(self.images, name)
            shutil.copy(self.image('qcow2'), path)
            volume = self.volume()
            url = 'file://' + self.images + '/' + ''.join(
                f'%{byte:02x}' for byte in name.encode()
            )
            with self.subTest(name):
                self.fill(volume, self.file, url)
                self.assert_filled(volume)
            self.driver.delete(volume)

    def test_what_lies_in_unwritten_sectors_of_a_vhd_is_no_byte_of_it(
        self,
    ) -> None:
        # Copied off a volume group, that is somebody's data.
        blocks = range(-(-SIZE // (2 * images.MIB)))
        made = vhds.craft(self.data, blocks, unset=range(3, 5000, 7))
        path = os.path.join(self.images, 'old.vhd')
        with open(path, 'wb') as f:
            f.write(made)
        self.data = vhds.naive(made)
        for source, url in self.both(path):
            for dirt in b'', b'\xee':
                with self.subTest(url=url, dirt=dirt):
                    volume = self.volume(dirt=dirt)
                    self.fill(
                        volume, source, url, declared_format='vhd',
                        fresh=not dirt,
                    )
                    self.assert_filled(volume)

    def test_a_download_that_breaks_fills_the_same_bytes(self) -> None:
        for kind in ('raw', 'qcow2'):
            with open(self.image(kind), 'rb') as f:
                data = f.read()
            # In the head, and in the image itself.
            drops = [700_000, 1 << 30, 1 << 30, 2_500_000]
            url = self.web.put('/i', data, drops=drops)
            volume = self.volume()
            with self.subTest(kind):
                self.fill(volume, self.http, url)
                self.assert_filled(volume)
                self.assertIn('If-Range', self.web.log[-1][1])

    def test_a_raw_stream_is_not_stored_twice(self) -> None:
        url = self.web.put('/i', self.data)
        self.fill(self.volume(), self.http, url)
        self.assertFalse(os.path.exists(self.spool))

    def test_progress_goes_from_nothing_to_all(self) -> None:
        digest = {
            kind: hashlib.sha256(self.read(self.image(kind))).hexdigest()
            for kind in ('raw', 'qcow2')
        }
        for kind in ('raw', 'qcow2'):
            for source, url in self.both(self.image(kind)):
                for checksum in (None, digest[kind]):
                    seen: list[tuple[int, int]] = []
                    self.fill(
                        self.volume(), source, url, checksum=checksum,
                        watch=lambda *done, to=seen: to.append(done),
                    )
                    with self.subTest(kind, url=url, checksum=checksum):
                        done = [d for d, _ in seen]
                        self.assertEqual(sorted(done), done)
                        self.assertEqual(1, len({t for _, t in seen}))
                        self.assertEqual(seen[-1][0], seen[-1][1])

    def read(self, path: str) -> bytes:
        with open(path, 'rb') as f:
            return f.read()


class Refusing(Case):
    def assert_refused(
        self, kind: type[errors.VolumeError], words: str,
        act: Callable[[model.Volume], object],
    ) -> None:
        """The volume keeps its bytes, or at least it is no success."""
        volume = self.volume(dirt=b'\xee')
        before = self.bytes_of(volume)
        with self.assertRaisesRegex(kind, words):
            act(volume)
        self.assertTrue(before == self.bytes_of(volume), 'bytes were stored')
        self.assert_no_spool()
        self.driver.delete(volume)

    def test_no_hostile_image_is_stored_by_any_way(self) -> None:
        for name, (declared, make, _) in images.HOSTILE.items():
            path = os.path.join(self.images, 'hostile')
            images.make('raw', path, make())
            for source, url in self.both(path):
                with self.subTest(name, url=url):
                    self.assert_refused(
                        errors.Invalid, '',
                        lambda v, s=source, u=url, d=declared: self.fill(
                            v, s, u, declared_format=d),
                    )

    def test_a_server_without_ranges_gets_no_hostile_image_in(self) -> None:
        for name, (declared, make, _) in images.HOSTILE.items():
            url = self.web.put('/i', make(), ranges=False)
            with self.subTest(name):
                self.assert_refused(
                    errors.Invalid, '',
                    lambda v, u=url, d=declared: self.fill(
                        v, self.http, u, declared_format=d),
                )

    def test_an_image_larger_than_the_volume_is_refused_first(self) -> None:
        for kind in ('raw', 'qcow2', 'vhd', 'vmdk'):
            for source, url in self.both(self.image(kind)):
                volume = self.volume(SIZE - 512, dirt=b'\xee')
                asked = len(self.web.log)
                with self.subTest(kind, url=url):
                    with self.assertRaisesRegex(errors.Invalid, '1 GiB'):
                        self.fill(volume, source, url)
                    self.assertTrue(
                        self.bytes_of(volume) == b'\xee' * (SIZE - 512))
                    self.assertLessEqual(len(self.web.log) - asked, 3)
                    self.assertFalse(os.path.exists(self.spool))

    def test_a_bomb_is_refused_by_the_size_it_promises(self) -> None:
        path = os.path.join(self.images, 'bomb')
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', path, '1T'],
            check=True, timeout=60)
        self.assert_refused(
            errors.Invalid, '1024 GiB',
            lambda v: self.fill(v, self.file, f'file://{path}'))

    def test_an_image_that_was_cut_off_is_refused(self) -> None:
        for kind in ('qcow2', 'qcow2-small', 'vhd', 'vmdk', 'vmdk-stream'):
            path = self.image(kind)
            os.truncate(path, os.path.getsize(path) * 3 // 4)
            for source, url in self.both(path):
                with self.subTest(kind, url=url):
                    self.assert_refused(
                        errors.Invalid, '',
                        lambda v, s=source, u=url: self.fill(v, s, u))

    def test_a_wrong_checksum_is_no_success(self) -> None:
        wrong = 'sha256:' + '0' * 64
        path = self.image('qcow2')
        for source, url in self.both(path):
            self.assert_refused(
                errors.Invalid, 'is not what was asked for',
                lambda v, s=source, u=url: self.fill(v, s, u, checksum=wrong))
        for source, url in self.both(self.image('raw')):
            with self.assertRaisesRegex(errors.Invalid, 'sha256 is'):
                self.fill(self.volume(), source, url, checksum=wrong)

    def test_a_right_checksum_is_a_success(self) -> None:
        for kind in ('raw', 'qcow2'):
            path = self.image(kind)
            with open(path, 'rb') as f:
                digest = hashlib.file_digest(f, 'sha512').hexdigest()
            for source, url in self.both(path):
                volume = self.volume()
                self.fill(volume, source, url, checksum=f'sha512:{digest}')
                self.assert_filled(volume)

    def test_a_server_that_first_shows_another_image_is_caught(self) -> None:
        shown, hidden = bytes(SIZE), images.qcow2(backing=images.PASSWD)
        hidden = hidden.ljust(SIZE, b'\0')
        self.web.put('/i', shown, etag=None)

        def switch(page: Any, sent: int) -> None:
            # First the head was asked for, to look at it.
            if sent:
                page.data = hidden

        self.web.pages['/i'].before = switch
        self.assert_refused(
            errors.Invalid, 'its bytes are qcow2',
            lambda v: self.fill(v, self.http, self.web.base + '/i'))

    def test_a_fixed_vhd_that_passes_for_raw_is_caught_at_its_end(
        self,
    ) -> None:
        data = images.vhd_fixed(self.data)
        url = self.web.put('/i', data, ranges=False)
        volume = self.volume()
        with self.assertRaisesRegex(errors.Invalid, 'declare it vhd'):
            self.fill(volume, self.http, url)
        self.fill(volume, self.http, url, declared_format='vhd')
        self.assert_filled(volume)

    def test_an_image_of_unknown_size_is_refused(self) -> None:
        url = self.web.put('/i', self.data, ranges=False, chunked=True)
        self.assert_refused(
            errors.Invalid, 'how large',
            lambda v: self.fill(v, self.http, url))

    def test_a_file_that_changes_meanwhile_is_a_conflict(self) -> None:
        path = self.image('raw')
        digest = hashlib.sha256(self.data).hexdigest()

        def watch(done: int, total: int) -> None:
            os.utime(path, ns=(done, done))

        for kind in ('raw', 'qcow2'):
            path = self.image(kind)
            with self.subTest(kind), self.assertRaises(errors.Conflict):
                self.fill(
                    self.volume(), self.file, f'file://{path}', watch=watch,
                    checksum=digest if kind == 'raw' else None,
                )

    def test_what_was_inspected_is_what_is_converted(self) -> None:
        path = self.image('qcow2')
        with open(path, 'rb') as f:
            digest = hashlib.file_digest(f, 'sha256').hexdigest()
        other = os.path.join(self.images, 'other')
        images.make('raw', other, images.qcow2(backing=images.PASSWD))

        def swap(done: int, total: int) -> None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(other, path)

        volume = self.volume()
        with self.assertRaises(errors.Conflict):
            self.fill(volume, self.file, f'file://{path}', watch=swap,
                      checksum=digest)
        # The name had changed before qemu-img began.
        self.assert_filled(volume)

    def test_no_error_tells_a_secret_of_the_url(self) -> None:
        self.web.put('/i', images.qcow2(backing=images.PASSWD))
        url = self.web.base.replace('//', '//u:hunter2@') + '/i?k=hunter2'
        with self.assertRaises(errors.Invalid) as e:
            self.fill(self.volume(), self.http, url)
        self.assertNotIn('hunter2', str(e.exception))


class Stopping(Case):
    def test_a_cancelled_fill_leaves_nothing_behind(self) -> None:
        for kind in ('raw', 'qcow2'):
            path = self.image(kind)
            for source, url in self.both(path):
                total: list[int] = []
                self.fill(
                    self.volume(), source, url,
                    watch=lambda _, all_, to=total: to.append(all_))
                for part in (0.0, 0.3, 0.9):

                    def watch(
                        done: int, all_: int, least: float = part
                    ) -> None:
                        if done >= all_ * least:
                            raise errors.Cancelled('enough')

                    with (
                        self.subTest(kind, url=url, part=part),
                        self.assertRaises(errors.Cancelled),
                    ):
                        self.fill(self.volume(), source, url, watch=watch)
                    self.assert_no_spool()

    def test_a_stalled_download_is_cancelled_at_once(self) -> None:
        for kind in ('raw', 'qcow2'):
            with open(self.image(kind), 'rb') as f:
                data = f.read()
            url = self.web.put('/i', data)

            def stall(page: Any, sent: int) -> None:
                # Not yet when the head and the tail are asked for.
                if sent == 2:
                    page.stalls_after = 2_500_000

            self.web.pages['/i'].before = stall

            def watch(done: int, total: int) -> None:
                if done >= images.MIB:
                    raise errors.Cancelled('enough')

            with self.subTest(kind), self.assertRaises(errors.Cancelled):
                self.fill(self.volume(), self.http, url, watch=watch)

    def test_a_rate_bounds_every_way(self) -> None:
        # qemu-img counts in slices of 100 ms, and starts with one for free.
        for kind in ('raw', 'qcow2'):
            for source, url in self.both(self.image(kind)):
                seen: list[int] = []
                self.fill(
                    self.volume(), source, url, rate_bytes_per_s=3 << 20,
                    watch=lambda done, _, to=seen: to.append(done))
                with self.subTest(kind, url=url):
                    # qemu-img may say 100 % and then wait for its rate: it
                    # is asked a few times a second for as long as it runs.
                    between = [d for d in seen if 0 < d < max(seen)]
                    self.assertTrue(between or len(seen) > 3, seen)

    def test_a_convert_beyond_its_space_is_ended(self) -> None:
        source = convert.image_node(self.image('raw'), 'raw')
        target = os.path.join(self.pool, 'small')
        with open(target, 'wb') as f:
            f.truncate(SIZE)
        node = {'driver': 'file', 'filename': target}
        with self.assertRaisesRegex(errors.NoSpace, 'grew beyond'):
            convert.convert(
                self.node, source, node, SIZE, file_bytes=images.MIB)

    def test_a_convert_without_progress_is_ended(self) -> None:
        source = convert.image_node(self.image('raw'), 'raw')
        target = os.path.join(self.pool, 'slow')
        with open(target, 'wb') as f:
            f.truncate(SIZE)
        node = {'driver': 'file', 'filename': target}
        with self.assertRaisesRegex(errors.Unavailable, 'no progress'):
            convert.convert(
                self.node, source, node, SIZE, rate_bytes_per_s=1000,
                stall_s=0.5)


class Copying(Case):
    def test_a_volume_is_copied_into_a_larger_one_that_was_used(self) -> None:
        source = self.volume(SIZE)
        with open(self.path(source), 'r+b') as f:
            f.write(self.data)
        remote = self.make_driver(self.node, Remote)
        for a, b in itertools.product((self.driver, remote), repeat=2):
            for fresh in (False, True):
                target = self.volume(dirt=b'' if fresh else b'\xee')
                with self.subTest(type(a).__name__ + type(b).__name__):
                    fill.copy_volume(
                        a, source, b, target, node=self.node, fresh=fresh)
                    self.assert_filled(target)

    def test_a_copy_into_a_smaller_volume_is_refused(self) -> None:
        with self.assertRaisesRegex(errors.Invalid, 'GiB or more'):
            fill.copy_volume(
                self.driver, self.volume(SIZE), self.driver,
                self.volume(SIZE - 512), node=self.node)
