# SPDX-License-Identifier: Apache-2.0
"""The door to the machine: commands within limits, files that are durable."""

import concurrent.futures
import contextvars
import errno
import fcntl
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import unittest

from tests import hung
from volume import errors
from volume import node as nodes
from volume.testing import fixtures

PYTHON = sys.executable

LINKS_MAX = 70_000  # ext4 has room for 65,000

# A command that a time limit has to end must not end by itself before.
FOREVER = 'import time; time.sleep(600)'


class Command(unittest.TestCase):
    """Node.run."""

    def setUp(self):
        self.node = fixtures.make_node(self)
        self.before = children()

    def python(self, code, **options):
        return self.node.run(PYTHON, '-c', code, **options)

    def test_output_is_returned(self):
        self.assertEqual('hello\n', self.node.run('echo', 'hello'))

    def test_no_shell_reads_the_words(self):
        self.assertEqual('$HOME; ls *\n', self.node.run('echo', '$HOME; ls *'))

    def test_exit_code_other_than_zero_is_an_error_with_the_reason(self):
        with self.assertRaises(nodes.CommandFailed) as caught:
            self.python('import sys; sys.exit("no such thing")')
        self.assertEqual(1, caught.exception.code)
        self.assertEqual('no such thing\n', caught.exception.stderr)
        self.assertIn('no such thing', str(caught.exception))

    def test_missing_command_is_unavailable(self):
        with self.assertRaisesRegex(errors.Unavailable, 'not installed'):
            self.node.run('no-such-command-here')

    def test_missing_command_within_limits_is_unavailable(self):
        with self.assertRaisesRegex(
            errors.Unavailable, 'no-such-command-here is not installed'
        ):
            self.node.run('no-such-command-here', limits=nodes.Limits())

    def test_command_that_may_not_be_run_is_one_of_our_errors(self):
        path = os.path.join(self.node.state_dir, 'data')
        self.node.write(path, b'not a program')
        with self.assertRaises(errors.Invalid):
            self.node.run(path)

    def test_failed_command_within_limits_is_called_by_its_name(self):
        with self.assertRaisesRegex(nodes.CommandFailed, '^false failed'):
            self.node.run('false', limits=nodes.Limits())

    def test_killed_command_is_an_error(self):
        with self.assertRaises(nodes.CommandFailed) as caught:
            self.python('import os; os.kill(os.getpid(), 9)')
        self.assertEqual(-signal.SIGKILL, caught.exception.code)

    def test_time_limit_ends_the_command(self):
        with self.assertRaisesRegex(errors.Unknown, 'within 0.5 s'):
            self.python(FOREVER, timeout_s=0.5)
        self.assert_no_child()

    def test_time_limit_ends_what_the_command_started(self):
        path = os.path.join(self.node.state_dir, 'pid')
        # Until there was time enough for it to start something.
        for timeout_s in 2, 10, 60:
            with self.assertRaises(errors.Unknown):
                self.python(
                    'import os, subprocess, sys\n'
                    'c = subprocess.Popen('
                    f'[sys.executable, "-c", {FOREVER!r}])\n'
                    f'open("{path}.new", "w").write(str(c.pid))\n'
                    f'os.rename("{path}.new", {path!r})\n'
                    'c.wait()', timeout_s=timeout_s,
                )
            if os.path.exists(path):
                break
        with open(path) as f:
            self.assert_ends(int(f.read()))

    def test_time_limit_ends_a_command_that_closed_its_output(self):
        with self.assertRaisesRegex(errors.Unknown, 'within 0.5 s'):
            self.python(f'import os; os.close(1); os.close(2); {FOREVER}',
                        timeout_s=0.5)
        self.assert_no_child()

    def test_command_that_cannot_be_killed_keeps_nobody_waiting(self):
        def cancels(percent):
            raise errors.Cancelled('a person wants it')

        disk = hung.Hung(self)
        disk.stick()
        lock, path = tempfile.mkstemp()
        self.addCleanup(os.unlink, path)
        token = nodes.held.set((lock,))
        self.addCleanup(nodes.held.reset, token)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def stat(watch):
            # One that has asked for nothing yet can be killed: then again.
            for _ in range(20):
                try:
                    self.node.run(
                        'stat', disk.path, watch=watch,
                        timeout_s=60 if watch else 0.5,
                    )
                except errors.VolumeError as failed:
                    if 'was killed' in str(failed):
                        raise
            self.fail('each was ended, or nobody was told of it')

        with concurrent.futures.ThreadPoolExecutor() as threads:
            pending = [
                (threads.submit(contextvars.copy_context().run, stat, watch),
                 words) for watch, words in (
                    (None, 'stat did not end within 0.5 s; stat was killed'),
                    (cancels, 'a person wants it; stat was killed and has'),
                )
            ]
            for future, words in pending:
                with self.assertRaisesRegex(errors.Unknown, words):
                    future.result(60)
        # Nobody can work beside it; and once it is free, it is reaped.
        os.close(lock)
        with open(path) as another:
            with self.assertRaises(BlockingIOError):
                fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
            disk.end()
            fcntl.flock(another, fcntl.LOCK_EX)
        for thread in threading.enumerate():
            if thread.name.startswith('reap-'):
                thread.join(20)
                self.assertFalse(thread.is_alive())

    def test_output_is_bounded(self):
        for stream in 'stdout', 'stderr':
            with self.assertRaisesRegex(errors.Unknown, 'over 1000 bytes'):
                self.python(
                    f'import sys\nwhile True: sys.{stream}.write("x" * 99)',
                    output_bytes_max=1000,
                )
        self.assert_no_child()

    def test_input_is_given_to_the_command(self):
        self.assertEqual('abc', self.node.run('cat', input_bytes=b'abc'))

    def test_command_without_input_reads_nothing(self):
        self.assertEqual('', self.node.run('cat'))

    def test_command_that_ignores_its_input_says_so_by_its_code(self):
        self.node.run('true', input_bytes=bytes(1 << 16))
        with self.assertRaises(nodes.CommandFailed):
            self.node.run('false', input_bytes=bytes(1 << 16))

    def test_environment_is_the_same_everywhere(self):
        os.environ['VOLUME_TEST_SECRET'] = 'x'
        self.addCleanup(os.environ.pop, 'VOLUME_TEST_SECRET')
        names = self.node.run('env').split('\n')
        self.assertIn('LC_ALL=C', names)
        self.assertEqual([], [n for n in names if 'VOLUME_TEST' in n])

    def test_command_has_a_process_group_of_its_own(self):
        pid, group = self.python(
            'import os; print(os.getpid(), os.getpgrp())'
        ).split()
        self.assertEqual(pid, group)
        self.assertNotEqual(os.getpgrp(), int(group))

    def test_command_inherits_no_file_of_ours(self):
        r, w = os.pipe()
        os.set_inheritable(w, True)
        self.addCleanup(os.close, r)
        self.addCleanup(os.close, w)
        files = self.node.run('ls', '/proc/self/fd').split()
        self.assertNotIn(str(w), files)

    def test_secrets_are_masked_in_errors(self):
        with self.assertRaises(nodes.CommandFailed) as caught:
            self.python(
                'import sys\n'
                'sys.exit("login bob hunter2, password=swordfish")',
                secrets=['hunter2'],
            )
        text = f'{caught.exception} {caught.exception.stderr}'
        self.assertNotIn('hunter2', text)
        self.assertNotIn('swordfish', text)
        self.assertIn('***', text)

    def assert_no_child(self):
        self.assertEqual(set(), children() - self.before)

    def assert_ends(self, pid):
        deadline = time.monotonic() + 10
        while is_running(pid):
            self.assertLess(time.monotonic(), deadline, f'{pid} lives on')
            time.sleep(0.01)


