# SPDX-License-Identifier: Apache-2.0
"""What a node does to its machine beyond files: settings, daemons, zeros."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator

from volume import errors
from volume.machine.opened import Opened
from volume.node import CommandFailed
from volume.node import Node
from volume.node import Op
from volume.node import Process
from volume.node import ReplyLength

SECRET = 'swordfish-42'

# Its first thread ends, and another one lives on and heeds no SIGTERM.
LAST_THREAD = """
import ctypes, signal, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


class MachineCase(unittest.TestCase):
    def setUp(self) -> None:
        self.root = tempfile.mkdtemp(prefix='vt', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.root)
        self.node = self.make_node()

    def make_node(self) -> Node:
        return Node(self.root)

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def touch(self, name: str, text: str = '') -> str:
        with open(self.path(name), 'w') as f:
            f.write(text)
        return self.path(name)


class ConfigureTest(MachineCase):
    def test_each_operation_may_be_repeated(self) -> None:
        attribute = self.touch('a', 'old and longer\n')
        link = self.path('l')
        for _ in range(2):
            self.assertEqual(
                [None, None, None, 'new', ['a', 'd', 'l'], True],
                self.node.configure([
                    Op.mkdir(self.path('d')),
                    Op.put(attribute, 'new\n'),
                    Op.link(link, self.path('d')),
                    Op.get(attribute),
                    Op.list(self.root),
                    Op.exists(link),
                ]),
            )
        for _ in range(2):
            self.assertEqual(
                [None, None, None, None, False],
                self.node.configure([
                    Op.unlink(link),
                    Op.rmdir(self.path('d')),
                    Op.get(self.path('none')),
                    Op.list(self.path('none')),
                    Op.exists(link),
                ]),
            )

    def test_text_is_written_in_place_and_never_makes_a_file(self) -> None:
        attribute = self.touch('a', 'old')
        inode = os.stat(attribute).st_ino
        self.node.configure([Op.put(attribute, 'x')])
        self.assertEqual(inode, os.stat(attribute).st_ino)
        with self.assertRaises(errors.NotFound):
            self.node.configure([Op.put(self.path('none'), 'x')])
        self.assertEqual(['a'], os.listdir(self.root))

    def test_first_that_fails_ends_the_row_and_is_named(self) -> None:
        first, last = self.path('first'), self.path('last')
        missing = self.path('none/below')
        with self.assertRaisesRegex(
            errors.NotFound, f'cannot mkdir {missing}: No such file'
        ):
            self.node.configure([
                Op.mkdir(first), Op.mkdir(missing), Op.mkdir(last),
            ])
        self.assertEqual(['first'], os.listdir(self.root))

    def test_what_goes_as_it_is_looked_at_is_not_there(self) -> None:
        # The kernel's own files, of an object that has gone since.
        for base in '/sys/fs/cgroup', '/sys/fs/cgroup/cpu':
            group = f'{base}/volume-{os.getpid()}'
            with contextlib.suppress(OSError):
                os.mkdir(group)
                if os.path.exists(f'{group}/cgroup.procs'):
                    break
                os.rmdir(group)
        else:
            self.skipTest('no control group can be made here')
        try:
            fd = os.open(f'{group}/cgroup.procs', os.O_RDONLY)
        finally:
            os.rmdir(group)
        self.addCleanup(os.close, fd)
        with self.assertRaises(OSError) as gone:
            os.read(fd, 1)
        self.assertEqual(errno.ENODEV, gone.exception.errno)
        path = f'/proc/{os.getpid()}/fd/{fd}'
        self.assertEqual([None], self.node.configure([Op.get(path)]))
        with self.assertRaises(errors.NotFound):
            self.node.read(path)

    def test_what_has_nobody_behind_it_is_not_there(self) -> None:
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(self.path('s'))
        with self.assertRaises(OSError) as seen, open(self.path('s')):
            pass
        self.assertEqual(errno.ENXIO, seen.exception.errno)
        with self.assertRaises(errors.NotFound):
            self.node.read(self.path('s'))

    def test_link_that_points_elsewhere_is_a_conflict(self) -> None:
        link = self.path('l')
        self.node.configure([Op.link(link, self.touch('a'))])
        with self.assertRaises(errors.Conflict):
            self.node.configure([Op.link(link, self.touch('b'))])
        # As the kernel's own settings tell it: relative to the link.
        os.unlink(link)
        os.symlink('a', link)
        self.node.configure([Op.link(link, self.path('a'))])

    def test_what_is_put_stands_in_no_message(self) -> None:
        op = Op.put(self.path('none/password'), SECRET)
        with self.assertRaises(errors.NotFound) as caught:
            self.node.configure([op])
        self.assertNotIn(SECRET, f'{caught.exception} {op}')

    def test_full_directory_is_busy_and_a_wrong_value_invalid(self) -> None:
        self.node.configure([
            Op.mkdir(self.path('d')), Op.mkdir(self.path('d/e')),
        ])
        with self.assertRaises(errors.Busy):
            self.node.configure([Op.rmdir(self.path('d'))])
        # The kernel takes a number here, and refuses everything else.
        with self.assertRaises(errors.Invalid):
            self.node.configure([Op.put('/proc/self/oom_score_adj', 'x')])

    def test_relative_paths_and_strange_verbs_are_refused(self) -> None:
        for op in (
            Op.mkdir('d'), Op.link(self.path('l'), 'd'), Op('rm', '/'),
            Op.get('/a\0b'),
        ):
            with self.assertRaises(errors.Invalid):
                self.node.configure([op])


