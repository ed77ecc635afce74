# SPDX-License-Identifier: Apache-2.0
"""Calls and answers as XML-RPC and as JSON-RPC carry them.

XML-RPC here is the server's own kind: whole numbers are strings, strings
carry no tag, and the answer is a struct with Status and Value. JSON-RPC
comes as 1.0, where an error is a list, and as 2.0, where it is an object.
"""

from __future__ import annotations

import dataclasses
import json
import re
import xmlrpc.client
from typing import Any, Final
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import escape

from volume.sim.xapi.failure import Failure
from volume.sim.xapi.failure import Fault
from volume.sim.xapi.state.values import DateTime
from volume.sim.xapi.state.values import Int32

XML: Final = 'text/xml'
JSON: Final = 'application/json'
_ILLEGAL: Final = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')
_HEAD: Final = '<?xml version="1.0"?><methodResponse>'


@dataclasses.dataclass(frozen=True)
class Request:
    """One call as it came; ``id`` and ``version`` are JSON's."""

    method: str
    args: list[Any]
    id: Any = None
    version: str = ''


def read_xml(body: bytes) -> Request:
    """Return the call in a body.

    :raises Fault: there is none
    """
    try:
        args, method = xmlrpc.client.loads(body)
    except (ExpatError, xmlrpc.client.Error, ValueError, LookupError,
            TypeError, AttributeError) as error:
        raise Fault(f'cannot read the call: {error}') from error
    if not isinstance(method, str):
        raise Fault('there is no method in the call')
    return Request(method, list(args))


def write_xml(value: Any) -> bytes:
    """Return the answer that a call succeeded."""
    return _answer(
        f'<struct>{_member("Status", "Success")}{_member("Value", value)}'
        '</struct>'
    )


def write_xml_failure(failure: Failure) -> bytes:
    """Return the answer that a call was refused."""
    return _answer(
        f'<struct>{_member("Status", "Failure")}'
        f'{_member("ErrorDescription", failure.description)}</struct>'
    )


def write_xml_fault(fault: Fault) -> bytes:
    """Return the answer that there was no call."""
    text = escape(_legal(str(fault)))
    return (
        f'{_HEAD}<fault><value><struct><member><name>faultCode</name><value>'
        '<i4>-1</i4></value></member><member><name>faultString</name><value>'
        f'{text}</value></member></struct></value></fault></methodResponse>'
    ).encode()


def _answer(inner: str) -> bytes:
    return (
        f'{_HEAD}<params><param><value>{inner}</value></param></params>'
        '</methodResponse>'
    ).encode()


def element(value: Any) -> str:
    """Return one value as XML."""
    parts: list[str] = []
    _write(value, parts)
    return ''.join(parts)


def _member(name: str, value: Any) -> str:
    return f'<member><name>{escape(name)}</name>{element(value)}</member>'


def _write(value: Any, parts: list[str]) -> None:
    if value is None:
        parts.append('<value></value>')
    elif isinstance(value, bool):
        parts.append(f'<value><boolean>{value:d}</boolean></value>')
    elif isinstance(value, Int32):
        parts.append(f'<value><i4>{int(value)}</i4></value>')
    elif isinstance(value, float):
        parts.append(f'<value><double>{value!r}</double></value>')
    elif isinstance(value, DateTime):
        parts.append(
            '<value><dateTime.iso8601>'
            f'{value!s}</dateTime.iso8601></value>'
        )
    elif isinstance(value, str):
        parts.append(f'<value>{escape(_legal(value))}</value>')
    elif isinstance(value, int):
        parts.append(f'<value>{value}</value>')
    elif isinstance(value, dict):
        parts.append('<value><struct>')
        for name, part in value.items():
            parts.append(
                f'<member><name>{escape(_legal(str(name)))}</name>'
            )
            _write(part, parts)
            parts.append('</member>')
        parts.append('</struct></value>')
    elif isinstance(value, list | tuple | set | frozenset):
        parts.append('<value><array><data>')
        for part in value:
            _write(part, parts)
        parts.append('</data></array></value>')
    else:
        raise TypeError(f'{type(value).__name__} cannot travel')


def _legal(text: str) -> str:
    # A name that XML cannot carry must not break a whole listing.
    return _ILLEGAL.sub('?', text)


def read_json(body: bytes) -> Request:
    """Return the call in a body.

    :raises Fault: there is none
    """
    try:
        document = json.loads(body)
    except ValueError as error:
        raise Fault(f'cannot read the call: {error}') from error
    if not isinstance(document, dict):
        raise Fault('a call is one object; batches are not accepted')
    args = document.get('params', [])
    method, id_ = document.get('method'), document.get('id')
    if not isinstance(method, str) or not isinstance(args, list):
        raise Fault('a call has a method, and its params in a list')
    if isinstance(id_, bool) or not isinstance(id_, str | int | float):
        # Notifications among them: each call has an answer.
        raise Fault('a call has an id, a string or a number')
    return Request(method, args, id_, str(document.get('jsonrpc', '1.0')))


def write_json(
    request: Request, value: Any, *, int_strings: bool = False,
) -> bytes:
    """Return the answer that a call succeeded."""
    if int_strings:
        value = _stringed(value)
    result = '' if value is None else value
    if request.version == '2.0':
        return _document(jsonrpc='2.0', result=result, id=request.id)
    return _document(result=result, error=None, id=request.id)


def write_json_failure(request: Request, failure: Failure) -> bytes:
    """Return the answer that a call was refused."""
    if request.version == '2.0':
        return _document(jsonrpc='2.0', error={
            'code': 1, 'message': failure.code, 'data': list(failure.params),
        }, id=request.id)
    return _document(
        result=None, error=failure.description, id=request.id,
    )


def write_json_fault(request: Request | None, fault: Fault) -> bytes:
    """Return the answer that there was no call."""
    id_ = None if request is None else request.id
    if request is not None and request.version != '2.0':
        return _document(result=None, error=[str(fault)], id=id_)
    return _document(jsonrpc='2.0', error={
        'code': -32600, 'message': str(fault), 'data': None,
    }, id=id_)


def _document(**members: Any) -> bytes:
    return json.dumps(members, separators=(',', ':')).encode()


def _stringed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stringed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_stringed(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool | Int32):
        return str(value)
    return value
