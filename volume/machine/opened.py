# SPDX-License-Identifier: Apache-2.0
"""An open file or block device, read and written by offset.

There is no position here: who has one keeps it himself, so that a file of
another machine is used in the same way as one of this.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import struct
from typing import Any

BEGIN_WRITE = 2  # of sync_file_range
BLKZEROOUT = 0x127F  # linux/fs.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
ZERO_CHUNK_BYTES = 1 << 20

# What a file or device says that cannot make zeros in this way: another is
# tried. (EINVAL: a block device, and a run that is no whole sectors.)
NO_ZEROS = (
    errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY,
)


class Opened:
    """What is open on this machine; its mode is that of ``open``."""

    def __init__(self, path: str, mode: str) -> None:
        self._raw = io.FileIO(path, mode)
        self.readable = self._raw.readable()
        self.writable = self._raw.writable()

    def fileno(self) -> int:
        return self._raw.fileno()

    def size(self) -> int:
        # Not stat: a block device has no size there. Nobody uses the
        # descriptor's position, so it may move.
        return os.lseek(self.fileno(), 0, os.SEEK_END)

    def pread_into(self, buffer: Any, offset_bytes: int) -> int:
        """Read what one call brings; nothing at the end."""
        try:
            return os.preadv(self.fileno(), [buffer], offset_bytes)
        except OSError as failed:
            if failed.errno != errno.ESPIPE:
                raise
            return os.readv(self.fileno(), [buffer])  # a pipe has no offsets

    def pwrite(self, data: Any, offset_bytes: int) -> int:
        """Write all of it."""
        left = memoryview(data).cast('B')
        total = len(left)
        while left:
            count = self._pwrite_some(left, offset_bytes)
            left = left[count:]
            offset_bytes += count
        return total

    def truncate(self, size_bytes: int) -> None:
        self._raw.truncate(size_bytes)

    def punch(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a run read as zeros, and free what it stored."""
        self._allocate(PUNCH_HOLE | KEEP_SIZE, offset_bytes, length_bytes)

    def zero_out(
        self, offset_bytes: int, length_bytes: int, may_free: bool = False
    ) -> bool:
        """Make a run read as zeros by the quickest way that there is.

        Say whether what it stored was freed, and nothing was written.
        """
        for way in self._ways(may_free):
            try:
                way(offset_bytes, length_bytes)
            except OSError as failed:
                if failed.errno not in NO_ZEROS:
                    raise
            else:
                return bool(way == self.punch)
        self._write_zeros(offset_bytes, length_bytes)
        return False

    def find(self, offset_bytes: int, is_data: bool) -> int:
        """Return where the next data, or the next hole, begins.

        The size, if there is none; a file system or device that does not
        know has data everywhere.
        """
        whence = os.SEEK_DATA if is_data else os.SEEK_HOLE
        try:
            return os.lseek(self.fileno(), offset_bytes, whence)
        except OSError as failed:
            if failed.errno == errno.ENXIO:
                return self.size()
            return offset_bytes if is_data else self.size()

    def begin_sync(self) -> None:
        """Have the kernel begin to store what was written; a hint."""
        import ctypes

        # Where there is no such call, ``sync`` has more to do.
        ctypes.CDLL(None).sync_file_range(
            self.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), BEGIN_WRITE
        )

    def sync(self) -> None:
        os.fsync(self.fileno())

    def close(self) -> None:
        self._raw.close()

    def _pwrite_some(self, data: memoryview, offset_bytes: int) -> int:
        try:
            return os.pwrite(self.fileno(), data, offset_bytes)
        except OSError as failed:
            if failed.errno != errno.ESPIPE:
                raise
            return os.write(self.fileno(), data)

    def _ways(self, may_free: bool) -> list[Any]:
        free = [self.punch] if may_free else []
        if stat.S_ISBLK(os.fstat(self.fileno()).st_mode):
            return [*free, self._zero_device]
        return [*free, self._zero_range]

    def _zero_device(self, offset_bytes: int, length_bytes: int) -> None:
        fcntl.ioctl(
            self.fileno(), BLKZEROOUT,
            struct.pack('@QQ', offset_bytes, length_bytes),
        )

    def _zero_range(self, offset_bytes: int, length_bytes: int) -> None:
        self._allocate(ZERO_RANGE | KEEP_SIZE, offset_bytes, length_bytes)

    def _write_zeros(self, offset_bytes: int, length_bytes: int) -> None:
        zeros = memoryview(bytes(min(length_bytes, ZERO_CHUNK_BYTES)))
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            count = min(end - offset_bytes, ZERO_CHUNK_BYTES)
            self.pwrite(zeros[:count], offset_bytes)
            offset_bytes += count

    def _allocate(self, mode: int, offset: int, length: int) -> None:
        # Python has no wrapper, and ctypes' libc call is what util-linux
        # does as well.
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.fallocate(
            ctypes.c_int(self.fileno()), ctypes.c_int(mode),
            ctypes.c_int64(offset), ctypes.c_int64(length),
        )
        if result:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