class TalkTest(MachineCase):
    def serve(self, answer: Callable[[socket.socket], None]) -> str:
        path = self.path('s')
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(path)
        listener.listen()

        def run() -> None:
            link, _ = listener.accept()
            with link:
                answer(link)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.addCleanup(thread.join, 10)
        return path

    def test_reply_ends_where_the_daemon_hangs_up(self) -> None:
        path = self.serve(lambda link: link.sendall(link.recv(99) * 2))
        self.assertEqual(b'abab', self.node.talk(path, b'ab'))

    def test_reply_ends_where_it_says_so(self) -> None:
        reply = struct.pack('@II', 0, 11) + b'abc'
        done = threading.Event()

        def answer(link: socket.socket) -> None:
            for at in range(len(reply)):
                link.sendall(reply[at:at + 1])
            done.wait(10)

        path = self.serve(answer)
        self.addCleanup(done.set)
        self.assertEqual(
            reply, self.node.talk(path, b'?', length=ReplyLength(4, 4))
        )

    def test_nobody_there_means_that_nothing_happened(self) -> None:
        with self.assertRaises(errors.Unavailable):
            self.node.talk(self.path('none'), b'x')

    def test_reply_that_is_late_cut_or_too_long_is_unknown(self) -> None:
        def late(link: socket.socket) -> None:
            link.recv(99)
            link.recv(99)

        for name, answer, options in (
            ('late', late, {'timeout_s': 0.1}),
            ('cut', lambda link: link.sendall(b'\x08\0\0'),
             {'length': ReplyLength(0, 4)}),
            ('long', lambda link: link.sendall(bytes(100)),
             {'reply_bytes_max': 99}),
            ('announced', lambda link: link.sendall(b'\0\0\0\x7f'),
             {'reply_bytes_max': 99, 'length': ReplyLength(0, 4)}),
        ):
            with self.subTest(name):
                path = self.serve(answer)
                with self.assertRaises(errors.Unknown):
                    self.node.talk(path, b'x', **options)  # type: ignore
                os.unlink(path)


class ProcessTest(MachineCase):
    def start(self, *argv: str) -> Process:
        process = self.node.start(argv, self.path('log'))
        self.addCleanup(self.node.end, process, 5)
        return process

    def test_process_runs_until_it_is_ended(self) -> None:
        process = self.start('sleep', '60')
        self.assertTrue(self.node.is_running(process))
        for _ in range(2):
            self.node.end(process, 5)
            self.assertFalse(self.node.is_running(process))

    def test_process_that_wants_to_live_is_killed(self) -> None:
        process = self.start(
            'sh', '-c', 'trap "" TERM; echo on; exec sleep 60'
        )
        while b'on' not in self.node.read(self.path('log')):
            pass
        self.node.end(process, 0.1)
        self.assertFalse(self.node.is_running(process))

    def test_process_that_ended_by_itself_does_not_run(self) -> None:
        process = self.start('true')
        while self.node.is_running(process):
            pass

    def test_process_whose_first_thread_ended_runs_on(self) -> None:
        process = self.start(sys.executable, '-c', LAST_THREAD)
        status = f'/proc/{process.pid}/status'
        while b'State:\tZ' not in self.node.read(status):
            pass
        self.assertTrue(self.node.is_running(process))
        self.node.end(process, 0.1)
        self.assertFalse(self.node.is_running(process))

    def test_another_of_the_same_number_is_left_alone(self) -> None:
        process = self.start('sleep', '60')
        other = Process(process.pid, process.started + '1')
        self.assertFalse(self.node.is_running(other))
        self.node.end(other, 5)
        self.assertTrue(self.node.is_running(process))

    def test_it_has_a_session_of_its_own_and_none_of_our_locks(self) -> None:
        with self.node.hold(['v']):
            process = self.start('sleep', '60')
        self.assertEqual(process.pid, os.getsid(process.pid))
        # One that starts has its libraries open for a moment.
        late = time.monotonic() + 30
        while (found := set(os.listdir(f'/proc/{process.pid}/fd'))) != {
            '0', '1', '2',
        } and time.monotonic() < late:
            pass
        self.assertEqual({'0', '1', '2'}, found)
        # Nobody waits for it, and nobody ends it for a lock.
        with self.node.hold(['v']):
            self.assertTrue(self.node.is_running(process))

    def test_program_that_is_missing_is_told_of(self) -> None:
        with self.assertRaisesRegex(errors.Unavailable, 'not installed'):
            self.node.start(['no-such-program'], self.path('log'))


