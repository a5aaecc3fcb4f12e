# SPDX-License-Identifier: Apache-2.0
"""Keeps the rule of :mod:`tests.support.execve_rule` in each Python that a test starts.

Python imports this when it starts, since the directory is in PYTHONPATH.
"""

from __future__ import annotations

import importlib.util
import os


def _keep_the_rule() -> None:
    # Other programs' Pythons, such as those of image servers, do not have the library.
    if importlib.util.find_spec("imagecache_lib") is None:
        return
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "execve_rule.py")
    spec = importlib.util.spec_from_file_location("imagecache_tests_execve_rule", path)
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    rule.install()


_keep_the_rule()
