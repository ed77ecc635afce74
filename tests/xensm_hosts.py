# SPDX-License-Identifier: Apache-2.0
"""Compute hosts of simulated pools: their VMs, and their connectors."""

from __future__ import annotations

import os
from typing import Any

from tests import xensm
from volume import model
from volume.connector.xensm import XenSmConnector
from volume.connector.xensm_host import XenHost
from volume.node import Node
from volume.sim.xapi.objects.guests import guests
from volume.testing import fixtures
from volume.xenapi import calls
from volume.xenapi import poolfile
from volume.xenapi.link import Link


class ComputeHost:
    """A host of a pool: a VM that runs there, and what plugs its disks."""

    def __init__(
        self, test: Any, pool: Any, at: int = 0, name: str = ''
    ) -> None:
        self.test = test
        self.pool = pool
        self.name = name or f'compute-{pool.uuid[:4]}-{at}'
        self.node: Node = fixtures.make_node(test)
        self.path = write_poolfile(fixtures.state_dir(test), pool)
        self.vm = make_vm(pool, at)
        self.connector = self.connect(self.vm)

    def connect(self, vm: str, **options: Any) -> XenSmConnector:
        """Return a connector of a process of its own on this host."""
        link = Link(poolfile.load(self.path).settings, self.node)
        record_calls(self.test, link)
        return XenSmConnector(
            self.node, XenHost(self.path, link, vm),
            **{'sleep': lambda pause_s: None, **options},
        )

    def host(self) -> model.Host:
        """Return who it is, under its own name."""
        found = self.connector.host()
        return model.Host(self.name, properties=found.properties)

    def write(self, device: str, offset: int, data: bytes) -> None:
        """Write as the guest."""
        guests(self.pool).write(
            self.vm, os.path.basename(device), offset, data)

    def read(self, device: str, offset: int, length: int) -> bytes:
        """Read as the guest."""
        return guests(self.pool).read(
            self.vm, os.path.basename(device), offset, length)

    def vbds(self, vm: str = '') -> list[dict[str, Any]]:
        """Return the disks of the VM, as the pool's database has them."""
        rows = self.pool.rows
        ref = rows.by_uuid('VM', vm or self.vm)
        return [rows.get('VBD', vbd) for vbd in rows.find('VBD', VM=ref)]


def record_calls(test: Any, link: Link) -> None:
    """See, after the test, that each call is one that we say we make."""
    made: set[str] = set()
    link.records.append(made.add)
    test.addCleanup(lambda: test.assertEqual(
        set(), {m.removeprefix('Async.') for m in made} - set(calls.ROLE)
    ))


def make_vm(pool: Any, at: int = 0, *, is_running: bool = True) -> str:
    """Make a VM on a host; return its uuid."""
    with xensm.session(pool) as xenapi:
        ref = xenapi.VM.create({
            'name_label': f'guest {at}', 'name_description': '',
            'user_version': '1', 'is_a_template': False,
            'affinity': pool.host(at), 'memory_target': '0',
            'memory_static_max': '1073741824',
            'memory_dynamic_max': '1073741824',
            'memory_dynamic_min': '1073741824',
            'memory_static_min': '1073741824',
            'VCPUs_params': {}, 'VCPUs_max': '1', 'VCPUs_at_startup': '1',
            'actions_after_shutdown': 'destroy',
            'actions_after_reboot': 'restart',
            'actions_after_crash': 'destroy',
            'PV_bootloader': '', 'PV_kernel': '', 'PV_ramdisk': '',
            'PV_args': '', 'PV_bootloader_args': '', 'PV_legacy_args': '',
            'HVM_boot_policy': '', 'HVM_boot_params': {},
            'platform': {}, 'PCI_bus': '', 'other_config': {},
            'recommendations': '',
        })
        if is_running:
            xenapi.VM.start_on(ref, pool.host(at), False, False)
        return str(xenapi.VM.get_uuid(ref))


def write_poolfile(directory: str, pool: Any, **more: str) -> str:
    """Write what a host or another pool knows of a pool; return the path."""
    path = os.path.join(directory, f'{pool.uuid}.conf')
    options = {'addresses': pool.url(), 'password': 'secret', **more}
    with open(path, 'w') as f:
        f.write('[xensm]\n' + ''.join(
            f'{name} = {value}\n' for name, value in options.items()
        ))
    return path
