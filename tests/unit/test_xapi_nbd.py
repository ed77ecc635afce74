# SPDX-License-Identifier: Apache-2.0
"""The NBD server of the simulator is one to any client, and to ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.parse
from collections.abc import Iterator

from tests import vhds
from tests.integration import hostile_case
from tests.vhds import MIB
from volume import concurrency
from volume import errors
from volume import nbd as client
from volume.sim.xapi.disk import disks
from volume.sim.xapi.disk import vhd_disk
from volume.sim.xapi.failure import Failure
from volume.sim.xapi.net import nbd
from volume.sim.xapi.sm.taps import Taps

SIZE = 6 * MIB
NAME = '/11111111-0000-4000-8000-000000000000?session_id=OpaqueRef:a b'


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.chance = random.Random(hostile_case.seed(self.id()))
        self.directory = self.enterContext(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.directory, 'disk.vhd')
        format = vhd_disk.Vhd()
        format.create(self.path, SIZE)
        self.model = bytearray(SIZE)
        with format.open(self.path, True) as disk:
            for at in 0, 3 * MIB - 77, SIZE - 50_000:
                data = self.chance.randbytes(50_000)
                disk.pwrite(at, data)
                self.model[at:at + 50_000] = data
        self.is_writable = True
        self.taps = Taps(
            lambda uuid, writable: format.open(self.path, writable))

    def resolve(self, name: str) -> disks.Disk:
        if name != NAME:
            raise Failure('UUID_INVALID', 'VDI', name)
        return self.taps.open('disk', self.is_writable)

    def server(
        self, tls: ssl.SSLContext | None = None, most: int = 16
    ) -> nbd.NbdServer:
        server = nbd.NbdServer(
            self.resolve, tls=tls, connections_max=most)
        self.addCleanup(server.close)
        return server

    def uri(self, server: nbd.NbdServer, scheme: str = 'nbd') -> str:
        host, port = server.address
        return f'{scheme}://{host}:{port}/{urllib.parse.quote(NAME, "")}'

    def nothing_is_left(self, server: nbd.NbdServer) -> None:
        server.close()
        self.assertEqual(0, server.connections())
        self.assertEqual([], self.taps.opened())


class Ours(Case):
    def test_what_is_written_is_read_and_in_the_file(self) -> None:
        server = self.server()
        ours = client.NbdClient(self.uri(server))
        self.assertEqual(SIZE, ours.size_bytes)
        self.assertFalse(ours.is_read_only)
        for _ in range(40):
            at = self.chance.randrange(SIZE)
            length = min(
                self.chance.choice((1, 512, 70_000, 3 * MIB)), SIZE - at)
            if self.chance.random() < 0.3:
                ours.zero(at, length)
                self.model[at:at + length] = bytes(length)
            else:
                data = self.chance.randbytes(length)
                ours.pwrite_ahead(data, at)
                self.model[at:at + length] = data
        ours.flush()
        found = bytearray(SIZE)
        ours.pread_into(found, 0)
        self.assertEqual(self.model, found)
        with open(self.path, 'rb') as file:
            self.assertEqual(self.model, vhds.naive(file.read()))
        ours.close()
        self.nothing_is_left(server)

    def test_connections_see_each_others_bytes(self) -> None:
        server = self.server()
        clients = [client.NbdClient(self.uri(server)) for _ in range(4)]

        def work(number: int) -> None:
            for step in range(20):
                at = (step * 4 + number) * 70_000
                data = bytes([number + 1]) * 70_000
                clients[number].pwrite(data, at)
                self.model[at:at + 70_000] = data

        threads = [
            threading.Thread(target=work, args=(number,))
            for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for each in clients:
            found = bytearray(SIZE)
            each.pread_into(found, 0)
            self.assertEqual(self.model, found)
            each.close()
        self.nothing_is_left(server)

    def test_a_disk_for_reading_is_not_written(self) -> None:
        self.is_writable = False
        server = self.server()
        ours = client.NbdClient(self.uri(server))
        self.assertTrue(ours.is_read_only)
        with self.assertRaises(errors.Invalid):
            ours.pwrite(b'x', 0)
        # Nor by one that does not look at the flags.
        ours._flags &= ~client.READ_ONLY
        with self.assertRaises(errors.Invalid):
            ours.pwrite(b'x', 0)
        found = bytearray(SIZE)
        ours.pread_into(found, 0)
        self.assertEqual(self.model, found)
        ours.close()

    def test_an_unknown_name_is_not_found(self) -> None:
        host, port = self.server().address
        for name in 'other', '':
            with self.assertRaises(errors.NotFound):
                client.NbdClient(f'nbd://{host}:{port}/{name}')

    def test_one_connection_too_many_is_hung_up(self) -> None:
        server = self.server(most=2)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                each = client.NbdClient(self.uri(server))
                stack.callback(each.close)
            with self.assertRaises(errors.Unavailable):
                client.NbdClient(self.uri(server), 5)

    def test_rubbish_ends_one_connection_and_nothing_else(self) -> None:
        server = self.server()
        option = client.OPTION.pack
        for sent in (
            b'', b'\0\0\0\0', b'\0\0\0\1x', b'\xff' * 4000,
            b'\0\0\0\1' + option(1, 7, 4),
            b'\0\0\0\1' + option(client.OPTION_MAGIC, 7, 1 << 31),
            b'\0\0\0\1' + option(client.OPTION_MAGIC, 1, 3) + b'\xff\xfe ',
            b'\0\0\0\1' + option(client.OPTION_MAGIC, 7, 4) + b'\xff' * 4,
            b'\0\0\0\1' + option(client.OPTION_MAGIC, 99, 0) * 50,
        ):
            with socket.create_connection(server.address, 10) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(sent)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(4096):
                        pass
        ours = client.NbdClient(self.uri(server))
        self.addCleanup(ours.close)
        # Each refusal leaves the connection as it was.
        for command, offset, length, error in (
            (0, SIZE, 1, 22), (1, SIZE, 0, 0), (0, 1 << 63, 5, 22),
            (6, SIZE - 1, 2, 28), (9, 0, 0, 22), (0, 5, 5, 0),
        ):
            ours._sock.sendall(client.REQUEST.pack(
                client.REQUEST_MAGIC, 0, command, 7, offset, length))
            magic, got, cookie = struct.unpack('>IIQ', ours._receive(
                16, time.monotonic() + 30))
            self.assertEqual(
                (client.SIMPLE_MAGIC, error, 7), (magic, got, cookie))
            if command == 0 and not got:
                self.assertEqual(
                    self.model[5:10], ours._receive(5, time.monotonic() + 30))

    def test_the_end_does_not_wait_for_clients(self) -> None:
        server = self.server()
        ours = client.NbdClient(self.uri(server))
        self.nothing_is_left(server)
        with self.assertRaises(errors.Unknown):
            ours.pread_into(bytearray(10), 0)


def run(*argv: str) -> bytes:
    """Run a tool that talks to us: we go on meanwhile, in either mode."""
    with tempfile.TemporaryFile() as said:
        process = concurrency.popen(
            argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        code = process.wait(60)
        said.seek(0)
        text = said.read()
    if code:
        raise Failed(text.decode())
    return text


class Failed(Exception):
    """A tool did not succeed."""


class Others(Case):
    def test_qemu_reads_and_writes(self) -> None:
        server = self.server()
        host, port = server.address
        options = (
            f'driver=nbd,host={host},port={port},export={NAME}')
        raw = os.path.join(self.directory, 'raw')
        run('qemu-img', 'convert', '--image-opts', '-O', 'raw', options,
            raw)
        with open(raw, 'rb') as file:
            self.assertEqual(self.model, file.read())
        self.model[MIB:2 * MIB] = self.chance.randbytes(MIB)
        self.model[4 * MIB:5 * MIB] = bytes(MIB)
        with open(raw, 'wb') as file:
            file.write(self.model)
        run('qemu-img', 'convert', '-n', '-f', 'raw', '--target-image-opts',
            raw, options)
        with open(self.path, 'rb') as file:
            self.assertEqual(self.model, vhds.naive(file.read()))
        self.nothing_is_left(server)

    @unittest.skipUnless(shutil.which('nbdcopy'), 'libnbd-bin is missing')
    def test_libnbd_reads_and_writes(self) -> None:
        server = self.server()
        told = json.loads(run('nbdinfo', '--json', self.uri(server)))
        (export,) = told['exports']
        self.assertEqual(SIZE, export['export-size'])
        self.assertTrue(export['can_multi_conn'])
        copy = os.path.join(self.directory, 'copy')
        run('nbdcopy', self.uri(server), copy)
        with open(copy, 'rb') as file:
            self.assertEqual(self.model, file.read())
        self.model[:SIZE] = self.chance.randbytes(SIZE)
        with open(copy, 'wb') as file:
            file.write(self.model)
        run('nbdcopy', '--flush', copy, self.uri(server))
        with open(self.path, 'rb') as file:
            self.assertEqual(
                hashlib.sha256(self.model).hexdigest(),
                hashlib.sha256(vhds.naive(file.read())).hexdigest())
        self.nothing_is_left(server)


@unittest.skipUnless(shutil.which('openssl'), 'openssl is missing')
class Secure(Case):
    @contextlib.contextmanager
    def certificate(self) -> Iterator[tuple[str, ssl.SSLContext]]:
        """Yield a directory as libnbd wants it, and the server's side."""
        directory = os.path.join(self.directory, 'tls')
        os.mkdir(directory)
        cert = os.path.join(directory, 'ca-cert.pem')
        key = os.path.join(directory, 'key.pem')
        subprocess.run(
            ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
             'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
             '-subj', '/CN=127.0.0.1', '-addext',
             'subjectAltName=IP:127.0.0.1,DNS:localhost', '-out', cert,
             '-keyout', key],
            check=True, capture_output=True, timeout=60)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        yield directory, context

    @unittest.skipUnless(shutil.which('nbdcopy'), 'libnbd-bin is missing')
    def test_libnbd_reads_with_tls_and_not_without(self) -> None:
        with self.certificate() as (directory, context):
            server = self.server(context)
            copy = os.path.join(self.directory, 'copy')
            run('nbdcopy', self.uri(server, 'nbds')
                + '?tls-certificates=' + directory, copy)
            with open(copy, 'rb') as file:
                self.assertEqual(self.model, file.read())
            with self.assertRaises(errors.Unavailable):
                client.NbdClient(self.uri(server))
            with self.assertRaises(Failed):
                run('nbdinfo', self.uri(server))
            self.nothing_is_left(server)


if __name__ == '__main__':
    unittest.main()
