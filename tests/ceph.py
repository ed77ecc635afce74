# SPDX-License-Identifier: Apache-2.0
"""A private Ceph cluster for tests: a monitor, a manager and an OSD.

It listens on loopback alone, runs as an ordinary user in a directory of its
own, is ended by pid, and leaves nothing behind. One is started in a process
that needs it, and serves all its tests.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import uuid
from typing import Any

from tests import ports
from tests.halt import halt

START_S = 90.0
END_S = 20.0
NOBODY = 65534
TOOLS = (
    'ceph', 'ceph-authtool', 'ceph-mgr', 'ceph-mon', 'ceph-osd',
    'monmaptool', 'rbd',
)
PGS = 4
# Where Debian has the modules of the manager; with none it dies.
MODULES = '/usr/share/ceph/mgr'

CONF = """
[global]
fsid = {fsid}
mon host = 127.0.0.1:{port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {root}/keyring
admin socket =
pid file =
log file = {root}/$name.log
run dir = {root}
crash dir = {root}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = {pgs}
osd crush chooseleaf type = 0
mon warn on pool no redundancy = false
# Long leases for reads, which last four fifths of it: an OSD that is frozen
# for longer than its own was seen to let some requests wait for ever.
osd heartbeat grace = 3600

[mon]
mon data = {root}/mon
# A snapshot waits for the map; in its own pace that takes a second.
paxos min wait = 0.01
paxos propose interval = 0.02
mon data avail crit = 1
mon data avail warn = 1
auth allow insecure global id reclaim = false

[mgr]
mgr data = {root}/mgr
mgr module path = {modules}
mgr initial modules =
mgr stats period = 1
mgr tick period = 1

[osd]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = {osd_bytes}
osd memory target = 939524096
osd op num shards = 2
osd max object name len = 256
"""


def missing() -> str:
    """Say why no cluster can be started here; nothing if one can."""
    path = '/usr/bin:/usr/sbin:/bin:/sbin'
    for tool in TOOLS:
        if shutil.which(tool, path=path) is None:
            return f'{tool} is not installed'
    for name in 'rados', 'rbd':
        try:
            importlib.import_module(name)
        except ImportError:
            return f'python3-{name} is not linked into this environment'
    return ''


@functools.cache
def cluster() -> Cluster:
    """Return the cluster of this process.

    :raises unittest.SkipTest: the packages are not here
    """
    if reason := missing():
        raise unittest.SkipTest(reason)
    made = Cluster()
    atexit.register(made.remove)
    made.start()
    return made


class Cluster:
    """One monitor, one manager, one OSD that keeps its bytes in memory."""

    def __init__(self, osd_bytes: int = 3 << 30) -> None:
        self.directory = tempfile.mkdtemp(prefix='vtceph', dir='/tmp')
        os.chmod(self.directory, 0o755)
        self.fsid = str(uuid.uuid4())
        self.port = ports.free()
        self.conf = os.path.join(self.directory, 'ceph.conf')
        self.keyring = os.path.join(self.directory, 'keyring')
        self._numbers = itertools.count(1)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        with open(self.conf, 'w') as f:
            f.write(CONF.format(
                fsid=self.fsid, port=self.port, root=self.directory,
                modules=MODULES, pgs=PGS, osd_bytes=osd_bytes,
            ))
        for name in 'mon', 'mgr', 'osd':
            os.mkdir(os.path.join(self.directory, name))
        self._give_away()

    def start(self) -> None:
        """Return when volumes can be made."""
        try:
            self._lay_out()
            self.begin('mon')
            self._await_mon()
            self._make_osd()
            self.begin('mgr')
            self.begin('osd')
            self._await(
                lambda: self.ceph('osd', 'stat')['num_up_osds'] == 1,
                'the OSD is not up',
            )
            self._await(
                lambda: self.ceph('df')['stats']['total_avail_bytes'] > 0,
                'the manager counts nothing',
            )
        except BaseException:
            self.remove()
            raise

    def begin(self, kind: str) -> None:
        """Start a daemon."""
        name = '0' if kind == 'osd' else 'a'
        with open(os.path.join(self.directory, 'output'), 'ab') as output:
            self._daemons[kind] = subprocess.Popen(
                [f'/usr/bin/ceph-{kind}', '-f', '-i', name, '-c', self.conf],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, **self._as_nobody(),
            )

    def freeze(self, kind: str) -> None:
        """Stop a daemon as an overloaded machine does."""
        halt(self._daemons[kind].pid)

    def thaw(self, kind: str) -> None:
        self._daemons[kind].send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End it, and leave nothing behind: the monitor last."""
        for kind in 'mgr', 'osd', 'mon':
            daemon = self._daemons.pop(kind, None)
            if daemon is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGCONT)
                daemon.kill()  # nothing of it is kept
            daemon.wait(END_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def pool(self) -> str:
        """Make a pool of images; return its name."""
        name = f'pool{next(self._numbers)}'
        self.ceph('osd', 'pool', 'create', name, str(PGS), '--size', '1',
                  '--autoscale-mode', 'off')
        self.run('rbd', 'pool', 'init', name)
        self._await(lambda: name in [
            each['name'] for each in self.ceph('df')['pools']
        ], f'no figures for {name}')
        return name

    def user(self, name: str, *caps: str) -> None:
        """Make a user, whose key is where the others' are."""
        path = os.path.join(self.directory, 'key')
        self.ceph('auth', 'get-or-create', f'client.{name}', *caps)
        self.run('ceph', 'auth', 'get', f'client.{name}', '-o', path)
        self._tool('ceph-authtool', self.keyring, '--import-keyring', path)

    def ceph(self, *argv: str) -> Any:
        """Return what an administrator's command answers."""
        text = self.run('ceph', '--format', 'json', *argv)
        return json.loads(text) if text.strip() else None

    def run(self, *argv: str, input_bytes: bytes = b'') -> str:
        """Run one of Ceph's tools as an administrator."""
        return self.read(*argv, input_bytes=input_bytes).decode()

    def read(self, *argv: str, input_bytes: bytes = b'') -> bytes:
        done = subprocess.run(
            [argv[0], '-c', self.conf, *argv[1:]], input=input_bytes,
            capture_output=True, timeout=START_S, **self._as_nobody(),
        )
        if done.returncode:
            raise AssertionError(
                f'{argv}: {done.stderr[-1000:].decode(errors="replace")}')
        return done.stdout

    # Ours alone.

    def _lay_out(self) -> None:
        for name, caps in (
            ('mon.', ['mon', 'allow *']),
            ('client.admin', [
                'mon', 'allow *', 'osd', 'allow *', 'mgr', 'allow *']),
            ('mgr.a', [
                'mon', 'allow profile mgr', 'osd', 'allow *', 'mds',
                'allow *']),
            ('osd.0', [
                'mon', 'allow profile osd', 'mgr', 'allow profile osd',
                'osd', 'allow *']),
        ):
            pairs = zip(caps[::2], caps[1::2], strict=True)
            self._tool(
                'ceph-authtool', *(
                    () if os.path.exists(self.keyring)
                    else ('--create-keyring',)
                ), self.keyring, '--gen-key', '-n', name,
                *(word for pair in pairs for word in ('--cap', *pair)),
            )
        monmap = os.path.join(self.directory, 'monmap')
        self._tool(
            'monmaptool', '--create', '--fsid', self.fsid, '--addv', 'a',
            f'[v1:127.0.0.1:{self.port}]', monmap,
        )
        self._tool(
            'ceph-mon', '-c', self.conf, '--mkfs', '-i', 'a', '--monmap',
            monmap, '--keyring', self.keyring,
        )

    def _make_osd(self) -> None:
        own = str(uuid.uuid4())
        self.ceph('osd', 'new', own)
        self._tool(
            'ceph-osd', '-c', self.conf, '-i', '0', '--mkfs', '--osd-uuid',
            own,
        )
        self.ceph('osd', 'crush', 'add', 'osd.0', '1.0', 'root=default')

    def _await_mon(self) -> None:
        def is_up() -> bool:
            try:
                self.run('ceph', '--connect-timeout', '5', 'quorum_status')
            except AssertionError:
                return False
            return True

        self._await(is_up, 'the monitor does not answer')

    def _await(self, asked: Any, words: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for kind, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise AssertionError(f'ceph-{kind} died: {self._tail()}')
            if asked():
                return
            time.sleep(0.05)
        raise AssertionError(f'{words}: {self._tail()}')

    def _tail(self) -> str:
        with open(os.path.join(self.directory, 'output'), 'rb') as f:
            return f.read()[-2000:].decode(errors='replace')

    def _tool(self, *argv: str) -> None:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=START_S, **self._as_nobody(),
        )
        if done.returncode:
            raise AssertionError(f'{argv[0]}: {done.stderr[-1000:]}')

    def _give_away(self) -> None:
        if os.getuid() == 0:
            for root, _, files in os.walk(self.directory):
                for name in '', *files:
                    os.chown(os.path.join(root, name), NOBODY, NOBODY)

    def _as_nobody(self) -> dict[str, Any]:
        environment = {
            'PATH': '/usr/bin:/usr/sbin:/bin:/sbin', 'LC_ALL': 'C.UTF-8',
            'HOME': self.directory, 'TMPDIR': self.directory,
        }
        if os.getuid() != 0:
            return {'env': environment, 'cwd': self.directory}
        return {
            'env': environment, 'cwd': self.directory, 'user': NOBODY,
            'group': NOBODY, 'extra_groups': [],
        }
