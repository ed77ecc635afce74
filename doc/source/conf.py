# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds these pages, for ``./run tox -e docs``."""

import importlib.metadata
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'ext'))

project = 'volume-service'
author = 'the authors of volume-service'
copyright = author
release = version = importlib.metadata.version('volume-service')

extensions = ['sphinx.ext.autodoc', 'contract', 'simulator', 'xensm']
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
html_theme = 'alabaster'
html_theme_options = {
    'description': 'Block storage with small drivers and a crash-safe journal',
    'fixed_sidebar': True,
}
html_show_sphinx = False
