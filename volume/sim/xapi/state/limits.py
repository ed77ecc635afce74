# SPDX-License-Identifier: Apache-2.0
"""How much, how many and how long: a server's limits, all to be set."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Limits:
    """The values of a real server; a test sets smaller ones."""

    auth_delay_s: float = 5.0
    sessions_per_originator: int = 500
    sessions_per_user: int = 500
    sessions: int = 400             # of root, without an originator
    session_s: float = 24 * 3600.0  # since it was last used
    tasks: int = 200                # finished ones
    finished_task_s: float = 65 * 60.0
    pending_task_s: float = 24 * 3600.0
    operation_wait_s: float = 2 * 3600.0
    auto_scan_s: float = 30.0       # between two scans of an SR by itself
    gc_delay_s: float = 5 * 60.0    # before the collector of an SR works
    body_bytes: int = 300 << 10
    connection_s: float = 600.0     # without a byte on it
    event_batch_s: float = 0.05
    collect_s: float = 60.0         # between two rounds of forgetting


NAMES = frozenset(field.name for field in dataclasses.fields(Limits))
