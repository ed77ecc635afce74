# SPDX-License-Identifier: Apache-2.0
"""A file or block device that is open on another machine."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from volume.machine.opened import Opened
from volume.remote import wire
from volume.remote.link import Link


class RemoteOpened(Opened):
    """As what is open here, by a number that the agent gave it.

    It is open as long as the connection lasts, and used under the locks
    that whoever opened it holds.
    """

    def __init__(
        self,
        link: Link,
        holds: Sequence[int],
        number: int,
        readable: bool,
        writable: bool,
    ) -> None:
        self._link = link
        self._holds = tuple(holds)
        self._number = number
        self._is_closed = False
        self.readable = readable
        self.writable = writable

    def fileno(self) -> int:
        raise io.UnsupportedOperation(
            'a file of another machine has no descriptor here'
        )

    def size(self) -> int:
        return int(self._ask('size'))

    def pread_into(self, buffer: Any, offset_bytes: int) -> int:
        view = memoryview(buffer).cast('B')
        length = min(len(view), wire.PAYLOAD_BYTES_MAX)
        _, found = self._link.call(
            'file.pread_into', self._number, length, offset_bytes,
            holds=self._holds, bytes_max=length,
        )
        view[:len(found)] = found
        return len(found)

    def pwrite(self, data: Any, offset_bytes: int) -> int:
        left = memoryview(data).cast('B')
        total = len(left)
        while left:
            part = left[:wire.PAYLOAD_BYTES_MAX]
            self._link.call(
                'file.pwrite', self._number, offset_bytes, payload=part,
                holds=self._holds,
            )
            offset_bytes += len(part)
            left = left[len(part):]
        return total

    def truncate(self, size_bytes: int) -> None:
        self._ask('truncate', size_bytes)

    def punch(self, offset_bytes: int, length_bytes: int) -> None:
        self._ask('punch', offset_bytes, length_bytes)

    def zero_out(
        self, offset_bytes: int, length_bytes: int, may_free: bool = False
    ) -> bool:
        return bool(
            self._ask('zero_out', offset_bytes, length_bytes, may_free)
        )

    def find(self, offset_bytes: int, is_data: bool) -> int:
        return int(self._ask('find', offset_bytes, is_data))

    def begin_sync(self) -> None:
        self._ask('begin_sync')

    def sync(self) -> None:
        self._ask('sync')

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._link.post_later('file.close', self._number)

    def _ask(self, verb: str, *args: Any) -> Any:
        return self._link.call(
            f'file.{verb}', self._number, *args, holds=self._holds
        )[0]
