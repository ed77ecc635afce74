# SPDX-License-Identifier: Apache-2.0
"""The RPC door: which verbs an endpoint has, and how messages reach them.

A message is ``{'method', 'args', 'version'}`` with a context beside it. One
``Dispatcher`` checks all of that before any verb sees it, whether the message
came over RabbitMQ (``Server``) or from this very process (``Local``); so a
program that works in one process works between two. Nothing can be called
but declared verbs (``rpcverb``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from amqp.exceptions import AMQPError  # type: ignore[import-untyped]
from kombu.exceptions import KombuError
from oslo_config import cfg

from volume import errors
from volume.context import Caller
from volume.context import current_request
from volume.context import new_request_id
from volume.notify import Notify
from volume.rpcverb import verbs_of

with warnings.catch_warnings():
    # It imports eventlet, which tells every user that it will retire, and
    # whose resolver is the third of a start and used by nobody.
    os.environ.setdefault('EVENTLET_NO_GREENDNS', 'yes')
    warnings.simplefilter('ignore')
    import oslo_messaging as messaging
    from oslo_messaging import opts as messaging_opts
    from oslo_messaging._metrics import client as metrics
    from oslo_messaging._tracing import client as tracing
    from oslo_messaging.rpc import server as messaging_server

LOG = logging.getLogger(__name__)

EXCHANGE = 'volume'
TOPIC = 'volume'
VERSION = '1.1'  # its history stands in rpcapi.py
MESSAGE_BYTES_MAX = 1 << 18
SEND_RETRIES = 5
"""Tries to reach the broker: with oslo's pauses of 1, 3, 5 … s about 25 s."""
PREFETCH = 64  # as many as oslo.messaging has threads to serve them
BROKER_S = 5.0

_VERSION = re.compile(r'(\d{1,4})\.(\d{1,4})')
_REQUEST_ID = re.compile(r'[A-Za-z0-9._:-]{1,64}')
_EVENT_IDS = ('volume_id', 'snapshot_id', 'job_id')


class Endpoint(Protocol):
    """What a dispatcher needs of the object whose verbs it calls."""

    @property
    def notify(self) -> Notify:
        """Where a failed cast is reported, for nobody waits for it."""


