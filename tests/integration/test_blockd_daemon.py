# SPDX-License-Identifier: Apache-2.0
"""The block daemon as a process: started, adopted, killed, ended."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor

from tests import ports
from tests.integration.blockd_case import BlockdCase
from volume import blockdaemon
from volume import errors
from volume import qmp
from volume.blockd import Blockd
from volume.node import Node

# Its first thread ends, and another one lives on and heeds no SIGTERM.
LAST_THREAD = """
import ctypes, signal, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""

# Stands for the daemon: it is deaf for some starts, then it is the daemon.
# Deaf is who sets up all, greets, and answers no command.
DEAF = """#!{python}
import os, socket, sys
directory, starts, hangs_up = {directory!r}, {starts}, {hangs_up}
with open(directory + '/starts', 'a+') as f:
    f.write(str(os.getpid()) + ' ')
    f.seek(0)
    nth = len(f.read().split())
if nth > starts:
    os.execvp({program!r}, [{program!r}, *sys.argv[1:]])
ready = socket.socket(socket.AF_UNIX)
ready.bind({ready!r} + '.deaf')
ready.listen()
os.rename({ready!r} + '.deaf', {ready!r})
with open(sys.argv[sys.argv.index('--pidfile') + 1], 'w') as f:
    f.write(str(os.getpid()))
taken = []
while True:
    taken.append(ready.accept()[0])
    taken[-1].sendall(b'{{"QMP": {{"version": {{}}, "capabilities": []}}}}\\n')
    if hangs_up:
        taken.pop().close()
"""


class DeafProcess(blockdaemon.Process):
    """Its daemon is another program."""

    program = ''

    def _argv(self) -> list[str]:
        return [
            self.program if each == blockdaemon.PROGRAM else each
            for each in super()._argv()
        ]


