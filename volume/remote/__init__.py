# SPDX-License-Identifier: Apache-2.0
"""A node that is another machine: its agent there, and SSH to it."""
