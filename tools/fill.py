# SPDX-License-Identifier: Apache-2.0
"""Fill an installation: the rows of a large one in seconds, to measure it.

    fill.py DIRECTORY [--driver qcow|file] [--exporter nbd|local]
            [--volumes N] [--snapshots N] [--attachments N] [--pools N]
            [--history N] [--expired N] [--files all|exported|none]

It makes DIRECTORY with ``volume.conf``, a database and pools, and says how
to serve it. Nothing is random: the same numbers make the same installation,
but for its ids. Half of all volumes lie in the first pool, for a pool is
what grows large; the others are spread.

What the rows say is true, as far as files were asked for: a volume's file
is there, and so are the layers under it. ``exported`` makes the files of the
volumes that are attached, which a service needs to export them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import insert
from sqlalchemy import update
from sqlalchemy.orm import Session

from volume import backends
from volume import conf as options
from volume import ids
from volume import report
from volume.db import migrate
from volume.db import models
from volume.db.engine import Database
from volume.node import Node

GIB = 1 << 30
PAGE = 4096
CHUNK = 5_000
BACKENDS = 4
PROJECTS = 20
HOUR_S = 3600.0
HOST = 'large'
Row = dict[str, Any]

CONFIGURATION = """\
[DEFAULT]
enabled_backends = {names}
state_path = {directory}/state
host = {host}
{settings}
[api]
port = 0
"""
SECTION = """\
[{name}]
driver = {driver}
directories = {directories}
exporter = {exporter}
oversubscription = 100000
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """How many of each; ``expired`` of the history is past its retention."""

    volumes: int = 10_000
    snapshots: int = 2_000
    attachments: int = 3_000
    pools: int = 200
    history: int = 100_000
    expired: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A pool: its backend and directory."""

    backend: str
    directory: str

    @property
    def pool(self) -> str:
        return os.path.basename(self.directory)


def configure(
    directory: str, pools: int, driver: str = 'qcow',
    exporter: str = 'nbd', settings: str = '',
) -> str:
    """Write a configuration, with its pools' directories; return its path."""
    directory = os.path.abspath(directory)
    os.makedirs(directory, 0o700, exist_ok=True)
    sections: dict[str, list[str]] = {}
    for number in range(pools):
        name = f'b{number % BACKENDS}'
        path = os.path.join(directory, 'pools', f'{name}-p{number:03}')
        os.makedirs(path, 0o700, exist_ok=True)
        sections.setdefault(name, []).append(path)
    path = os.path.join(directory, 'volume.conf')
    with open(path, 'w') as f:
        f.write(CONFIGURATION.format(
            names=', '.join(sections), directory=directory, host=HOST,
            settings=settings,
        ))
        for name, paths in sections.items():
            f.write(SECTION.format(
                name=name, driver=driver, exporter=exporter,
                directories=', '.join(paths),
            ))
    return path


def fill(path: str, size: Size, files: str = 'exported') -> None:
    """Make the rows, and files, of the installation that ``path`` says."""
    conf = options.load([], [path])
    node = Node(os.path.abspath(conf.state_path))
    os.makedirs(node.state_dir, 0o700, exist_ok=True)
    table = backends.load(conf, node)
    exporters = {name: each.exporter for name, each in table.items()}
    for each in table.values():
        each.exporter = None  # no storage daemon is started for this
    backends.check_all(table.values(), 600.0)
    for name, each in table.items():
        if not each.is_up:
            raise SystemExit(f'backend {name} is down: {each.reason}')
        each.exporter = exporters[name]
    places = [
        Place(name, directory)
        for name, each in table.items()
        for directory in each.conf.directories
    ]
    places.sort(key=lambda place: place.pool.rpartition('-')[2])
    db = Database(options.database_url(conf))
    try:
        migrate.upgrade(db)
        db.write(lambda session: report.report(
            session, list(table.values()), conf.host, db.clock()
        ))
        is_local = any(
            each.conf.exporter == 'local' for each in table.values()
        )
        _Filler(
            db, size, places, files, node.state_dir if is_local else ''
        ).run()
    finally:
        db.close()


