# SPDX-License-Identifier: Apache-2.0
"""What is printed: tables for people, JSON for programs, ids for pipes.

The keys of the JSON are a promise: they are listed in the reference, and
what the API sends beside them is left out. Tables have no such promise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from volume.cli.client import Json
from volume.cli.values import Usage
from volume.sizes import human

FORMATS = ('table', 'json', 'id')


class Column(NamedTuple):
    title: str
    cell: Callable[[Json], object]


def volume(seen: Json) -> Json:
    """Return what we say about a volume."""
    return {
        'id': seen['id'],
        'name': seen['name'],
        'status': seen['status'],
        'reason': seen['reason'],
        'size_bytes': seen['size_bytes'],
        'backend': seen['backend'],
        'pool': seen['pool'],
        'project_id': seen['os-vol-tenant-attr:tenant_id'],
        'description': seen['description'],
        'metadata': seen['metadata'],
        'bootable': seen['bootable'] == 'true',
        'multiattach': seen['multiattach'],
        'snapshot_id': seen['snapshot_id'],
        'source_volume_id': seen['source_volid'],
        'image': seen.get('volume_image_metadata', {}),
        'attachments': [
            {
                'id': each['attachment_id'],
                'host': each['host_name'],
                'instance_id': each['server_id'],
                'attached_at': _time(each['attached_at']),
            }
            for each in seen['attachments']
        ],
        'created_at': _time(seen['created_at']),
        'updated_at': _time(seen['updated_at']),
    }


def snapshot(seen: Json) -> Json:
    """Return what we say about a snapshot."""
    return {
        'id': seen['id'],
        'name': seen['name'],
        'status': seen['status'],
        'reason': seen['reason'],
        'size_bytes': seen['size_bytes'],
        'volume_id': seen['volume_id'],
        'project_id': seen['os-extended-snapshot-attributes:project_id'],
        'description': seen['description'],
        'metadata': seen['metadata'],
        'created_at': _time(seen['created_at']),
        'updated_at': _time(seen['updated_at']),
    }


def job(seen: Json) -> Json:
    """Return what we say about a job."""
    return {
        **{key: seen[key] for key in (
            'id', 'kind', 'state', 'direction', 'step', 'volume_id',
            'snapshot_id', 'backend', 'project_id', 'attempts', 'cancelling',
            'done_bytes', 'total_bytes', 'rate_bytes_per_s', 'error_kind',
            'error', 'request_id',
        )},
        'created_at': _time(seen['created_at']),
        'updated_at': _time(seen['updated_at']),
        'ended_at': _time(seen['ended_at']),
    }


def service(seen: Json) -> Json:
    """Return what we say about a process, or about a backend that it has."""
    host, _, backend = seen['host'].partition('@')
    return {
        'host': host,
        'backend': backend,
        'state': seen['state'],
        'enabled': seen['status'] == 'enabled',
        'heard_at': _time(seen['updated_at']),
        'reason': seen['disabled_reason'],
    }


VOLUMES = (
    Column('ID', lambda v: v['id']),
    Column('NAME', lambda v: v['name']),
    Column('STATUS', lambda v: v['status']),
    Column('SIZE', lambda v: human(v['size_bytes'])),
    Column('POOL', lambda v: place(v)),
    Column('HOSTS', lambda v: ', '.join(
        each['host'] or each['instance_id'] or 'another'
        for each in v['attachments']
    )),
)
SNAPSHOTS = (
    Column('ID', lambda s: s['id']),
    Column('NAME', lambda s: s['name']),
    Column('STATUS', lambda s: s['status']),
    Column('SIZE', lambda s: human(s['size_bytes'])),
    Column('VOLUME', lambda s: s['volume_id']),
    Column('CREATED', lambda s: s['created_at']),
)
JOBS = (
    Column('ID', lambda j: j['id']),
    Column('KIND', lambda j: j['kind']),
    Column('STATE', lambda j: job_state(j)),
    Column('PROGRESS', lambda j: progress(j)),
    Column('VOLUME', lambda j: j['volume_id']),
    Column('CREATED', lambda j: j['created_at']),
    Column('ERROR', lambda j: j['error']),
)
ATTACHMENTS = (
    Column('ID', lambda a: a['id']),
    Column('VOLUME', lambda a: a['volume_id']),
    Column('STATUS', lambda a: a['status']),
    Column('MODE', lambda a: a['mode']),
    Column('HOST', lambda a: a['host'] or a['instance_id']),
    Column('LOCATION', lambda a: a['location']),
)
SERVICES = (
    Column('HOST', lambda s: s['host']),
    Column('BACKEND', lambda s: s['backend']),
    Column('STATE', lambda s: s['state']),
    Column('HEARD', lambda s: s['heard_at']),
    Column('REASON', lambda s: s['reason']),
)
BACKENDS = (
    Column('NAME', lambda b: b['name']),
    Column('STATE', lambda b: b['state']),
    Column('DRIVER', lambda b: b['driver']),
    Column('EXPORTER', lambda b: b['exporter']),
    Column('TAGS', lambda b: ', '.join(b['tags'])),
    Column('POOLS', lambda b: len(b['pools'])),
    Column('REASON', lambda b: b['reason']),
)
POOLS = (
    Column('POOL', lambda p: place(p)),
    Column('STATE', lambda p: p['state']),
    Column('TOTAL', lambda p: human(p['total_bytes'])),
    Column('FREE', lambda p: human(p['free_bytes'])),
    Column('PROMISED', lambda p: human(p['claimed_bytes'])),
    Column('LIMIT', lambda p: human(p['limit_bytes'])),
    Column('FEATURES', lambda p: ', '.join(p['features'])),
)


def place(thing: Json) -> str:
    """Return where a volume lies, or what a pool is called."""
    pool = thing['pool']
    return f'{thing["backend"]}#{pool}' if thing['backend'] else ''


def job_state(seen: Json) -> str:
    """Return a job's state in one or two words."""
    if seen['state'] != 'open':
        return str(seen['state'])
    if seen['cancelling']:
        return 'cancelling'
    return 'undoing' if seen['direction'] == 'undo' else 'open'


