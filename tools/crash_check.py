# SPDX-License-Identifier: Apache-2.0
"""Hold rows, jobs, files and bytes against what must be."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from crash_bytes import BLOCK_BYTES
from crash_kill import ENDS_DAEMON
from crash_model import Model
from crash_model import Thing
from crash_report import Difference
from crash_report import Kill
from crash_report import Outcome
from crash_report import Request
from crash_rows import Row
from crash_rows import Rows

from volume.db.models import TRANSITIONAL

CHUNK_BYTES = 1 << 20
DIFFERENT_BLOCKS_MAX = 5
LASTING = frozenset({'available', 'in-use'})
# A request of these kinds that was accepted has a job.
HAVE_JOBS = frozenset({
    'create', 'create_from_image', 'clone', 'from_snapshot', 'extend',
    'snapshot', 'delete_snapshot', 'revert', 'flatten', 'upload', 'delete',
    'delete_cascade', 'detach',
})
# What comes again by itself, until it can be done or is not wanted.
REPEATED = frozenset({'restore'})
# What is ended by whoever takes the volume away from its host.
LETS_IN = frozenset({'attach', 'restore'})

# Whose death may be the end of a job.
HELPED_BY = ENDS_DAEMON | {'helper'}

Fill = Callable[[bytearray, int], None]


def unsettled(rows: Rows) -> list[Difference]:
    """Return what is still under way: jobs, and rows that wait for one."""
    found = [
        Difference(
            'unsettled', f'job {row["id"]}',
            f'{row["kind"]} is open, attempt {row["attempts"]}, direction '
            f'{row["direction"]}, step {row["step"]}: {row["error"]}',
        ) for row in rows.open_jobs()
    ]
    for noun in 'volume', 'snapshot':
        found += [
            Difference('unsettled', f'{noun} {row_id}', f'is {row["status"]}')
            for row_id, row in rows.live(noun).items()
            if row['status'] in TRANSITIONAL
        ]
    return found


def promises(
    rows: Rows, model: Model, outcome: Outcome, cancelled: set[str]
) -> Iterator[Difference]:
    """See that what was accepted was done, or why not; close the requests."""
    by_request: dict[str, list[Row]] = {}
    for row in rows.jobs.values():
        by_request.setdefault(row['request_id'], []).append(row)
    for request in outcome.requests:
        if request.end:
            continue
        jobs = by_request.get(request.request_id, [])
        request.end = _end(request, jobs)
        if request.answer == 'internal error':
            yield Difference(
                'internal', f'{request.kind} {request.about}', request.words
            )
        if (
            request.answer == 'accepted' and request.kind in HAVE_JOBS
            and not jobs
        ):
            yield Difference(
                'forgotten', f'{request.kind} {request.about}',
                f'was accepted and has no job ({request.request_id})',
            )
        for job in jobs:
            if job['state'] in ('done', 'open'):
                continue
            if _is_explained(job, outcome.kills, cancelled):
                outcome.excused_jobs += job['state'] == 'failed'
                continue
            yield Difference(
                'failed', f'{job["kind"]} of volume {job["volume_id"]}',
                f'job {job["id"]} {job["state"]}: {job["error_kind"]}: '
                f'{job["error"]}',
            )


def presence(rows: Rows, model: Model) -> Iterator[Difference]:
    """What was made is there and as large as it must be, and no more."""
    for noun, wanted in (
        ('volume', model.volumes), ('snapshot', model.snapshots),
    ):
        live = rows.live(noun)
        for row_id, thing in wanted.items():
            row = live.get(row_id)
            if row is None:
                yield Difference(
                    'lost', f'{noun} {row_id}',
                    'was made and not deleted, and is not there',
                )
            elif row['status'] not in LASTING:
                yield Difference(
                    'status', f'{noun} {row_id}',
                    f'is {row["status"]}: {row["reason"]}',
                )
            elif row['size_bytes'] != thing.size_bytes:
                yield Difference(
                    'size', f'{noun} {row_id}',
                    f'has {row["size_bytes"]} bytes, not {thing.size_bytes}',
                )
        for row_id, row in live.items():
            if row_id in wanted or row['status'].startswith('error'):
                continue
            words = (
                'was deleted, and is back' if row_id in model.deleted
                else 'is there, and was never made'
            )
            yield Difference(
                'undead', f'{noun} {row_id}', f'{words}: {row["status"]}'
            )


def claims(rows: Rows) -> Iterator[Difference]:
    """Pools have claimed what their rows say, and nobody reads any more."""
    sums: dict[tuple[str, str], int] = {}
    for noun, table in (
        ('volume', rows.volumes), ('snapshot', rows.snapshots),
    ):
        for row in table.values():
            place = row['backend'], row['pool']
            sums[place] = sums.get(place, 0) + row['claimed_bytes']
            if row['deleted_at'] is not None and row['claimed_bytes']:
                yield Difference(
                    'claims', f'{noun} {row["id"]}',
                    f'is deleted and claims {row["claimed_bytes"]} bytes',
                )
            elif noun == 'volume' and row['status'] in LASTING and (
                row['claimed_bytes'] < row['size_bytes']
            ):
                yield Difference(
                    'claims', f'{noun} {row["id"]}',
                    f'has {row["size_bytes"]} bytes and claims '
                    f'{row["claimed_bytes"]}',
                )
            if row['deleted_at'] is None and row['lease_shared']:
                yield Difference(
                    'lease', f'{noun} {row["id"]}',
                    f'is being read by {row["lease_shared"]} jobs; none runs',
                )
    devices: dict[str, int] = {}
    for pool in rows.pools:
        claimed = sums.get((pool['backend'], pool['name']), 0)
        devices[pool['device']] = devices.get(pool['device'], 0) + claimed
        if pool['claimed_bytes'] != claimed:
            yield Difference(
                'claims', f'pool {pool["backend"]}#{pool["name"]}',
                f'has claimed {pool["claimed_bytes"]} bytes, its rows '
                f'{claimed}',
            )
    for device in rows.devices:
        if device['claimed_bytes'] != devices.get(device['name'], 0):
            yield Difference(
                'claims', f'device {device["name"]}',
                f'has claimed {device["claimed_bytes"]} bytes, its pools '
                f'{devices.get(device["name"], 0)}',
            )


def content(
    what: str, thing: Thing, size_bytes: int, fill: Fill, outcome: Outcome
) -> Iterator[Difference]:
    """Read every byte, and say which are not as they were written."""
    wrong: list[str] = []
    for offset in range(0, size_bytes, CHUNK_BYTES):
        buffer = bytearray(min(CHUNK_BYTES, size_bytes - offset))
        fill(buffer, offset)
        wrong += thing.content.compare(offset, bytes(buffer))
        outcome.verified_bytes += len(buffer)
    if wrong:
        yield Difference(
            'bytes', what,
            f'{len(wrong)} blocks of {BLOCK_BYTES} bytes differ: '
            + '; '.join(wrong[:DIFFERENT_BLOCKS_MAX]),
        )


def recoveries(rows: Rows, kills: list[Kill]) -> None:
    """Note how long it took until all had ended that a kill had met."""
    for kill in kills:
        if kill.is_looked_at:
            continue
        kill.is_looked_at = True
        ended = [
            row['ended_at'] for job_id in kill.jobs
            if (row := rows.jobs.get(job_id)) and row['ended_at']
        ]
        if kill.target in ENDS_DAEMON:
            ended += [
                row['ended_at'] for row in rows.jobs.values()
                if row['kind'] == 'restore' and row['state'] == 'done'
                and row['created_at'] >= kill.at
            ]
        if ended:
            kill.recovered_s = max(0.0, max(ended) - kill.at)


def _end(request: Request, jobs: list[Row]) -> str:
    """Return how a request ended, by its own job if it has one."""
    if request.answer in ('refused', 'unanswered', 'internal error'):
        return request.answer
    states = {job['state'] for job in jobs}
    for state in 'failed', 'cancelled':
        if state in states:
            return state
    return 'done'


def _is_explained(
    job: Row, kills: list[Kill], cancelled: set[str]
) -> bool:
    """Say whether it is known why a job failed."""
    if job['kind'] in REPEATED:
        return True
    if job['state'] == 'cancelled':
        return job['id'] in cancelled or job['kind'] in LETS_IN
    with contextlib.suppress(TypeError):
        return any(
            job['created_at'] <= kill.at <= (job['ended_at'] or time.time())
            for kill in kills
            if kill.target in HELPED_BY
        )
    return False
