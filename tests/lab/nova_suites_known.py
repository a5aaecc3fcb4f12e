# SPDX-License-Identifier: Apache-2.0
"""Which of Nova's tests run through the adapter, and which of them cannot apply to it, with the reason."""

from __future__ import annotations

#: What CI runs.
SAMPLE = [
    "nova.tests.unit.virt.test_imagecache",
    "nova.tests.unit.virt.libvirt.test_imagecache",
    "nova.tests.unit.virt.libvirt.test_imagebackend",
]

_CACHE = "nova.tests.unit.virt.libvirt.test_imagecache.ImageCacheManagerTestCase."
_FLAT = "nova.tests.unit.virt.libvirt.test_imagebackend.FlatTestCase."

_STAT = "it replaces os.stat and os.listdir call by call, in the order in which Nova's own code calls them"
_PRIVATE = "it looks into the lists of Nova's own pass, which is not the one that runs"
_MOCKED = "it replaces what Nova's own code calls to make a disk, and makes none that could be looked at"

#: By id, with the reason. It may only become shorter.
CANNOT_APPLY = {
    f"{_CACHE}test_get_disk_usage": _STAT,
    f"{_CACHE}test_get_disk_usage_cache_dir_missing": _STAT,
    f"{_CACHE}test_get_disk_usage_cache_is_on_different_disk": _STAT,
    f"{_CACHE}test_get_disk_usage_empty": _STAT,
    f"{_CACHE}test_get_disk_usage_io_error_while_reading": _STAT,
    f"{_CACHE}test_verify_base_images": _PRIVATE,
    f"{_FLAT}test_prealloc_image": _MOCKED,
    f"{_FLAT}test_prealloc_image_without_write_access": _MOCKED,
}
