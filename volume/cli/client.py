# SPDX-License-Identifier: Apache-2.0
"""The REST door from outside: one request at a time, over TCP or a socket.

Each request has its own connection. So it is known what a failure means:
before the request was sent nothing has happened (``Unavailable``), after it
anything may have (``Unknown``). What may be sent twice is sent again. It is
the standard library's client because a command must start at once.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from volume import errors
from volume.cli.values import Usage

DEFAULT_URL = 'http://127.0.0.1:8776/v3'
VERSION = 'volume 3.54'
PAGE_MAX = 1000
ANSWER_BYTES_MAX = 256 << 20
CONNECT_S = 10.0
# The service answers a call within a minute, or says that it cannot.
ANSWER_S = 120.0
TRIES = 3
PAUSE_S = 0.3

# What a status means to whoever asked.
KINDS: Mapping[int, type[errors.VolumeError]] = {
    400: errors.Invalid,
    401: errors.Denied,
    403: errors.Denied,
    404: errors.NotFound,
    406: errors.Unsupported,
    409: errors.Conflict,
    413: errors.NoSpace,
    501: errors.Unsupported,
    503: errors.Unavailable,
}

Json = dict[str, Any]


class Client:
    """A service at a URL: ``http://…``, ``https://…`` or ``unix:/path``."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        token: str = '',
        project: str = '',
        ca_file: str = '',
    ) -> None:
        self.url = url
        self.origin = f'{url} {project}'.rstrip()
        self._token = token
        self._socket_path = ''
        self._tls: ssl.SSLContext | None = None
        self._host, self._port = 'localhost', 0
        try:
            f'{url}{project}'.encode()
        except UnicodeError:
            raise Usage('the URL or the project is not valid text') from None
        if url.startswith('unix:'):
            self._socket_path = url.removeprefix('unix:')
            self._path = '/v3'
            if not self._socket_path.startswith('/'):
                raise Usage(f'URL {url!r:.200} is not like unix:/path')
        else:
            self._read_url(url, ca_file)
        if project:
            self._path += f'/{urllib.parse.quote(project, safe="")}'

    def get(self, path: str, **query: object) -> Json:
        """Look; asked again if the answer is lost."""
        return self._ask('GET', path, query=query, again=True)

    def post(
        self,
        path: str,
        body: Json,
        *,
        headers: Mapping[str, str] | None = None,
        again: bool = False,
    ) -> Json:
        """Ask for a change; ``again`` says that twice is as once."""
        return self._ask('POST', path, body, headers=headers, again=again)

    def put(self, path: str, body: Json) -> Json:
        """Set values; twice is as once."""
        return self._ask('PUT', path, body, again=True)

    def delete(
        self,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        **query: object,
    ) -> Json:
        """Ask for the end of something."""
        return self._ask('DELETE', path, headers=headers, query=query)

    def pages(
        self, path: str, key: str, most: int | None = None, **query: object
    ) -> Iterator[Json]:
        """Yield the items of a list, page by page, at most ``most``."""
        left = most
        while left is None or left > 0:
            query['limit'] = min(left or PAGE_MAX, PAGE_MAX)
            body = self.get(path, **query)
            items = _list(body, key)
            yield from items
            link = next(iter(body.get(f'{key}_links') or ()), None)
            if link is None or not items:
                return
            # Only what comes next is taken from the link: its address is
            # what the service believes to be its own.
            parts = urllib.parse.urlsplit(str(link.get('href')))
            query = dict(urllib.parse.parse_qsl(parts.query))
            if left is not None:
                left -= len(items)

    def _read_url(self, url: str, ca_file: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            self._host, port = parts.hostname or '', parts.port
            self._host.encode('idna')
        except ValueError:
            raise Usage(f'URL {url!r:.200} is not valid') from None
        if parts.scheme not in ('http', 'https') or not self._host:
            raise Usage(
                f'URL {url!r:.200} is not like {DEFAULT_URL} or '
                'unix:/run/volume/api.sock'
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise Usage(
                'the URL of the service must be an address and a path alone; '
                'a token comes from --token-file or VOLUME_TOKEN'
            )
        self._port = port or (443 if parts.scheme == 'https' else 80)
        self._path = urllib.parse.quote(
            parts.path.rstrip('/'), safe='/%'
        ) or '/v3'
        if parts.scheme == 'https':
            try:
                self._tls = ssl.create_default_context(
                    cafile=ca_file or None
                )
            except OSError as failed:
                raise Usage(
                    f'CA file {ca_file} cannot be used: {failed}'
                ) from None

    def _ask(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, object] | None = None,
        again: bool = False,
    ) -> Json:
        target = self._path + path
        if pairs := [
            (key, str(value)) for key, value in (query or {}).items()
            if value is not None
        ]:
            target += '?' + urllib.parse.urlencode(pairs)
        all_headers = {
            'Accept': 'application/json',
            'OpenStack-API-Version': VERSION,
            'Connection': 'close',
            **(headers or {}),
        }
        if self._token:
            all_headers['X-Auth-Token'] = self._token
        raw = None
        if body is not None:
            raw = json.dumps(body).encode()
            all_headers['Content-Type'] = 'application/json'
        tries = TRIES if again else 1
        while True:
            tries -= 1
            try:
                return self._once(method, target, raw, all_headers)
            except errors.Unknown:
                if not tries:
                    raise
                time.sleep(PAUSE_S)

    def _once(
        self,
        method: str,
        target: str,
        raw: bytes | None,
        headers: Mapping[str, str],
    ) -> Json:
        connection = self._connection()
        try:
            try:
                connection.connect()
            except OSError as failed:
                raise self._no_service(failed) from None
            if connection.sock is not None:
                connection.sock.settimeout(ANSWER_S)
            try:
                connection.request(method, target, raw, dict(headers))
                response = connection.getresponse()
                text = _whole(response)
            except (OSError, http.client.HTTPException) as failed:
                raise self._no_answer(method, failed) from None
        finally:
            connection.close()
        is_ours = response.getheader('X-Openstack-Request-Id') is not None
        return self._read(response.status, text, is_ours)

    def _connection(self) -> http.client.HTTPConnection:
        if self._socket_path:
            return _UnixConnection(self._socket_path)
        if self._tls is not None:
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_S, context=self._tls
            )
        return http.client.HTTPConnection(
            self._host, self._port, timeout=CONNECT_S
        )

    def _read(self, status: int, text: bytes, is_ours: bool) -> Json:
        if 200 <= status < 300 and not text and is_ours:
            return {}
        try:
            body = json.loads(
                text[:ANSWER_BYTES_MAX + 1], object_hook=_Answer
            )
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise errors.VolumeError(
                f'what answers at {self.url} is no volume service (status '
                f'{status}); see to --url or VOLUME_URL'
            )
        if status < 300:
            return body
        fault = next(iter(body.values()), None)
        message = (
            str(fault.get('message') or '') if isinstance(fault, dict) else ''
        ) or f'the service refuses with status {status}'
        if status == 401:
            message += '; give one by --token-file or VOLUME_TOKEN'
        raise KINDS.get(status, errors.VolumeError)(message)

    def _no_service(self, failed: OSError) -> errors.Unavailable:
        why = _words(failed)
        if isinstance(failed, ssl.SSLCertVerificationError):
            return errors.Unavailable(
                f'the certificate of {self.url} is not trusted: '
                f'{failed.verify_message}; name its authority by --ca-file '
                'or VOLUME_CA_FILE'
            )
        if isinstance(failed, ssl.SSLError):
            return errors.Unavailable(
                f'{self.url} does not speak TLS as we do: {why}; is it '
                'http:// there?'
            )
        if isinstance(failed, PermissionError):
            return errors.Unavailable(
                f'{self.url} may not be opened by this user: {why}'
            )
        return errors.Unavailable(
            f'nobody answers at {self.url}: {why}; start volume-service '
            'there, or say by --url or VOLUME_URL where it is'
        )

    def _no_answer(
        self, method: str, failed: OSError | http.client.HTTPException
    ) -> errors.Unknown:
        message = f'no answer came from {self.url}: {_words(failed)}'
        if method != 'GET':
            message += (
                '; it may have happened all the same: look before you ask '
                'again'
            )
        return errors.Unknown(message)


def _whole(response: http.client.HTTPResponse) -> bytes:
    """Return the body, at most one byte more than it may have.

    :raises http.client.IncompleteRead: the service ended in the middle;
        a read with a limit says nothing of that by itself
    """
    text = response.read(ANSWER_BYTES_MAX + 1)
    if response.length and len(text) <= ANSWER_BYTES_MAX:
        raise http.client.IncompleteRead(text, response.length)
    return text


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__('localhost')
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(self._path)


class _Answer(dict[str, Any]):
    """An object of the service's; what it lacks is told, not a bug of ours."""

    def __missing__(self, key: str) -> Any:
        raise errors.VolumeError(
            f'the service did not send {key!r}: it is of another version, or '
            'no volume service'
        )


def _list(body: Json, key: str) -> list[Json]:
    items = body.get(key)
    if not isinstance(items, list):
        raise errors.VolumeError(f'the service sent no list of {key}')
    return items


def _words(failed: OSError | http.client.HTTPException) -> str:
    if isinstance(failed, TimeoutError):
        return 'it takes too long'
    if isinstance(failed, http.client.RemoteDisconnected):
        return 'the connection was closed'
    words = getattr(failed, 'strerror', None) or str(failed)
    return str(words)[:200].lower() or type(failed).__name__
