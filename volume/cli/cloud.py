# SPDX-License-Identifier: Apache-2.0
"""The verbs about the service: backends, pools, jobs, limits, status."""

from __future__ import annotations

import argparse

from volume import errors
from volume.cli import find
from volume.cli import parser
from volume.cli import show
from volume.cli import values
from volume.cli import wait
from volume.cli.client import Json
from volume.cli.parser import Verbs
from volume.cli.wait import Session

LISTED = 50


def add(verbs: Verbs) -> None:
    """Declare the verbs."""
    parser.verb(
        verbs, 'backends', show_backends, 'list backends, and why one is '
        'down',
        'volume backends',
    )
    parser.verb(
        verbs, 'pools', show_pools, 'list pools: what they hold, have '
        'promised, and can do',
        'volume pools',
    )
    parser.verb(
        verbs, 'services', show_services, 'list the processes that serve, '
        'and when they were last heard of (administrators only)',
        'volume services',
    )
    _add_jobs(verbs)
    parser.verb(
        verbs, 'limits', show_limits, 'show how much the project uses',
        'volume limits --format json',
    )
    parser.verb(
        verbs, 'status', show_status, 'say whether all is well',
        'volume status',
        more='The exit code is 1 if an enabled backend is down.',
    )


def _add_jobs(verbs: Verbs) -> None:
    group = parser.group(
        verbs, 'jobs', 'see what the service is doing, stop it, hurry it; '
        'without a verb: list jobs', default=show_jobs, options=_add_filters,
    )
    verb = parser.verb(
        group, 'list', show_jobs, 'list jobs, the newest first',
        'volume jobs list --state open',
    )
    _add_filters(verb)
    for name, run, help in (
        ('show', show_job, 'show all about a job'),
        ('cancel', cancel, 'stop a job, and undo what it has done'),
        ('retry', retry, 'try a waiting job now, and give it its full time '
                         'again'),
    ):
        verb = parser.verb(
            group, name, run, help,
            f'volume jobs {name} 6f9619ff-8b86-4d01-b42d-00cf4fc964ff',
            waits=name != 'show',
        )
        verb.add_argument('job', type=values.id, metavar='JOB', help='its id')


def _add_filters(verb: parser.Parser) -> None:
    # They stand before the verb "list", or behind it, or without it.
    verb.add_argument(
        '--state', choices=('open', 'done', 'failed', 'cancelled'),
        default=argparse.SUPPRESS, help='only those in this state',
    )
    verb.add_argument(
        '--volume', metavar='VOLUME', default=argparse.SUPPRESS,
        help='only those about this volume',
    )
    verb.add_argument(
        '--all-projects', action='store_true', default=argparse.SUPPRESS,
        help='also of other projects (administrators only)',
    )
    verb.add_argument(
        '--limit', type=values.count, metavar='NUMBER',
        default=argparse.SUPPRESS,
        help=f'no more than so many; by default {LISTED}',
    )


def show_backends(session: Session, args: argparse.Namespace) -> None:
    show.many(_backends(session), show.BACKENDS, session.format)


def show_pools(session: Session, args: argparse.Namespace) -> None:
    show.many(_pools(session), show.POOLS, session.format)


def show_services(session: Session, args: argparse.Namespace) -> None:
    asked = session.client.get('/os-services')['services']
    show.many([show.service(each) for each in asked], show.SERVICES,
              session.format)


def show_jobs(session: Session, args: argparse.Namespace) -> None:
    client = session.client
    given = vars(args)
    name = given.get('volume')
    rows = client.pages(
        '/os-volume-jobs', 'jobs', given.get('limit', LISTED),
        state=given.get('state'),
        volume_id=find.volume(client, name) if name else None,
        all_tenants=1 if given.get('all_projects') else None,
    )
    show.many([show.job(row) for row in rows], show.JOBS, session.format)


def show_job(session: Session, args: argparse.Namespace) -> None:
    show.one(_job(session, args.job), session.format)


