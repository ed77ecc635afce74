# SPDX-License-Identifier: Apache-2.0
"""Logging: one line an event, with the request that it belongs to.

As text, ``TIME LEVEL MODULE [REQUEST] MESSAGE``; or as a JSON object a line,
with the keys ``time`` (UTC), ``level``, ``logger``, ``request``, ``message``
and, where something was raised that nobody expected, ``exception``.
"""

from __future__ import annotations

import datetime
import json
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


class JsonLines(logging.Formatter):
    """The same as one JSON object a line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            'time': when.isoformat(timespec='milliseconds'),
            'level': record.levelname,
            'logger': record.name,
            'request': current_request.get(),
            'message': mask(record.getMessage()),
        }
        if record.exc_info:
            line['exception'] = mask(self.formatException(record.exc_info))
        return json.dumps(line)


def set_up(level: str, format: str = 'text') -> None:
    """Log to standard error, where systemd or a person reads it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if format == 'json' else Lines(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Chatter of libraries that nobody can act on.
    for name in ('alembic', 'stevedore', 'urllib3', 'oslo', 'amqp'):
        logging.getLogger(name).setLevel(logging.WARNING)
