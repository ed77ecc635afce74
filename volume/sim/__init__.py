# SPDX-License-Identifier: Apache-2.0
"""Servers that behave as storage does, for tests and for trying things."""
