# SPDX-License-Identifier: Apache-2.0
"""One file a noun of the API: what is asked, which verb, what is shown."""
