# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. Warnings are errors in every build: see the Makefile and tox.ini."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "ext"))

project = "imagecache-lib"
author = "The imagecache-lib maintainers"
copyright = author

extensions = [
    "sphinx.ext.autodoc",
    "oslo_config.sphinxconfiggen",
    "oslo_config.sphinxext",
    "command_help",
    "own_names",
]

# Writes imagecache.conf.sample beside this file, for admin/configuration.
config_generator_config_file = [("config-generator.conf", "imagecache")]

# Everything documented here is typed; the signature need not say it twice.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Optional parts, which need not be installed to read about them.
autodoc_mock_imports = ["cursive", "oslo_messaging", "prometheus_client", "rados", "rbd"]

# Links to the documentation of Python and of other packages would need the network while this is built.
_OTHERS = (
    "collections.abc|contextlib|hashlib|logging|os|queue|re|ssl|threading|unittest"
    "|oslo_concurrency|oslo_messaging|prometheus_client|requests"
)
# Sphinx splits the type of a parameter at its comma.
nitpick_ignore_regex = [("py:.*", rf"({_OTHERS})\..*|({_OTHERS})|tuple\[str")]

html_theme = "alabaster"
html_theme_options = {
    "description": "A host-local image cache for hypervisor drivers",
    "fixed_sidebar": True,
    "page_width": "70em",
}
html_show_sphinx = False

man_pages = [("admin/imagecache", "imagecache", "the image cache of a host", author, 1)]
