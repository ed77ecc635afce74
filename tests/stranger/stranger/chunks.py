# SPDX-License-Identifier: Apache-2.0
"""A volume is a directory of chunks; a chunk that is not there is zero.

``<root>/<volume id>/size`` holds the size in bytes, and ``000000012`` the
thirteenth mebibyte. A volume exists if its ``size`` does: that file comes
first and goes last, so no call that was cut short leaves chunks that a later
volume could take for its own.
"""

import contextlib
import io
import os

from oslo_config import cfg

from volume import errors
from volume import ids
from volume import model
from volume.drivers import base

CHUNK_BYTES = 1 << 20
VOLUME_BYTES_MAX = CHUNK_BYTES * 10**9  # nine digits in a name


class ChunksDriver(base.Driver, base.Resize):
    """Volumes as directories of chunk files."""

    options = (
        cfg.StrOpt(
            'root', required=True,
            help='Directory that holds the volumes.\n\nAn absolute path.',
        ),
    )

    def __init__(self, conf, node):
        self.conf = conf
        self.node = node

    def check(self):
        if not os.path.isabs(self.conf.root or ''):
            raise errors.Invalid('the option root must be an absolute path')
        self.node.make_directory(self.conf.root)

    def pools(self):
        space = self.node.space(self.conf.root)
        return [
            model.Pool(
                'chunks', space.total_bytes, space.free_bytes, thin=True,
                features=base.features(self), device=space.device,
                max_volume_bytes=VOLUME_BYTES_MAX,
            )
        ]

    def create(self, volume):
        _check_size(volume.size_bytes)
        path = self._path(volume)
        try:
            size_bytes = self._size(path)
        except errors.NotFound:
            self.node.make_directory(path)
            self._set_size(path, volume.size_bytes)
        else:
            if size_bytes != volume.size_bytes:
                raise errors.Conflict(f'volume {volume.id} has {size_bytes}')
        return volume.id

    def delete(self, volume):
        path = self._path(volume)
        if not self.node.exists(path):
            return
        for name in sorted(self.node.list(path)):  # digits, then "size"
            self.node.unlink(os.path.join(path, name))
        # What the node has no method for goes through act() as well.
        self.node.act('rmdir', lambda: os.rmdir(path))

    def inspect(self, volume):
        size_bytes = self._size(self._path(volume))
        return model.Found(volume.id, size_bytes, volume.id)

    def scan(self, pool):
        self._check_pool(pool)
        for name in self.node.list(self.conf.root):
            # Without a size it is a draft, or no volume at all.
            with contextlib.suppress(errors.NotFound, errors.Invalid):
                size_bytes = self._size(os.path.join(self.conf.root, name))
                yield model.Found(
                    name, size_bytes, name if ids.is_id(name) else None
                )

    @contextlib.contextmanager
    def reader(self, source):
        path = self._path(source)
        yield Chunks(self.node, path, self._size(path))

    writer = reader

    # Resize.

    def resize(self, volume, size_bytes):
        _check_size(size_bytes)
        path = self._path(volume)
        there = self._size(path)
        if size_bytes < there:
            raise errors.Invalid(f'volume {volume.id} cannot shrink')
        if size_bytes > there:
            self._set_size(path, size_bytes)

    # Ours alone.

    def _check_pool(self, pool):
        if pool != 'chunks':
            raise errors.Invalid(f'the only pool is chunks, not {pool}')

    def _path(self, volume):
        self._check_pool(volume.pool)
        return os.path.join(self.conf.root, ids.check(volume.id))

    def _size(self, path):
        return int(self.node.read(os.path.join(path, 'size')))

    def _set_size(self, path, size_bytes):
        self.node.write(os.path.join(path, 'size'), b'%d' % size_bytes)


class Chunks(base.Reader, base.Writer):
    """The bytes of one volume, to be read and written."""

    def __init__(self, node, path, size_bytes):
        self._node = node
        self._path = path
        self._at = 0
        self.size_bytes = size_bytes

    def readable(self):
        return True

    def writable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        start = {0: 0, 1: self._at, 2: self.size_bytes}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer):
        name, offset, length = self._run(len(buffer))
        buffer[:length] = bytes(length)
        if length and self._node.exists(name):
            with self._node.open(name) as f:
                f.seek(offset)
                f.readinto(memoryview(buffer)[:length])
        self._at += length
        return length

    def write(self, data):
        name, offset, length = self._run(len(data))
        if not length and len(data):
            raise errors.Invalid(f'{self._path} ends at {self.size_bytes}')
        mode = 'r+b' if self._node.exists(name) else 'x+b'
        with self._node.open(name, mode) as f:
            f.truncate(CHUNK_BYTES)
            f.seek(offset)
            f.write(data[:length])
            f.sync()
        self._at += length
        return length

    def zero(self, offset_bytes, length_bytes):
        end = offset_bytes + length_bytes
        self.seek(offset_bytes)
        while self._at < end:
            name, _, length = self._run(end - self._at)
            if self._node.exists(name):
                self.write(bytes(length))
            else:
                self._at += length

    def commit(self):
        # Each chunk was synced when it was written; their names were not.
        self._node.act('commit', lambda: _sync(self._path))

    def extents(self):
        for at in range(0, self.size_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, self.size_bytes - at)
            is_zero = not self._node.exists(self._name(at))
            yield model.Extent(at, length, is_zero)

    def _name(self, at):
        return os.path.join(self._path, f'{at // CHUNK_BYTES:09}')

    def _run(self, length):
        """Return chunk, offset in it, and how much of the length is there."""
        offset = self._at % CHUNK_BYTES
        left = min(CHUNK_BYTES - offset, self.size_bytes - self._at)
        return self._name(self._at), offset, max(0, min(length, left))


def _check_size(size_bytes):
    if not 0 < size_bytes <= VOLUME_BYTES_MAX:
        raise errors.Invalid(f'no volume can have {size_bytes} bytes')
    if size_bytes % model.SECTOR_BYTES:
        raise errors.Invalid(f'{size_bytes} bytes are no whole sectors')


def _sync(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
