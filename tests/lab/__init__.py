# SPDX-License-Identifier: Apache-2.0
"""Real servers and filesystems for the functional tests: installed, started on loopback, awaited, ended.

Nothing here imports ``imagecache_lib``, so what it shows of a server does not rest on what is tested. What
a machine lacks fails the test where ``CI`` is set, and skips it elsewhere: see :mod:`tests.support.needs`.
"""
