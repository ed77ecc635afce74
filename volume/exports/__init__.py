# SPDX-License-Identifier: Apache-2.0
"""How a host reaches a device of this node."""
