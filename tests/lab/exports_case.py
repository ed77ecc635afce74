# SPDX-License-Identifier: Apache-2.0
"""What tests of the kernel's exporters share: a node in the guest, devices.

The exporter runs here, and reaches the guest's kernel through the node's
agent alone. Sources are logical volumes of the guest.
"""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any, ClassVar

from tests import lab
from tests import ports
from tests.lab.case import LabCase
from tests.lab.hosts import batch
from volume import model
from volume.remote import ssh
from volume.remote.node import SshNode
from volume.testing import exports
from volume.testing import faults

LVS = 8  # what a test needs at most
LV_BYTES = 4 * model.MIB


def target_of(guest: lab.Guest) -> ssh.Target:
    """Return how the agent is reached; the guest sees this checkout."""
    return ssh.Target(
        'root', guest.address, guest.port, guest.key, guest.known_hosts,
        f'env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={lab.TOP} '
        'python3 -m volume.remote.agent --state-path /run/volume-node',
    )


class CountingNode(SshNode):
    """Counts round trips, and what is done in them."""

    def __init__(self, target: ssh.Target) -> None:
        super().__init__(target)
        self.trips = self.ops = 0

    def configure(self, wanted: Any) -> Any:
        if wanted:
            self.trips += 1
            self.ops += len(wanted)
        return super().configure(wanted)


class FaultyGuestNode(faults.FaultyNode, SshNode):
    """Each operation on the kernel is an act of its own, to be spoilt."""

    def configure(self, wanted: Any) -> Any:
        return [SshNode.configure(self, [op])[0] for op in wanted]


class DeviceCase(exports.ExporterBench, LabCase):
    """A node in the guest, and logical volumes as sources."""

    node: ClassVar[CountingNode]
    spare: ClassVar[list[str]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.node = CountingNode(target_of(cls.guest))
        cls.addClassCleanup(cls._remove_devices)
        cls.addClassCleanup(cls.node.close)
        cls.spare = cls._make_devices()

    @classmethod
    def _make_devices(cls) -> list[str]:
        names = [f'lv{number}' for number in range(LVS if cls.disks else 0)]
        batch(cls.guest, *(
            ['lvcreate', '-y', '-q', '-Wn', '-Zn', '-n', name, '-L',
             f'{LV_BYTES}b', cls.group]
            for name in names
        ))
        return [f'/dev/{cls.group}/{name}' for name in names]

    @classmethod
    def _remove_devices(cls) -> None:
        cls.guest.run('vgremove', '-ff', '-y', cls.group)

    def make_source(self, image: bytes) -> model.Device:
        path = self.spare.pop()
        self.addCleanup(self.spare.append, path)
        self.write(path, 'r+b', image)
        return model.Device(path, is_block=True)

    def write(self, path: str, mode: str, image: bytes) -> None:
        with self.node.open(path, mode) as f:
            f.write(image)
            f.sync()

    def stored(self, source: model.Device, length_bytes: int) -> bytes:
        """Return a device's bytes as the guest's disk has them."""
        return self.guest.run_bytes(
            'dd', f'if={source.path}', 'bs=4k', 'iflag=direct,count_bytes',
            f'count={length_bytes}', 'status=none',
        )


class Tunnels:
    """Ports of this machine that lead to addresses of the guest."""

    def __init__(self, guest: lab.Guest) -> None:
        self.guest = guest
        self.made: dict[str, str] = {}

    def to(self, portal: str) -> str:
        if portal not in self.made:
            here = f'127.0.0.1:{ports.free()}'
            self._control('forward', f'{here}:{portal}')
            self.made[portal] = here
        return self.made[portal]

    def close(self) -> None:
        for portal, here in self.made.items():
            with contextlib.suppress(subprocess.CalledProcessError):
                self._control('cancel', f'{here}:{portal}')
        self.made.clear()

    def _control(self, what: str, forward: str) -> None:
        *ssh, host = self.guest.ssh()
        subprocess.run(
            [*ssh, '-O', what, '-L', forward, host], check=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
        )
