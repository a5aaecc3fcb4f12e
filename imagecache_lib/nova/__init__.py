# SPDX-License-Identifier: Apache-2.0
"""Nova's own files and objects, read and written as Nova does. Nothing of Nova is imported."""

from imagecache_lib.nova.driver_report import instance, instances

__all__ = ["instance", "instances"]
