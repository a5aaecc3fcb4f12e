# SPDX-License-Identifier: Apache-2.0
"""What must be right of a process before the driver starts in it."""

from __future__ import annotations

import os

from nova import monkey_patch, version
from nova.virt.imagecachelib import options

import imagecache_lib as ic

#: The release of Nova that this release of the adapter was tested with.
TESTED = "34"


def require_native_threads() -> None:
    """Refuse a process in which eventlet replaced threads, locks and sleeps.

    The library's loops over files and bytes never yield, so that a copy of some gigabytes would stop the
    whole service for as long as it takes, its heartbeat included.

    :raises ConfigError: it is one.
    """
    if monkey_patch.is_patched():
        raise ic.ConfigError(
            "this process runs on eventlet, and the image cache needs native threads",
            next_step="set concurrency_backend = threading in [DEFAULT] of nova.conf, and take"
            " OS_NOVA_DISABLE_EVENTLET_PATCHING=false out of the service's environment",
        )


def require_tested_release(conf, release: str | None = None) -> None:
    """Refuse a release of Nova that the adapter was not tested with.

    :param conf: Nova's configuration.
    :param release: of Nova. None: the one that runs.
    :raises ConfigError: it is another, and ``allow_untested_nova`` is off.
    """
    conf.register_opts(options.OPTIONS, group=options.GROUP)
    found = release or version.version_string()
    if found.split(".")[0] != TESTED and not conf.image_cache.allow_untested_nova:
        raise ic.ConfigError(
            f"Nova is {found}, and imagecache-lib-nova was tested with {TESTED}",
            next_step=f"install the release of imagecache-lib-nova for Nova {found.split('.')[0]}, or set"
            " allow_untested_nova = true in [image_cache]",
        )


def require_no_contradiction(conf) -> None:
    """Refuse options that cannot both hold.

    :param conf: Nova's configuration, with the library's options.
    :raises ConfigError: they do not go together; the message names both.
    """
    on_rbd = conf.libvirt.images_type == "rbd"
    cloned_only = on_rbd and conf.workarounds.never_download_image_if_on_rbd
    for demand in ("verify_glance_signatures", "enable_certificate_validation"):
        if cloned_only and conf.glance[demand]:
            raise _contradiction(
                "[workarounds] never_download_image_if_on_rbd",
                f"[glance] {demand}",
                "a signature is verified over the image's bytes, and a clone reads none",
            )
    if on_rbd and not conf.force_raw_images:
        raise _contradiction(
            "[libvirt] images_type = rbd", "[DEFAULT] force_raw_images = false", "disks in Ceph are raw"
        )
    roots = [os.path.normpath(root) for root in conf.image_cache.disk_roots]
    if roots and os.path.normpath(conf.instances_path) not in roots:
        raise _contradiction(
            "[image_cache] disk_roots",
            "[DEFAULT] instances_path",
            "Nova's disks lie under the second, which the first leaves out",
        )
    low, high = conf.image_cache.free_space_low, conf.image_cache.free_space_high
    if high and high < low:
        raise _contradiction(
            "[image_cache] free_space_high", "[image_cache] free_space_low", "the first is below the second"
        )


def _contradiction(one: str, other: str, why: str) -> ic.ConfigError:
    return ic.ConfigError(f"{one} and {other} contradict each other: {why}", next_step="change one of them")
