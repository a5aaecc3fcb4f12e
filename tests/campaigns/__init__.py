# SPDX-License-Identifier: Apache-2.0
"""Campaigns: tests that are run for as long as somebody likes. The suites run a sample of each.

``IMAGECACHE_CAMPAIGN=1`` makes the suites run the whole of what has an end.
"""
