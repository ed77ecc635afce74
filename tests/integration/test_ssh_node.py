# SPDX-License-Identifier: Apache-2.0
"""A node over SSH: a real sshd on loopback, and what can be wrong with it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import unittest

from tests import sshd
from tests.unit import test_remote
from tests.unit.test_remote import lives
from tests.unit.test_remote import WAIT_S
from tests.unit.test_remote import wait_until
from volume import errors
from volume.remote import ssh
from volume.remote.node import SshNode


class SshNodeTest(test_remote.RemoteCase):
    server: sshd.Sshd

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.server = sshd.Sshd(cls)

    def setUp(self) -> None:
        self.addCleanup(
            self.server.set_command, self.server.agent_command()
        )
        self.addCleanup(self.server.know_host, 'host')
        super().setUp()

    def another(self) -> SshNode:
        return self.server.node(self)

    def refused(self, target: ssh.Target) -> str:
        node = SshNode(target)
        self.addCleanup(node.close)
        # Whoever waits for a node waits for all of this, too: it is mended.
        with self.assertRaises(errors.Unavailable) as caught:
            node.exists('/')
        return str(caught.exception)

    def test_all_goes_through_one_connection(self) -> None:
        with self.busy(self.node):
            self.assertTrue(self.node.exists('/'))
            # Those of earlier tests are on their way out.
            wait_until(self, lambda: len(self.server.sessions()) == 1)

    def test_hostile_arguments_arrive_as_they_are(self) -> None:
        out = self.node.run('printf', '%s\\0', *test_remote.HOSTILE)
        self.assertEqual(
            [name.replace('\udcff', '\ufffd')
             for name in test_remote.HOSTILE],
            out.split('\0')[:-1],
        )

    def test_cut_in_the_middle_of_a_command(self) -> None:
        with self.busy(self.node) as (pid, future):
            self.server.cut()
            with self.assertRaisesRegex(errors.Unknown, 'was to run'):
                future.result(WAIT_S)
            wait_until(self, lambda: not lives(pid))
        self.assertEqual('again\n', self.node.run('echo', 'again'))

    def test_client_that_dies_ends_what_it_asked_for(self) -> None:
        program = (
            'import os, sys\n'
            'from volume.remote import ssh\n'
            'from volume.remote.node import SshNode\n'
            'node = SshNode(ssh.Target(*sys.argv[2:4], int(sys.argv[4]),'
            ' *sys.argv[5:]))\n'
            'print(node.run("sh", "-c", "echo $$ >$0; exec sleep 600",'
            ' sys.argv[1], timeout_s=600))\n'
        )
        note = self.path('pid')
        target = self.server.target()
        with subprocess.Popen([
            sys.executable, '-c', program, note,
            *map(str, dataclasses.astuple(target)),
        ]) as client:
            wait_until(self, lambda: (
                os.path.exists(note) and os.stat(note).st_size > 1
            ))
            client.kill()
        with open(note) as f:
            pid = int(f.read())
        wait_until(self, lambda: not lives(pid))

    def test_stale_owner_is_kept_out(self) -> None:
        later = self.another()
        with self.node.hold(['v']):
            with later.hold(['v']):
                # Its agent is ended; whether before it was asked or in the
                # middle of it, nobody can say.
                with self.assertRaises((errors.Unavailable, errors.Unknown)):
                    self.node.write(self.path('f'), b'stale')
        self.assertFalse(later.exists(self.path('f')))

    def test_key_opens_the_agent_and_nothing_else(self) -> None:
        argv = self.server.target().argv()
        done = subprocess.run(
            [*argv[:-1], 'touch', self.path('shell')],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        )
        self.assertTrue(done.stdout.startswith(b'volnode1'), done.stderr)
        self.assertFalse(os.path.exists(self.path('shell')))

    def test_unknown_host_is_refused(self) -> None:
        open(self.server.path('known_hosts'), 'w').close()
        self.assertIn(
            'its host key is not in', self.refused(self.server.target())
        )

    def test_host_with_another_key_is_refused(self) -> None:
        self.server.know_host('other')
        self.assertIn(
            'its host key is not the one in',
            self.refused(self.server.target()),
        )

    def test_key_that_the_node_does_not_know_is_refused(self) -> None:
        self.assertIn(
            'it refuses the key', self.refused(self.server.target('other'))
        )

    def test_key_that_others_may_read_is_refused(self) -> None:
        path = self.server.path('key')
        os.chmod(path, 0o644)
        self.addCleanup(os.chmod, path, 0o600)
        self.assertIn(
            'give it mode 0600', self.refused(self.server.target())
        )

    def test_missing_files_are_named(self) -> None:
        for name in 'key_file', 'known_hosts_file':
            target = dataclasses.replace(
                self.server.target(), **{name: self.path('none')}
            )
            self.assertIn(self.path('none'), self.refused(target))

    def test_node_without_an_agent_is_told(self) -> None:
        self.server.set_command('volume-node-agent-of-nobody')
        self.assertIn(
            'install volume-service there',
            self.refused(self.server.target()),
        )

    def test_node_that_is_not_there_is_told(self) -> None:
        target = dataclasses.replace(self.server.target(), port=9)
        self.assertIn('it cannot be reached', self.refused(target))

    def test_directory_that_cannot_be_used_is_told(self) -> None:
        with open(self.server.state_path + '.file', 'w'):
            pass
        self.server.set_command(
            self.server.agent_command() + '.file/below'
        )
        self.assertIn(
            'cannot be used: Not a directory',
            self.refused(self.server.target()),
        )


class AddressTest(unittest.TestCase):
    def parse(self, address: str, **changed: str) -> ssh.Target:
        return ssh.parse(address, **{
            'key_file': '/k', 'known_hosts_file': '/h',
            'command': 'volume-node-agent', **changed,
        })

    def test_addresses_are_read(self) -> None:
        for address, user, host, port in (
            ('ssh://a@b', 'a', 'b', 22),
            ('ssh://storage-1.example:2222/', 'root', 'storage-1.example',
             2222),
            ('ssh://root@[fe80::1]:23', 'root', 'fe80::1', 23),
        ):
            target = self.parse(address)
            self.assertEqual(
                (user, host, port), (target.user, target.host, target.port)
            )
            self.assertEqual(target, self.parse(target.address))

    def test_what_ssh_could_misread_is_refused(self) -> None:
        for address in (
            'b', 'http://b', 'ssh://', 'ssh://-oProxyCommand=x',
            'ssh://-l@b', 'ssh://a:secret@b', 'ssh://a@b/x', 'ssh://a@b:x',
            'ssh://a@b:99999', 'ssh://a b@c', 'ssh://a@b c', 'ssh://a@b?x',
            'ssh://a;b@c', 'ssh://a@$(b)', 'ssh://a@b\nc',
        ):
            with self.subTest(address), self.assertRaises(errors.Invalid):
                self.parse(address)
        for option in 'key_file', 'known_hosts_file', 'command':
            for value in '', 'a b\n', '/a%h', '/a "b"', '$(x)', '/~;x':
                with self.subTest(option, value=value):
                    with self.assertRaises(errors.Invalid):
                        self.parse('ssh://a@b', **{option: value})


if __name__ == '__main__':
    unittest.main()
