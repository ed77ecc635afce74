# SPDX-License-Identifier: Apache-2.0
"""What was promised: rows, claims and jobs."""
