# SPDX-License-Identifier: Apache-2.0
"""Sphinx directives that take pages from the code, so that they stay true.

* ``driver-contract``      rules, methods and features, from ``base.py``
* ``feature-matrix``       which driver has which feature
* ``exporter-matrix``      what each exporter can do at best
* ``plugin:: GROUP NAME``  what one entry point is: features and options
* ``service-options``      options of the service, and those of any backend

Drivers installed from elsewhere appear as well: all come by entry points.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from volume import conf
from volume import model
from volume.drivers import base


class DriverContract(SphinxDirective):
    """The contract as its author wrote it."""

    def run(self) -> list[nodes.Node]:
        rules = inspect.getdoc(base) or ''
        lines = [*rules.splitlines()[1:], '', '.. rubric:: Every driver', '']
        lines += _autoclass(base.Driver)
        lines += ['', '.. rubric:: What is read and written', '']
        lines += _autoclass(base.Reader) + _autoclass(base.Writer)
        lines += ['', '.. rubric:: Features, to choose from', '']
        for feature in base.FEATURES:
            lines += _autoclass(feature)
        return self.parse_text_to_nodes('\n'.join(lines))


class FeatureMatrix(SphinxDirective):
    """A row for each feature, a column for each driver."""

    def run(self) -> list[nodes.Node]:
        drivers = {
            point.name: base.features(point.load())
            for point in _points('volume.drivers')
        }
        head = ['feature', *drivers]
        rows = [
            [feature.__name__]
            + ['✓' if feature.__name__ in has else '' for has in
               drivers.values()]
            for feature in base.FEATURES
        ]
        return [_table(head, rows)]


class ExporterMatrix(SphinxDirective):
    """A row for each ability, a column for each exporter."""

    def run(self) -> list[nodes.Node]:
        exporters = {
            point.name: point.load().abilities
            for point in _points('volume.exports')
        }
        rows = [
            [field.name.replace('_', ' ')]
            + [_ability(getattr(each, field.name))
               for each in exporters.values()]
            for field in dataclasses.fields(model.Abilities)
        ]
        return [_table(['', *exporters], rows)]


class Plugin(SphinxDirective):
    """What the class of an entry point says of itself."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        group, name = self.arguments
        for point in _points(group):
            if point.name == name:
                break
        else:
            raise self.error(f'no entry point {name!r} in {group!r}')
        cls = point.load()
        found: list[nodes.Node] = []
        if features := sorted(base.features(cls)):
            found.append(_paragraph('Features: ', ', '.join(features) + '.'))
        return found + _options(cls.options)


class ServiceOptions(SphinxDirective):
    """The service's own sections, then what every backend's may hold."""

    def run(self) -> list[nodes.Node]:
        sections = [
            (f'[{name}]', options) for name, options in conf.list_opts()
            if name in ('DEFAULT', 'api')
        ]
        found: list[nodes.Node] = []
        for title, options in [
            *sections, ('The section of a backend', conf.BACKEND)
        ]:
            found += [nodes.rubric('', title), *_options(options)]
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive('driver-contract', DriverContract)
    app.add_directive('feature-matrix', FeatureMatrix)
    app.add_directive('exporter-matrix', ExporterMatrix)
    app.add_directive('plugin', Plugin)
    app.add_directive('service-options', ServiceOptions)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}


def _points(group: str) -> list[importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=group)
    return sorted(points, key=lambda point: point.name)


def _ability(value: object) -> str:
    if isinstance(value, tuple):
        return ', '.join(value)
    return '✓' if value else ''


def _autoclass(cls: type) -> list[str]:
    return [
        f'.. autoclass:: {cls.__module__}.{cls.__qualname__}',
        '   :members:',
        '   :member-order: bysource',
        '',
    ]


def _options(options: Iterable[Any]) -> list[nodes.Node]:
    """Return a definition list; nodes, since help texts are no markup."""
    entries = nodes.definition_list()
    for option in sorted(options, key=lambda option: option.name):
        term = nodes.term('', '', nodes.literal('', option.name))
        meaning = nodes.definition('', _paragraph('', _kind(option)))
        for paragraph in (option.help or '').split('\n\n'):
            meaning += _paragraph('', paragraph)
        entries += nodes.definition_list_item('', term, meaning)
    return [entries] if len(entries) else []


def _kind(option: Any) -> str:
    words = [type(option.type).__name__.lower()]
    if getattr(option.type, 'choices', None):
        words = [' | '.join(map(str, option.type.choices))]
    for bound in ('min', 'max'):
        if getattr(option.type, bound, None) is not None:
            words.append(f'{bound} {getattr(option.type, bound)}')
    if option.required:
        words.append('required')
    else:
        default = option.sample_default
        if default is None:
            default = option.default
        words.append(f'default {default}')
    return '; '.join(words)


def _paragraph(strong: str, text: str) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    if strong:
        paragraph += nodes.strong('', strong)
    paragraph += nodes.Text(' '.join(text.split()))
    return paragraph


def _table(head: list[str], rows: list[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead('', _row(head))
    group += nodes.tbody('', *map(_row, rows))
    return nodes.table('', group)


def _row(cells: list[str]) -> nodes.row:
    return nodes.row(
        '', *(nodes.entry('', nodes.paragraph('', cell)) for cell in cells)
    )
