# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on request: in calls, in transfers, in storage.

A fault names a message (``VDI.create``, ``import_raw_vdi`` or ``*``) and
happens ``count`` times. By a plain name it meets the call in either form;
by ``Async.VDI.create`` only the request that starts the task.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Final

REFUSE: Final = 'refuse'            # params: code, *details
DELAY: Final = 'delay'              # params: seconds
LOSE_REPLY: Final = 'lose_reply'    # done, then the connection closes
DROP: Final = 'drop'                # not done, the connection closes
KILL_MASTER: Final = 'kill_master'  # before or after it is done
PARTIAL: Final = 'partial'          # params: bytes, then the transfer ends
KINDS: Final = (REFUSE, DELAY, LOSE_REPLY, DROP, KILL_MASTER, PARTIAL)
# These belong to the request, whatever it starts.
OF_REQUEST: Final = frozenset({LOSE_REPLY, DROP})
TRANSFERS: Final = ('import_raw_vdi', 'export_raw_vdi')
BEFORE: Final = 'before'
AFTER: Final = 'after'
ASYNC: Final = 'Async.'


@dataclasses.dataclass
class Fault:
    """One thing that is to go wrong, ``count`` times (-1: always)."""

    method: str
    kind: str
    when: str = BEFORE
    count: int = 1
    params: tuple[Any, ...] = ()
    after_matches: int = 0  # let so many matching calls pass first

    def __post_init__(self) -> None:
        if isinstance(self.params, str):
            raise ValueError(f'params is a list, not {self.params!r}')
        if self.kind not in KINDS:
            raise ValueError(
                f'no fault of kind {self.kind!r}; there are '
                f'{", ".join(KINDS)}'
            )
        if self.when not in (BEFORE, AFTER):
            raise ValueError(f'a fault is before or after, not {self.when!r}')
        if self.kind == LOSE_REPLY:
            self.when = AFTER
        if self.kind == DROP:
            self.when = BEFORE
        self.params = tuple(self.params)
        if self.kind in (DELAY, PARTIAL) and not (
            self.params and isinstance(self.params[0], int | float)
        ):
            raise ValueError(
                f'{self.kind} needs a number in params: '
                + ('[seconds]' if self.kind == DELAY else '[bytes]')
            )
        if self.kind == REFUSE and not self.params:
            raise ValueError('refuse needs a code in params: ["CODE", ...]')


class Faults:
    """All that is to go wrong in one pool; nothing of it is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._offline: set[str] = set()
        self._full: dict[str, int] = {}
        self.happened: list[tuple[str, str]] = []  # (method, kind)
        self.gc_paused = False
        self.gc_delay_s: float | None = None

    def add(self, fault: Fault) -> Fault:
        """Let something go wrong from now on."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Let nothing go wrong any more, offline SRs and space excepted."""
        with self._lock:
            self._faults.clear()

    @property
    def waiting(self) -> list[Fault]:
        """Return what has not happened yet."""
        with self._lock:
            return list(self._faults)

    def take(
        self, method: str, when: str = BEFORE, *, kinds: frozenset[str],
    ) -> list[Fault]:
        """Return the faults that happen to a call now, and count them."""
        taken = []
        plain = method.removeprefix(ASYNC)
        with self._lock:
            for fault in list(self._faults):
                names = {method, '*'}
                if fault.kind in OF_REQUEST or method == plain:
                    names.add(plain)
                if (
                    fault.when != when or fault.kind not in kinds
                    or fault.method not in names
                ):
                    continue
                if fault.after_matches:
                    fault.after_matches -= 1
                    continue
                fault.count -= 1
                if not fault.count:
                    self._faults.remove(fault)
                self.happened.append((method, fault.kind))
                taken.append(fault)
        return taken

    def partial(self, name: str) -> int | None:
        """Return after how many bytes a transfer is to end, if it is."""
        for fault in self.take(name, kinds=frozenset({PARTIAL})):
            return int(fault.params[0])
        return None

    def put_sr_offline(self, sr_uuid: str) -> None:
        """Let the storage of an SR be out of reach."""
        with self._lock:
            self._offline.add(sr_uuid)

    def put_sr_online(self, sr_uuid: str) -> None:
        """Let the storage of an SR be back."""
        with self._lock:
            self._offline.discard(sr_uuid)

    def is_sr_offline(self, sr_uuid: str) -> bool:
        """Say if the storage of an SR is out of reach."""
        with self._lock:
            return sr_uuid in self._offline

    @property
    def offline(self) -> list[str]:
        """Return the SRs that are out of reach."""
        with self._lock:
            return sorted(self._offline)

    def fill_sr(self, sr_uuid: str, free_bytes: int | None) -> None:
        """Leave an SR only so much room; None takes the limit away."""
        with self._lock:
            if free_bytes is None:
                self._full.pop(sr_uuid, None)
            else:
                self._full[sr_uuid] = free_bytes

    def room(self, sr_uuid: str) -> int | None:
        """Return how much room is left by order, None if by the storage."""
        with self._lock:
            return self._full.get(sr_uuid)
