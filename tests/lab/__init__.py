# SPDX-License-Identifier: Apache-2.0
"""A guest with a real kernel: LVM, targets and initiators of every kind.

The suites and the service run here, on the host; the guest runs what a node
and a host run. It is booted when a test first asks for it, is this process's
own, and ends with it. The folder has the scripts that build and boot it
(README.md); ``case`` has what a test of it begins with.
"""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import unittest

HERE = pathlib.Path(__file__).parent
TOP = HERE.parents[1]
ADDRESS = '127.0.0.1'

# Unset: no lab. ``auto``: if this machine can. ``1``: it must. ``full``: it
# must, and nothing is left out. ``running``: the guest that ``up`` has booted
# is used, and left running.
WANTED = os.environ.get('VOLUME_LAB', '')
FULL = WANTED == 'full' or bool(os.environ.get('VOLUME_PROOF'))

in_full = unittest.skipUnless(
    FULL, 'it is not of the core: VOLUME_LAB is not full'
)

BUILD_S = 900.0
BOOT_S = 660.0
RUN_S = 300.0
NO_PACKAGES = 3   # as ``build`` ends
TOOLS = {
    'mmdebstrap': 'mmdebstrap', 'qemu-system-x86_64': 'qemu-system-x86',
    'qemu-img': 'qemu-utils', 'debugfs': 'e2fsprogs',
    'ssh': 'openssh-client',
}
FREE_BYTES = {'disk': 4 << 30, 'memory': 2500 << 20}


class Failed(AssertionError):
    """A command in the guest said no."""


class NoPackages(Failed):
    """The packages of the guest could not be had, or not be installed."""


def guest() -> Guest:
    """Return the guest of this process, booted when it is first asked for.

    :raises unittest.SkipTest: there is none, and why
    """
    if reason := missing():
        raise unittest.SkipTest(f'no lab: {reason}')
    return _booted()


def missing() -> str:
    """Say what this machine lacks for a lab; nothing if it has all."""
    if not WANTED:
        return 'VOLUME_LAB is not set'
    if WANTED != 'auto':
        return ''
    if os.getuid():
        return 'this user is not root'
    path = f'{os.environ.get("PATH", "")}:/usr/sbin:/sbin'
    for tool, package in TOOLS.items():
        if not shutil.which(tool, path=path):
            return f'{package} is not installed'
    if shutil.disk_usage(TOP).free < FREE_BYTES['disk']:
        return f'less than {FREE_BYTES["disk"] >> 30} GiB of disk are free'
    if _available_bytes() < FREE_BYTES['memory']:
        return f'less than {FREE_BYTES["memory"] >> 20} MiB of memory are free'
    return ''


def _available_bytes() -> int:
    with open('/proc/meminfo') as f:
        for line in f:
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) << 10
    return 0


class _Never:
    """The boot that failed: nobody waits for it a second time."""

    def __init__(self, failed: Failed) -> None:
        self.failed = failed


@functools.cache
def _boot() -> Guest | _Never:
    try:
        return Guest()
    except Failed as failed:
        return _Never(failed)


def _booted() -> Guest:
    found = _boot()
    if isinstance(found, _Never):
        if isinstance(found.failed, NoPackages) and WANTED == 'auto':
            raise unittest.SkipTest(f'no lab: {found.failed}')
        raise Failed(f'the lab did not start: {found.failed}')
    return found


class Guest:
    """A virtual machine; root's commands run in it by ``run``."""

    def __init__(self, **settings: str) -> None:
        """Boot a guest with these settings of the scripts.

        The image is built if it is not up to date.
        """
        self._attendant: subprocess.Popen[bytes] | None = None
        if WANTED == 'running':
            default = os.environ.get('LAB_DIR', TOP / '.lab')
            self.state = os.environ.get('LAB_STATE', f'{default}/state')
        else:
            # Short: unix sockets lie in it.
            self.state = os.path.join(tempfile.mkdtemp(prefix='lab'), 's')
        self.environment = os.environ | {
            'LAB_STATE': self.state, 'LAB_CHECKOUT': str(TOP),
            'LAB_MEM': os.environ.get('LAB_MEM', '1536'),
            'LAB_BOOT_TIMEOUT': str(int(BOOT_S) - 60),
        } | settings
        if WANTED != 'running':
            self._start()
        self.address = ADDRESS
        self.port = int(pathlib.Path(self.state, 'ssh-port').read_text())
        self.key = os.path.join(self.state, 'id_ed25519')
        self.known_hosts = os.path.join(self.state, 'known_hosts')

    def _start(self) -> None:
        self._script('build', timeout_s=BUILD_S)
        self._attendant = subprocess.Popen(
            [HERE / 'attend'], stdin=subprocess.PIPE, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.end)
        self._script('up', timeout_s=BOOT_S)

    def end(self) -> None:
        """End it, and remove its disks; return when it is gone."""
        if self._attendant is None:
            return
        assert self._attendant.stdin is not None
        self._attendant.stdin.close()
        self._attendant.wait(60)
        atexit.unregister(self.end)

    def reset(self) -> None:
        """Cut its power whatever it does, and boot it again."""
        self._script('reset', timeout_s=BOOT_S)

    def run(
        self,
        *argv: str,
        input_bytes: bytes = b'',
        timeout_s: float = RUN_S,
        check: bool = True,
    ) -> str:
        """Run a command as root and return what it printed.

        :raises Failed: it ended with a code that is not zero
        """
        return self.run_bytes(
            *argv, input_bytes=input_bytes, timeout_s=timeout_s, check=check
        ).decode()

    def run_bytes(
        self,
        *argv: str,
        input_bytes: bytes = b'',
        timeout_s: float = RUN_S,
        check: bool = True,
    ) -> bytes:
        done = subprocess.run(
            [*self.ssh(), shlex.join(argv)], input=input_bytes,
            capture_output=True, timeout=timeout_s,
        )
        if check and done.returncode:
            said = (done.stdout[-1000:] + done.stderr[-1000:]).decode(
                errors='replace'
            )
            raise Failed(
                f'{shlex.join(argv):.300} ended with {done.returncode}: '
                f'{said.strip()}'
            )
        return done.stdout

    def succeeds(self, *argv: str, timeout_s: float = RUN_S) -> bool:
        """Run a command and say whether it ended well."""
        return subprocess.run(
            [*self.ssh(), shlex.join(argv)], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=timeout_s,
        ).returncode == 0

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on; it ends with its standard input."""
        return subprocess.Popen(
            [*self.ssh(), shlex.join(argv)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def ssh(self) -> list[str]:
        """Return a command's beginning, over the connection that is open."""
        return [
            'ssh', '-q', '-F', 'none', '-i', f'{self.state}/id_ed25519',
            '-p', str(self.port), '-o', 'BatchMode=yes',
            '-o', 'StrictHostKeyChecking=yes',
            '-o', f'UserKnownHostsFile={self.state}/known_hosts',
            '-o', 'GlobalKnownHostsFile=/dev/null', '-o', 'ConnectTimeout=30',
            '-o', f'ControlPath={self.state}/ssh.sock', f'root@{ADDRESS}',
        ]

    def _script(self, name: str, timeout_s: float) -> None:
        done = subprocess.run(
            [HERE / name], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, cwd=TOP,
        )
        if done.returncode:
            kind = NoPackages if done.returncode == NO_PACKAGES else Failed
            raise kind(
                f'{name} ended with {done.returncode}: {done.stderr[-6000:]}'
            )
