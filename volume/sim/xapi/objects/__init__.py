# SPDX-License-Identifier: Apache-2.0
"""Rules of the objects that several calls share: VDIs, VBDs, VMs, SRs."""
