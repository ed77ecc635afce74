# SPDX-License-Identifier: Apache-2.0
"""Long work in a native thread, which tells how far it is.

librbd tells it in that thread, where nothing may wait for a greenthread. So
the figure is only taken there; who asked for the work reads it, and tells
its own watch.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from volume import concurrency
from volume.drivers.rbd import failures

POLL_S = (0.005, 0.2)


class Watched:
    """Work in a native thread, which tells how far it is."""

    def __init__(self) -> None:
        self.percent = 0.0
        self.error: BaseException | None = None
        self._is_stopped = False

    def told(self, done: int, total: int) -> int:
        """Take the figure; librbd ends the work if this is not zero."""
        self.percent = min(100.0, 100.0 * done / max(total, 1))
        return -errno.ECANCELED if self._is_stopped else 0

    def run(
        self, work: Callable[[], object], watch: Callable[[float], None]
    ) -> None:
        """Work to the end; what ``watch`` raises ends it before."""

        def run() -> None:
            try:
                work()
            except BaseException as failed:
                self.error = failed

        stopped: BaseException | None = None
        thread = concurrency.native().Thread(target=run, daemon=True)
        thread.start()
        pause_s, most_s = POLL_S
        while thread.is_alive():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, most_s)
            if stopped is None:
                try:
                    watch(self.percent)
                except BaseException as wish:
                    stopped, self._is_stopped = wish, True
        if self.error is not None and not (
            stopped and failures.code(
                self.error.__cause__ or self.error) == errno.ECANCELED
        ):
            raise self.error
        if stopped is not None and self.error is not None:
            raise stopped
