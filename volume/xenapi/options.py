# SPDX-License-Identifier: Apache-2.0
"""The options of a backend's section, and what they mean together.

``Settings`` is a section that was read once and found consistent. Secrets
have no place in its ``repr``.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from oslo_config import cfg

from volume import errors
from volume.xenapi import kinds
from volume.xenapi.kinds import Kind

UUID = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')
HOST = re.compile(r'[A-Za-z0-9.:_\-\[\]]+')

LINK = frozenset({
    'addresses', 'username', 'password', 'password_file', 'password_env',
    'ca_file', 'fingerprints', 'insecure', 'timeout_s',
})
"""The names of those options that are about talking to a pool."""

OPTIONS: tuple[cfg.Opt, ...] = (
    cfg.ListOpt(
        'addresses', required=True,
        help='Members of the pool: host names, or URLs with a port.\n\n'
             'Name several: the master is found through any of them. '
             'Without a scheme it is https://.',
    ),
    cfg.StrOpt('username', default='root', help='User of the pool.'),
    cfg.StrOpt(
        'password', secret=True,
        help='Password of the user; password_file keeps it out of here.',
    ),
    cfg.StrOpt(
        'password_file',
        help='File whose first line is the password, mode 0600.',
    ),
    cfg.StrOpt(
        'password_env', default='XENSM_PASSWORD',
        help='Environment variable with the password, if nothing else has.',
    ),
    cfg.StrOpt(
        'ca_file',
        help='File of certificates that sign those of the hosts.\n\n'
             'Without it and without fingerprints the certificates of the '
             'system decide.',
    ),
    cfg.ListOpt(
        'fingerprints', default=[],
        help='SHA-256 of the hosts\' certificates, one for each member.',
    ),
    cfg.BoolOpt(
        'insecure', default=False,
        help='Talk to whoever answers: certificates are not checked.\n\n'
             'Also needed for http:// to anything but loopback.',
    ),
    cfg.ListOpt(
        'sr_uuid', default=[],
        help='SRs to use, each one a pool; they are never formatted.\n\n'
             'One that the pool does not know is introduced, with sr_type '
             'and device_config.',
    ),
    cfg.StrOpt(
        'sr_type',
        help='Type of an SR to introduce or create, such as nfs.',
    ),
    cfg.StrOpt(
        'sr_name',
        help='Name of an SR that is found, or created, by its name.',
    ),
    cfg.StrOpt(
        'device_config', default='', secret=True,
        help='Keys of the SR for its hosts, one a line, as key=value.\n\n'
             'The lines are indented. A value is taken as it stands: it may '
             'hold spaces, commas and "="; only "$" is written "$$".',
    ),
    cfg.StrOpt(
        'sm_config', default='',
        help='Keys of the SR for its driver, written as device_config is.',
    ),
    cfg.StrOpt(
        'vdi_config', default='',
        help='Keys of each new VDI for its driver, as device_config.\n\n'
             'Such as image-format=qcow2 (XCP-ng), or '
             'snap-reserve-percentage=200 (equal).',
    ),
    cfg.BoolOpt(
        'create', default=False,
        help='Format a new SR if there is none of the name sr_name.\n\n'
             'Its devices are probed first: anything found there is a '
             'refusal.',
    ),
    cfg.BoolOpt(
        'repair', default=True,
        help='Plug the SR into hosts that have lost it.',
    ),
    cfg.BoolOpt(
        'sr_per_volume', default=False,
        help='Make an SR of its own for each volume (nfs and smb only).\n\n'
             'Only such a volume can be attached to another pool.',
    ),
    cfg.ListOpt(
        'luns', default=[],
        help='SCSI ids of the LUNs that may be used (hba, iscsi, rawhba).',
    ),
    cfg.BoolOpt(
        'luns_erase', default=False,
        help='Take also LUNs that hold something: it is erased.\n\n'
             'Never those that another SR of the pool has.',
    ),
    cfg.ListOpt(
        'peers', default=[],
        help='Files that name the other pools that volumes may be lent to.\n\n'
             'Each has a section [xensm] with addresses, username, '
             'password_file and what else is needed to talk to that pool: '
             'what is attached there can then be ended from here.',
    ),
    cfg.StrOpt(
        'helper_vm',
        help='UUID of a VM through which LUNs are wiped faster.',
    ),
    cfg.BoolOpt(
        'cbt', default=False,
        help='Have the server track what changes after each snapshot.\n\n'
             'What changed is then told without comparing; XenServer needs '
             'a licence for it, and a disk that is tracked cannot be '
             'migrated live to another SR.',
    ),
    cfg.StrOpt(
        'read_back', default='near', choices=[
            ('near', 'where there is no NBD, samples of the first 64 MiB'),
            ('whole', 'samples of all, also where that takes an export'),
        ],
        help='What is read of a volume to prove that it was filled.\n\n'
             'By NBD samples of all are read in any case.',
    ),
    cfg.FloatOpt(
        'timeout_s', default=60.0, min=1.0,
        help='Seconds that one call of the server may take.',
    ),
    cfg.FloatOpt(
        'task_timeout_s', default=6 * 3600.0, min=1.0,
        help='Seconds that a copy, or another long task, may take.',
    ),
    cfg.IntOpt(
        'per_sr', default=1, min=1, max=16,
        help='Changes of one SR that are asked for at once.\n\n'
             'The server makes them one after the other in any case.',
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A section, checked."""

    urls: tuple[str, ...]
    username: str
    password: str = dataclasses.field(repr=False)
    ca_file: str = ''
    fingerprints: frozenset[str] = frozenset()
    insecure: bool = False
    sr_uuids: tuple[str, ...] = ()
    kind: Kind | None = None
    sr_name: str = ''
    device_config: Mapping[str, str] = dataclasses.field(
        default_factory=dict, repr=False
    )
    sm_config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vdi_config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    create: bool = False
    repair: bool = True
    sr_per_volume: bool = False
    luns: tuple[str, ...] = ()
    luns_erase: bool = False
    peers: tuple[str, ...] = ()
    helper_vm: str = ''
    cbt: bool = False
    read_back: str = 'near'
    timeout_s: float = 60.0
    task_timeout_s: float = 6 * 3600.0
    per_sr: int = 1

    def secrets(self) -> list[str]:
        """Return what must never be told: not in a log, not in an error."""
        return [each for each in (
            self.password, *kinds.secrets(self.device_config)
        ) if each]


