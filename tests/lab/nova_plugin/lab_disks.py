# SPDX-License-Identifier: Apache-2.0
"""Disks as Nova's driver makes them and makes sure of them: from Nova's own image types, or the adapter's."""

import functools
import os

import nova.conf
import nova.privsep.fs
from nova import context
from nova.virt.libvirt import driver, imagebackend, imagecache
from nova.virt.libvirt import utils as libvirt_utils

CONF = nova.conf.CONF
MIB, GIB = 2**20, 2**30


def request_context(glance_url, token):
    """Return a user's request, as the API puts it together: its token, and where Glance is."""
    endpoints = {"region": "lab", "publicURL": glance_url, "internalURL": glance_url}
    catalog = [{"type": "image", "name": "glance", "endpoints": [endpoints]}]
    user, project, _role = token.split(":")
    return context.RequestContext(user, project, auth_token=token, service_catalog=catalog)


@functools.cache
def _caches():
    """Return the adapter's, as its driver has them."""
    from nova.virt.imagecachelib import caches, options, sources

    from imagecache_lib import opts

    opts.register_opts(CONF)
    CONF.register_opts(options.OPTIONS, group=options.GROUP)
    return caches.Caches(sources.Glance())


def backend(side):
    """Return the choice of image types of a side: ``nova`` or ``adapter``."""
    if side == "nova":
        return imagebackend.Backend(CONF.use_cow_images)
    from nova.virt.imagecachelib import images

    return images.Backend(CONF.use_cow_images, _caches())


def image_cache_manager(side):
    """Return what runs the periodic pass of a side."""
    if side == "nova":
        return imagecache.ImageCacheManager()
    from nova.virt.imagecachelib import upkeep

    return upkeep.ImageCacheManager(_caches())


def use(side, ctxt, owner, disk):
    """Make a disk, or make sure of one that is there, as a spawn and a hard reboot do.

    :param disk: its ``name``, ``kind`` (qcow2 or raw), and one of ``image``, ``swap`` and ``ephemeral``.
    :returns: its path, and the format in which QEMU is told to open it.
    """
    os.makedirs(libvirt_utils.get_instance_path(owner), exist_ok=True)
    file = disk["name"].split(".")[0] in ("kernel", "ramdisk")
    made = backend(side).by_name(owner, disk["name"], "raw" if file else disk["kind"])
    if "image" in disk:
        made.cache(
            fetch_func=libvirt_utils.fetch_raw_image if file else libvirt_utils.fetch_image,
            context=ctxt,
            filename=imagecache.get_cache_fname(disk["image"]),
            image_id=disk["image"],
            **({} if file else {"size": disk["size_gb"] * GIB, "trusted_certs": None}),
        )
    elif "swap" in disk:
        made.cache(
            fetch_func=driver.LibvirtDriver._create_swap,
            context=ctxt,
            filename=f"swap_{disk['swap']}",
            size=disk["swap"] * MIB,
            swap_mb=disk["swap"],
            safe=True,
        )
    else:
        _ephemeral(made, ctxt, owner, disk)
    return made.path, made.driver_format


def _ephemeral(made, ctxt, owner, disk):
    kind = nova.privsep.fs.get_fs_type_for_os_type(owner.os_type)
    digits = nova.privsep.fs.get_file_extension_for_os_type(kind, CONF.default_ephemeral_format)
    make = functools.partial(
        driver.LibvirtDriver._create_ephemeral,
        fs_label=f"ephemeral{disk['name'][-1]}",
        os_type=owner.os_type,
        is_block_dev=False,
        vm_mode=None,
    )
    made.cache(
        fetch_func=make,
        context=ctxt,
        filename=f"ephemeral_{disk['ephemeral']}_{digits}",
        size=disk["ephemeral"] * GIB,
        ephemeral_size=disk["ephemeral"],
        safe=True,
        **({"specified_fs": disk["fs"]} if disk.get("fs") else {}),
    )