class Bus(Protocol):
    """A way to an endpoint: through RabbitMQ, or in this process."""

    def call(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> Any:
        """Return what the verb returns, or raise what it raises."""

    def cast(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> None:
        """Hand the message over; how it ends is told by notifications."""

    def close(self) -> None:
        """Close every connection."""


# Options and transport.


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register what a service needs; without a ``transport_url`` no broker.

    Unlike oslo.messaging's own default, RabbitMQ is used only by those who
    name one.
    """
    _register(conf)
    conf.set_default('transport_url', 'fake://')
    conf.set_default('control_exchange', EXCHANGE)  # of notifications
    # A manager takes what it can work on, and leaves the rest to others; a
    # broker that is back is found again soon, however long it was away.
    for name, value in (
        ('rabbit_qos_prefetch_count', PREFETCH), ('rabbit_interval_max', 5),
    ):
        conf.set_default(name, value, group='oslo_messaging_rabbit')


def is_remote(conf: cfg.ConfigOpts) -> bool:
    """Say whether other processes reach this one through a broker."""
    register_opts(conf)
    return not str(conf.transport_url or 'fake://').startswith('fake:')


def _register(conf: cfg.ConfigOpts) -> None:
    """Register all of oslo.messaging's options on a private ConfigOpts.

    It registers two groups on the global one alone, and reads them from
    the conf that it was given.
    """
    for group, options in messaging_opts.list_opts():
        if group != 'oslo_messaging_kafka':
            conf.register_opts(options, group=group)
    conf.register_opts(
        metrics.oslo_messaging_metrics, group='oslo_messaging_metrics'
    )
    conf.register_opts(
        tracing.oslo_messaging_tracing, group='oslo_messaging_tracing'
    )


def _transport(conf: cfg.ConfigOpts, url: str | None) -> Any:
    _register(conf)
    quiet()
    try:
        return messaging.get_rpc_transport(
            conf, url, allowed_remote_exmods=[errors.__name__]
        )
    except (messaging.InvalidTransportURL, messaging.DriverLoadFailure) as bad:
        # Its text would show the URL, and the URL has a password in it.
        raise errors.Invalid(
            'transport_url cannot be used; it must be like '
            'rabbit://USER:PASSWORD@HOST:5672/VHOST'
        ) from bad


def quiet() -> None:
    """Keep the libraries from logging whole messages, as at DEBUG they do.

    Connections are in them, with their secrets.
    """
    for name in ('oslo_messaging', 'amqp', 'kombu'):
        logger = logging.getLogger(name)
        if logger.level < logging.INFO:
            logger.setLevel(logging.INFO)


# Dispatching.


class Dispatcher:
    """Checks a message and calls the verb that it names."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._verbs = verbs_of(endpoint)

    def run(self, context: object, message: object, *, waits: bool) -> Any:
        """Return the verb's result as plain JSON.

        ``waits`` says whether somebody gets the reply; if not, a failure is
        reported by a notification as well.

        :raises VolumeError: one of the kinds of ``errors``, never another
        """
        asked = message if isinstance(message, Mapping) else {}
        token = current_request.set('-')
        try:
            result = self._run(context, asked)
            LOG.info(
                'rpc %s %.60s %s: done', 'call' if waits else 'cast',
                asked.get('method'), _named(asked.get('args')),
            )
            return result
        except errors.VolumeError as failed:
            public = _public(failed)
        except Exception:
            # The one net below everything: a bug of ours must not end the
            # consumer, and whoever asked has to know that anything may be.
            LOG.exception('rpc %.60r failed by a bug', asked.get('method'))
            public = errors.Unknown(
                f'{asked.get("method")!r:.60} failed inside the service; its '
                f'log says why, at request {current_request.get()}'
            )
        finally:
            request = current_request.get()
            current_request.reset(token)
        self._report(context, asked, public, request, waits)
        raise public

    def dispatch(self, incoming: Any) -> Any:
        """Serve a message of oslo.messaging's."""
        # Not by msg_id: oslo.messaging makes one up for a cast.
        waits = bool(getattr(incoming, 'reply_q', None))
        try:
            return self.run(incoming.ctxt, incoming.message, waits=waits)
        except errors.VolumeError as failed:
            expected = messaging.ExpectedException()
            # Without a traceback: our paths are no business of a client's.
            expected.exc_info = (type(failed), failed, None)
            raise expected from None

    def _run(self, context: object, message: Mapping[str, Any]) -> Any:
        caller = caller_of(context)
        current_request.set(caller.request_id)
        method, args = message.get('method'), message.get('args')
        _check_version(message.get('version') or '1.0')
        found = self._verbs.get(method) if isinstance(method, str) else None
        if found is None:
            raise errors.Invalid(f'there is no verb {method!r:.60}')
        if not isinstance(args, dict):
            raise errors.Invalid(f'{found.name}: args is no mapping')
        found.check(wire(args))
        return wire(found.function(self._endpoint, caller, **args))

    def _report(
        self,
        context: object,
        message: Mapping[str, Any],
        failed: errors.VolumeError,
        request: str,
        waits: bool,
    ) -> None:
        """Log a failure; tell of it by a notification if nobody waits."""
        method, args = message.get('method'), message.get('args')
        named = _named(args)
        LOG.log(
            logging.INFO if waits else logging.WARNING,
            'rpc %s %.60r %s request %s: %s: %s',
            'call' if waits else 'cast', method, named, request,
            failed.kind, failed,
        )
        found = self._verbs.get(method) if isinstance(method, str) else None
        if waits or found is None or not found.error:
            return
        sender = context if isinstance(context, Mapping) else {}
        self._endpoint.notify(found.error, {
            'tenant_id': _short(sender.get('project_id')),
            'user_id': _short(sender.get('user_id')),
            'request_id': request,
            'status': 'error',
            'error_kind': failed.kind,
            'reason': str(failed),
            **named,
        })


def wire(value: Any) -> Any:
    """Return a value as it comes out of a message: plain JSON, of its own.

    :raises Invalid: it is no JSON, or too much of it
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as bad:
        raise errors.Invalid(f'the message is no JSON: {bad!s:.200}') from bad
    if len(text) > MESSAGE_BYTES_MAX:
        raise errors.Invalid(
            f'the message has {len(text)} bytes; {MESSAGE_BYTES_MAX} are '
            'allowed'
        )
    return json.loads(text)


def caller_of(context: object) -> Caller:
    """Return who asks, from the context that came with a message.

    Whoever may write to the broker is believed, as among OpenStack's
    services; only the form is checked. What else is in it is left alone.

    :raises Invalid: it is malformed
    """
    if not isinstance(context, Mapping):
        raise errors.Invalid('the context is no mapping')
    is_admin = context.get('is_admin', False)
    if not isinstance(is_admin, bool):
        raise errors.Invalid('the context\'s is_admin is not true or false')
    found = {}
    for name in 'project_id', 'user_id':
        value = context.get(name)
        if value is None and is_admin:
            value = 'default'  # an administrator's context may have neither
        if _short(value) is None:
            raise errors.Invalid(
                f'the context\'s {name} is not a text of 1 to 255 characters'
            )
        found[name] = str(value)
    request_id = context.get('request_id') or new_request_id()
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(
        request_id
    ):
        raise errors.Invalid('the context\'s request_id is not an id')
    return Caller(is_admin=is_admin, request_id=request_id, **found)


def context_of(caller: object) -> dict[str, Any]:
    """Return what goes with a message, of our caller or a RequestContext.

    :raises Invalid: it says nothing about who asks
    """
    names = ('project_id', 'user_id', 'is_admin', 'request_id')
    if isinstance(caller, Mapping):
        found = {name: caller.get(name) for name in names}
    else:
        found = {name: getattr(caller, name, None) for name in names}
    found['is_admin'] = bool(found['is_admin'])
    checked = caller_of(found)
    return {name: getattr(checked, name) for name in names}


def _named(args: object) -> dict[str, str]:
    """Return which things a message is about; nothing else of it."""
    given = args if isinstance(args, Mapping) else {}
    return {
        name: given[name] for name in _EVENT_IDS
        if isinstance(given.get(name), str) and len(given[name]) <= 64
    }


def _short(value: object) -> str | None:
    if isinstance(value, str) and 0 < len(value) <= 255 and (
        value.isprintable()
    ):
        return value
    return None


def _check_version(version: object) -> None:
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise errors.Invalid(f'version {version!r:.40} is not like 1.0')
    ours = tuple(int(part) for part in VERSION.split('.'))
    theirs = (int(match[1]), int(match[2]))
    if theirs[0] != ours[0] or theirs[1] > ours[1]:
        raise errors.Unsupported(
            f'the message needs version {version} of this service\'s RPC, '
            f'which is {VERSION}; upgrade the older of the two'
        )


def _public(failed: errors.VolumeError) -> errors.VolumeError:
    """Return the error as one of the kinds that clients know."""
    text = str(failed.args[0]) if failed.args else ''
    for each in type(failed).__mro__:
        if errors.KINDS.get(each.__name__) is each:
            return errors.rebuild(each.__name__, text)
    return errors.Unknown(text)


# Ways to an endpoint.


class Local:
    """The bus within one process: no transport, all the same checks.

    A cast is served before ``cast`` returns: a verb only accepts.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._dispatcher = Dispatcher(endpoint)

    def call(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> Any:
        return self._run(context, version, method, args, waits=True)

    def cast(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> None:
        message = {'version': version, 'method': method, 'args': wire(args)}
        try:
            self._dispatcher.run(wire(context), message, waits=False)
        except errors.VolumeError:
            pass  # reported by the dispatcher: a cast has no answer

    def close(self) -> None:
        pass

    def _run(
        self, context: Any, version: str, method: str, args: Any, waits: bool
    ) -> Any:
        message = {'version': version, 'method': method, 'args': wire(args)}
        return self._dispatcher.run(wire(context), message, waits=waits)


class Remote:
    """The bus through RabbitMQ."""

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        url: str | None = None,
        *,
        timeout_s: float | None = None,
        retries: int = SEND_RETRIES,
    ) -> None:
        _register(conf)
        if str(url or conf.transport_url).startswith('fake:'):
            raise errors.Invalid(
                'transport_url is fake://, which ends with this process; '
                'name a broker (rabbit://…), or use rpc.Local'
            )
        self._transport = _transport(conf, url)
        self._url = messaging.TransportURL.parse(conf, url)
        self._was_answered = False
        self._client = messaging.get_rpc_client(
            self._transport,
            messaging.Target(exchange=EXCHANGE, topic=TOPIC),
            timeout=timeout_s,
            retry=retries,
            # A message that no queue takes is an error, not a silence.
            transport_options=messaging.TransportOptions(at_least_once=True),
        )

    def call(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> Any:
        # The first call makes the reply queue, and waits for a broker for
        # as long as there is none: look first whether there is one.
        if not self._was_answered:
            self._need_broker()
        result = self._send('call', context, version, method, args, host)
        self._was_answered = True
        return result

    def cast(
        self,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str = '',
    ) -> None:
        self._send('cast', context, version, method, args, host)

    def close(self) -> None:
        self._transport.cleanup()

    def _send(
        self,
        how: str,
        context: Mapping[str, Any],
        version: str,
        method: str,
        args: Mapping[str, Any],
        host: str,
    ) -> Any:
        to = f'{TOPIC}.{host}' if host else TOPIC
        client = self._client.prepare(
            version=version, **({'server': host} if host else {})
        )
        send = getattr(client, how)
        LOG.debug('rpc %s %s to %s', how, method, to)
        try:
            return send(wire(context), method, **wire(args))
        except errors.VolumeError as failed:
            # Its class was made up by oslo.messaging, with our kind as its
            # base, and a text of its own.
            raise _public(failed) from None
        except messaging.RemoteError as failed:
            raise errors.rebuild(
                str(failed.exc_type), f'{failed.value!s:.500}'
            ) from None
        except messaging.MessageUndeliverable:
            raise errors.Unavailable(
                f'{method} was not sent: no service listens on {to}'
            ) from None
        except (KombuError, AMQPError) as failed:
            # oslo.messaging lets these out while it connects, never once it
            # has begun to send.
            raise errors.Unavailable(
                f'{method} was not sent: the message broker cannot be used: '
                f'{failed!s:.300}'
            ) from None
        except messaging.MessagingTimeout:
            raise errors.Unknown(
                f'{method} had no reply from {to} in time; it may have '
                'happened: ask again'
            ) from None
        except messaging.MessagingException as failed:
            raise errors.Unknown(
                f'{method} may not have reached {to}: {failed!s:.300}'
            ) from None

    def _need_broker(self) -> None:
        """Look whether a broker can be reached at all.

        :raises Unavailable: none answers; nothing was sent
        """
        tried = []
        for host in self._url.hosts:
            address = (host.hostname or 'localhost', host.port or 5672)
            try:
                socket.create_connection(address, timeout=BROKER_S).close()
                return
            except OSError as failed:
                tried.append(f'{address[0]}:{address[1]} ({failed})')
        if tried:
            raise errors.Unavailable(
                f'no message broker answers: {", ".join(tried)}'
            )


class Server:
    """Consumes messages for an endpoint.

    It listens on the topic, on ``topic.host`` and on the topic's fanout.
    """

    retry_s = 10.0

    def __init__(
        self, conf: cfg.ConfigOpts, endpoint: Endpoint, host: str
    ) -> None:
        register_opts(conf)
        self._transport = _transport(conf, None)
        self._target = messaging.Target(
            exchange=EXCHANGE, topic=TOPIC, server=host
        )
        self._dispatcher = Dispatcher(endpoint)
        self._server: Any = None
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._consume, name='rpc-start', daemon=True
        )

    def start(self) -> None:
        """Begin to consume, as soon as a broker answers; do not wait."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until messages are consumed; say whether they are."""
        return self._ready.wait(timeout_s)

    def stop(self) -> None:
        """Take no more messages, and wait for those that were taken."""
        self._ended.set()
        # If no broker has answered yet, oslo.messaging waits for one for
        # ever; the thread then ends with the process.
        if self._ready.is_set():
            self._server.stop()
            self._server.wait()
            self._transport.cleanup()

    def _consume(self) -> None:
        while not self._ended.is_set():
            # One that has failed to start never does.
            self._server = messaging_server.RPCServer(
                self._transport, self._target, self._dispatcher
            )
            try:
                self._server.start()
            except (
                messaging.MessagingException, KombuError, AMQPError, OSError,
                RuntimeError,  # no more threads
            ) as failed:
                # Who is away is waited for. This one refuses us: it may be
                # told of our user or virtual host later.
                LOG.error(
                    'no messages are taken, and it is tried again: %.300s',
                    failed,
                )
                self._ended.wait(self.retry_s)
            else:
                self._ready.set()
                return