class DaemonTest(BlockdCase):
    def test_first_start_is_news_and_told_once(self) -> None:
        self.assertTrue(self.blockd.ensure())
        self.assertFalse(self.blockd.ensure())

    def test_restarted_service_adopts_the_daemon_and_its_exports(
        self
    ) -> None:
        self.qcow2('a')
        self.blockd.ensure()
        uri = self.blockd.export('one', self.chain('a'), True)
        client = self.client(uri)
        later = Blockd(Node(self.root), self.directory)
        self.assertFalse(later.ensure())
        self.assertEqual({'one': self.path('a')}, later.exports())
        self.assertTrue(later.is_open(self.path('a')))
        self.assertEqual(uri, later.export('one', self.chain('a'), True))
        client.pread_into(bytearray(1), 0)
        later.unexport('one')
        self.assertEqual({}, self.blockd.exports())

    def test_killed_daemon_is_started_again_and_names_come_back(
        self
    ) -> None:
        self.qcow2('base')
        self.qcow2('a', below='base')
        chain = self.chain('a', 'base')
        self.blockd.ensure()
        uri = self.blockd.export('one', chain, True)
        self.write(uri, b'flushed')
        first = self.pid()
        self.kill()
        self.assertEqual({}, self.blockd.exports())
        self.assertFalse(self.blockd.is_open(self.path('a')))
        self.blockd.unexport('one')
        self.assertTrue(self.blockd.ensure())
        self.assertNotEqual(first, self.pid())
        self.assertEqual(uri, self.blockd.export('one', chain, True))
        self.assertEqual(b'flushed', self.read(uri, 7))

    def test_start_by_an_export_is_still_told_to_whoever_restores(
        self
    ) -> None:
        self.raw('a')
        self.blockd.ensure()
        self.kill()
        self.blockd.export('one', self.plain('a'), True)
        self.assertTrue(self.blockd.ensure())
        self.assertEqual({'one': self.path('a')}, self.blockd.exports())

    def test_lost_reply_to_the_start_is_mended_by_adopting(self) -> None:
        for before in True, False:
            self.node.what = 'start qemu-storage-daemon'
            self.node.before = before
            with self.assertRaises(errors.VolumeError):
                self.blockd.ensure()
            self.assertTrue(self.blockd.ensure())
            self.blockd.stop()

    def test_daemon_has_a_session_of_its_own_and_many_files(self) -> None:
        self.blockd.ensure()
        pid = self.pid()
        self.assertEqual(pid, os.getsid(pid))
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        self.assertGreaterEqual(soft, 4096)

    def test_too_low_limit_of_files_is_raised_when_it_is_found(self) -> None:
        self.blockd.ensure()
        _, hard = resource.prlimit(self.pid(), resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid(), resource.RLIMIT_NOFILE, (1024, hard))
        self.blockd.ensure()
        soft, _ = resource.prlimit(self.pid(), resource.RLIMIT_NOFILE)
        self.assertGreaterEqual(soft, 4096)

    def test_daemon_inherits_no_lock_of_its_starter(self) -> None:
        with self.node.hold(exclusive=['volume']):
            self.blockd.ensure()
        names = {
            os.readlink(f'/proc/{self.pid()}/fd/{fd}')
            for fd in os.listdir(f'/proc/{self.pid()}/fd')
        }
        self.assertNotIn(self.path('locks/volume'), names)

    def test_starting_at_once_starts_one(self) -> None:
        others = [Blockd(Node(self.root), self.directory) for _ in range(6)]
        with ThreadPoolExecutor(6) as threads:
            news = list(threads.map(lambda each: each.ensure(), others))
        self.assertEqual(1, sum(news))

    def test_directory_is_for_its_owner_alone(self) -> None:
        os.mkdir(self.directory, 0o755)
        self.blockd.ensure()
        self.assertEqual(0o700, os.stat(self.directory).st_mode & 0o777)

    def test_stop_ends_it_and_may_be_repeated(self) -> None:
        self.blockd.stop()
        self.blockd.ensure()
        pid = self.pid()
        Blockd(Node(self.root), self.directory).stop()
        self.blockd.stop()
        with self.assertRaises(ProcessLookupError):
            os.kill(pid, 0)

    def test_daemon_whose_last_thread_lives_is_not_taken_for_dead(
        self
    ) -> None:
        self.blockd.ensure()
        self.blockd.stop()
        with subprocess.Popen(
            [sys.executable, '-c', LAST_THREAD], stdout=subprocess.PIPE
        ) as half:
            try:
                half.stdout.readline()
                fields = []
                while fields[:1] != ['Z']:
                    with open(f'/proc/{half.pid}/stat') as f:
                        fields = f.read().rpartition(')')[2].split()
                self.record(half.pid, int(fields[19]))
                self.blockd.stop()
                self.assertEqual(-signal.SIGKILL, half.wait(10))
            finally:
                half.kill()

    def record(self, pid: int, start: int) -> None:
        """Leave word that the daemon is this process."""
        record = {
            'address': os.path.join(self.directory, 'nbd'),
            'pid': pid, 'start': start,
        }
        with open(os.path.join(self.directory, 'daemon.json'), 'w') as f:
            json.dump(record, f)

    def test_stop_never_ends_a_process_that_got_the_pid_later(self) -> None:
        self.blockd.ensure()
        self.blockd.stop()
        with subprocess.Popen(['sleep', '60']) as bystander:
            try:
                self.record(bystander.pid, 1)
                self.blockd.stop()
                self.assertIsNone(bystander.poll())
                self.assertTrue(self.blockd.ensure())
            finally:
                bystander.kill()

    def test_stopped_daemon_is_ended_all_the_same(self) -> None:
        self.blockd.ensure()
        os.kill(self.pid(), signal.SIGSTOP)
        self.blockd.stop()
        self.assertTrue(self.blockd.ensure())

    def test_daemon_without_its_sockets_is_not_taken_for_dead(self) -> None:
        self.blockd.ensure()
        for path in qmp.paths(self.directory):
            os.unlink(path)
        for call in (
            self.blockd.ensure, self.blockd.exports,
            self.blockd.open_files, lambda: self.blockd.unexport('x'),
        ):
            with self.assertRaises(errors.Unavailable):
                call()

    def test_lost_record_is_written_again(self) -> None:
        self.blockd.ensure()
        pid = self.pid()
        os.unlink(os.path.join(self.directory, 'daemon.json'))
        self.assertFalse(self.blockd.ensure())
        self.assertEqual(pid, self.pid())

    def test_taken_monitors_are_passed_over(self) -> None:
        self.raw('a')
        self.blockd.ensure()
        with contextlib.ExitStack() as stack:
            for _ in range(qmp.MONITORS - 1):
                stack.enter_context(
                    qmp.conversation(self.node, self.directory)
                )
            self.blockd.export('one', self.plain('a'), True)

    def test_stranger_on_a_monitor_blocks_nobody(self) -> None:
        self.blockd.ensure()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(qmp.paths(self.directory)[0])
            stranger.recv(100)
            self.assertEqual({}, self.blockd.exports())

    def test_why_it_does_not_start_is_said(self) -> None:
        os.makedirs(os.path.join(self.directory, 'nbd'), 0o700)
        with self.assertRaisesRegex(errors.Unavailable, 'nbd'):
            self.blockd.ensure()

    def deaf(self, starts: int, hangs_up: bool) -> DeafProcess:
        """Return a process whose first starts are deaf."""
        made = DeafProcess(self.node, self.directory, None)
        made.program = self.path('deaf')
        with open(made.program, 'w') as f:
            f.write(DEAF.format(
                python=sys.executable, directory=self.root, starts=starts,
                hangs_up=hangs_up, program=blockdaemon.PROGRAM,
                ready=qmp.paths(self.directory)[-1],
            ))
        os.chmod(made.program, 0o700)
        self.addCleanup(self.end_starts)
        return made

    def end_starts(self) -> None:
        for pid in self.starts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def starts(self) -> list[int]:
        """Return the pids of all that were started."""
        with open(self.path('starts')) as f:
            return [int(pid) for pid in f.read().split()]

    def test_daemon_that_starts_deaf_is_ended_and_started_anew(self) -> None:
        self.deaf(1, hangs_up=False).bring_up()
        first, second = self.starts()
        with self.assertRaises(ProcessLookupError):
            os.kill(first, 0)
        self.assertEqual(second, self.pid())
        self.assertEqual({}, self.blockd.exports())

    def test_of_a_daemon_that_is_deaf_each_time_nothing_is_left(
        self
    ) -> None:
        process = self.deaf(blockdaemon.STARTS, hangs_up=True)
        with self.assertRaisesRegex(
            errors.Unavailable, 'qemu-storage-daemon does not answer'
        ):
            process.bring_up()
        pids = self.starts()
        self.assertEqual(blockdaemon.STARTS, len(pids))
        for pid in pids:
            with self.assertRaises(ProcessLookupError):
                os.kill(pid, 0)
        # Nor is anything in the way of one that hears.
        process.bring_up()
        self.assertEqual({}, self.blockd.exports())

    def test_path_too_long_for_a_socket_is_refused_with_the_reason(
        self
    ) -> None:
        long = os.path.join(self.root, 'x' * 100)
        with self.assertRaisesRegex(errors.Invalid, '107'):
            Blockd(self.node, long).ensure()

    def test_path_with_a_comma_and_a_blank_works(self) -> None:
        odd = Blockd(self.node, self.path('a,b c'))
        self.addCleanup(odd.stop)
        self.raw('a', b'x')
        self.assertEqual(
            b'x', self.read(odd.export('one', self.plain('a'), False), 1)
        )

    def test_tcp_serves_on_loopback(self) -> None:
        port = ports.free()
        tcp = Blockd(self.node, self.path('t'), tcp=f'127.0.0.1:{port}')
        self.addCleanup(tcp.stop)
        self.raw('a', b'x')
        uri = tcp.export('one', self.plain('a'), False)
        self.assertEqual(f'nbd://127.0.0.1:{port}/one', uri)
        self.assertEqual(b'x', self.copied(uri)[:1])
        # One address a daemon: another wish is not silently ignored.
        with self.assertRaises(errors.Unavailable):
            Blockd(self.node, self.path('t')).ensure()

    def test_tcp_on_anything_but_loopback_is_refused(self) -> None:
        for tcp in (
            '0.0.0.0:10809', '192.0.2.1:10809', 'localhost:1', '127.0.0.1',
            '127.0.0.1:0', '127.0.0.1:99999', '[::]:1', '::1:80', '',
        ):
            with self.subTest(tcp), self.assertRaises(errors.Invalid):
                Blockd(self.node, self.directory, tcp=tcp)


if __name__ == '__main__':
    unittest.main()
