# SPDX-License-Identifier: Apache-2.0
"""Who uses a device or a file, while somebody else's server is dead."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator

from tests import hung
from volume.machine import users

LOOK = 'import sys; from volume.machine import users; ' \
       'print(*users.users(sys.argv[1], [*map(int, sys.argv[2:])]), ' \
       'sep="\\n")'
HOLD = 'import sys; f = open(sys.argv[1], "rb"); ' \
       'sys.argv[2:] and open("/proc/self/comm", "w").write(sys.argv[2]); ' \
       'print("open", flush=True); sys.stdin.read()'
WAIT_S = 30


class UsersTest(unittest.TestCase):

    @contextlib.contextmanager
    def held(self, path: str, *name: str) -> Iterator[str]:
        """Have a process hold it open; yield how that is called."""
        with subprocess.Popen(
            [sys.executable, '-c', HOLD, path, *name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout
            self.assertEqual(b'open\n', child.stdout.readline())
            try:
                yield f'(pid {child.pid})'
            finally:
                child.communicate(timeout=WAIT_S)

    def look(self, path: str, disk: hung.Hung, *known: str) -> str:
        """Ask in a process of its own: a wrong one could not be ended."""
        asking = subprocess.Popen(
            [sys.executable, '-c', LOOK, path, *known], stdout=subprocess.PIPE,
        )
        try:
            return asking.communicate(timeout=WAIT_S)[0].decode()
        except subprocess.TimeoutExpired:
            disk.end()
            asking.communicate()
            self.fail(f'who asked for {path} waited for a dead server')

    def device(self) -> str:
        for name in sorted(os.listdir('/sys/block')):
            path = f'/dev/{name}'
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_RDONLY))
                return path
        self.skipTest('no block device that can be opened')

    def unmount(self, directory: str) -> None:
        ctypes.CDLL(None).umount2(directory.encode(), hung.DETACH)

    def test_who_looks_for_labels_on_all_disks_is_no_user(self) -> None:
        path = self.device()
        with self.held(path, 'pvs') as looks, self.held(path, 'dd') as user:
            found = ' '.join(users.users(path))
        self.assertIn(user, found)
        self.assertNotIn(looks, found)

    def test_dead_server_of_a_stranger_keeps_nobody_waiting(self) -> None:
        with tempfile.NamedTemporaryFile() as f:
            for is_taken_away in False, True:
                disk = hung.Hung(self)
                with self.held(disk.path):
                    if is_taken_away:
                        self.unmount(os.path.dirname(disk.path))
                    disk.stick()
                    for path in f.name, self.device():
                        with self.subTest(path, is_taken_away=is_taken_away):
                            with self.held(path) as user:
                                self.assertIn(user, self.look(path, disk))
                    disk.end()

    def test_user_of_a_file_that_lies_with_a_server_is_named(self) -> None:
        disk = hung.Hung(self)
        with self.held(disk.path) as user:
            self.assertIn(user, ' '.join(users.users(disk.path)))

    def test_user_of_a_file_is_named_by_what_is_known_while_nobody_answers(
        self
    ) -> None:
        disk = hung.Hung(self)
        found = os.stat(disk.path)
        known = [str(found.st_dev), str(found.st_ino)]
        with self.held(disk.path) as user, self.held(__file__) as other:
            for is_taken_away in False, True:
                with self.subTest(is_taken_away=is_taken_away):
                    if is_taken_away:
                        self.unmount(os.path.dirname(disk.path))
                    else:
                        disk.stick()
                    said = self.look(disk.path, disk, *known)
                    self.assertIn(user, said)
                    self.assertNotIn(other, said)
            disk.end()
        self.assertEqual('\n', self.look(disk.path, disk, *known))

    def test_partition_that_vanishes_while_it_is_looked_at_is_passed_over(
        self
    ) -> None:
        with tempfile.TemporaryDirectory() as block:
            for name, number in ('sda1', '8:1'), ('sda2', ''):
                os.makedirs(f'{block}/8:0/{name}')
                for key, text in ('partition', '1'), ('dev', number):
                    with open(f'{block}/8:0/{name}/{key}', 'w') as f:
                        f.write(text)
            os.unlink(f'{block}/8:0/sda2/dev')
            self.assertEqual(
                {os.makedev(8, 0), os.makedev(8, 1)},
                users._with_partitions(os.makedev(8, 0), block),
            )

    def test_device_is_in_use_by_whatever_mount_it_was_opened(self) -> None:
        path = self.device()
        with tempfile.TemporaryDirectory() as directory:
            if ctypes.CDLL(None).mount(
                b'dev', directory.encode(), b'devtmpfs', 0, None
            ):
                self.skipTest('no mount of a devtmpfs: it takes root')
            other = os.path.join(directory, os.path.basename(path))
            self.assertTrue(stat.S_ISBLK(os.stat(other).st_mode))
            with self.held(other) as user:
                for _ in range(2):
                    self.assertIn(user, ' '.join(users.users(path)))
                    self.unmount(directory)


if __name__ == '__main__':
    unittest.main()
