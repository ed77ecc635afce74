# SPDX-License-Identifier: Apache-2.0
"""What is spoken on the network: calls, disks over HTTP, NBD, control."""