class _Filler:
    """One run: rows first, then the files that they speak of."""

    def __init__(
        self, db: Database, size: Size, places: list[Place], files: str,
        told: str,
    ) -> None:
        self._db = db
        self._size = size
        self._places = places
        self._files = files
        self._told = told
        self._now = db.clock()
        self._volumes: list[Row] = []
        self._snapshots: list[Row] = []
        self._of: dict[str, list[str]] = {}

    def run(self) -> None:
        self._volumes = list(self._make_volumes())
        self._snapshots = list(self._make_snapshots())
        for row in self._snapshots:
            self._of.setdefault(row['volume_id'], []).append(row['id'])
        attachments = list(self._make_attachments())
        # Files first: what is written down is there.
        self._make_files({row['volume_id'] for row in attachments})
        if self._told:
            self._tell(attachments)
        for table, rows in (
            (models.Volume, self._volumes),
            (models.Snapshot, self._snapshots),
            (models.Attachment, attachments),
            (models.Job, self._make_jobs()),
            (models.Volume, self._make_tombstones()),
        ):
            for chunk in _chunks(rows):
                self._db.write(lambda s, t=table, c=chunk: s.execute(
                    insert(t), c
                ))
        self._db.write(self._claim)

    def _place(self, number: int) -> Place:
        """Return where a volume lies: every other one in the first pool."""
        return self._places[
            0 if number % 2 else number // 2 % len(self._places)
        ]

    def _make_volumes(self) -> Iterator[Row]:
        for number in range(self._size.volumes):
            place, created = self._place(number), self._when(number)
            is_attached = number < self._size.attachments
            yield {
                'id': ids.new(), 'project_id': _project(number),
                'user_id': 'filler', 'name': f'fill-{number}',
                'meta': {'number': str(number), 'tier': str(number % 3)},
                'status': 'in-use' if is_attached else 'available',
                'backend': place.backend, 'pool': place.pool,
                'size_bytes': GIB, 'claimed_bytes': GIB,
                'created_at': created, 'updated_at': created,
                'launched_at': created, 'handle': '',
            }

    def _make_snapshots(self) -> Iterator[Row]:
        if not self._volumes:
            return
        for number in range(self._size.snapshots):
            # Of the last volumes, so that most attached ones have none.
            row = self._volumes[-1 - number % len(self._volumes)]
            yield {
                'id': ids.new(), 'volume_id': row['id'],
                'project_id': row['project_id'], 'user_id': 'filler',
                'name': f'snapshot-{number}', 'status': 'available',
                'backend': row['backend'], 'pool': row['pool'],
                'size_bytes': GIB, 'created_at': self._when(number),
                'updated_at': self._when(number), 'handle': '',
            }

    def _make_attachments(self) -> Iterator[Row]:
        for number in range(self._size.attachments):
            row = self._volumes[number]
            host = f'compute-{number % 50}'
            yield {
                'id': ids.new(), 'volume_id': row['id'],
                'project_id': row['project_id'], 'backend': row['backend'],
                'status': 'attached', 'host': host,
                'connector': {'host': host},
                'connection': {'driver_volume_type': 'nbd', 'data': {}},
                'is_connected': True, 'instance_uuid': ids.new(),
                'node': HOST, 'mountpoint': '/dev/vdb',
                'created_at': self._when(number),
                'attached_at': self._when(number),
            }

    def _make_jobs(self) -> Iterator[Row]:
        """Three fifths of the history are jobs, of all kinds and ends."""
        kinds = ('create', 'attach', 'detach', 'delete', 'snapshot')
        for number in range(self._size.history * 3 // 5):
            ended = self._ended(number)
            place, kind = self._place(number), kinds[number % len(kinds)]
            has_host = kind in ('attach', 'detach')
            yield {
                'id': ids.new(), 'kind': kind, 'volume_id': ids.new(),
                'state': 'failed' if number % 50 == 0 else 'done',
                'backend': place.backend, 'project_id': _project(number),
                'args': {'attachments': [
                    [ids.new(), {'host': 'compute-1'}]
                ], 'remove': []} if has_host else {'native': False},
                'exclusive': [f'volume-{ids.new()}'],
                'due_at': ended, 'created_at': ended - 1.0,
                'updated_at': ended, 'ended_at': ended,
            }

    def _make_tombstones(self) -> Iterator[Row]:
        for number in range(self._size.history * 2 // 5):
            ended = self._ended(number)
            place = self._place(number)
            yield {
                'id': ids.new(), 'project_id': _project(number),
                'user_id': 'filler', 'name': f'gone-{number}',
                'status': 'deleted', 'backend': place.backend,
                'pool': place.pool, 'size_bytes': GIB,
                'created_at': ended - HOUR_S, 'updated_at': ended,
                'deleted_at': ended,
            }

    def _when(self, number: int) -> float:
        return self._now - 30 * 86400.0 + number * 60.0

    def _ended(self, number: int) -> float:
        """Return when history happened; the expired ones long ago."""
        if number * 5 < self._size.expired * 3:
            return self._now - 400 * 86400.0 + number
        return self._now - 86400.0 + number * 0.5

    def _claim(self, session: Session) -> None:
        claimed: dict[tuple[str, str], int] = {}
        for row in self._volumes:
            key = row['backend'], row['pool']
            claimed[key] = claimed.get(key, 0) + row['claimed_bytes']
        for (backend, pool), claimed_bytes in claimed.items():
            session.execute(
                update(models.Pool)
                .where(
                    models.Pool.backend == backend,
                    models.Pool.name == pool,
                )
                .values(claimed_bytes=claimed_bytes)
            )

    def _make_files(self, attached: set[str]) -> None:
        if self._files == 'none':
            return
        directories = {place.pool: place.directory for place in self._places}
        templates: dict[str, _Template] = {}
        for row in self._volumes:
            if self._files == 'exported' and row['id'] not in attached:
                continue
            directory = directories[row['pool']]
            of = self._of.get(row['id'], [])
            if not os.path.isdir(os.path.join(directory, 'layers')):
                _make_raw(directory, row['id'], of)
                continue
            if not templates:
                templates['alone'] = _Template(directory, '')
                templates['over'] = _Template(directory, BELOW)
            _make_layers(directory, row['id'], of, templates)


    def _tell(self, attachments: list[Row]) -> None:
        """Make the records of the local exporter: it has told all paths."""
        directory = os.path.join(self._told, 'local')
        os.makedirs(directory, 0o700, exist_ok=True)
        paths = {place.pool: place.directory for place in self._places}
        pools = {row['id']: row['pool'] for row in self._volumes}
        for row in attachments:
            volume_id = row['volume_id']
            path = os.path.join(paths[pools[volume_id]], f'{volume_id}.raw')
            with open(f'{directory}/{row["id"]}.json', 'x') as f:
                json.dump({
                    'path': path, 'format': 'raw', 'access': 'rw',
                }, f)


BELOW = '00000000-0000-4000-8000-000000000000.qcow2'


class _Template:
    """An empty qcow2 image, of which copies are made page by page."""

    def __init__(self, directory: str, backing: str) -> None:
        path = os.path.join(directory, 'drafts', 'template')
        subprocess.run(
            ['qemu-img', 'create', '-q', '-f', 'qcow2', *(
                ['-u', '-b', backing, '-F', 'qcow2'] if backing else []
            ), path, str(GIB)],
            check=True, timeout=60,
        )
        with open(path, 'rb') as f:
            data = f.read()
        os.unlink(path)
        self._bytes = len(data)
        self._pages = [
            (at, data[at:at + PAGE]) for at in range(0, len(data), PAGE)
            if any(data[at:at + PAGE])
        ]

    def write(self, path: str, backing: str = BELOW) -> None:
        with open(path, 'xb') as f:
            for at, page in self._pages:
                f.seek(at)
                f.write(page.replace(BELOW.encode(), backing.encode()))
            f.truncate(self._bytes)


def _make_raw(directory: str, volume_id: str, of: list[str]) -> None:
    for name in volume_id, *(f'{volume_id}@{each}' for each in of):
        with open(os.path.join(directory, f'{name}.raw'), 'xb') as f:
            f.truncate(GIB)


def _make_layers(
    directory: str, volume_id: str, of: list[str],
    templates: dict[str, _Template],
) -> None:
    below = ''
    for pointer in (
        *(f'snapshots/{volume_id}@{each}' for each in of),
        f'volumes/{volume_id}',
    ):
        name = f'{ids.new()}.qcow2'
        path = os.path.join(directory, 'layers', name)
        templates['over' if below else 'alone'].write(path, below or BELOW)
        os.symlink(f'../layers/{name}', os.path.join(directory, pointer))
        below = name


def _project(number: int) -> str:
    """Return a project; the first one has half of everything."""
    return 'default' if number % 2 else f'project-{number % PROJECTS}'


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while chunk := list(itertools.islice(left, CHUNK)):
        yield chunk


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='fill.py', description='Make the rows of a large installation.'
    )
    parser.add_argument('directory')
    parser.add_argument('--driver', default='qcow', choices=['qcow', 'file'])
    parser.add_argument('--exporter', default='nbd')
    parser.add_argument(
        '--files', default='exported', choices=['all', 'exported', 'none']
    )
    for field in dataclasses.fields(Size):
        parser.add_argument(
            f'--{field.name}', type=int, default=field.default
        )
    given = parser.parse_args(argv)
    if os.path.exists(os.path.join(given.directory, 'volume.conf')):
        parser.error(f'{given.directory} is filled already: name another')
    begun = time.monotonic()
    size = Size(**{
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(Size)
    })
    if size.attachments > size.volumes:
        parser.error('there are more attachments than volumes')
    path = configure(
        given.directory, size.pools, given.driver, given.exporter
    )
    fill(path, size, given.files)
    print(f'filled in {time.monotonic() - begun:.1f} s; serve it with')
    print(f'    volume-service --config-file {path}')
    return 0


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))