def progress(seen: Json) -> str:
    """Return how far a job is, in words."""
    if not seen['total_bytes']:
        return ''
    text = f'{human(seen["done_bytes"])} of {human(seen["total_bytes"])}'
    if seen['state'] == 'open' and seen['rate_bytes_per_s']:
        text += f', {human(seen["rate_bytes_per_s"])}/s'
    return text


def many(
    things: Sequence[Json], columns: Sequence[Column], format: str
) -> None:
    """Print a list."""
    if format == 'json':
        _print_json(list(things))
    elif format == 'id':
        for each in things:
            print(each['id'] if 'id' in each else columns[0].cell(each))
    else:
        cells = [
            [clean(column.cell(each)) for column in columns]
            for each in things
        ]
        _print_table([column.title for column in columns], cells)


def one(thing: Json, format: str) -> None:
    """Print all about one thing."""
    if format == 'json':
        _print_json(thing)
    elif format == 'id':
        if 'id' not in thing:
            raise Usage('what is shown here has no id; use table or json')
        print(thing['id'])
    else:
        width = max(len(key) for key in thing)
        for key, value in thing.items():
            print(f'{key:{width}}  {_value(key, value)}'.rstrip())


def done(thing: Json, sentence: str, format: str) -> None:
    """Print that something was done: a sentence, or the thing itself."""
    if format == 'table':
        print(clean(sentence))
    else:
        one(thing, format)


_speaker = 'volume'


def speak_as(name: str) -> None:
    """Say which command this process is."""
    global _speaker
    _speaker = name


def note(message: str) -> None:
    """Tell a person something that is not the result."""
    print(f'{_speaker}: {clean(message)}', file=sys.stderr, flush=True)


def clean(value: object) -> str:
    """Return one line that no terminal takes for commands."""
    text = '' if value is None else str(value)
    return ''.join(c if c.isprintable() else '?' for c in text)


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if key.endswith('_bytes') and isinstance(value, int):
        return f'{human(value)} ({value} bytes)'
    if key.endswith('_bytes_per_s') and isinstance(value, int):
        return f'{human(value)}/s'
    if isinstance(value, dict):
        return clean(', '.join(f'{k}={v}' for k, v in value.items()))
    if isinstance(value, list):
        return '; '.join(
            _value('', each) if isinstance(each, dict) else clean(each)
            for each in value
        )
    return clean(value)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(titles: list[str], cells: list[list[str]]) -> None:
    if sys.stdout.isatty():
        _print_rich(titles, cells)
        return
    widths = [
        max(len(row[n]) for row in [titles, *cells])
        for n in range(len(titles))
    ]
    for row in [titles, *cells]:
        print('  '.join(
            f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)
        ).rstrip())


def _print_rich(titles: list[str], cells: list[list[str]]) -> None:
    # Slow to import, and of use at a terminal only.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style='bold')
    for title in titles:
        table.add_column(
            title, no_wrap=title in ('ID', 'STATUS', 'SIZE'), overflow='fold'
        )
    for row in cells:
        table.add_row(*(
            Text(cell, style=_style(title, cell))
            for title, cell in zip(titles, row, strict=True)
        ))
    Console().print(table)


def _style(title: str, cell: str) -> str:
    if title not in ('STATUS', 'STATE'):
        return ''
    if cell.startswith('error') or cell in ('down', 'failed'):
        return 'red'
    if cell in ('available', 'in-use', 'up', 'done'):
        return 'green'
    return 'yellow'


def _time(text: str | None) -> str | None:
    # The API writes UTC without saying so.
    return f'{text}Z' if text else None
