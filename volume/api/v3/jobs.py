# SPDX-License-Identifier: Apache-2.0
"""/os-volume-jobs: what is being done, how far it is; stop it, hurry it.

Ours alone; Cinder has no such thing.
"""

from __future__ import annotations

from volume.api import paging
from volume.api import views
from volume.api.actions import Action
from volume.api.actions import dispatch
from volume.api.call import Call
from volume.api.call import Reply
from volume.api.fields import Fields
from volume.verbs import jobs
from volume.verbs import lookup

FILTERS = ('id', 'state', 'kind', 'volume_id', 'snapshot_id', 'backend',
           'project_id')
SORT = ('created_at', 'updated_at', 'id', 'state', 'kind')


def index(call: Call) -> Reply:
    found = lookup.jobs(
        call.core, call.caller,
        paging.page(call, FILTERS, SORT, lookup.JOB_FILTERS),
    )
    return Reply(200, paging.listed(
        call, 'jobs', [views.job(row) for row in found.rows], found,
        found.rows[-1].id if found.rows else '',
    ))


def show(call: Call) -> Reply:
    row = jobs.get(call.core, call.caller, call.id('job_id'))
    return Reply(200, {'job': views.job(row)})


def act(call: Call) -> Reply:
    return dispatch(call, ACTIONS)


def _cancel(call: Call, info: Fields) -> None:
    jobs.cancel(call.core, call.caller, call.id('job_id'))


def _retry(call: Call, info: Fields) -> None:
    jobs.retry(call.core, call.caller, call.id('job_id'))


ACTIONS = {
    'os-cancel': Action(_cancel, 202),
    'os-retry': Action(_retry, 202),
}
