# SPDX-License-Identifier: Apache-2.0
"""What tests stand on: a state directory, options, a file system.

Each function takes the test, and what it makes is removed when the test
ends; a loop-mounted file system is made once a process, for it takes root
and a tenth of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
import unittest
from typing import Any

from oslo_config import cfg

from volume.blockd import Blockd
from volume.node import Node
from volume.testing import faults

XFS_BYTES = 1 << 30  # sparse; mkfs.xfs wants at least 300 MiB
COMMAND_S = 60


def state_dir(test: unittest.TestCase) -> str:
    """Return a fresh directory; its path is short enough for a socket's."""
    path = tempfile.mkdtemp(prefix='vt', dir='/tmp')
    test.addCleanup(shutil.rmtree, path, ignore_errors=True)
    return path


def make_node(test: unittest.TestCase) -> Node:
    """Return a node with a state directory of its own."""
    return Node(state_dir(test))


def serve_blocks(test: unittest.TestCase, node: Node) -> None:
    """Give the node a storage daemon, ended with the test.

    Skips the test if the node is another machine: daemons are of this one.
    """
    if node.is_remote:
        raise unittest.SkipTest('no storage daemon on another machine')
    directory = os.path.join(node.state_dir, 'blockd')
    blockd = node.blockd = Blockd(node, directory)

    def stop() -> None:
        if isinstance(node, faults.FaultyNode):
            node.arm(None)
        blockd.stop()

    test.addCleanup(stop)


def settings(plugin: type[Any], **options: Any) -> Any:
    """Return an option group, as a section of a configuration file gives it.

    ``plugin`` is a class with ``options``, such as a driver; those that are
    not named have their defaults.
    """
    conf = cfg.ConfigOpts()
    conf([], project='volume', default_config_files=[],
         default_config_dirs=[])
    conf.register_opts(plugin.options, group='backend')
    for name, value in options.items():
        conf.set_override(name, value, group='backend')
    return conf['backend']


def directory(test: unittest.TestCase, name: str = 'pool') -> str:
    """Return a fresh directory, on whatever file system."""
    return _under(state_dir(test), name)


def plain_directory(test: unittest.TestCase, name: str = 'pool') -> str:
    """Return a fresh directory on a file system without reflink.

    Skips the test where there is none.
    """
    for parent in '/tmp', '/dev/shm':
        if os.path.isdir(parent):
            root = tempfile.mkdtemp(prefix='vt', dir=parent)
            test.addCleanup(shutil.rmtree, root, ignore_errors=True)
            if not _has_reflink(root):
                return _under(root, name)
    raise unittest.SkipTest('no file system without reflink')


def reflink_directory(test: unittest.TestCase, name: str = 'pool') -> str:
    """Return a fresh directory on a file system with reflink.

    Skips the test where there is none and none can be mounted.
    """
    parent = '/tmp' if _has_reflink('/tmp') else _xfs()
    root = tempfile.mkdtemp(prefix='vt', dir=parent)
    test.addCleanup(shutil.rmtree, root, ignore_errors=True)
    return _under(root, name)


def _under(root: str, name: str) -> str:
    path = os.path.join(root, name)
    os.mkdir(path)
    return path


def _has_reflink(directory: str) -> bool:
    with tempfile.TemporaryDirectory(dir=directory) as root:
        source = os.path.join(root, 'source')
        with open(source, 'wb') as f:
            f.write(bytes(4096))
        done = subprocess.run(
            ['cp', '--reflink=always', source, f'{source}.clone'],
            capture_output=True, timeout=COMMAND_S,
        )
        return done.returncode == 0


_mounted: str | None = None
_refused: str | None = None


def _xfs() -> str:
    """Return the mount point of this process's XFS, made at first use."""
    global _mounted, _refused
    if _mounted is None and _refused is None:
        try:
            _mounted = _mount_xfs()
        except (OSError, subprocess.SubprocessError) as failed:
            words = getattr(failed, 'stderr', b'') or str(failed).encode()
            _refused = words.decode(errors='replace').strip()
    if _mounted is None:
        raise unittest.SkipTest(
            f'no reflink, and no XFS on a loop device: {_refused:.200}'
        )
    return _mounted


def _mount_xfs() -> str:
    _sweep()
    root = tempfile.mkdtemp(prefix='vx', dir='/tmp')
    with open(os.path.join(root, 'owner'), 'w') as f:
        f.write(str(os.getpid()))
    image, target = os.path.join(root, 'image'), os.path.join(root, 'mnt')
    try:
        os.mkdir(target)
        with open(image, 'wb') as f:
            f.truncate(XFS_BYTES)
        for argv in (
            ['mkfs.xfs', '-q', '-m', 'reflink=1', image],
            ['mount', '-o', 'loop', image, target],
        ):
            subprocess.run(
                argv, check=True, capture_output=True, timeout=COMMAND_S,
                env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'},
            )
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    atexit.register(_unmount, root, target, os.getpid())
    os.unlink(image)  # the mount keeps it
    return target


def _sweep() -> None:
    """Unmount what a test process that was killed has left."""
    for note in glob.glob('/tmp/vx*/owner'):
        with contextlib.suppress(OSError, ValueError):
            root = os.path.dirname(note)
            with open(note) as f:
                owner = int(f.read())
            if os.stat(note).st_uid != os.getuid():
                continue
            if not os.path.exists(f'/proc/{owner}'):
                _unmount(root, os.path.join(root, 'mnt'), os.getpid())


def _unmount(root: str, target: str, owner: int) -> None:
    if os.getpid() == owner:
        # Lazily: a helper that is still ending must not keep the mount.
        subprocess.run(
            ['umount', '-l', target], capture_output=True, timeout=COMMAND_S
        )
        shutil.rmtree(root, ignore_errors=True)
