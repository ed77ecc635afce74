# SPDX-License-Identifier: Apache-2.0
"""How much of a file is in memory alone, by what the kernel says.

``cachestat`` (Linux 6.5) counts a file's pages that are dirty or on their
way to the disk: what a power cut would take. Only a file system with a disk
under it has such pages that ever become clean.
"""

import ctypes
import errno
import os
import unittest

SYS_CACHESTAT = 451


class _Range(ctypes.Structure):
    _fields_ = [('offset', ctypes.c_uint64), ('length', ctypes.c_uint64)]


class _Found(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in (
            'cached', 'dirty', 'writeback', 'evicted', 'recently_evicted',
        )
    ]


def pages(path):
    """Return how many pages of a file would be lost now."""
    libc = ctypes.CDLL(None, use_errno=True)
    whole, found = _Range(0, 0), _Found()
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(
            SYS_CACHESTAT, fd, ctypes.byref(whole), ctypes.byref(found), 0
        ):
            code = ctypes.get_errno()
            if code == errno.ENOSYS:
                raise unittest.SkipTest('this kernel has no cachestat')
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)
    return found.dirty + found.writeback


def need(directory):
    """Skip where dirty pages say nothing, or cannot be seen."""
    path = os.path.join(directory, 'dirty')
    try:
        with open(path, 'wb') as f:
            f.write(os.urandom(1 << 20))
            f.flush()
            if not pages(path):
                raise unittest.SkipTest(
                    'a file system that writes at once, or none with a disk'
                )
            os.fsync(f.fileno())
            if pages(path):
                raise unittest.SkipTest('a file system without a disk')
    finally:
        os.unlink(path)
