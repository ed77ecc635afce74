# SPDX-License-Identifier: Apache-2.0
"""What tests of sources share."""

from __future__ import annotations

import random
import types
from typing import Any

from volume.transfer.base import Source

DATA = random.Random(5).randbytes(3_000_000)


def settings(**changed: Any) -> Any:
    conf = {
        'image_allowed_directories': [],
        'image_upload_directories': [],
        'image_allowed_networks': ['127.0.0.0/8'],
        'image_http_timeout_s': 10.0,
        'image_http_attempts': 3,
        'image_redirects_max': 3,
        'image_size_bytes_max': 1 << 30,
        'image_ca_file': '',
    }
    return types.SimpleNamespace(**{**conf, **changed})


def read(source: Source, url: str) -> bytes:
    stat = source.stat(url)
    with source.open(stat) as image:
        return read_all(image)


def read_all(image: Any) -> bytes:
    pieces = []
    while piece := image.read(100_000):
        pieces.append(piece)
    return b''.join(pieces)
