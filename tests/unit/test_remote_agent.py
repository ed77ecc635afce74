# SPDX-License-Identifier: Apache-2.0
"""Both ends of a connection, and what neither of them knows."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest
from collections.abc import Sequence

from tests import sshd
from tests.unit.test_remote import WAIT_S
from volume import errors
from volume.remote import wire
from volume.remote.node import SshNode
from volume.testing import fixtures


class AgentTest(unittest.TestCase):
    """What the agent makes of what is no service."""

    def setUp(self) -> None:
        self.root = fixtures.state_dir(self)

    def answer(self, data: bytes, *options: str) -> bytes:
        done = subprocess.run(
            [sys.executable, '-m', 'volume.remote.agent', '--state-path',
             self.root, *options],
            input=data, capture_output=True, timeout=60,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        self.assertTrue(done.stdout.startswith(wire.MAGIC))
        return done.stdout + done.stderr

    def frame(self, header: wire.Header) -> bytes:
        return wire.pack(header)[0]

    def test_what_is_no_frame_ends_it(self) -> None:
        for name, data in (
            ('text', b'GET / HTTP/1.1\r\n\r\n'),
            ('long', wire.LENGTHS.pack(1 << 31, 0)),
            ('much', wire.LENGTHS.pack(2, 1 << 31) + b'{}'),
            ('json', wire.LENGTHS.pack(2, 0) + b'{]'),
            ('list', wire.LENGTHS.pack(2, 0) + b'[]'),
            ('deep', wire.LENGTHS.pack(99999, 0) + b'[' * 99999),
            ('cut', self.frame({'id': 1, 'do': 'run'})[:-1]),
            ('nameless', self.frame({'id': 1})),
            ('numberless', self.frame({'do': 'ping'})),
            ('args', self.frame({'id': 1, 'do': 'size', 'args': 7})),
            ('held', self.frame({'id': 1, 'do': 'size', 'holds': {}})),
            ('cancel', self.frame({'id': 0, 'do': 'cancel', 'args': [[]]})),
        ):
            with self.subTest(name):
                self.assertIn(b'ends: ', self.answer(data))

    def test_strange_requests_are_refused_and_the_next_is_served(
        self
    ) -> None:
        strange: Sequence[wire.Header] = (
            {'do': 'eval', 'args': ['1']},
            {'do': '_run', 'args': []},
            {'do': 'file._raw', 'args': [1]},
            {'do': 'file.size', 'args': [99]},
            {'do': 'run', 'args': []},
            {'do': 'exists', 'args': []},
            {'do': 'exists', 'args': [7.5]},
            {'do': 'exists', 'args': ['/'], 'holds': [7]},
        )
        said = self.answer(b''.join(
            self.frame({'id': number, **header})
            for number, header in enumerate(strange)
        ) + self.frame({'id': 99, 'do': 'size', 'args': ['/dev/null']}))
        for number in range(len(strange)):
            self.assertIn(b'{"id":%d,"error":' % number, said)
        self.assertIn(b'{"id":99,"result":0}', said)

    def test_silence_ends_it(self) -> None:
        with subprocess.Popen(
            [sys.executable, '-m', 'volume.remote.agent', '--state-path',
             self.root, '--silence-s', '0.2'],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as agent:
            assert agent.stderr
            self.assertIn(b'silence for 0.2 s', agent.stderr.read())
            self.assertEqual(0, agent.wait(WAIT_S))

    def test_it_needs_nothing_but_python(self) -> None:
        package = os.path.dirname(os.path.dirname(os.path.abspath(
            wire.__file__
        )))
        done = subprocess.run(
            [sys.executable, '-I', '-S', '-c',
             'import sys; sys.path.insert(0, sys.argv[1]);'
             'from volume.remote import agent; '
             'print({name.partition(".")[0] for name in sys.modules}'
             ' - sys.stdlib_module_names - {"volume", "__main__"})',
             os.path.dirname(package)],
            capture_output=True, text=True, timeout=60,
        )
        self.assertEqual('set()\n', done.stdout, done.stderr)


class OtherTarget(sshd.DirectTarget):
    """Something else at the other end than an agent of this release."""

    program = ''

    def argv(self) -> list[str]:
        return [sys.executable, '-c', self.program]


class GreetingTest(unittest.TestCase):
    def refused(self, program: str) -> str:
        class Target(OtherTarget):
            pass

        Target.program = program
        plain = sshd.direct_target(fixtures.state_dir(self))
        node = SshNode(Target(
            plain.user, plain.host, plain.port, plain.key_file,
            plain.known_hosts_file, plain.command,
        ))
        self.addCleanup(node.close)
        messages = set()
        for _ in range(2):
            with self.assertRaises(errors.Unavailable) as caught:
                node.exists('/')
            messages.add(str(caught.exception))
        message, = messages
        self.assertTrue(message.startswith('node ssh://root@direct:22: '))
        return message

    def test_another_protocol_is_refused_by_its_number(self) -> None:
        program = (
            'import os; from volume.remote import wire; '
            'os.write(1, wire.MAGIC + wire.pack({"hello": 99})[0])'
        )
        self.assertIn(
            f'speaks protocol 99, and this service {wire.VERSION}: install',
            self.refused(program),
        )

    def test_something_else_is_told_as_it_speaks(self) -> None:
        self.assertIn("b'Welcome '", self.refused('print("Welcome to it")'))

    def test_last_words_are_told(self) -> None:
        self.assertIn('it has no volume-node-agent', self.refused(
            'import sys; sys.exit("bash: volume-node-agent: '
            'command not found")'
        ))

    def test_silence_at_once_is_told(self) -> None:
        self.assertIn('cut off', self.refused(''))


if __name__ == '__main__':
    unittest.main()
