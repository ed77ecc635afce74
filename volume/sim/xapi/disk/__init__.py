# SPDX-License-Identifier: Apache-2.0
"""The bytes of VDIs: files of each kind, their trees, and what merges them."""
