# SPDX-License-Identifier: Apache-2.0
"""Logging: one line an event, with the request that it belongs to."""

from __future__ import annotations

import logging
import sys

from volume.context import current_request
from volume.node import mask

FORMAT = '%(asctime)s %(levelname)s %(name)s [%(request)s] %(message)s'


class Lines(logging.Formatter):
    """Adds the request id; a secret that slipped in is masked."""

    def format(self, record: logging.LogRecord) -> str:
        record.request = current_request.get()
        return mask(super().format(record))


def set_up(level: str) -> None:
    """Log to standard error, where systemd or a person reads it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Chatter of libraries that nobody can act on.
    for name in ('alembic', 'stevedore', 'urllib3', 'oslo', 'amqp'):
        logging.getLogger(name).setLevel(logging.WARNING)
