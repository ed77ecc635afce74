# SPDX-License-Identifier: Apache-2.0
"""Work whose failure must end nothing else.

A thread that does something again and again comes no more once an exception
has ended it, and of several things that are to be ended the others must be
as well. So what fails is told to the log, and its caller goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from volume import errors

LOG = logging.getLogger(__name__)


def guarded(what: str, work: Callable[[], object]) -> None:
    """Do it, and return whatever becomes of it.

    ``what`` begins the line in the log, such as ``sweep``.
    """
    try:
        work()
    except errors.VolumeError as failed:
        LOG.error('%s: %s', what, failed)
    except Exception:
        LOG.exception('%s: failed by a bug', what)
