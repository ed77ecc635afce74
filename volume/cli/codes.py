# SPDX-License-Identifier: Apache-2.0
"""Exit codes: what a script can do about a failure."""

from __future__ import annotations

from volume import errors
from volume.cli.values import Usage
from volume.cli.wait import Interrupted
from volume.cli.wait import Late

OK = 0
FAILED = 1  # refused, or begun and failed
USAGE = 2
NOT_FOUND = 3
LATE = 4  # the time to wait is over; the work goes on
NO_ANSWER = 5  # try again; after a change look first
INTERRUPTED = 130

# The first that fits.
CODES: tuple[tuple[type[errors.VolumeError], int], ...] = (
    (Usage, USAGE),
    (Late, LATE),
    (Interrupted, INTERRUPTED),
    (errors.NotFound, NOT_FOUND),
    (errors.Unavailable, NO_ANSWER),
    (errors.Unknown, NO_ANSWER),
)


def of(failed: errors.VolumeError) -> int:
    """Return the exit code of a failure."""
    for kind, code in CODES:
        if isinstance(failed, kind):
            return code
    return FAILED
