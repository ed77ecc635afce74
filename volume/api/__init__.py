# SPDX-License-Identifier: Apache-2.0
"""The REST door, compatible with the Cinder v3 API."""
