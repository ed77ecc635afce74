# SPDX-License-Identifier: Apache-2.0
"""Shipped for driver authors: conformance suite, faults, fixtures."""
