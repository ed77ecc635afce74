# SPDX-License-Identifier: Apache-2.0
"""What every test in the lab begins and ends with: clean disks, no remains.

A class has a volume group of its own on scratch disks that were emptied for
it, and two portals, each with an address of its own. At its end nothing may
be left in the guest: no target, no session, no mapping, no process. What is
left is told as a failure, and swept away, so that the next class begins
clean all the same.
"""

from __future__ import annotations

import pathlib
import unittest
from typing import ClassVar

from tests import lab
from tests.lab import core

NOT_CORE = 'it is not of the core: VOLUME_LAB is not full'
PORTALS = ('192.0.2.1', '192.0.2.2')
HERE = pathlib.Path(__file__).parent


class LabCase(unittest.TestCase):
    """Tests with a guest; ``group`` is the volume group of the class."""

    disks: ClassVar[int] = 1
    limit_s: ClassVar[float] = 1800.0
    guest: ClassVar[lab.Guest]
    group: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        if not lab.FULL and not core.of(cls):
            raise unittest.SkipTest(NOT_CORE)
        super().setUpClass()
        cls.guest = cls.find_guest()
        cls.addClassCleanup(cls._leave)
        script(cls.guest, 'sweep.sh')
        script(cls.guest, 'portals.sh', *PORTALS)
        script(cls.guest, 'agent.sh', str(lab.TOP))
        cls.group = f'vg-{cls.__name__.lower()}'
        if cls.disks:
            cls.guest.run('vgcreate', '-q', cls.group, *cls.devices())

    def setUp(self) -> None:
        if not lab.FULL and self._testMethodName not in core.of(type(self)):
            self.skipTest(NOT_CORE)
        super().setUp()

    @classmethod
    def find_guest(cls) -> lab.Guest:
        return lab.guest()

    @classmethod
    def devices(cls) -> list[str]:
        """Return the scratch disks that make the volume group."""
        return [disk(number) for number in range(cls.disks)]

    @classmethod
    def _leave(cls) -> None:
        left = remains(cls.guest)
        script(cls.guest, 'sweep.sh')
        if left:
            raise AssertionError(f'left in the guest: {left}')


def disk(number: int) -> str:
    """Return the path of a scratch disk."""
    return f'/dev/disk/by-id/virtio-lab{number}'


def remains(guest: lab.Guest) -> list[str]:
    """Return whatever is in the guest that a class should have removed."""
    return script(guest, 'remains.sh').splitlines()


def script(guest: lab.Guest, name: str, *arguments: str) -> str:
    """Run one of the scripts of this folder in the guest."""
    return guest.run(
        'bash', '-s', '--', *arguments,
        input_bytes=(HERE / 'guest' / name).read_bytes(),
    )
