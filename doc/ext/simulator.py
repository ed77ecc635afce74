# SPDX-License-Identifier: Apache-2.0
"""Sphinx directives for the page of the XenAPI simulator.

* ``simulator-profiles``  which servers it can be
* ``simulator-types``     the types of storage repositories of all of them
* ``simulator-switches``  what can be set, and what it is otherwise
* ``simulator-missing``   the calls that it knows and does not answer
"""

from __future__ import annotations

import itertools
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from volume.sim.xapi import registry
from volume.sim.xapi.published import datamodel
from volume.sim.xapi.published import generic
from volume.sim.xapi.published import profiles


class Profiles(SphinxDirective):
    """A definition for each profile."""

    def run(self) -> list[nodes.Node]:
        return [_definitions(
            (profile.name, [
                f'{profile.title}. Calls and fields of release '
                f'{profile.release}.',
                f'Types: {", ".join(sorted(profile.sm))}.',
                *([
                    'Switches: ' + ', '.join(
                        f'{name} = {value}'
                        for name, value in profile.switches.items()) + '.'
                ] if profile.switches else []),
            ])
            for profile in profiles.PROFILES.values()
        )]


class Types(SphinxDirective):
    """A definition for each type, of the newest profile that has it."""

    def run(self) -> list[nodes.Node]:
        known = {**profiles.EXTRA}
        for profile in profiles.PROFILES.values():
            known |= profile.sm
        return [_definitions(
            (kind.type, [
                f'{kind.name} ({kind.vendor}), '
                f'{"shared" if kind.shared else "local"}'
                + (', modelled on manuals' if kind.modelled else '')
                + (', by name only' if kind.family == 'bare' else '') + '.',
                f'device_config: {", ".join(sorted(kind.keys)) or "-"}.',
                f'Features: {", ".join(kind.features)}.',
            ])
            for _, kind in sorted(known.items())
        )]


class Switches(SphinxDirective):
    """A definition for each switch."""

    def run(self) -> list[nodes.Node]:
        return [_definitions(
            (name, [f'{switch.help}. Default {switch.default}.'])
            for name, switch in sorted(profiles.SWITCHES.items())
        )]


class Missing(SphinxDirective):
    """A line for each class with calls that are not simulated."""

    def run(self) -> list[nodes.Node]:
        return [_definitions(
            (cls, [', '.join(name for _, name in names) + '.'])
            for cls, names in itertools.groupby(
                (name.split('.', 1) for name in missing()),
                key=lambda pair: pair[0],
            )
        )]


def missing() -> list[str]:
    """Return the calls that answer NOT_IMPLEMENTED."""
    registry.load()
    return generic.missing(datamodel.load())


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive('simulator-profiles', Profiles)
    app.add_directive('simulator-types', Types)
    app.add_directive('simulator-switches', Switches)
    app.add_directive('simulator-missing', Missing)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}


def _definitions(entries: Any) -> nodes.definition_list:
    found = nodes.definition_list()
    for name, texts in entries:
        meaning = nodes.definition()
        for text in texts:
            meaning += nodes.paragraph('', text)
        found += nodes.definition_list_item(
            '', nodes.term('', '', nodes.literal('', name)), meaning)
    return found
