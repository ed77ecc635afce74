# SPDX-License-Identifier: Apache-2.0
"""What can be asked of the service: one accepting transaction a verb.

A verb checks the request, then writes the row, the claim on capacity and the
job together, or nothing. Both doors (REST and RPC) come through here, so a
rule stands once. What has to happen on the storage is the job's business
(``flows``); the message that wakes a manager for it is only a hint.
"""