def read(conf: Any) -> Settings:
    """Return the section's settings.

    :raises Invalid: an option is wrong, or does not fit another
    """
    settings = dataclasses.replace(
        read_link(conf),
        sr_uuids=tuple(uuid(each, 'sr_uuid') for each in conf.sr_uuid),
        kind=kinds.find(conf.sr_type) if conf.sr_type else None,
        sr_name=conf.sr_name or _home_name(conf),
        device_config=keys(conf.device_config, 'device_config'),
        sm_config=keys(conf.sm_config, 'sm_config'),
        vdi_config=keys(conf.vdi_config, 'vdi_config'),
        create=conf.create or bool(_home_name(conf)),
        repair=conf.repair,
        sr_per_volume=conf.sr_per_volume,
        luns=tuple(conf.luns),
        luns_erase=conf.luns_erase,
        peers=tuple(conf.peers),
        helper_vm=uuid(conf.helper_vm, 'helper_vm') if conf.helper_vm
        else '',
        task_timeout_s=conf.task_timeout_s,
        cbt=conf.cbt,
        read_back=conf.read_back,
        per_sr=conf.per_sr,
    )
    _check_sr(settings)
    return settings


def _home_name(conf: Any) -> str:
    """Return the name of the SR that tells how much room there is.

    With an SR for each volume it is empty, and made where none is named.
    """
    if conf.sr_per_volume and not (conf.sr_uuid or conf.sr_name):
        return 'volume-service'
    return ''


def read_link(conf: Any) -> Settings:
    """Return what it takes to talk to a pool, and nothing of its SRs.

    :raises Invalid: an option is wrong
    """
    settings = Settings(
        urls=tuple(_url(each) for each in conf.addresses or ()),
        username=conf.username,
        password=_password(conf),
        ca_file=conf.ca_file or '',
        fingerprints=frozenset(map(_fingerprint, conf.fingerprints)),
        insecure=conf.insecure,
        timeout_s=conf.timeout_s,
    )
    _check_link(settings)
    return settings


