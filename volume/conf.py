# SPDX-License-Identifier: Apache-2.0
"""The service's options, and those that every backend section has.

Nobody imports a global ``CONF``: ``load()`` makes a private one and hands it
down. Driver, exporter and source options stand on their classes;
``list_opts()`` collects them all for the sample file and the docs, also of
drivers that were installed from elsewhere.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Collection, Sequence
from typing import Any

from oslo_config import cfg
from oslo_config import types
from stevedore import ExtensionManager

from volume import concurrency

LOG = logging.getLogger(__name__)

SERVICE = (
    cfg.HostAddressOpt(
        'host', default=socket.gethostname(),
        sample_default='this-machine',
        help='Name of this node, as rows and RPC topics carry it.',
    ),
    cfg.StrOpt(
        'state_path', default='/var/lib/volume',
        help='Directory for locks, sockets, spools and the default database.',
    ),
    cfg.StrOpt(
        'lock_path', default='$state_path/locks',
        help='Directory of the locks on volumes.\n\n'
             'Services of one machine that work on the same storage must '
             'share it: then one can go on with the work of another that '
             'has died.',
    ),
    cfg.StrOpt(
        'database', secret=True,
        default='sqlite:///$state_path/volume.sqlite',
        help='SQLAlchemy URL of the database.\n\n'
             'sqlite:////PATH, postgresql://USER:PASSWORD@HOST/NAME or '
             'mariadb://USER:PASSWORD@HOST/NAME.',
    ),
    cfg.FloatOpt(
        'database_timeout_s', default=10.0, min=0.1,
        help='Seconds that a database server has to answer a statement.\n\n'
             'Lost races and lost connections are tried again for as long; '
             'then the request is refused with 503, and a job waits.',
    ),
    cfg.IntOpt(
        'database_connections', default=30, min=2,
        help='The most connections to a database server at once.\n'
             'Heartbeat and leases have two more of their own.',
    ),
    cfg.ListOpt(
        'enabled_backends', default=[],
        help='Names of the sections that are backends.',
    ),
    cfg.ListOpt(
        'roles', default=['api', 'manager'],
        item_type=types.String(choices=['api', 'manager']),
        help='What this process does.',
    ),
    cfg.StrOpt(
        'concurrency', default=concurrency.THREADS,
        choices=concurrency.MODES,
        help='How the process does several things at once.\n\n'
             'eventlet must be installed: volume-service[eventlet].',
    ),
    cfg.StrOpt(
        'availability_zone', default='nova',
        help='Zone of volumes whose request names none.',
    ),
    cfg.FloatOpt(
        'lease_s', default=30.0, min=1.0,
        help='Seconds for which a manager holds a job without renewing.',
    ),
    cfg.FloatOpt(
        'lease_wait_s', default=10.0, min=0.0,
        help='Seconds for which a request waits for another job to end.',
    ),
    cfg.FloatOpt(
        'job_retry_s', default=3600.0, min=0.0,
        help='Seconds for which a job is tried again before it fails.',
    ),
    cfg.FloatOpt(
        'call_timeout_s', default=55.0, min=1.0,
        help='Seconds for which a call waits for its job.',
    ),
    cfg.FloatOpt(
        'sweep_interval_s', default=5.0, min=0.1,
        help='Seconds between two looks for jobs that nobody runs.',
    ),
    cfg.FloatOpt(
        'stats_interval_s', default=10.0, min=0.5,
        help='Seconds between two reports of capacity.',
    ),
    cfg.FloatOpt(
        'service_down_s', default=60.0, min=1.0,
        help='Seconds of silence after which a service counts as down.\n\n'
             'Its backends get no new volumes then, unless another service '
             'has them too. At least three times stats_interval_s is used.',
    ),
    cfg.FloatOpt(
        'upkeep_interval_s', default=30.0, min=0.1,
        help='Seconds between two pieces of background work on a backend.',
    ),
    cfg.FloatOpt(
        'reservation_timeout_s', default=900.0, min=1.0,
        help='Seconds after which a reservation that nobody uses ends.',
    ),
    cfg.FloatOpt(
        'retention_s', default=30 * 86400.0, min=0.0,
        help='Seconds for which ended jobs and deleted rows are kept.',
    ),
    cfg.FloatOpt(
        'graceful_shutdown_timeout_s', default=60.0, min=0.0,
        help='Seconds that running steps have to end when the service stops.',
    ),
    cfg.StrOpt(
        'image_url_template', default='',
        help='URL of an image that is named by its id.\n\n'
             'The word {id} in it is replaced, as in '
             'https://images.example.org/{id}.qcow2.',
    ),
    cfg.IntOpt(
        'image_rate_bytes_per_s', default=0, min=0,
        help='Bytes a second of one copy, or of one wipe; 0 is no limit.',
    ),
    cfg.StrOpt(
        'secrets_key_file', default='$state_path/secrets.key',
        help='File of the keys that seal secrets in the database.\n\n'
             'Made at the first start. Services of one database need the '
             'same file, and a copy of it belongs to each backup.',
    ),
    cfg.StrOpt(
        'nbd_listen', default='',
        help='Loopback address and port of the NBD server; empty is a '
             'unix socket.',
    ),
    cfg.StrOpt(
        'log_level', default='INFO',
        choices=['DEBUG', 'INFO', 'WARNING', 'ERROR'],
        help='The least important messages that are logged.',
    ),
    cfg.StrOpt(
        'log_format', default='text', choices=['text', 'json'],
        help='Whether a line of the log is for people, or a JSON object.',
    ),
)

API = (
    cfg.StrOpt(
        'listen', default='127.0.0.1',
        help='Address to listen on, or unix:PATH.',
    ),
    cfg.PortOpt('port', default=8776, help='Port; 0 takes a free one.'),
    cfg.StrOpt(
        'auth', default='none', choices=['none', 'tokens'],
        help='Who may ask: everybody (loopback only), or holders of tokens.',
    ),
    cfg.StrOpt(
        'tokens_file', default='/etc/volume/tokens.json',
        help='File of static tokens, readable by the service alone.',
    ),
    cfg.URIOpt(
        'public_url', schemes=['http', 'https'],
        help='URL that links in answers begin with, behind a proxy.',
    ),
    cfg.StrOpt('tls_certificate', help='Certificate file; sets TLS on.'),
    cfg.StrOpt('tls_key', help='Private key file of the certificate.'),
    cfg.IntOpt('threads', default=16, min=1, help='Requests served at once.'),
)

BACKEND = (
    cfg.StrOpt(
        'driver', required=True,
        help='Driver by its entry point\'s name; see "volume-manage drivers".',
    ),
    cfg.StrOpt(
        'exporter', default='nbd',
        help='How hosts reach the volumes: nbd, local, or installed ones.',
    ),
    cfg.StrOpt(
        'node', default='',
        help='Machine that has the storage, if not this: ssh://user@host.\n\n'
        'Or ssh://user@host:port. The agent of this release runs there, '
        'bound to a key; driver and exporter work through it.',
    ),
    cfg.StrOpt(
        'node_key_file', default='/etc/volume/node-key',
        help='Private key, without a passphrase, that opens the node.',
    ),
    cfg.StrOpt(
        'node_known_hosts_file', default='/etc/volume/node-known-hosts',
        help='Host keys of nodes, in the format of ssh; others are refused.',
    ),
    cfg.StrOpt(
        'node_command', default='volume-node-agent',
        help='What is run on the node, unless its key is bound to a command.',
    ),
    cfg.ListOpt('tags', default=[], help='Words that requests can ask for.'),
    cfg.IntOpt('cost', default=0, help='The cheapest pool that fits is used.'),
    cfg.StrOpt('cluster', default='', help='Only for requests of a cluster.'),
    cfg.StrOpt('role', default='', help='Use of the backend, e.g. SAN.'),
    cfg.ListOpt(
        'projects', default=[],
        help='The only projects that may use it; empty is all.',
    ),
    cfg.IntOpt(
        'reserved_percent', default=0, min=0, max=100,
        help='Percent of a pool that is never promised.',
    ),
    cfg.FloatOpt(
        'oversubscription', default=1.0, min=0.0,
        help='How many times a thin pool\'s size may be promised.',
    ),
    cfg.FloatOpt(
        'capacity_gib', min=0.0,
        help='Size of each pool, if smaller than what the storage has.',
    ),
    cfg.IntOpt(
        'max_parallel', default=8, min=1, max=64,
        help='Jobs that run on the backend at once.',
    ),
)


def load(
    argv: Sequence[str] = (), files: Sequence[str] | None = None
) -> cfg.ConfigOpts:
    """Return the configuration of a command line and its files.

    :raises SystemExit: the command line is wrong, and why
    :raises cfg.Error: a file or a value is wrong, and why
    """
    conf = cfg.ConfigOpts()
    register(conf)
    try:
        conf(
            list(argv), project='volume', prog='volume-service',
            default_config_files=list(files) if files is not None else None,
            default_config_dirs=[] if files is not None else None,
        )
        for path in conf.config_file:
            _check_file(path, {'DEFAULT', 'api', *conf.enabled_backends})
    except cfg.ConfigFilesNotFoundError as missing:
        raise cfg.Error(
            f'configuration file {", ".join(missing.config_files)} does not '
            'exist; give --config-file another one'
        ) from None
    except (OSError, UnicodeDecodeError) as failed:
        raise cfg.Error(
            f'the configuration cannot be read: {failed}'
        ) from None
    _check_values(conf)
    return conf


SECTION = re.compile(r'\[(.*)\]')


def _check_file(path: str, ours: Collection[str]) -> None:
    """Refuse a section, or an option of ours, that stands there twice.

    oslo.config would mix two sections of one name and take the last of two
    values: a backend could come to have another's directories.
    """
    section = 'DEFAULT'
    seen: dict[tuple[str, str], int] = {}
    with open(path, encoding='utf-8') as lines:
        for number, line in enumerate(lines, 1):
            if found := SECTION.match(line):
                section, what = found[1], f'section [{found[1]}]'
                mark = section, ''
            elif section in ours and not line.startswith(
                (' ', '\t', '#', ';', '\n')
            ):
                name = re.split('[=:]', line, maxsplit=1)[0].strip()
                what = f'option {name} of section [{section}]'
                mark = section, name.replace('-', '_')
            else:
                continue
            if mark in seen:
                raise cfg.ConfigFileValueError(
                    f'{path}:{number}: {what} stands in line {seen[mark]} '
                    'already; make one of the two'
                )
            seen[mark] = number


def _check_values(conf: cfg.ConfigOpts) -> None:
    """Read every value of ours now, that none fails when it is needed."""
    for name in conf:
        if isinstance(conf[name], cfg.ConfigOpts.GroupAttr):
            for option in conf[name]:
                conf[name][option]


def register(conf: cfg.ConfigOpts) -> None:
    """Register the service's own options, and those of image sources."""
    conf.register_cli_opts([o for o in SERVICE if o.name in CLI])
    conf.register_opts([o for o in SERVICE if o.name not in CLI])
    conf.register_opts(API, group='api')
    for source in _classes('volume.sources'):
        conf.register_opts(source.options)


