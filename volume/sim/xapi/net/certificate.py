# SPDX-License-Identifier: Apache-2.0
"""A host's own certificate: self-signed, as a new host has it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

DAYS = 3650
LIMIT_S = 60


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of a certificate and of its key."""

    certificate: Path
    key: Path


def make(directory: Path, name: str, address: str) -> Pair:
    """Return a host's certificate, made once by ``openssl``.

    :raises OSError: it cannot be made, or openssl is not there
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pair = Pair(directory / f'{name}.pem', directory / f'{name}.key')
    if pair.certificate.exists():
        return pair
    new = pair.certificate.with_suffix('.new')
    done = subprocess.run(
        [
            'openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-sha256',
            '-nodes', '-days', str(DAYS), '-subj', f'/CN={address}',
            '-addext', f'subjectAltName=IP:{address},DNS:{name}',
            '-keyout', str(pair.key), '-out', str(new),
        ],
        capture_output=True, timeout=LIMIT_S, check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise OSError(f'openssl made no certificate: {done.stderr!r}')
    os.replace(new, pair.certificate)
    return pair