def keys(text: str, option: str) -> dict[str, str]:
    """Return the keys of a text with one ``key=value`` a line.

    :raises Invalid: a line has no "=", or a key stands twice
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, sign, value = line.partition('=')
        key = key.strip()
        if not sign or not key:
            # The line itself may hold a secret.
            raise errors.Invalid(
                f'option {option}: line {number} is not key=value'
            )
        if key in found:
            raise errors.Invalid(f'option {option} has the key {key} twice')
        found[key] = value.strip()
    return found


def lines(found: Mapping[str, str]) -> str:
    """Return keys as they stand in a configuration file."""
    return ''.join(f'\n    {key}={value}' for key, value in found.items())


def _check_link(settings: Settings) -> None:
    if not settings.urls:
        raise errors.Invalid('option addresses names no member of the pool')
    if not settings.password:
        raise errors.Invalid(
            'there is no password: give option password_file or password, '
            'or the environment variable that password_env names'
        )
    for url in settings.urls:
        if url.startswith('http:') and not settings.insecure and not (
            _is_loopback(url)
        ):
            raise errors.Invalid(
                f'{url} would carry the password in the clear: use https://, '
                'or say insecure = true'
            )
    if settings.insecure and (settings.ca_file or settings.fingerprints):
        raise errors.Invalid(
            'insecure = true checks no certificate: it does not go with '
            'ca_file or fingerprints'
        )


def _check_sr(settings: Settings) -> None:
    kind, name = settings.kind, settings.sr_name
    if not (settings.sr_uuids or name or settings.sr_per_volume):
        raise errors.Invalid(
            'no SR is named: give sr_uuid, or sr_name (and, to format a new '
            'one, sr_type, device_config and create = true)'
        )
    if settings.sr_uuids and settings.create:
        raise errors.Invalid(
            'create = true formats a new SR, whose uuid nobody knows yet: '
            'it goes with sr_name, not with sr_uuid'
        )
    if settings.create and not (name and kind):
        raise errors.Invalid('create = true needs sr_name and sr_type')
    if settings.sr_per_volume and (
        kind is None or kind.type not in ('nfs', 'smb')
    ):
        raise errors.Invalid('sr_per_volume needs sr_type nfs or smb')
    if settings.device_config and kind is None:
        raise errors.Invalid('device_config needs sr_type')
    if kind is not None:
        kind.check(settings.device_config)
        if kind.family == 'lun' and not settings.luns:
            raise errors.Invalid(
                f'sr_type {kind.type} uses whole LUNs, and only those that '
                'option luns names by their SCSI ids: name some'
            )


def _url(address: str) -> str:
    address = address.strip().rstrip('/')
    if '://' not in address:
        address = f'https://{address}'
    parts = urlsplit(address)
    try:
        is_right = parts.scheme in ('http', 'https') and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right or not parts.hostname or parts.path or (
        not HOST.fullmatch(parts.netloc)
    ):
        raise errors.Invalid(
            # What stands before an "@" may be a password.
            f'option addresses: {address.rpartition("@")[2]!r:.100} is '
            'neither a host nor an http(s) URL without user and path'
        )
    return address


def _password(conf: Any) -> str:
    if conf.password_file:
        try:
            with open(conf.password_file, encoding='utf-8') as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise errors.Invalid(
                        f'password_file {conf.password_file} can be read by '
                        'others: chmod 600'
                    )
                return file.readline().rstrip('\r\n')
        except (OSError, UnicodeDecodeError) as failed:
            raise errors.Invalid(
                f'password_file {conf.password_file} cannot be read: '
                f'{getattr(failed, "strerror", "") or "no text"}'
            ) from failed
    found: str = conf.password or os.environ.get(conf.password_env or '', '')
    return found


def _fingerprint(text: str) -> str:
    found = text.replace(':', '').strip().lower()
    if not re.fullmatch('[0-9a-f]{64}', found):
        raise errors.Invalid(
            f'option fingerprints: {text!r:.100} is no SHA-256 in hex'
        )
    return found


def uuid(text: str, option: str) -> str:
    """Return a UUID as it is written, in lower case.

    :raises Invalid: it is none
    """
    found = text.strip().lower()
    if not UUID.fullmatch(found):
        raise errors.Invalid(f'option {option}: {text!r:.100} is no UUID')
    return found


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ''
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def mask(text: str, secrets: Iterable[str]) -> str:
    """Return a text without the secrets that it may hold."""
    for secret in secrets:
        text = text.replace(secret, '***')
    return text
