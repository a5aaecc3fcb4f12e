# SPDX-License-Identifier: Apache-2.0
"""Which of Nova's tests run through the adapter, and which of them cannot apply to it, with the reason."""

from __future__ import annotations

#: What runs, with how many tests each module has in the release of Nova that the adapter is for.
SUITES = {
    "nova.tests.unit.virt.test_imagecache": 4,
    "nova.tests.unit.virt.test_images": 22,
    "nova.tests.unit.virt.libvirt.test_imagecache": 30,
    "nova.tests.unit.virt.libvirt.test_imagebackend": 144,
    "nova.tests.unit.virt.libvirt.test_utils": 55,
    "nova.tests.unit.virt.libvirt.test_driver": 1213,
    "nova.tests.functional.compute.test_cache_image": 1,
}

_CACHE = "nova.tests.unit.virt.libvirt.test_imagecache.ImageCacheManagerTestCase."
_FLAT = "nova.tests.unit.virt.libvirt.test_imagebackend.FlatTestCase."
_CONNECTION = "nova.tests.unit.virt.libvirt.test_driver.LibvirtConnTestCase."
_DRIVER = "nova.tests.unit.virt.libvirt.test_driver.LibvirtDriverTestCase."

_STAT = "it replaces os.stat and os.listdir call by call, in the order in which Nova's own code calls them"
_PRIVATE = "it looks into the lists of Nova's own pass, which is not the one that runs"
_MOCKED = "it replaces what Nova's own code calls to make a disk, and makes none that could be looked at"
_NO_IMAGE = "its image exists nowhere: it replaces the function by which Nova's own code fetches images"
_NO_DOWNLOAD = "its image service returns no bytes where Nova's own code, which it replaces, would write them"
_NO_DIRECTORY = "its disks lie in directories that do not exist, and it replaces what would open them"
_CALLS = "it counts the calls of Nova's own fetch function, which is replaced"

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
    f"{_CONNECTION}test_create_ephemeral_specified_fs_not_valid": _NO_IMAGE,
    f"{_CONNECTION}test_create_image_not_exist_fallback": _NO_DOWNLOAD,
    f"{_CONNECTION}test_create_image_not_exist_no_fallback": _NO_DOWNLOAD,
    f"{_CONNECTION}test_create_images_and_backing_ephemeral_gets_created": _NO_DOWNLOAD,
    f"{_CONNECTION}test_create_images_and_backing_images_exist": _NO_DIRECTORY,
    f"{_CONNECTION}test_create_images_and_backing_images_not_exist_fallback": _NO_DIRECTORY,
    f"{_CONNECTION}test_create_images_and_backing_images_not_exist_no_fallback": _NO_DIRECTORY,
    f"{_CONNECTION}test_create_images_backing_images_and_fallback_not_exist": _NO_DIRECTORY,
    f"{_DRIVER}test_cache_image_existing": _NO_DIRECTORY,
    f"{_DRIVER}test_cache_image_uncached": _NO_DIRECTORY,
    f"{_DRIVER}test_cache_image_uncached_first_time": _NO_DIRECTORY,
    f"{_DRIVER}test_create_fetch_image_ceph_workaround": _CALLS,
}

#: How many there are. A change that needs a larger number takes something away from users.
AT_MOST = 20
