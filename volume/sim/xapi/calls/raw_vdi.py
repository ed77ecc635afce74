# SPDX-License-Identifier: Apache-2.0
"""The HTTP handlers of disks, which are answered beside the calls."""

from __future__ import annotations

from volume.sim.xapi.net import handlers

ROUTES = (handlers.put, handlers.get)
