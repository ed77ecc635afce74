# SPDX-License-Identifier: Apache-2.0
"""A host: a process of its own that has an image open by librbd.

    python -m tests.rbd_client CONF USER POOL IMAGE [ro]

It takes a command a line (``read OFFSET``, ``write OFFSET LETTER``), and
answers each with a line: 4096 bytes are all one letter, or the error number.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

BYTES = 4096
TIMEOUT_S = '20'


def main(argv: list[str]) -> None:
    import rados
    import rbd

    conf, user, pool, image, *how = argv
    cluster = rados.Rados(conffile=conf, rados_id=user, conf={
        'rados_osd_op_timeout': TIMEOUT_S, 'rbd_cache': 'false'})
    cluster.connect()
    disk = rbd.Image(
        cluster.open_ioctx(pool), image, read_only=bool(how))
    print('open', flush=True)
    for line in sys.stdin:
        verb, offset, *letter = line.split()
        try:
            if verb == 'read':
                data = disk.read(int(offset), BYTES)
                assert data == data[:1] * BYTES
                print(data[:1].replace(b'\0', b'.').decode(), flush=True)
            else:
                disk.write(letter[0].encode() * BYTES, int(offset))
                print('written', flush=True)
        except Exception as failed:
            print(f'error {getattr(failed, "errno", failed)}', flush=True)


class Client:
    """That process."""

    def __init__(
        self, test: Any, conf: str, user: str, name: str, *how: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tests.rbd_client', conf, user,
             *name.split('/'), *how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )
        test.addCleanup(self.kill)
        test.assertEqual('open', self._line())

    def ask(self, *words: object) -> str:
        """Return what the host is answered."""
        assert self.process.stdin is not None
        self.process.stdin.write(' '.join(map(str, words)) + '\n')
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        """Close the image in good order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def kill(self) -> None:
        for stream in self.process.stdin, self.process.stdout:
            if stream is not None:
                stream.close()
        self.process.kill()
        self.process.wait(30)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


if __name__ == '__main__':
    main(sys.argv[1:])
