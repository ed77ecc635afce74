# SPDX-License-Identifier: Apache-2.0
"""A XenAPI pool with its Storage Manager, in one process."""
