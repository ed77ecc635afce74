# SPDX-License-Identifier: Apache-2.0
"""Images that lie on this node: ``file:///path``.

A caller of the service names the path, so it may reach only what an
administrator has listed. A name can come to mean another file at any moment:
what counts is the file that was opened, and where the kernel says it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import stat
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume.node import File
from volume.node import meaning
from volume.node import Node
from volume.node import Reading
from volume.transfer.base import ImageStat
from volume.transfer.base import Source


class FileSource(Source):
    """Images in directories that an administrator has allowed."""

    schemes: ClassVar[tuple[str, ...]] = ('file',)
    options: ClassVar[tuple[cfg.Opt, ...]] = (
        cfg.ListOpt(
            'image_allowed_directories',
            default=[],
            help='Directories that file:// images may be read from.',
        ),
        cfg.ListOpt(
            'image_upload_directories',
            default=[],
            help='Directories that file:// images may be written to.',
        ),
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node

    def stat(self, url: str) -> ImageStat:
        path = _path(url)
        with self._opened(path) as image:
            return self._stat(url, path, image)

    @contextlib.contextmanager
    def open(
        self, image: ImageStat, offset_bytes: int = 0
    ) -> Iterator[io.FileIO]:
        path = _path(image.url)
        with self._opened(path) as opened:
            if self._stat(image.url, path, opened).version != image.version:
                raise errors.Conflict(
                    f'image {path} has changed since it was looked at'
                )
            opened.seek(offset_bytes)
            yield opened

    @contextlib.contextmanager
    def put(self, url: str) -> Iterator[File]:
        path = _path(url)
        directory = self._resolved(os.path.dirname(path))
        self._check_under(
            directory, self.conf.image_upload_directories, path,
            'image_upload_directories',
        )
        if os.path.basename(path).startswith('.'):
            # Drafts are called so: it could be taken for one, and removed.
            raise errors.Invalid(
                f'image {path!r:.400} cannot have a name that begins with a '
                'dot: choose another'
            )
        target = os.path.join(directory, os.path.basename(path))
        draft = os.path.join(directory, f'.{os.path.basename(path)}.draft')
        if self.node.exists(target):
            if self.node.exists(draft) and self.node.blocking(
                lambda: os.path.samefile(draft, target)
            ):
                # A crash came between its two names.
                self.node.unlink(draft)
            raise errors.Conflict(f'image {path} is there already')
        with self._draft(draft) as file:
            # Not in a finally: a draft that was not finished is taken over
            # by the next try, and a crash would leave it all the same.
            try:
                yield file
            except errors.VolumeError:
                self.node.unlink(draft)
                raise
            file.sync()
            self._publish(draft, target)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[io.FileIO]:
        """Open a regular file that lies where it may."""

        def opening() -> int:
            # A FIFO would block, a device would act: neither is opened so.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                return os.open(os.path.realpath(path), flags | os.O_NOFOLLOW)
            except OSError as failed:
                raise meaning(failed, f'open image {path}') from failed

        allowed = self.conf.image_allowed_directories
        # First by name, so that nothing outside is touched at all.
        self._check_under(
            self._resolved(path), allowed, path, 'image_allowed_directories'
        )
        fd = self.node.act(
            f'open {os.path.basename(path)}',
            lambda: self.node.blocking(opening),
        )
        try:
            self._check_under(
                os.readlink(f'/proc/self/fd/{fd}'), allowed, path,
                'image_allowed_directories',
            )
            found = self.node.blocking(lambda: os.fstat(fd))
            if not stat.S_ISREG(found.st_mode):
                raise errors.Invalid(f'image {path} is not a regular file')
        except BaseException:
            os.close(fd)
            raise
        with self.node.blocking(lambda: Reading(fd, 'rb')) as opened:
            yield opened

    @contextlib.contextmanager
    def _draft(self, draft: str) -> Iterator[File]:
        """Open an empty draft that nobody else is writing."""

        def opening() -> int:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                fd = os.open(draft, flags, 0o600)
                if os.fstat(fd).st_nlink > 1:
                    # A crash came after it was published: under its other
                    # name it is somebody's image.
                    os.close(fd)
                    os.unlink(draft)
                    fd = os.open(draft, flags | os.O_EXCL, 0o600)
                return fd
            except OSError as failed:
                raise meaning(failed, f'open {draft}') from failed

        blocking = self.node.blocking
        fd = self.node.act('open draft', lambda: blocking(opening))
        with blocking(lambda: io.FileIO(fd, 'r+b')) as held:
            try:
                blocking(
                    lambda: fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                )
            except BlockingIOError:
                raise errors.Busy(
                    f'{draft} is being written by another upload'
                ) from None
            with self.node.open(draft, 'r+b') as file:
                if not blocking(lambda: os.path.sameopenfile(
                    held.fileno(), file.fileno()
                )):
                    raise errors.Busy(f'{draft} was taken by another upload')
                file.truncate(0)
                try:
                    yield file
                finally:
                    blocking(lambda: fcntl.flock(held, fcntl.LOCK_UN))

    def _publish(self, draft: str, target: str) -> None:
        """Give the draft its name, durably; never replace a file."""

        def link() -> None:
            try:
                os.link(draft, target)
            except FileExistsError:
                raise errors.Conflict(
                    f'image {target} is there already'
                ) from None
            except OSError as failed:
                if failed.errno not in (
                    errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK
                ):
                    raise meaning(failed, f'publish {target}') from failed
                # No hard links here: the name was free a moment ago.
                os.rename(draft, target)

        self.node.act(
            f'publish {os.path.basename(target)}',
            lambda: self.node.blocking(link),
        )
        self.node.unlink(draft)

    def _stat(self, url: str, path: str, opened: io.FileIO) -> ImageStat:
        found = self.node.blocking(lambda: os.fstat(opened.fileno()))
        version = '-'.join(
            str(n) for n in (
                found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns,
            )
        )
        return ImageStat(url, found.st_size, version, True, path)

    def _resolved(self, path: str) -> str:
        return self.node.blocking(lambda: os.path.realpath(path))

    def _check_under(
        self, real: str, allowed: Sequence[str], path: str, option: str
    ) -> None:
        for directory in allowed:
            root = self._resolved(directory)
            if os.path.commonpath((root, real)) == root:
                return
        raise errors.Invalid(
            f'image path {path!r:.400} is not under a directory of {option}'
        )


def _path(url: str) -> str:
    """Return the absolute path that a URL names."""
    try:
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(parts.path, errors='strict')
    except ValueError as bad:
        raise errors.Invalid(f'image URL {url!r:.400}: {bad}') from None
    if (
        parts.scheme != 'file'
        or parts.netloc not in ('', 'localhost')
        or parts.query
        or parts.fragment
        or not path.startswith('/')
        or path.endswith('/')
        or not path.isprintable()
    ):
        raise errors.Invalid(
            f'image URL {url!r:.400} is not file:// and an absolute path'
        )
    return os.path.normpath(path)
