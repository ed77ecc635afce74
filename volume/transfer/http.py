# SPDX-License-Identifier: Apache-2.0
"""Images that a web server has: ``http://`` and ``https://``.

The stream of an image is one stream, whatever happens to the connections
below it: a broken one is taken up again where it ended, as long as the server
can prove by a strong validator that the image is still the same.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import io
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from oslo_config import cfg

from volume import errors
from volume.node import Node
from volume.transfer import dial
from volume.transfer.base import ImageStat
from volume.transfer.base import Opened
from volume.transfer.base import Source
from volume.transfer.dial import masked

REDIRECTS = (301, 302, 303, 307, 308)
BROKEN = (OSError, http.client.HTTPException)
# The server may be given up on, or come back: which of them it is.
MEANING: Mapping[int, type[errors.VolumeError]] = {
    401: errors.Denied,
    403: errors.Denied,
    404: errors.NotFound,
    408: errors.Unavailable,
    410: errors.NotFound,
    425: errors.Unavailable,
    429: errors.Unavailable,
}
CONTENT_RANGE = re.compile(r'bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)')
PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"
# So much new data makes up for an earlier broken connection.
PROGRESS_BYTES = 1 << 20
WAIT_S_MAX = 5.0


class HttpSource(Source):
    """Images of web servers, for reading only."""

    schemes: ClassVar[tuple[str, ...]] = ('http', 'https')
    options: ClassVar[tuple[cfg.Opt, ...]] = (
        cfg.ListOpt(
            'image_allowed_networks',
            default=[],
            help='Networks that are not public and may have images.',
        ),
        cfg.FloatOpt(
            'image_http_timeout_s',
            default=30.0,
            min=0.1,
            help='Seconds of silence after which a server is given up.',
        ),
        cfg.IntOpt(
            'image_http_attempts',
            default=5,
            min=1,
            help='Connections that may break in a row in a download.',
        ),
        cfg.IntOpt(
            'image_redirects_max',
            default=5,
            min=0,
            help='Redirects that are followed for an image.',
        ),
        cfg.IntOpt(
            'image_size_bytes_max',
            default=1 << 40,
            min=1,
            help='Size of the largest image that is downloaded.',
        ),
        cfg.StrOpt(
            'image_ca_file',
            default='',
            help='File of authorities to trust; the system has its own.',
        ),
    )

    def __init__(self, conf: Any, node: Node) -> None:
        self.conf = conf
        self.node = node
        self.resolve: dial.Resolve = socket.getaddrinfo

    def stat(self, url: str) -> ImageStat:
        # A GET of one byte, for a HEAD is forbidden by many a signed URL,
        # and the answer tells whether ranges work.
        with self.ask(url, {'Range': 'bytes=0-0'}) as answer:
            response = answer.response
            version = _version(response)
            if response.status == 206:
                size = _content_range(response)[1]
                strong = _is_strong(response)
            elif response.status == 416:
                size, strong = 0, False
            else:
                size, strong = _length(response), False
        if size is not None and size > self.conf.image_size_bytes_max:
            raise errors.Invalid(
                f'image {masked(url)} has {size} bytes, over the '
                f'{self.conf.image_size_bytes_max} of image_size_bytes_max'
            )
        return ImageStat(url, size, version, strong)

    @contextlib.contextmanager
    def open(
        self, image: ImageStat, offset_bytes: int = 0
    ) -> Iterator[io.RawIOBase]:
        if image.size_bytes is None:
            raise errors.Invalid(
                f'the server of image {masked(image.url)} does not say how '
                'large it is'
            )
        stream = Stream(self, image, image.size_bytes, offset_bytes)
        try:
            yield stream
        finally:
            stream.close()

    def put(
        self, url: str
    ) -> contextlib.AbstractContextManager[Opened]:
        raise errors.Unsupported(
            f'{masked(url)}: images are not written to web servers; use a '
            'file:// URL'
        )

    @contextlib.contextmanager
    def ask(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send a GET, follow redirects, and yield the last answer."""
        answer = self.asked(url, headers)
        try:
            yield answer
        finally:
            answer.wire.end()

    def asked(self, url: str, headers: Mapping[str, str]) -> Answer:
        first = _split(url)
        here, parts = url, first
        for _ in range(self.conf.image_redirects_max + 1):
            same = (parts.scheme, parts.hostname, parts.port) == (
                first.scheme, first.hostname, first.port
            )
            answer = self._get(here, parts, headers, first if same else None)
            if answer.response.status not in REDIRECTS:
                self._check(url, answer)
                return answer
            answer.wire.end()
            target = answer.response.getheader('Location') or ''
            here, following = _following(url, here, target)
            if (parts.scheme, following.scheme) == ('https', 'http'):
                raise errors.Invalid(
                    f'image {masked(url)} is redirected from https to '
                    f'{masked(here)}, where nothing protects it'
                )
            parts = following
        raise errors.Invalid(
            f'image {masked(url)} is redirected over '
            f'{self.conf.image_redirects_max} times'
        )

    def _get(
        self,
        url: str,
        parts: urllib.parse.SplitResult,
        headers: Mapping[str, str],
        login: urllib.parse.SplitResult | None,
    ) -> Answer:
        host = parts.hostname or ''
        secure = parts.scheme == 'https'
        port = parts.port or (443 if secure else 80)
        target = urllib.parse.quote(parts.path or '/', safe=PATH_SAFE)
        if parts.query:
            target += '?' + urllib.parse.quote(parts.query, safe=PATH_SAFE)
        full = {'Accept-Encoding': 'identity', 'Connection': 'close'}
        full.update({'User-Agent': 'volume-service', **headers})
        if login is not None and login.username is not None:
            full['Authorization'] = _basic(login)

        def asking() -> Answer:
            wire = self._wire(host, port, secure)
            try:
                connection = dial.Connection(host, port, wire, secure)
                connection.request('GET', target, headers=full)
                response = connection.getresponse()
                wire.headers_done()
            except BaseException:
                wire.end()
                raise
            return Answer(response, wire)

        try:
            return self.node.act(f'ask {host}', asking)
        except ssl.SSLCertVerificationError as untrusted:
            raise errors.Invalid(
                f'image {masked(url)}: the certificate of {host} is not '
                f'trusted: {untrusted.verify_message}'
            ) from None
        except BROKEN as lost:
            raise errors.Unavailable(
                f'image {masked(url)}: no answer from {host}: '
                f'{_why(lost)}'
            ) from None

    def _wire(self, host: str, port: int, secure: bool) -> dial.Wire:
        timeout_s = self.conf.image_http_timeout_s
        allowed = dial.networks(self.conf.image_allowed_networks)
        sock = dial.dial(host, port, allowed, timeout_s, self.resolve)
        if secure:
            try:
                context = dial.tls(self.conf.image_ca_file)
                sock = context.wrap_socket(sock, server_hostname=host)
            except BaseException:
                sock.close()
                raise
        return dial.Wire(sock, timeout_s)

    def _check(self, url: str, answer: Answer) -> None:
        """Let pass what has an image in it, or tells that it has changed."""
        response = answer.response
        status = response.status
        encoding = response.getheader('Content-Encoding') or 'identity'
        if status in (200, 206) and encoding.lower() == 'identity':
            return
        if status in (412, 416):
            return
        answer.wire.end()
        if status in (200, 206):
            raise errors.Invalid(
                f'image {masked(url)} is sent with encoding {encoding!r:.40} '
                'though none was asked for'
            )
        default = errors.Unavailable if status >= 500 else errors.Invalid
        raise MEANING.get(status, default)(
            f'image {masked(url)}: the server answered {status} '
            f'{response.reason!r:.80}'
        )


