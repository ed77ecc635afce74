# SPDX-License-Identifier: Apache-2.0
"""One connection to one member of the pool: a request, and how it ended.

The one idea: whether a request was *sent* is known for certain. ``NotSent``
means that the server cannot have acted on it; ``Lost`` means that it may
have. The transports of the standard library, and so those of ``XenAPI``,
hide the difference: they send a request again after a lost connection.
"""

from __future__ import annotations

import hashlib
import http.client
import select
import ssl
import xmlrpc.client
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit
from xml.parsers.expat import ExpatError

import XenAPI

from volume import errors
from volume.xenapi.failures import Failure
from volume.xenapi.options import Settings

REPLY_BYTES_MAX = 1 << 28
# What the parser raises on what is no XML-RPC.
GARBLED = (
    ExpatError, xmlrpc.client.ResponseError, ValueError, TypeError,
    LookupError, AttributeError, OverflowError,
)


class NotSent(Exception):
    """The server did not get the request."""


class Lost(Exception):
    """The server may have got it; nobody knows what it did."""


class Wire(Protocol):
    """What ``Link`` needs of a connection."""

    def request(self, method: str, params: tuple[Any, ...]) -> Any:
        """Return the value that the server answered with."""

    def close(self) -> None:
        """End it."""


Connect = Callable[[str, ssl.SSLContext | None, float], Wire]


class Certificates:
    """How the certificates of a pool are checked, at every connection."""

    def __init__(self, settings: Settings) -> None:
        self.fingerprints = settings.fingerprints
        self.insecure = settings.insecure
        self.ca_file = settings.ca_file

    def context(self, url: str) -> ssl.SSLContext | None:
        """Return what a connection to the URL is made with.

        :raises Invalid: the file of certificates cannot be used
        """
        if not url.startswith('https:'):
            return None
        context = _Pinned(ssl.PROTOCOL_TLS_CLIENT)
        context.fingerprints = self.fingerprints
        if self.insecure or (self.fingerprints and not self.ca_file):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif not self.ca_file:
            context.load_default_certs()
        if self.ca_file:
            try:
                context.load_verify_locations(self.ca_file)
            except OSError as failed:
                raise errors.Invalid(
                    f'ca_file {self.ca_file} cannot be used: {failed}'
                ) from failed
        return context


class _Pinned(ssl.SSLContext):
    """A context that also compares the fingerprint of what it meets."""

    fingerprints: frozenset[str] = frozenset()

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        sock = super().wrap_socket(*args, **options)
        found = hashlib.sha256(sock.getpeercert(True) or b'').hexdigest()
        if self.fingerprints and found not in self.fingerprints:
            sock.close()
            raise ssl.SSLCertVerificationError(
                1, f'its certificate has the fingerprint {found}, which '
                'option fingerprints does not name'
            )
        return sock


def http_connection(
    url: str, context: ssl.SSLContext | None, timeout_s: float
) -> http.client.HTTPConnection:
    """Return a connection to a member, its certificate checked.

    :raises NotSent: it cannot be reached, or is not who it should be
    """
    parts = urlsplit(url)
    host = parts.hostname or ''
    connection: http.client.HTTPConnection
    if context is not None:
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(
            host, parts.port, timeout=timeout_s
        )
    try:
        connection.connect()
    except (OSError, http.client.HTTPException) as failed:
        connection.close()
        raise NotSent(f'{parts.netloc}: {failed}') from failed
    return connection


class _Transport(xmlrpc.client.Transport):
    """Sends each request once, over one connection that it keeps."""

    def __init__(
        self, url: str, context: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        super().__init__()
        self.url, self.context, self.timeout_s = url, context, timeout_s
        self.http: http.client.HTTPConnection | None = None

    def request(
        self, host: Any, handler: str, request_body: Any, verbose: Any = False
    ) -> Any:
        if self.http is not None and _is_dead(self.http):
            self.close()
        if self.http is None:
            self.http = http_connection(
                self.url, self.context, self.timeout_s
            )
        try:
            self.http.request('POST', handler or '/', request_body, {
                'Content-Type': 'text/xml', 'User-Agent': 'volume-service',
            })
        except (OSError, http.client.HTTPException) as failed:
            # Without its last byte nothing can be made of a request.
            self.close()
            raise NotSent(f'{self.url}: {failed}') from failed
        try:
            return self._reply()
        except BaseException:
            self.close()
            raise

    def _reply(self) -> Any:
        assert self.http is not None
        try:
            reply = self.http.getresponse()
            data = reply.read(REPLY_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as failed:
            raise Lost(
                f'{self.url}: {failed or type(failed).__name__}'
            ) from failed
        if 400 <= reply.status < 500:
            raise NotSent(f'{self.url}: HTTP {reply.status} {reply.reason}')
        if reply.status != 200 or len(data) > REPLY_BYTES_MAX:
            raise Lost(f'{self.url}: HTTP {reply.status} {reply.reason}')
        parser, unmarshaller = self.getparser()
        try:
            parser.feed(data)
            parser.close()
            return unmarshaller.close()
        except xmlrpc.client.Fault:
            raise
        except GARBLED as failed:
            raise Lost(f'{self.url}: the reply is no XML-RPC') from failed

    def close(self) -> None:
        if self.http is not None:
            self.http.close()
            self.http = None


class XenWire:
    """A connection by the official SDK, with a transport that is honest."""

    def __init__(
        self, url: str, context: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self._transport = _Transport(url, context, timeout_s)
        self._session = XenAPI.Session(url, transport=self._transport)

    def request(self, method: str, params: tuple[Any, ...]) -> Any:
        try:
            reply = getattr(self._session, method)(*params)
        except xmlrpc.client.Fault as fault:
            raise Failure('FAULT', str(fault.faultString)) from fault
        except (TypeError, OverflowError, UnicodeError) as failed:
            raise NotSent(f'{method} cannot be sent: {failed}') from failed
        if isinstance(reply, dict) and reply.get('Status') == 'Success':
            return reply.get('Value')
        if isinstance(reply, dict) and reply.get('ErrorDescription'):
            raise Failure(*map(str, reply['ErrorDescription']))
        raise Lost(f'the reply to {method} has no Status')

    def close(self) -> None:
        self._transport.close()


def _is_dead(connection: http.client.HTTPConnection) -> bool:
    """Say whether the far side has closed a connection that lay idle."""
    if connection.sock is None:
        return True
    if not hasattr(select, 'poll'):  # so it is under eventlet
        return bool(select.select([connection.sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