CLI = frozenset({
    'concurrency', 'log_format', 'log_level', 'roles', 'state_path',
})


def database_url(conf: cfg.ConfigOpts) -> str:
    """Return the database's URL; a relative state path is made absolute."""
    url: str = conf.database
    if url == f'sqlite:///{conf.state_path}/volume.sqlite':
        path = os.path.abspath(conf.state_path)
        return f'sqlite:///{path}/volume.sqlite'
    return url


def database_limits(conf: cfg.ConfigOpts) -> dict[str, Any]:
    """Return what ``Database`` is told beside its URL."""
    return {
        'timeout_s': conf.database_timeout_s,
        'connections': conf.database_connections,
    }


def list_opts() -> list[tuple[str | None, list[cfg.Opt]]]:
    """Return every option by group, for oslo-config-generator and the docs.

    A backend's section is shown once a driver, named after the driver.
    """
    sources: dict[str, cfg.Opt] = {
        option.name: option
        for source in _classes('volume.sources')
        for option in source.options
    }
    groups: list[tuple[str | None, list[cfg.Opt]]] = [
        ('DEFAULT', [*SERVICE, *sources.values()]), ('api', list(API)),
    ]
    exporters = {
        option.name: option
        for exporter in _classes('volume.exports')
        for option in exporter.options
    }
    for name, driver in sorted(plugins('volume.drivers').items()):
        own = {option.name for option in driver.options}
        groups.append((f'my_{name}', [
            *driver.options,
            *(option for option in BACKEND if option.name not in own),
            *(o for name, o in exporters.items() if name not in own),
        ]))
    return groups


def _classes(namespace: str) -> list[Any]:
    return list(dict.fromkeys(plugins(namespace).values()))


def plugins(namespace: str) -> dict[str, Any]:
    """Return the classes of a namespace of entry points by name.

    One that cannot be loaded is logged and left out: the others serve.
    """
    found: ExtensionManager[Any] = ExtensionManager(
        namespace, on_load_failure_callback=_note_failure,
    )
    # In an order of their own: that of the installation is any.
    return {
        extension.name: extension.plugin
        for extension in sorted(found, key=lambda each: each.name)
    }


def _note_failure(
    manager: object, entry: object, error: BaseException
) -> None:
    LOG.error('entry point %s cannot be loaded: %s', entry, error)
