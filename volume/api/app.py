# SPDX-License-Identifier: Apache-2.0
"""The WSGI application: who asks, in which version, for what; one answer.

Every request goes down the same list: its id, discovery, who asks, the API
version, the route, the body, the handler. Whatever goes wrong on the way is
a fault with a status; only a bug of ours is 500, with its story in the log.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import webob

from volume import errors
from volume.api import auth as auth_module
from volume.api import faults
from volume.api import fields
from volume.api import microversions
from volume.api import routes
from volume.api.auth import Auth
from volume.api.auth import Identity
from volume.api.call import Call
from volume.api.call import Limits
from volume.api.call import Reply
from volume.api.faults import Refused
from volume.context import Caller
from volume.context import current_request
from volume.context import new_request_id
from volume.core import Core

LOG = logging.getLogger(__name__)
ACCESS = logging.getLogger('volume.api.access')

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
QUERY_FIELDS_MAX = 64
PATH_MAX = 2048
READS = frozenset({'GET', 'HEAD'})
REQUEST_ID = re.compile(
    r'req-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'
)


def make_app(
    core: Core,
    auth: Auth,
    *,
    limits: Limits | None = None,
    public_url: str = '',
    upload_url: str = '',
) -> App:
    """Return the application.

    ``public_url`` is the address that links name, if clients see another
    than ours; ``upload_url`` the directory (``file:///…``) of images that
    are uploaded by a name alone.
    """
    return _App(
        core, auth, limits or Limits(), public_url.rstrip('/'), upload_url
    )


@dataclasses.dataclass(slots=True)
class _Trace:
    """What the access log and the headers tell, however far it came."""

    request_id: str
    minor: int | None = None
    caller: Caller | None = None


class _App:
    def __init__(
        self,
        core: Core,
        auth: Auth,
        limits: Limits,
        public_url: str,
        upload_url: str,
    ) -> None:
        self._core = core
        self._auth = auth
        self._limits = limits
        self._public_url = public_url
        self._public_host = urllib.parse.urlsplit(public_url).hostname or ''
        self._upload_url = upload_url

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        started = time.perf_counter()
        request = webob.Request(environ)
        trace = _Trace(_request_id(request))
        mark = current_request.set(trace.request_id)
        try:
            reply = self._reply(request, trace)
            response = _response(request, reply, trace)
            _note(request, response, trace, started)
        finally:
            current_request.reset(mark)
        answer: Iterable[bytes] = response(environ, start_response)
        return answer

    def _reply(self, request: webob.Request, trace: _Trace) -> Reply:
        try:
            return self._answer(request, trace)
        except errors.VolumeError as failed:
            wrong = faults.refused(failed)
            if wrong.status == 500:
                LOG.error('%s', failed)
            else:
                LOG.info('refused: %s: %r', failed.kind, str(failed)[:1000])
        except Refused as failed:
            wrong = failed
        except Exception:
            # The one net of this door: who asked is answered all the same.
            LOG.exception(
                'a bug, met by %s %r', request.method,
                request.environ.get('PATH_INFO'),
            )
            wrong = Refused(500, faults.BUG)
        return Reply(wrong.status, faults.body(wrong), wrong.headers)

    def _answer(self, request: webob.Request, trace: _Trace) -> Reply:
        path = _path(request)
        base_url = self._public_url or _base_url(request)
        if path in ('/', '/v3', '/v3/', '/healthcheck'):
            return _discover(request, path, base_url)
        if request.environ.get('REMOTE_ADDR'):
            # No browser speaks to a unix socket.
            auth_module.check_host_header(
                self._auth, request.headers.get('Host', ''),
                self._public_host,
            )
        identity = self._identify(request)
        trace.caller = Caller(
            identity.project_id, identity.user_id, identity.is_admin,
            trace.request_id,
        )
        if not path.startswith('/v3/'):
            raise Refused(404, 'the resource could not be found')
        minor = trace.minor = microversions.negotiate(
            request.headers.get(microversions.HEADER)
        )
        method = 'GET' if request.method == 'HEAD' else request.method
        found = routes.match(method, path[3:], minor)
        trace.caller = _in_project(trace.caller, found.project_id)
        if found.route.admin and not identity.is_admin:
            raise Refused(403, 'only an administrator may do this')
        if identity.roles <= {'reader'} and method not in READS:
            raise Refused(403, 'the role reader may not change anything')
        return found.route.handler(Call(
            core=self._core,
            caller=trace.caller,
            roles=identity.roles,
            minor=minor,
            path=found.params,
            query=_query(request),
            headers=request.headers,
            body=(
                _body(request, self._limits.body_bytes_max)
                if method in ('POST', 'PUT') else None
            ),
            base_url=base_url,
            project_path=(
                f'/{found.project_id}' if found.project_id else ''
            ),
            route_path=found.path,
            limits=self._limits,
            upload_url=self._upload_url,
        ))

    def _identify(self, request: webob.Request) -> Identity:
        """Return who asks; a service may vouch with a token of its own."""
        identity = self._auth.identify(request.headers.get('X-Auth-Token'))
        if second := request.headers.get('X-Service-Token'):
            if {'service', 'admin'} & self._auth.identify(second).roles:
                return dataclasses.replace(
                    identity, roles=identity.roles | {'service'}
                )
        return identity


def _request_id(request: webob.Request) -> str:
    given = request.headers.get('X-Openstack-Request-Id', '')
    return given if REQUEST_ID.fullmatch(given) else new_request_id()


def _path(request: webob.Request) -> str:
    try:
        path: str = request.environ.get('PATH_INFO', '').encode(
            'latin-1'
        ).decode()
        fields.check_text(path, 'the path')
    except UnicodeError:
        raise Refused(400, 'the path is not valid UTF-8') from None
    if len(path) > PATH_MAX:
        raise Refused(400, f'the path has over {PATH_MAX} characters')
    return path or '/'


def _base_url(request: webob.Request) -> str:
    try:
        return str(request.application_url).rstrip('/')
    except (UnicodeError, ValueError):
        raise Refused(400, 'the header Host is not valid') from None


def _discover(request: webob.Request, path: str, base_url: str) -> Reply:
    if request.method not in READS:
        raise Refused(405, 'only GET is known here', {'Allow': 'GET, HEAD'})
    if path == '/healthcheck':
        return Reply(200, {'status': 'OK'})
    return Reply(
        300 if path == '/' else 200, microversions.document(base_url)
    )


def _in_project(caller: Caller, project_id: str) -> Caller:
    """Return the caller in the URL's project; an administrator may in any."""
    if not project_id or project_id == caller.project_id:
        return caller
    if not caller.is_admin or not auth_module.is_name(project_id):
        raise Refused(400, 'malformed request url: the project is another')
    return dataclasses.replace(caller, project_id=project_id)


def _query(request: webob.Request) -> dict[str, list[str]]:
    try:
        pairs = urllib.parse.parse_qsl(
            request.query_string, keep_blank_values=True, errors='strict',
            max_num_fields=QUERY_FIELDS_MAX,
        )
    except ValueError:
        raise Refused(400, 'the query is not valid') from None
    result: dict[str, list[str]] = {}
    for key, value in pairs:
        fields.check_text(key, 'the query')
        fields.check_text(value, 'the query')
        result.setdefault(key, []).append(value)
    return result


def _body(request: webob.Request, body_bytes_max: int) -> Any:
    length = request.environ.get('CONTENT_LENGTH') or ''
    if length and not (length.isascii() and length.isdigit()):
        raise Refused(400, 'the header Content-Length is not valid')
    if length and int(length[:20]) > body_bytes_max:
        raise _too_large(body_bytes_max)
    kind = request.headers.get('Content-Type', '').partition(';')[0]
    if kind.strip().lower() != 'application/json':
        # Also no type at all: a web page can send that without asking.
        raise Refused(
            415, f'unsupported Content-Type {kind!r:.80}; send '
            'application/json'
        )
    wanted = int(length) if length else body_bytes_max + 1
    raw = b''
    if length or request.environ.get('wsgi.input_terminated'):
        try:
            raw = request.environ['wsgi.input'].read(wanted)
        except TimeoutError:
            raise Refused(408, 'the body did not arrive in time') from None
        except OSError:
            raise Refused(400, 'the body broke off on its way') from None
    if length and len(raw) < wanted:
        # Also where what has come looks whole: more was meant.
        raise Refused(400, 'the body is shorter than it was said to be')
    if len(raw) > body_bytes_max:
        raise _too_large(body_bytes_max)
    return fields.parse(raw)


def _too_large(body_bytes_max: int) -> Refused:
    return Refused(
        413, f'the body is larger than {body_bytes_max} bytes',
        {'Retry-After': '0'},
    )


def _response(
    request: webob.Request, reply: Reply, trace: _Trace
) -> webob.Response:
    response = webob.Response(status=reply.status)
    # Often the status alone says it all.
    response.headers.pop('Content-Type', None)
    if reply.body is not None:
        response.content_type = 'application/json'
        response.body = json.dumps(
            reply.body, separators=(',', ':')
        ).encode()
    for name, value in reply.headers.items():
        response.headers[name] = value
    response.headers['X-Openstack-Request-Id'] = trace.request_id
    response.headers['X-Compute-Request-Id'] = trace.request_id
    response.headers['Vary'] = microversions.HEADER
    response.headers['X-Content-Type-Options'] = 'nosniff'
    if trace.minor is not None:
        response.headers[microversions.HEADER] = (
            f'{microversions.SERVICE} 3.{trace.minor}'
        )
    if request.method == 'HEAD':
        length = response.content_length
        response.body = b''
        response.content_length = length
    return response


def _note(
    request: webob.Request,
    response: webob.Response,
    trace: _Trace,
    started: float,
) -> None:
    """Write the one line that a request leaves; no query, no body."""
    caller = trace.caller
    ACCESS.info(
        '%s "%.10s %.200s" %d %d %.1fms %s %s:%s',
        request.environ.get('REMOTE_ADDR') or 'unix',
        urllib.parse.quote(str(request.environ['REQUEST_METHOD'])),
        urllib.parse.quote(
            request.environ.get('PATH_INFO', ''), safe='/', encoding='latin-1'
        ),
        response.status_int,
        response.content_length or 0,
        (time.perf_counter() - started) * 1000,
        trace.request_id,
        caller.user_id if caller else '-',
        caller.project_id if caller else '-',
    )