class Watch(unittest.TestCase):
    """Progress of a command, and its end from outside."""

    PROGRESS = (
        'import sys, time\n'
        'for p in 0, 12.5, 50, 100:\n'
        '    sys.stdout.write(f"    ({p:.2f}/100%)\\r")\n'
        '    sys.stdout.flush()\n'
        '    time.sleep(0.05)\n'
    )

    def setUp(self):
        self.node = fixtures.make_node(self)

    def test_percentage_is_told(self):
        seen = []
        self.node.run(PYTHON, '-c', self.PROGRESS, watch=seen.append)
        self.assertEqual(sorted(seen), seen)
        self.assertEqual(100.0, seen[-1])

    def test_silent_command_is_watched_too(self):
        calls, before = [], children()

        def stop(percent):
            calls.append(percent)
            raise errors.Cancelled('stop')

        with self.assertRaises(errors.Cancelled):
            self.node.run(PYTHON, '-c', FOREVER, watch=stop)
        self.assertEqual([0.0], calls)
        self.assertEqual(set(), children() - before)

    def test_long_progress_is_no_long_output(self):
        self.node.run(
            PYTHON, '-c',
            'for p in range(20000): print(f"({p / 200:.2f}/100%)", end="\\r")',
            watch=lambda percent: None, output_bytes_max=100_000,
        )


