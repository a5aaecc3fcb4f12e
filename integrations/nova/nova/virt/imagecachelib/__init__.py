# SPDX-License-Identifier: Apache-2.0
"""Nova's libvirt driver with imagecache_lib as its image cache.

``compute_driver = imagecachelib.LibvirtDriver`` loads it: Nova imports ``nova.virt.<compute_driver>``, which
is all that brings this package in. Nothing of Nova is patched.
The driver here is Nova's own, with two objects exchanged after it was made: what makes disks
(:mod:`~nova.virt.imagecachelib.images`) and what tends the cache (:mod:`~nova.virt.imagecachelib.upkeep`).
"""

from nova.virt.imagecachelib.driver import LibvirtDriver

__all__ = ["LibvirtDriver"]
