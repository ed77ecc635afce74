# SPDX-License-Identifier: Apache-2.0
"""Notifications by oslo.messaging: ``volume.create.start`` and the like.

A verb never waits for a broker: events go into a bounded queue and are sent,
in their order, by one thread. Where no driver is configured they are logged
at DEBUG.
"""

from __future__ import annotations

import importlib
import json
import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg

from volume import rpc
from volume.context import current_request

messaging: Any = importlib.import_module('oslo_messaging')  # rpc hushed it

LOG = logging.getLogger(__name__)

PENDING_MAX = 10_000
STOP_S = 5.0


class Notifier:
    """A ``notify.Notify`` that publishes as ``volume.<host>``."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        host: str,
        pending_max: int = PENDING_MAX,
    ) -> None:
        rpc.register_opts(conf)
        self._conf = conf
        self._publisher = f'{rpc.TOPIC}.{host}'
        self._is_on = bool(conf.oslo_messaging_notifications.driver)
        self._pending: queue.Queue[_Event | None] = queue.Queue(pending_max)
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_dropping = False

    def __call__(self, event: str, payload: Mapping[str, Any]) -> None:
        # Of its own, for the sender's may change before it is sent.
        body = rpc.wire(dict(payload))
        if not self._is_on:
            LOG.debug('%s %s', event, json.dumps(body))
            return
        self._start()
        try:
            self._pending.put_nowait((current_request.get(), event, body))
            self._is_dropping = False
        except queue.Full:
            # Said once: the log must not grow with what the broker misses.
            if not self._is_dropping:
                LOG.warning(
                    'notifications are dropped from %s on: %d wait for the '
                    'broker', event, self._pending.maxsize,
                )
            self._is_dropping = True

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Send what waits, for as long as the time given."""
        with self._guard:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            LOG.warning('%d notifications are lost', self._pending.qsize())
            return
        thread.join(timeout_s)

    def _start(self) -> None:
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._send_all, name='notifier', daemon=True
                )
                self._thread.start()

    def _send_all(self) -> None:
        rpc.quiet()
        transport = messaging.get_notification_transport(self._conf)
        notifier = messaging.Notifier(transport, self._publisher)
        while True:
            pending = self._pending.get()
            if pending is None:
                break
            request, event, body = pending
            send = notifier.error if event.endswith('.error') else (
                notifier.info
            )
            send({'request_id': request}, event, body)
        transport.cleanup()


_Event = tuple[str, str, dict[str, Any]]


def notifier(conf: cfg.ConfigOpts) -> Notifier:
    """Return what tells the world of events, as the options say."""
    return Notifier(conf, conf.host)
