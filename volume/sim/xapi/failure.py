# SPDX-License-Identifier: Apache-2.0
"""What a XenAPI server answers instead of a value: a code and its details."""

from __future__ import annotations

NULL = 'OpaqueRef:NULL'


class Failure(Exception):
    """A call is refused; code and parameters are those of a real server."""

    def __init__(self, code: str, *params: str) -> None:
        super().__init__(code, *params)
        self.code = code
        self.params = params

    def __str__(self) -> str:
        return f'{self.code} {list(self.params)}'

    @property
    def description(self) -> list[str]:
        """Return it as the wire carries it."""
        return [self.code, *self.params]


class Fault(Exception):
    """A call that is not even one: an RPC fault, not a Status of Failure."""


class Hangup(BaseException):
    """The connection ends without an answer.

    It is no Exception, so that no call's own clean-up takes it for a
    failure of the storage.
    """


class Cancelled(Failure):
    """The task was cancelled while its call ran."""

    def __init__(self, task_ref: str) -> None:
        super().__init__('TASK_CANCELLED', task_ref)


def dead(cls: str, ref: str) -> Failure:
    """Return the failure of a reference that leads nowhere."""
    return Failure('HANDLE_INVALID', cls, ref)


def internal(text: str) -> Failure:
    """Return the failure of what nobody had thought of."""
    return Failure('INTERNAL_ERROR', text)


def sm_failure(
    number: int, text: str, opterr: str = '', xml: str = '', sr: str = '',
    vdi: str = '',
) -> Failure:
    """Return what the server makes of a Storage Manager driver's fault.

    Four faults have codes of their own; an unimplemented call (38) is an
    internal error, unless the caller knows better.
    """
    if opterr:
        text = f'{text} [opterr={opterr}]'
    if number == 16:
        return Failure('SR_DEVICE_IN_USE')
    if number == 24:
        return Failure('VDI_IN_USE')
    if number == 38:
        return internal(f'Storage_error.Unimplemented({text})')
    if number == 39:
        return Failure('SR_NOT_EMPTY')
    if number == 144:
        return Failure('VDI_MISSING', sr, vdi)
    return Failure(f'SR_BACKEND_FAILURE_{number}', '', text, xml)
