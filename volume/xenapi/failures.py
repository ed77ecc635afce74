# SPDX-License-Identifier: Apache-2.0
"""What the server's error codes mean to our caller: one table.

``mean()`` makes one of our errors of a code; the code itself stays at hand
as its cause, for the few callers that must know it (``code()``).
"""

from __future__ import annotations

from collections.abc import Sequence

from volume import errors
from volume.xenapi import calls


class Failure(Exception):
    """What the server answered: a code and its parameters."""

    def __init__(self, code: str, *params: str) -> None:
        super().__init__(code, *params)
        self.code = code
        self.params = params


Meaning = tuple[type[errors.VolumeError], str]

# The kind, and what to say; {0} … are the parameters of the code.
TABLE: dict[str, Meaning] = {
    'SESSION_AUTHENTICATION_FAILED': (
        errors.Denied, 'user or password is wrong'),
    'RBAC_PERMISSION_DENIED': (errors.Denied, 'the user may not {0}'),
    'PERMISSION_DENIED': (errors.Denied, 'it is not allowed to clients'),
    'LICENCE_RESTRICTION': (
        errors.Unsupported, 'the licence of the pool does not cover {0}'),
    'FEATURE_RESTRICTED': (
        errors.Unsupported, 'the licence of the pool does not cover it'),
    # Nothing happened: the same call can be made later, or elsewhere.
    'HOST_IS_SLAVE': (errors.Unavailable, 'the host is no longer the master'),
    'HOST_STILL_BOOTING': (errors.Unavailable, 'the host is still starting'),
    'HOST_OFFLINE': (errors.Unavailable, 'host {0} is offline'),
    'HOST_DISABLED': (errors.Unavailable, 'the host is disabled'),
    'HOST_NOT_LIVE': (errors.Unavailable, 'the host is not alive'),
    'SESSION_INVALID': (errors.Unavailable, 'the session has ended'),
    'SR_HAS_NO_PBDS': (
        errors.Unavailable,
        'the SR is plugged nowhere (on a shared one: not on the master)'),
    'NOT_SUPPORTED_DURING_UPGRADE': (
        errors.Unavailable, 'the pool is being upgraded'),
    'EVENT_FROM_TOKEN_PARSE_FAILURE': (
        errors.Unavailable, 'the stream of events has begun anew'),
    'TASK_CANCELLED': (errors.Unavailable, 'the task was cancelled'),
    'CANNOT_CONTACT_HOST': (
        errors.Unknown, 'the master lost host {0} in the middle of it'),
    'INTERNAL_ERROR': (errors.Unknown, 'internal error of the server: {0}'),
    'SR_BACKEND_FAILURE': (
        errors.Unknown, 'the storage driver has crashed: {1}'),
    'MAP_DUPLICATE_KEY': (errors.Conflict, '{0} has a key {3} already'),
    'HANDLE_INVALID': (errors.NotFound, 'there is no such {0} any more'),
    'UUID_INVALID': (errors.NotFound, 'there is no {0} {1}'),
    'VDI_MISSING': (errors.NotFound, 'the storage has no such VDI any more'),
    'OTHER_OPERATION_IN_PROGRESS': (
        errors.Busy, 'another operation is going on ({2})'),
    'OPERATION_NOT_ALLOWED': (errors.Busy, '{0}'),
    'VDI_IN_USE': (errors.Busy, 'the VDI is in use'),
    'DEVICE_DETACH_REJECTED': (errors.Busy, 'the guest keeps the device'),
    'DEVICE_DETACH_TIMEOUT': (errors.Busy, 'the guest does not let go'),
    'SR_DEVICE_IN_USE': (
        errors.Conflict, 'another SR of the pool has the device already'),
    'SR_NOT_EMPTY': (errors.Conflict, 'the SR has VDIs'),
    'SR_HAS_PBD': (errors.Conflict, 'the SR is still plugged'),
    'SR_UUID_EXISTS': (errors.Conflict, 'the pool has an SR {0} already'),
    'PBD_EXISTS': (errors.Conflict, 'the host has a PBD of this SR already'),
    'SR_NOT_SHARABLE': (errors.Conflict, 'the SR is plugged in elsewhere'),
    'DEVICE_ALREADY_EXISTS': (errors.Conflict, 'device {0} is taken'),
    'LOCATION_NOT_UNIQUE': (errors.Conflict, 'the pool knows {1} already'),
    'SR_OPERATION_NOT_SUPPORTED': (
        errors.Unsupported, 'this type of SR cannot'),
    'UNIMPLEMENTED_IN_SM_BACKEND': (
        errors.Unsupported, 'this type of VDI cannot'),
    'NOT_IMPLEMENTED': (errors.Unsupported, 'the server cannot: {0}'),
    'MESSAGE_REMOVED': (errors.Unsupported, 'this release has it no more'),
    'MESSAGE_METHOD_UNKNOWN': (
        errors.Unsupported, 'this release does not know {0}'),
    'VDI_NOT_MANAGED': (
        errors.Invalid, 'the VDI is a base copy: not a volume'),
    'VDI_READONLY': (errors.Invalid, 'the VDI is read-only'),
    'VDI_TOO_SMALL': (errors.Invalid, 'the VDI is smaller than {1} bytes'),
    'VDI_TOO_LARGE': (errors.Invalid, 'the VDI is larger than {1} bytes'),
    'VDI_IS_SHARABLE': (errors.Invalid, 'the VDI is sharable'),
    'VDI_INCOMPATIBLE_TYPE': (errors.Invalid, 'the type of the VDI is {1}'),
    'VDI_NO_CBT_METADATA': (
        errors.Unsupported, 'nothing tracks the changes of this VDI'),
    'SR_UNKNOWN_DRIVER': (
        errors.Invalid, 'the pool has no storage driver {0}'),
    'VALUE_NOT_SUPPORTED': (errors.Invalid, '{0} cannot be {1}: {2}'),
    'INVALID_DEVICE': (errors.Invalid, 'the VM has no device {0}'),
    'VBD_NOT_UNPLUGGABLE': (
        errors.Invalid, 'the disk cannot be unplugged while the VM runs'),
    'DISK_VBD_MUST_BE_READWRITE_FOR_HVM': (
        errors.Invalid, 'this type of VM (HVM) has no read-only disks'),
    'VM_MISSING_PV_DRIVERS': (
        errors.Invalid, 'the guest has no PV drivers: it must be halted'),
    'VM_OLD_PV_DRIVERS': (
        errors.Invalid, 'the PV drivers of the guest are too old'),
    'DEVICE_ALREADY_ATTACHED': (errors.Conflict, 'it is plugged already'),
    'DEVICE_ALREADY_DETACHED': (errors.Conflict, 'it is not plugged'),
    'SR_NOT_ATTACHED': (
        errors.Unavailable, 'the SR is not plugged on the host of the VM'),
    'VM_BAD_POWER_STATE': (errors.Invalid, 'the VM is {2}, not {1}'),
}