class Limited(unittest.TestCase):
    """What parses foreign bytes cannot take the machine down."""

    def setUp(self):
        self.node = fixtures.make_node(self)

    def python(self, code, **limits):
        return self.node.run(PYTHON, '-c', code, limits=nodes.Limits(**limits))

    def test_memory_is_bounded(self):
        with self.assertRaisesRegex(nodes.CommandFailed, 'MemoryError'):
            self.python('bytearray(1 << 29)', address_bytes=1 << 28)
        self.python('bytearray(1 << 20)', address_bytes=1 << 28)

    def test_processor_time_is_bounded(self):
        with self.assertRaises(nodes.CommandFailed) as caught:
            self.python('while True: pass', cpu_s=1)
        self.assertIn(
            -caught.exception.code, (signal.SIGXCPU, signal.SIGKILL)
        )

    def test_files_are_bounded(self):
        path = os.path.join(self.node.state_dir, 'big')
        with self.assertRaises(nodes.CommandFailed):
            self.python(
                f'f = open({path!r}, "wb"); f.write(bytes(1 << 16))',
                file_bytes=4096,
            )
        self.assertLessEqual(self.node.size(path), 4096)


class Files(unittest.TestCase):
    """Files of the node."""

    def setUp(self):
        self.node = fixtures.make_node(self)

    def path(self, name):
        return os.path.join(self.node.state_dir, name)

    def test_small_file_is_written_whole_and_read_back(self):
        path = self.path('note')
        for data in b'one', b'':
            self.node.write(path, data)
            self.assertEqual(data, self.node.read(path))
        self.assertEqual(['note'], self.node.list(self.node.state_dir))

    def test_read_is_bounded(self):
        self.node.write(self.path('big'), bytes(11))
        with self.assertRaisesRegex(errors.Invalid, 'over 10 bytes'):
            self.node.read(self.path('big'), bytes_max=10)

    def test_what_is_absent_is_not_found(self):
        path = self.path('none')
        for call in (
            self.node.size, self.node.read, self.node.list, self.node.open,
            self.node.readlink,
        ):
            with self.assertRaises(errors.NotFound):
                call(path)
        self.assertFalse(self.node.exists(path))
        self.assertFalse(self.node.is_file(path))
        self.assertEqual(0, self.node.allocated_bytes(path))
        self.node.unlink(path)

    def test_absence_is_never_guessed_from_another_failure(self):
        self.node.write(self.path('file'), b'')
        for ask in self.node.exists, self.node.is_file:
            with self.assertRaises(errors.Invalid):
                ask(self.path('file/below'))

    def test_dangling_link_exists_and_is_no_file(self):
        self.node.point(self.path('link'), 'nowhere')
        self.assertTrue(self.node.exists(self.path('link')))
        self.assertFalse(self.node.is_file(self.path('link')))

    def test_link_is_switched_in_one_step(self):
        for target in 'one', 'two':
            self.node.point(self.path('link'), target)
            self.assertEqual(target, self.node.readlink(self.path('link')))
        self.assertEqual(['link'], self.node.list(self.node.state_dir))

    def test_socket_is_no_plain_file(self):
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)
        server.bind(self.path('socket'))
        self.assertFalse(self.node.is_file(self.path('socket')))

    def test_directory_is_made_for_this_user_alone(self):
        for _ in range(2):
            self.node.make_directory(self.path('a/b'))
        mode = os.stat(self.path('a/b')).st_mode
        self.assertEqual(0o700, stat.S_IMODE(mode))

    def test_rename_replaces_its_target(self):
        self.node.write(self.path('a'), b'new')
        self.node.write(self.path('b'), b'old')
        self.node.rename(self.path('a'), self.path('b'))
        self.assertEqual(b'new', self.node.read(self.path('b')))
        self.assertFalse(self.node.exists(self.path('a')))

    def test_open_file_is_written_at_its_position(self):
        with self.node.open(self.path('f'), 'wb') as f:
            f.truncate(1000)
            f.seek(500)
            f.write(b'abc')
            f.sync()
        with self.node.open(self.path('f')) as f:
            self.assertEqual(500, f.seek(500))
            self.assertEqual(b'abc\0', f.read(4))
            f.seek(1000)
            self.assertEqual(b'', f.read(4))

    def test_punched_run_reads_as_zeros_and_frees_its_space(self):
        path = self.path('f')
        with self.node.open(path, 'w+b') as f:
            f.write(b'\xff' * (1 << 20))
            f.sync()
            before = self.node.allocated_bytes(path)
            f.punch(4096, (1 << 20) - 8192)
            f.sync()
            f.seek(4095)
            self.assertEqual(b'\xff\0', f.read(2))
        self.assertEqual(1 << 20, self.node.size(path))
        self.assertLess(self.node.allocated_bytes(path), before // 4)

    def test_full_device_is_no_space(self):
        with self.node.open('/dev/full', 'r+b') as f:
            with self.assertRaises(errors.NoSpace):
                f.write(b'x')

    def test_file_that_cannot_be_opened_leaves_nothing_behind(self):
        # A half-made object would complain when it is collected.
        seen = []
        old, sys.unraisablehook = sys.unraisablehook, seen.append
        self.addCleanup(setattr, sys, 'unraisablehook', old)
        with self.assertRaises(errors.NotFound):
            self.node.open(self.path('none'))
        self.assertEqual([], seen)

    def test_space_is_the_same_device_for_one_file_system(self):
        self.node.make_directory(self.path('a'))
        here, below = (
            self.node.space(self.node.state_dir),
            self.node.space(self.path('a')),
        )
        self.assertEqual(here.device, below.device)
        self.assertLessEqual(here.free_bytes, here.total_bytes)
        self.assertNotEqual(here.device, self.node.space('/proc').device)

    def test_file_system_without_reflink_is_unsupported(self):
        directory = fixtures.plain_directory(self)
        source = os.path.join(directory, 'a')
        self.node.write(source, b'x' * 4096)
        with self.assertRaises(errors.Unsupported):
            self.node.clone_file(source, os.path.join(directory, 'b'))
        self.assertEqual(['a'], os.listdir(directory))

    def test_clone_of_a_file_has_its_bytes(self):
        directory = fixtures.reflink_directory(self)
        source, target = (os.path.join(directory, name) for name in 'ab')
        self.node.write(source, b'x' * 4096)
        self.node.clone_file(source, target)
        self.node.write(source, b'y' * 4096)
        self.assertEqual(b'x' * 4096, self.node.read(target))

    def test_file_that_can_have_no_second_name_keeps_its_own(self):
        source, other = self.path('a'), self.path('b')
        self.node.write(source, b'x')
        try:
            for number in range(LINKS_MAX):
                os.link(source, self.path(f'l{number}'))
        except OSError as failed:
            self.assertEqual(errno.EMLINK, failed.errno)
        else:
            self.skipTest('no file system with a limit of links')
        with self.assertRaisesRegex(errors.Unsupported, 'no hard links'):
            self.node.hard_link(source, other)
        self.assertEqual(b'x', self.node.read(source))
        self.assertFalse(self.node.exists(other))

    def test_second_name_is_of_the_same_file_and_may_be_given_again(self):
        source, other = self.path('a'), self.path('b')
        self.node.write(source, b'x')
        self.node.hard_link(source, other)
        self.node.hard_link(source, other)
        self.assertTrue(os.path.samefile(source, other))

    def test_clone_of_what_is_absent_is_not_found(self):
        with self.assertRaises(errors.NotFound):
            self.node.clone_file(self.path('none'), self.path('b'))
        self.assertEqual([], self.node.list(self.node.state_dir))


class Mask(unittest.TestCase):

    def test_what_looks_like_a_secret_is_masked(self):
        for text in (
            'password=abc', 'PASSWORD: abc', 'api_token=abc', 'secret-key=abc',
            '{"auth_password": "abc", "x": 1}', "{'key': 'abc', 'x': 1}",
            '--key=abc', 'http://h/x?token=abc', '(secret: abc)', 'key:abc',
            'x=1,key=abc', 'password:\nabc', '-opassword=abc and more',
            # A path, and yet a secret.
            '/v3/x?key=abc is wrong', '/x/key=abc is wrong', '/x/key:abc is',
            '/x/key: abc', '/x/key: abc1 is wrong', '/x/key: aBc is wrong',
            '/x/password: abc is wrong', '/x/y:key: abc is wrong',
            '/x/key: is wrong, key: abc',
        ):
            self.assertNotIn('abc', nodes.mask(text), text)

    def test_named_secrets_are_masked_wherever_they_stand(self):
        self.assertEqual('x ***y', nodes.mask('x abcy', ['abc', '']))

    def test_other_words_stay(self):
        for text in (
            'no space left on /dev/sda',
            'node admin@h: it refuses the key /x/other-key: add its public '
            'half to authorized_keys of user admin there',
            'open /x/node.key: No such file or directory',
            'open /x/secrets/a_key: Permission denied',
        ):
            self.assertEqual(text, nodes.mask(text))


class Modules(unittest.TestCase):

    def load(self, has_kmod):
        commands = []

        class Machine(nodes.Node):
            def exists(self, path):
                if path.endswith('/modprobe'):
                    return has_kmod
                return path == '/sys/module/is_there'

            def run(self, *argv, **_):
                commands.append(argv)
                if not has_kmod:
                    raise errors.Unavailable('modprobe is not installed')
                raise nodes.CommandFailed(argv, 1, 'FATAL: Module not found')

        node = Machine(fixtures.state_dir(self))
        node.load_modules('is-there')
        self.assertEqual([], commands)
        with self.assertRaises(errors.Unsupported) as seen:
            node.load_modules('is-there', 'not-there')
        self.assertEqual([('modprobe', '-a', 'not-there')], commands)
        self.assertIn(
            f'machine {socket.gethostname()} ', str(seen.exception)
        )
        self.assertIn(' module not-there of the kernel', str(seen.exception))
        return str(seen.exception)

    def test_machine_without_kmod_is_told_to_install_it_and_for_what(self):
        self.assertIn('install kmod', self.load(has_kmod=False))

    def test_kernel_without_the_module_is_said_to_be_that(self):
        self.assertIn('install a kernel', self.load(has_kmod=True))

    def test_node_that_does_not_answer_is_no_missing_program(self):
        class Silent(nodes.Node):
            def exists(self, path):
                return path.endswith('/modprobe')

            def run(self, *argv, **_):
                raise errors.Unavailable('the node does not answer')

        with self.assertRaisesRegex(errors.Unavailable, 'not answer'):
            Silent(fixtures.state_dir(self)).load_modules('not-there')


class Threads(unittest.TestCase):

    def test_commands_run_side_by_side(self):
        node = fixtures.make_node(self)
        found = []
        threads = [
            threading.Thread(
                target=lambda n=n: found.append(node.run('echo', str(n)))
            )
            for n in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual([f'{n}\n' for n in range(6)], sorted(found))


def children():
    """Return the processes that this one has started, ended ones too."""
    found = set()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/stat') as f:
                parent = int(f.read().rsplit(')', 1)[1].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            found.add(int(pid))
    return found


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False
