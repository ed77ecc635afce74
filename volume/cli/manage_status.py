# SPDX-License-Identifier: Apache-2.0
"""``volume-manage status``: what is going on, at a glance.

It reads the database alone, so it also works while the service is down. The
exit code is 0 if all is well, and 1 if something needs a look; what, stands
first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from typing import Any

import sqlalchemy
from oslo_config import cfg

from volume.cli import show
from volume.db import migrate
from volume.db import overview
from volume.db.engine import Database
from volume.sizes import human

Json = dict[str, Any]

LISTED = 20
ALL = 100_000
DISK_BYTES_MIN = 256 << 20


def run(db: Database, conf: cfg.ConfigOpts, args: argparse.Namespace) -> int:
    """Print what is going on; say by the exit code whether all is well."""
    now = time.time()
    view = db.read(lambda session: overview.read(
        session, now, ALL if args.all else LISTED,
        silent_s=max(conf.service_down_s, 3 * conf.stats_interval_s),
        waits_for_host_s=conf.reservation_timeout_s,
    ))
    view['database'] = {
        'name': name(db.url), 'revision': migrate.current(db),
        'release': migrate.newest(), **_disk(db, conf),
    }
    left = view['database'].get('disk_free_bytes')
    if left is not None and left < DISK_BYTES_MIN:
        view['look'].insert(0, (
            f'the file system of state_path has {human(left)} left: without '
            'room the database takes no more requests'
        ))
    view['is_well'] = not view['look']
    if args.format == 'json':
        print(json.dumps(view, indent=2))
    else:
        _print(view)
    return 0 if view['is_well'] else 1


def name(url: str) -> str:
    """Return which database a URL means; no password."""
    found = sqlalchemy.make_url(url)
    if url.startswith('sqlite'):
        return found.database or ''
    return f'{found.get_backend_name()}://{found.host or ""}/{found.database}'


def _disk(db: Database, conf: cfg.ConfigOpts) -> Json:
    found: Json = {}
    with contextlib.suppress(OSError):
        fs = os.statvfs(conf.state_path)
        found['disk_free_bytes'] = fs.f_bavail * fs.f_frsize
    if db.is_sqlite:
        with contextlib.suppress(OSError):
            path = name(db.url)
            found['size_bytes'] = sum(
                os.path.getsize(each)
                for each in (path, f'{path}-wal') if os.path.exists(each)
            )
    return found


def _print(view: Json) -> None:
    if view['look']:
        print('needs a look:')
        for line in view['look']:
            print(show.clean(f'  {line}'))
    else:
        print('all is well')
    _print_services(view)
    _print_pools(view['pools'])
    _print_jobs(view)
    _print_rows(view)
    _print_database(view)


def _print_services(view: Json) -> None:
    _list('services', view['services'], (
        show.Column('HOST', lambda s: s['host']),
        show.Column('STATE', lambda s: s['state']),
        show.Column('HEARD', lambda s: _ago(s['heard_s'])),
        show.Column('RUNS FOR', lambda s: _time(s['up_s'])),
        show.Column('ROLES', lambda s: ' '.join(s['roles'])),
        show.Column('VERSION', lambda s: s['version']),
    ))
    _list('backends', view['backends'], (
        show.Column('BACKEND', lambda b: b['backend']),
        show.Column('STATE', lambda b: b['state']),
        show.Column('HOST', lambda b: b['host']),
        show.Column('DRIVER', lambda b: b['driver']),
        show.Column('EXPORTER', lambda b: b['exporter']),
        show.Column('CHECKED', lambda b: _ago(b['checked_s'])),
        show.Column('REASON', lambda b: b['reason']),
    ))


def _print_pools(pools: Json) -> None:
    _list('pools', pools, (
        show.Column('POOL', lambda p: p['pool']),
        show.Column('STATE', lambda p: p['state']),
        show.Column('TOTAL', lambda p: human(p['total_bytes'])),
        show.Column('FREE', lambda p: human(p['free_bytes'])),
        show.Column('PROMISED', lambda p: human(p['promised_bytes'])),
        show.Column('OF LIMIT', lambda p: f'{p["promised_percent"]}%'),
        show.Column('LIMIT', lambda p: human(p['limit_bytes'])),
        show.Column('OF TOTAL', lambda p: f'{p["limit_percent"]}%'),
        show.Column('ROOM', lambda p: human(p['room_bytes'])),
        show.Column('ALARM', lambda p: p['alarm']),
    ))


def _print_jobs(view: Json) -> None:
    jobs = view['jobs']
    print()
    if not jobs['open']:
        print('jobs: none open')
        return
    kinds: dict[str, list[str]] = {}
    for each in jobs['by_kind']:
        kinds.setdefault(each['kind'], []).append(
            f'{each["count"]} {each["state"]}'
        )
    print(f'jobs: {jobs["open"]} open, the oldest for '
          f'{_time(jobs["oldest_s"])}')
    for kind, words in kinds.items():
        print(f'  {kind}: {", ".join(words)}')
    for each in view['leases']:
        print(show.clean(
            f'  held by {each["host"]}: {each["held"]}'
            + (f', and {each["expired"]} whose lease has run out'
               if each['expired'] else '')
        ))
    if jobs['rows']:
        show.many(jobs['rows'], (
            show.Column('JOB', lambda j: j['job']),
            show.Column('KIND', lambda j: j['kind']),
            show.Column('STATE', lambda j: j['state']),
            show.Column('AGE', lambda j: _time(j['age_s'])),
            show.Column('NEXT TRY', lambda j: _next(j)),
            show.Column('PROGRESS', lambda j: show.progress(
                {**j, 'state': 'open'}
            )),
            show.Column('VOLUME', lambda j: j['volume_id']),
            show.Column('ERROR', lambda j: j['error']),
        ), 'table')


def _print_rows(view: Json) -> None:
    if view['stuck']['count']:
        _list('stuck', view['stuck'], (
            show.Column('WHAT', lambda r: r['what']),
            show.Column('STATUS', lambda r: r['status']),
            show.Column('SINCE', lambda r: _ago(r['since_s'])),
        ))
    found = view['errors']
    if found['rows']:
        _list('in error', {
            'count': sum(found['counts'].values()), 'rows': found['rows'],
        }, (
            show.Column('WHAT', lambda r: r['what']),
            show.Column('STATUS', lambda r: r['status']),
            show.Column('REASON', lambda r: r['reason']),
        ))
    print()
    for name in 'volumes', 'snapshots', 'attachments':
        counts = view['counts'][name]
        words = ', '.join(f'{n} {status}' for status, n in counts.items())
        print(f'{name}: {sum(counts.values())}'
              + (f' ({words})' if words else ''))


def _print_database(view: Json) -> None:
    database, history = view['database'], view['counts']['history']
    print(
        f'history: {history["ended_jobs"]} ended jobs, '
        f'{history["deleted_volumes"]} deleted volumes, '
        f'{history["deleted_snapshots"]} deleted snapshots'
    )
    line = f'database: {database["name"]}, revision {database["revision"]}'
    if 'size_bytes' in database:
        line += f', {human(database["size_bytes"])}'
    if 'disk_free_bytes' in database:
        line += (
            f'; {human(database["disk_free_bytes"])} left beside state_path'
        )
    print(show.clean(line))


def _list(
    title: str, section: Json, columns: tuple[show.Column, ...]
) -> None:
    rows, count = section['rows'], section['count']
    print()
    print(f'{title}: {count}')
    if rows:
        show.many(rows, columns, 'table')
    if count > len(rows):
        print(f'… and {count - len(rows)} more; --all lists them')


def _ago(seconds: float) -> str:
    return f'{_time(seconds)} ago'


def _next(job: Json) -> str:
    if job['held_by']:
        return 'runs'
    return 'now' if not job['next_s'] else f'in {_time(job["next_s"])}'


def _time(seconds: float) -> str:
    """Return a duration as a person says it."""
    for unit, word in (86400, 'd'), (3600, 'h'), (60, 'min'):
        if seconds >= 2 * unit:
            return f'{seconds / unit:.0f} {word}'
    return f'{seconds:.0f} s'
