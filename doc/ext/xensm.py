# SPDX-License-Identifier: Apache-2.0
"""Sphinx directives for the pages of the driver ``xensm``.

* ``xensm-types``  the types of SR: keys, what they can do, what to mind
* ``xensm-calls``  the calls of the server that it makes, by least role
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from volume.xenapi import calls
from volume.xenapi import kinds

# What is shown for what a storage driver declares.
CAN = {
    'volumes': 'VDI_DELETE', 'snapshots': 'VDI_SNAPSHOT',
    'clones': 'VDI_CLONE', 'growth': 'VDI_RESIZE',
    'changed blocks': 'VDI_CONFIG_CBT',
}


class Types(SphinxDirective):
    """A row for each type, as the driver's own table has it."""

    def run(self) -> list[nodes.Node]:
        head, *rows = (
            (*row[:4], can, *row[4:]) for row, can in zip(
                kinds.table(), ('Can do', *map(_can, kinds.KINDS)),
                strict=True,
            )
        )
        lines = ['.. list-table::', '   :header-rows: 1', '']
        for row in (head, *rows):
            for at, cell in enumerate(row):
                lines.append(f'   {"*" if not at else " "} - {cell}')
        return self.parse_text_to_nodes('\n'.join(lines))


def _can(kind: kinds.Kind) -> str:
    """Return what the newest driver of a type says that it can do."""
    abilities: set[str] = set()
    data = json.loads(
        importlib.resources.files('volume.sim.xapi')
        .joinpath('sm_drivers.json').read_text()
    )
    for drivers in data['drivers'].values():
        for driver in drivers:
            types = [t.replace('lvhd', 'lvm') for t in driver['handles'] or ()]
            if kind.type in types and not abilities:
                abilities = {
                    name.partition('/')[0] for name in driver['capabilities']
                }
    if not abilities:
        return 'what the pool says'
    return ', '.join(
        word for word, needs in CAN.items() if needs in abilities
    ) or 'volumes'


class Calls(SphinxDirective):
    """A definition for each role."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for role, names in calls.ROLES.items():
            listed = ', '.join(
                f'``{name}``' + (
                    f' (since {calls.NEWER[name]}, where it is there)'
                    if name in calls.NEWER else ''
                ) for name in sorted(names)
            )
            lines += [f'``{role}``', f'   {listed}', '']
        return self.parse_text_to_nodes('\n'.join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive('xensm-types', Types)
    app.add_directive('xensm-calls', Calls)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
