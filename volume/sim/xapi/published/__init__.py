# SPDX-License-Identifier: Apache-2.0
"""What was published of servers: their calls, and what each release can."""
