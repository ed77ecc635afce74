# SPDX-License-Identifier: Apache-2.0
"""What a server knows and keeps: rows, sessions, tasks, events."""
