# SPDX-License-Identifier: Apache-2.0
"""A stranger's package, with a driver for the volume service."""
