# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, as Cinder's clients know it: a status and a fault name.

Our kinds of errors say what a caller can do; Cinder's API says it in other
codes, and its clients react to those. So this door has a table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volume import errors

# A volume in the wrong state is Invalid, and so 400: to the letter.
STATUS: Mapping[type[errors.VolumeError], int] = {
    errors.Invalid: 400,
    errors.Denied: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Busy: 409,
    errors.Cancelled: 409,
    errors.NoSpace: 413,
    errors.Corrupt: 500,
    errors.Unsupported: 501,
    errors.Unavailable: 503,
    errors.Unknown: 503,
}

NAMES = {
    400: 'badRequest',
    401: 'unauthorized',
    403: 'forbidden',
    404: 'itemNotFound',
    405: 'badMethod',
    409: 'conflictingRequest',
    413: 'overLimit',
    415: 'badMediaType',
    501: 'notImplemented',
    503: 'serviceUnavailable',
}
OTHER = 'computeFault'
BUG = 'the service has met an error of its own; its log tells more'


class Refused(Exception):
    """The door itself refuses a request, before any verb is asked."""

    def __init__(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


def refused(failed: errors.VolumeError) -> Refused:
    """Return what this door says of a verb's error."""
    for kind in type(failed).__mro__:
        if kind in STATUS:
            status = STATUS[kind]
            break
    else:
        status = 500
    # Cinder's clients read Retry-After of every 413, and give up at zero.
    headers = {'Retry-After': '0'} if status == 413 else {}
    return Refused(status, str(failed), headers)


def body(failed: Refused) -> dict[str, Any]:
    """Return the JSON of a fault."""
    fault: dict[str, Any] = {'code': failed.status, 'message': str(failed)}
    if 'Retry-After' in failed.headers:
        fault['retryAfter'] = failed.headers['Retry-After']
    return {NAMES.get(failed.status, OTHER): fault}
