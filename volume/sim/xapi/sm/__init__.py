# SPDX-License-Identifier: Apache-2.0
"""The Storage Manager: one manager for each family of SR types."""
