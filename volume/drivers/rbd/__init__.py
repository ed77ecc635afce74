# SPDX-License-Identifier: Apache-2.0
"""Images of a Ceph cluster (RBD) as volumes."""
