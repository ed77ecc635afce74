# SPDX-License-Identifier: Apache-2.0
"""Those fields of a connection that are not for everybody.

Credentials are an attachment's own and stand sealed in its row; secrets are
the storage's, and are nowhere but in the answer of the job that made the
connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from volume import errors
from volume.core import Core
from volume.core import Ended
from volume.db import models
from volume.vault import Vault

SECRET_KEYS = 'secret_keys'  # which fields of a connection are not stored


def of(core: Core, row: models.Attachment) -> dict[str, str]:
    """Return what proves to the storage who the attachment's host is.

    For the host and for services that act for it; nothing for lists, logs
    or messages.

    :raises Unavailable: the key that sealed it is not here
    """
    if not row.credentials:
        return {}
    opened = Vault(core.settings.secrets_key_file).open(
        row.id, row.credentials
    )
    return {
        name: text for name, text in opened.items() if ':' not in name
    }


def told(
    connection: Mapping[str, Any], more: Mapping[str, str]
) -> dict[str, Any]:
    """Return the connection with more fields."""
    if not more:
        return dict(connection)
    return {**connection, 'data': {**connection.get('data', {}), **more}}


def secret(answer: Mapping[str, Any], ended: Ended) -> dict[str, Any]:
    """Return the connection with the storage's secrets.

    :raises Unavailable: another process ran the job, and had them
    """
    secrets = ended.answer.get('secrets', {})
    missing = [name for name in secret_keys(answer) if name not in secrets]
    if missing:
        raise errors.Unavailable(
            f'the connection needs {", ".join(missing)}, which is never '
            'stored, and another service made it: ask that one by its name'
        )
    return told(answer, secrets)


def secret_keys(connection: Mapping[str, Any]) -> list[str]:
    """Return the names of the storage's secrets that it needs."""
    found = (connection.get('data') or {}).get(SECRET_KEYS, ())
    return [str(name) for name in found]
