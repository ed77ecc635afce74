# SPDX-License-Identifier: Apache-2.0
"""Plant losses behind the service's back, and see that each is found.

A check that cannot fail proves nothing. Each plant spoils one thing of its
own, and puts it right again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator

import crash_check
import crash_rows
from crash_roster import Held
from crash_run import Run
from demo_screen import Failed

ROUNDS_MAX = 20
SIZE_BYTES = 1 << 20
# The kind of the difference that must be found, and a word of it.
Sign = tuple[str, str]


def try_all(run: Run) -> Iterator[tuple[str, bool]]:
    """Yield the name of each plant, and whether the check has found it.

    :raises Failed: something differs without any plant, or afterwards
    """
    run.start()
    for _ in range(ROUNDS_MAX):
        run.work('')
        _check(run)
        if any(_own_data(run)):
            break
    rows = [_new_volume(run) for _ in range(PLAIN_VOLUMES)]
    _check(run)
    signs = {}
    with contextlib.ExitStack() as stack:
        for name, plant in PLANTS.items():
            signs[name] = stack.enter_context(plant(run, rows))
        run.outcome.differences += crash_check.unsettled(run.rows())
        run.look()
    found = list(run.outcome.differences)
    run.outcome.differences.clear()
    for name, (kind, word) in signs.items():
        yield name, any(
            each.kind == kind and word in str(each) for each in found
        )
    _check(run)
    run.clear()


def _check(run: Run) -> None:
    run.check()
    if run.outcome.differences:
        raise Failed(f'without a plant, {run.outcome.differences[0]}')


@contextlib.contextmanager
def _byte_of_volume(run: Run, rows: list[str]) -> Iterator[Sign]:
    row_id = rows.pop()
    path = run.service.path('plain', f'{row_id}.raw')
    with _spoilt(path, SIZE_BYTES // 3):
        yield 'bytes', row_id


@contextlib.contextmanager
def _byte_of_snapshot(run: Run, rows: list[str]) -> Iterator[Sign]:
    row_id, path, offset_bytes = next(_own_data(run))
    with _spoilt(path, offset_bytes):
        yield 'bytes', row_id


@contextlib.contextmanager
def _orphan_file(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _file(run, f'{uuid.uuid4()}.raw') as name:
        yield 'files', name


@contextlib.contextmanager
def _orphan_of_reconcile(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _file(run, f'{uuid.uuid4()}.raw') as name:
        yield 'reconcile', name


@contextlib.contextmanager
def _draft(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _file(run, f'.{uuid.uuid4()}.raw.new') as name:
        yield 'files', name


@contextlib.contextmanager
def _stuck_row(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _changed(run, rows, 'status', 'extending') as row_id:
        yield 'unsettled', row_id


@contextlib.contextmanager
def _lost_row(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _changed(run, rows, 'deleted_at', 1.0) as row_id:
        yield 'lost', row_id


@contextlib.contextmanager
def _size(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _changed(run, rows, 'size_bytes', SIZE_BYTES // 2) as row_id:
        yield 'size', row_id


@contextlib.contextmanager
def _claim(run: Run, rows: list[str]) -> Iterator[Sign]:
    with _changed(run, rows, 'claimed_bytes', 0):
        yield 'claims', 'pool plain#plain'


@contextlib.contextmanager
def _undead_row(run: Run, rows: list[str]) -> Iterator[Sign]:
    row_id = rows.pop()
    thing = run.model.volumes.pop(row_id)
    run.model.deleted.add(row_id)
    try:
        yield 'undead', row_id
    finally:
        run.model.deleted.discard(row_id)
        run.model.volumes[row_id] = thing


@contextlib.contextmanager
def _forgotten_request(run: Run, rows: list[str]) -> Iterator[Sign]:
    request = next(
        each for each in run.outcome.requests
        if each.kind == 'create' and each.answer == 'accepted'
    )
    kept = request.request_id, request.end
    request.request_id, request.end = f'req-{uuid.uuid4()}', ''
    try:
        yield 'forgotten', request.about
    finally:
        request.request_id, request.end = kept


@contextlib.contextmanager
def _host_cut_off(run: Run, rows: list[str]) -> Iterator[Sign]:
    held = Held(str(uuid.uuid4()), rows.pop(), SIZE_BYTES, '')
    run.roster.hold(held)
    try:
        yield 'host', held.attachment_id
    finally:
        del run.roster.held[held.attachment_id]


PLANTS: dict[
    str,
    Callable[[Run, list[str]], contextlib.AbstractContextManager[Sign]],
] = {
    'a byte of a volume was changed': _byte_of_volume,
    'a byte of a snapshot was changed': _byte_of_snapshot,
    'a file belongs to no row': _orphan_file,
    'reconcile sees it, too': _orphan_of_reconcile,
    'a draft was left over': _draft,
    'a row is stuck': _stuck_row,
    'a volume is gone': _lost_row,
    'a volume has shrunk': _size,
    'a deleted volume is back': _undead_row,
    'a claim is wrong': _claim,
    'an accepted request has no job': _forgotten_request,
    'a host has lost its volume': _host_cut_off,
}
PLAIN_VOLUMES = 7  # at most one a plant


def _new_volume(run: Run) -> str:
    """Make a volume for a plant to spoil."""
    return run.clients[0].new_volume(
        'create', SIZE_BYTES, backend='plain', wait=False
    )


def _own_data(run: Run) -> Iterator[tuple[str, str, int]]:
    """Yield snapshots that have data in a layer of their own, and where."""
    for row_id, row in run.rows().live('snapshot').items():
        path = os.path.realpath(run.service.path(
            'tree', 'snapshots', f'{row["volume_id"]}@{row_id}'
        ))
        for each in json.loads(run.service.run(
            'qemu-img', 'map', '-U', '-f', 'qcow2', '--output=json', path
        )):
            if each['data'] and each['depth'] == 0:
                yield row_id, path, each['offset']
                break


@contextlib.contextmanager
def _spoilt(path: str, offset_bytes: int) -> Iterator[None]:
    with open(path, 'r+b') as f:

        def flip() -> None:
            f.seek(offset_bytes)
            was = f.read(1)[0]
            f.seek(offset_bytes)
            f.write(bytes([was ^ 1]))
            f.flush()

        flip()
        try:
            yield
        finally:
            flip()


@contextlib.contextmanager
def _file(run: Run, name: str) -> Iterator[str]:
    path = run.service.path('plain', name)
    with open(path, 'wb') as f:
        f.truncate(SIZE_BYTES)
    try:
        yield name
    finally:
        os.unlink(path)


@contextlib.contextmanager
def _changed(
    run: Run, rows: list[str], column: str, value: object
) -> Iterator[str]:
    row_id = rows.pop()
    kept = run.rows().volumes[row_id][column]
    path = run.service.path('state', 'volume.sqlite')
    statement = f'UPDATE volumes SET {column} = ? WHERE id = ?'
    crash_rows.change(path, statement, value, row_id)
    try:
        yield row_id
    finally:
        crash_rows.change(path, statement, kept, row_id)
