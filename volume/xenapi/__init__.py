# SPDX-License-Identifier: Apache-2.0
"""A pool of XenServer or XCP-ng hosts, talked to from both of its sides.

The driver ``xensm`` works on its storage, and the connector of that name on
its VMs; what both need is here: the session and its calls (``link``), long
ones (``tasks``), bytes (``handlers``), what errors mean (``failures``), SRs,
PBDs and VBDs (``srs``, ``plugs``).
"""