def cancel(session: Session, args: argparse.Namespace) -> None:
    session.client.post(
        f'/os-volume-jobs/{args.job}/action', {'os-cancel': None}
    )
    if session.wait:
        ended = wait.job(session, args.job, f'cancelling job {args.job}')
        if ended['state'] != 'cancelled':
            raise errors.VolumeError(
                f'job {args.job} was not cancelled in time: it is '
                f'{ended["state"]}'
            )
    _say_job(session, args.job)


def retry(session: Session, args: argparse.Namespace) -> None:
    session.client.post(
        f'/os-volume-jobs/{args.job}/action', {'os-retry': None}, again=True
    )
    if session.wait:
        ended = wait.job(session, args.job, f'job {args.job}')
        if ended['state'] != 'done':
            raise errors.VolumeError(
                f'job {args.job} is {ended["state"]}: {ended["error"]}'
            )
    _say_job(session, args.job)


def show_limits(session: Session, args: argparse.Namespace) -> None:
    absolute = session.client.get('/limits')['limits']['absolute']
    show.one({
        'volumes': absolute['totalVolumesUsed'],
        'volumes_limit': _limit(absolute['maxTotalVolumes']),
        'snapshots': absolute['totalSnapshotsUsed'],
        'snapshots_limit': _limit(absolute['maxTotalSnapshots']),
        'gib': absolute['totalGigabytesUsed'],
        'gib_limit': _limit(absolute['maxTotalVolumeGigabytes']),
    }, session.format)


def show_status(session: Session, args: argparse.Namespace) -> int:
    backends = _backends(session)
    down = [
        each for each in backends if each['enabled'] and each['state'] != 'up'
    ]
    jobs = session.client.pages(
        '/os-volume-jobs', 'jobs', state='open', all_tenants=1
    )
    stuck = [
        seen for seen in map(show.job, jobs)
        if seen['attempts'] or seen['direction'] == 'undo'
    ]
    show.one({
        'url': session.client.url,
        'backends_up': [
            each['name'] for each in backends if each['state'] == 'up'
        ],
        'backends_down': [each['name'] for each in down],
        'jobs_in_trouble': [seen['id'] for seen in stuck],
    }, session.format)
    for each in down:
        show.note(
            f'backend {each["name"]} is down: '
            f'{each["reason"] or "administrators are told why"}'
        )
    return 1 if down else 0


def _asked(session: Session) -> list[Json]:
    found: list[Json] = session.client.get('/os-volume-backends')['backends']
    return found


def _backends(session: Session) -> list[Json]:
    return [
        {
            'name': each['name'],
            'state': each['state'],
            'enabled': each['enabled'],
            # What follows is told to administrators only.
            'reason': each.get('reason'),
            'driver': each.get('driver'),
            'exporter': each.get('exporter'),
            'cost': each.get('cost'),
            'projects': each.get('projects'),
            'tags': each['tags'],
            'cluster': each['cluster'],
            'role': each['role'],
            'pools': [pool['name'] for pool in each['pools']],
        }
        for each in _asked(session)
    ]


def _pools(session: Session) -> list[Json]:
    return [
        {
            'backend': backend['name'],
            'pool': pool['name'],
            'state': pool['state'] if backend['state'] == 'up' else 'down',
            **{key: pool.get(key) for key in (
                'total_bytes', 'free_bytes', 'claimed_bytes', 'limit_bytes',
                'hidden_bytes', 'granularity_bytes', 'max_volume_bytes',
                'thin', 'device',
            )},
            'features': pool['features'],
        }
        for backend in _asked(session)
        for pool in backend['pools']
    ]


def _job(session: Session, job_id: str) -> Json:
    answer = session.client.get(f'/os-volume-jobs/{job_id}')
    return show.job(answer['job'])


def _say_job(session: Session, job_id: str) -> None:
    seen = _job(session, job_id)
    show.done(
        seen, f'job {job_id} is {show.job_state(seen)}', session.format
    )


def _limit(number: int) -> int | None:
    return None if number < 0 else number