class BorrowTest(MachineCase):
    """Lock files of other programs, which flock(1) stands for here."""

    def setUp(self) -> None:
        super().setUp()
        self.lock = self.path('V_vg')
        self.gone = self.path('gone')

    @contextlib.contextmanager
    def another(self, lock: str = '') -> Iterator[subprocess.Popen[str]]:
        """Have another program hold a lock until it hears something.

        The last that it does before it lets go is to make a file.
        """
        with subprocess.Popen(
            ['flock', '-o', lock or self.lock, 'sh', '-c',
             'echo in; read line; : > "$0"', self.gone],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as program:
            assert program.stdin and program.stdout
            try:
                self.assertEqual('in\n', program.stdout.readline())
                yield program
            finally:
                program.stdin.close()

    def is_free(self) -> bool:
        return subprocess.run(['flock', '-n', self.lock, 'true']
                              ).returncode == 0

    def wait_until_free(self) -> None:
        # A remote one is given back, and nobody waits for that.
        late = time.monotonic() + 30
        while not self.is_free() and time.monotonic() < late:
            pass
        self.assertTrue(self.is_free())

    def test_no_other_program_has_it_meanwhile(self) -> None:
        for _ in range(2):
            with self.node.borrow(self.lock, 30):
                self.assertFalse(self.is_free())
                self.node.run('true')
                self.assertFalse(self.is_free())
            self.wait_until_free()

    def test_it_is_given_back_after_a_failure(self) -> None:
        with self.assertRaisesRegex(errors.Busy, 'x'):
            with self.node.borrow(self.lock, 30):
                raise errors.Busy('x')
        self.wait_until_free()

    def test_who_has_it_is_named_and_not_ended(self) -> None:
        with self.another() as program:
            with self.assertRaisesRegex(
                errors.Unavailable, f'locked by process {program.pid}'
            ):
                with self.node.borrow(self.lock, 0.1):
                    self.fail('it has the lock')
            self.assertIsNone(program.poll())

    def test_it_waits_for_who_has_it(self) -> None:
        with self.another() as program:
            assert program.stdin
            timer = threading.Timer(0.3, program.stdin.close)
            timer.start()
            # The lock is free before the kernel tells of the end.
            with self.node.borrow(self.lock, 30):
                self.assertTrue(os.path.exists(self.gone))
            timer.join()

    def test_file_that_its_program_has_made_anew_is_the_lock(self) -> None:
        # LVM removes the file when it is done, and the next makes another.
        with self.another():
            os.unlink(self.lock)
            with self.node.borrow(self.lock, 30):
                self.assertFalse(self.is_free())

    def test_command_that_outlives_us_keeps_it(self) -> None:
        ready, late = self.path('ready'), self.path('late')
        os.mkfifo(ready)
        with self.node.borrow(self.lock, 30):
            self.node.run('sh', '-c', (
                f'(read line < {ready}; echo > {late}) '
                '> /dev/null 2>&1 < /dev/null &'
            ))
        self.assertFalse(self.is_free())
        with open(ready, 'w') as f:
            f.write('go\n')
        with self.node.borrow(self.lock, 30):
            self.assertTrue(os.path.exists(late))

    def test_lvm_keeps_it_though_it_closes_what_it_inherits(self) -> None:
        if shutil.which('lvm') is None:
            self.skipTest('no lvm')
        thread = threading.Thread(target=self.change_another_group)
        with self.another(self.path('V_another')):
            thread.start()
            late = time.monotonic() + 30
            while not (found := self.descriptors_of_lvm('V_another')):
                self.assertLess(time.monotonic(), late)
                time.sleep(0.01)
        thread.join(30)
        self.assertEqual(['0'], [
            number for number, path in found.items() if path == self.lock
        ])

    def change_another_group(self) -> None:
        with self.node.borrow(self.lock, 30):
            with self.assertRaises(CommandFailed):  # there is none
                self.node.run(
                    'lvm', 'lvchange', '-ay', 'another/lv', '--config',
                    f'global{{locking_dir="{self.root}"}}'
                    'devices{use_devicesfile=0 filter=["r|.*|"]}',
                )

    def descriptors_of_lvm(self, lock: str) -> dict[str, str]:
        """Return those of a command of LVM that waits for a lock of ours."""
        for proc in glob.glob('/proc/[0-9]*'):
            with contextlib.suppress(OSError):
                with open(f'{proc}/comm') as f:
                    if f.read() != 'lvm\n':
                        continue
                found = {
                    number: os.readlink(f'{proc}/fd/{number}')
                    for number in os.listdir(f'{proc}/fd')
                }
                if self.path(lock) in found.values():
                    return found
        return {}

    def test_lock_that_cannot_be_had_is_told_of(self) -> None:
        path = self.path('none/V_vg')
        with self.assertRaisesRegex(errors.Unavailable, 'No such file'):
            with self.node.borrow(path, 30):
                self.fail('it has the lock')


class OpenedTest(MachineCase):
    def test_zeros_come_whatever_the_file_system_can(self) -> None:
        # A file system in memory makes holes, and no zeros otherwise.
        for directory in self.root, '/dev/shm':
            for may_free in False, True:
                with self.subTest(directory, may_free=may_free):
                    self.check_zeros(directory, may_free)

    def check_zeros(self, directory: str, may_free: bool) -> None:
        size = 3 << 20
        with tempfile.NamedTemporaryFile(dir=directory) as named:
            named.write(b'x' * size)
            named.flush()
            with self.node.open(named.name, 'r+b') as file:
                is_freed = file.zero_out(5, size - 10, may_free)
                self.assertEqual(may_free, is_freed)
                self.assertEqual(size, file.size_bytes)
                found = file.read(size)
            self.assertEqual(
                b'x' * 5 + bytes(size - 10) + b'x' * 5, found
            )
            stored = self.node.allocated_bytes(named.name)
            if may_free:
                self.assertLess(stored, 1 << 20)
            else:
                self.assertGreaterEqual(stored, size)

    def test_device_without_any_way_to_make_zeros_is_written(self) -> None:
        with self.node.open('/dev/null', 'r+b') as file:
            self.assertFalse(file.zero_out(0, 1 << 21, may_free=True))
        with self.assertRaises(errors.NoSpace):
            with self.node.open('/dev/full', 'r+b') as file:
                file.zero_out(0, 1 << 21)

    def test_data_and_holes_are_found(self) -> None:
        path = self.path('a')
        with self.node.open(path, 'w+b') as file:
            file.pwrite(b'x', 1 << 20)
            file.truncate(4 << 20)
            data = file.find(0, True)
            hole = file.find(data, False)
            self.assertTrue(0 <= data <= 1 << 20 < hole <= 4 << 20)
            self.assertEqual(4 << 20, file.find(hole, True))
            self.assertEqual(4 << 20, file.find(5 << 20, False))

    def test_what_bears_a_name_is_told(self) -> None:
        os.symlink('none', self.path('l'))
        os.mkdir(self.path('d'))
        self.touch('f', 'abc')
        found = {
            name: self.node.about(self.path(name)) for name in 'ldfx'
        }
        self.assertIsNone(found.pop('x'))
        self.assertEqual(
            {'l': 'link', 'd': 'directory', 'f': 'file'},
            {name: about and about.kind for name, about in found.items()},
        )
        assert found['f']
        self.assertEqual(3, found['f'].size_bytes)
        self.assertFalse(self.node.is_block(self.path('f')))
        self.assertFalse(self.node.is_block(self.path('x')))

    def test_bytes_of_an_offset_do_not_move_the_position(self) -> None:
        with self.node.open(self.path('a'), 'w+b') as file:
            file.write(b'abcdef')
            file.pwrite(b'X', 1)
            buffer = bytearray(2)
            self.assertEqual(2, file.pread_into(buffer, 1))
            self.assertEqual(b'Xc', bytes(buffer))
            self.assertEqual(6, file.tell())
            self.assertEqual(0, file.readinto(buffer))
            file.seek(-2, os.SEEK_CUR)
            self.assertEqual(b'ef', file.read(9))
            file.seek(-1, os.SEEK_END)
            self.assertEqual(b'f', file.read())
            with self.assertRaises(errors.Invalid):
                file.seek(-1)

    def test_size_of_a_device_is_not_that_of_its_name(self) -> None:
        opened = Opened('/dev/null', 'rb')
        self.addCleanup(opened.close)
        self.assertEqual(0, opened.size())
