# SPDX-License-Identifier: Apache-2.0
"""The first steps of ``volume-service``: which kind of concurrency it has.

eventlet must patch the standard library before anything else is imported
that uses it. So the configuration is read here for that one option, and once
more, in full, by the service.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from oslo_config import cfg

from volume import concurrency
from volume import conf as options
from volume import errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``volume-service`` until it is told to stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        concurrency.start(_mode(arguments))
    except errors.VolumeError as wrong:
        print(f'volume-service: {wrong}', file=sys.stderr)
        return 1
    from volume import service

    return service.main(arguments)


def _mode(arguments: Sequence[str]) -> str:
    conf = cfg.ConfigOpts()
    conf.register_cli_opts([
        option for option in options.SERVICE if option.name in options.CLI
    ])
    try:
        conf(list(arguments), project='volume', prog='volume-service')
        return str(conf.concurrency)
    except (cfg.Error, OSError, ValueError):
        # The service reads it again, and says what is wrong with it.
        return concurrency.THREADS
