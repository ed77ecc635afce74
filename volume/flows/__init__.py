# SPDX-License-Identifier: Apache-2.0
"""One workflow a file: a list of steps, each with its undo beside it."""
