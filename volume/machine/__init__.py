# SPDX-License-Identifier: Apache-2.0
"""What can be done on one machine: names, open files, kernel settings.

``node`` is the door to all of it; nobody else comes here.
"""
