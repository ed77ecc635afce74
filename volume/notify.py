# SPDX-License-Identifier: Apache-2.0
"""The seam for notifications: a function of an event and its payload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Notify = Callable[[str, Mapping[str, Any]], None]


def silent(event: str, payload: Mapping[str, Any]) -> None:
    """Tell nobody."""
