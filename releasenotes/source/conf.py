# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration of the release notes, which reno reads from this repository's history."""

project = "imagecache-lib release notes"
author = "The imagecache-lib maintainers"
copyright = author

extensions = ["reno.sphinxext"]

html_theme = "alabaster"
html_show_sphinx = False