# Codes of storage drivers (SR_BACKEND_FAILURE_n) that are given before
# anything is changed. Any other may have come in the middle: Unknown.
STORAGE: dict[int, type[errors.VolumeError]] = {
    **dict.fromkeys((44, 127, 129, 167, 180), errors.NoSpace),
    # 109: the chain is too long, until the server has merged it.
    **dict.fromkeys((16, 24, 37, 109, 135), errors.Busy),
    # The far side, or the way to it, is not there now.
    **dict.fromkeys((
        19, 40, 46, 47, 58, 67, 68, 70, 71, 73, 83, 86, 92, 97, 108, 111,
        124, 131, 132, 140, 141, 150, 151, 152, 153, 154, 164, 171, 201,
        430, 431, 432, 433, 434, 5002,
    ), errors.Unavailable),
    **dict.fromkeys((
        1, 2, 20, 48, 49, 60, 66, 72, 79, 84, 87, 89, 90, 91, 94, 95, 96,
        98, 99, 101, 102, 103, 105, 106, 107, 115, 119, 120, 121, 122, 123,
        125, 126, 128, 130, 133, 134, 142, 143, 160, 161, 162, 163, 165,
        166, 169, 170, 172, 173, 446, 447, 449, 460, 461, 5003, 5004, 5005,
        5010,
    ), errors.Invalid),
    **dict.fromkeys((42, 43, 75, 113, 5008), errors.Conflict),
    **dict.fromkeys((38, 168, 454), errors.Unsupported),
    144: errors.NotFound,
}
CHAIN_TOO_LONG = 'SR_BACKEND_FAILURE_109'
PREFIX = 'SR_BACKEND_FAILURE_'


def mean(
    method: str, failure: Failure, role: str = ''
) -> errors.VolumeError:
    """Return the failure as one of our errors, with the code as its cause.

    ``method`` is what was called; it names the least role if that lacks.
    """
    kind, words = _words(failure)
    if failure.code == 'RBAC_PERMISSION_DENIED':
        role = role or calls.role(method)
        words += f': give it the role {role}, which {method} needs'
    told = kind(f'{method}: {words} ({failure.code})')
    told.__cause__ = failure
    return told


def code(error: BaseException) -> str:
    """Return the server's code that an error stems from, or nothing."""
    cause = error.__cause__
    return cause.code if isinstance(cause, Failure) else ''


def params(error: BaseException) -> tuple[str, ...]:
    """Return the parameters that came with the code."""
    cause = error.__cause__
    return cause.params if isinstance(cause, Failure) else ()


def _words(failure: Failure) -> Meaning:
    if failure.code.startswith(PREFIX):
        number = failure.code.removeprefix(PREFIX)
        text = _at(failure.params, 1) or 'the storage driver gives no reason'
        kind = STORAGE.get(
            int(number) if number.isdigit() else 0, errors.Unknown
        )
        return kind, text
    if failure.code not in TABLE:
        text = ', '.join(p for p in failure.params if not _is_ref(p))
        return errors.Unknown, f'the server refuses: {text:.300}'
    kind, words = TABLE[failure.code]
    return kind, words.format(*(
        _at(failure.params, at) or 'it' for at in range(4)
    ))


def _at(params: Sequence[str], at: int) -> str:
    """Return a parameter in brief; an opaque reference tells nobody much."""
    found = str(params[at]) if at < len(params) else ''
    return '' if _is_ref(found) else ' '.join(found.split())[:300]


def _is_ref(text: str) -> bool:
    return str(text).startswith('OpaqueRef:')