class Answer:
    """A response, and the connection that its body comes by."""

    def __init__(
        self, response: http.client.HTTPResponse, wire: dial.Wire
    ) -> None:
        self.response = response
        self.wire = wire


class Stream(io.RawIOBase):
    """An image from an offset to its end, over as many connections."""

    def __init__(
        self, source: HttpSource, image: ImageStat, size_bytes: int, at: int
    ) -> None:
        self._source = source
        self._image = image
        self._size_bytes = size_bytes
        self._at = at
        self._broken = 0
        self._broken_at = at
        self._stop = threading.Event()
        self._answer: Answer | None = None
        self._connect()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast('B')[:self._size_bytes - self._at]
        while view:
            count, why = 0, 'it ended early'
            try:
                if self._answer is None:
                    self._connect()
                assert self._answer is not None
                count = self._answer.response.readinto(view)
            except errors.Unavailable as lost:
                why = str(lost)
            except BROKEN as lost:
                why = _why(lost)
            except (AttributeError, ValueError) as lost:
                # ``http.client`` on a connection that ``abort`` has ended.
                if not self._stop.is_set():
                    raise
                why = _why(lost)
            if count:
                self._at += count
                if self._at == self._size_bytes:
                    self._check_end()
                return count
            self._lost(why)
        return 0

    def abort(self) -> None:
        """End it from another thread: a read that waits fails at once."""
        self._stop.set()
        if self._answer is not None:
            self._answer.wire.end()

    def close(self) -> None:
        self.abort()
        super().close()

    def _lost(self, why: str) -> None:
        """Get ready for another connection, or give up."""
        image = f'image {masked(self._image.url)}'
        where = f'after {self._at} of {self._size_bytes} bytes ({why:.300})'
        if self._answer is not None:
            self._answer.wire.end()
            self._answer = None
        if self._stop.is_set():
            raise errors.Unavailable(f'{image}: the download was ended')
        if not self._image.can_resume:
            raise errors.Unavailable(
                f'{image}: the connection was lost {where}, and the server '
                'cannot go on from there'
            )
        if self._at - self._broken_at >= PROGRESS_BYTES:
            self._broken = 0
        self._broken_at = self._at
        self._broken += 1
        if self._broken >= self._source.conf.image_http_attempts:
            raise errors.Unavailable(
                f'{image}: the connection was lost {self._broken} times, '
                f'the last time {where}'
            )
        # The first time at once; then politely.
        self._stop.wait(min(0.1 * (2 ** (self._broken - 1) - 1), WAIT_S_MAX))

    def _connect(self) -> None:
        headers = {}
        if self._at:
            headers['Range'] = f'bytes={self._at}-'
            if self._image.can_resume:
                headers['If-Range'] = self._image.version
        answer = self._source.asked(self._image.url, headers)
        try:
            self._check(answer.response)
        except BaseException:
            answer.wire.end()
            raise
        self._answer = answer
        if self._stop.is_set():
            answer.wire.end()

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Refuse an answer that is not the rest of the image we know."""
        name = f'image {masked(self._image.url)}'
        version = _version(response)
        known = self._image.version
        if response.status in (412, 416) or (
            known and version != known and (version or not self._at)
        ):
            raise errors.Conflict(
                f'{name} has changed since it was looked at'
            )
        if response.status == 206:
            start, total = _content_range(response)
            if start != self._at or total not in (None, self._size_bytes):
                raise errors.Conflict(
                    f'{name}: bytes from {start} of {total} came, not from '
                    f'{self._at} of {self._size_bytes}'
                )
        elif self._at:
            raise errors.Unavailable(
                f'{name}: the server does not go on from byte {self._at}'
            )
        length = _length(response)
        if length not in (None, self._size_bytes - self._at):
            raise errors.Conflict(
                f'{name} had {self._size_bytes} bytes; now {length} bytes '
                f'are left from {self._at}'
            )

    def _check_end(self) -> None:
        """Refuse a body that goes on, where no length has bounded it."""
        assert self._answer is not None
        response = self._answer.response
        if response.length is None:
            with contextlib.suppress(*BROKEN):
                if response.read(1):
                    raise errors.Conflict(
                        f'image {masked(self._image.url)} is longer than '
                        f'{self._size_bytes} bytes'
                    )


def _split(url: str) -> urllib.parse.SplitResult:
    """Take the URL apart.

    :raises Invalid: it is malformed, or not of the web
    """
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.port != 0 and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine or not url.isprintable() or len(url) > 8192:
        raise errors.Invalid(f'image URL {masked(url)!r} is malformed')
    if parts.scheme not in HttpSource.schemes:
        raise errors.Invalid(
            f'image URL {masked(url)} is not http or https'
        )
    return parts


def _following(
    url: str, here: str, target: str
) -> tuple[str, urllib.parse.SplitResult]:
    """Return where a redirect leads."""
    try:
        there = urllib.parse.urljoin(here, target)
    except ValueError:
        there = ''
    if not target or not there:
        raise errors.Invalid(
            f'image {masked(url)} is redirected, but not to a URL'
        )
    return there, _split(there)


def _basic(parts: urllib.parse.SplitResult) -> str:
    user = urllib.parse.unquote(parts.username or '')
    word = urllib.parse.unquote(parts.password or '')
    return 'Basic ' + base64.b64encode(f'{user}:{word}'.encode()).decode()


def _version(response: http.client.HTTPResponse) -> str:
    found = (
        response.getheader('ETag') or response.getheader('Last-Modified') or ''
    )
    return found.strip()[:400]


def _is_strong(response: http.client.HTTPResponse) -> bool:
    """Say whether the version changes with every byte (RFC 9110, 8.8)."""
    tag = response.getheader('ETag')
    if tag:
        return tag.strip().startswith('"')
    try:
        modified, now = (
            email.utils.parsedate_to_datetime(response.getheader(name) or '')
            for name in ('Last-Modified', 'Date')
        )
        return (now - modified).total_seconds() >= 60
    except (TypeError, ValueError):
        return False


def _length(response: http.client.HTTPResponse) -> int | None:
    """Return how long the body is, if its end cannot be missed."""
    text = response.getheader('Content-Length') or ''
    if response.chunked or not re.fullmatch(r'\d{1,18}', text):
        return None
    return int(text)


def _content_range(
    response: http.client.HTTPResponse,
) -> tuple[int, int | None]:
    """Return where the part starts, and how large the whole is."""
    text = response.getheader('Content-Range') or ''
    found = CONTENT_RANGE.fullmatch(text.strip())
    if found is None:
        raise errors.Unavailable(
            f'the server sent a part without saying which ({text!r:.80})'
        )
    return int(found[1]), None if found[3] == '*' else int(found[3])


def _why(lost: Exception) -> str:
    """Say what broke, without what a server may have put there."""
    if isinstance(lost, TimeoutError | OSError):
        return f'{lost!s:.200}'
    return type(lost).__name__
