# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: one request as JSON on standard input, one answer on standard output."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings

warnings.simplefilter("ignore")
os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"

import lab_disks  # noqa: E402
import nova.conf  # noqa: E402
import nova.privsep  # noqa: E402
import nova.privsep.fs  # noqa: E402
from nova import block_device, context, objects  # noqa: E402
from nova.objects import base as nova_base  # noqa: E402
from nova.objects import block_device as block_device_objects  # noqa: E402
from nova.virt.libvirt import driver, imagebackend  # noqa: E402
from nova.virt.libvirt import utils as libvirt_utils  # noqa: E402

CONF = nova.conf.CONF
GIB = 2**30


def configure(
    instances_path, *, default_ephemeral_format=None, virt_mkfs=(), host="here", images_type="qcow2"
):
    CONF([], project="nova", default_config_files=[])
    CONF.set_override("instances_path", instances_path)
    CONF.set_override("state_path", os.path.dirname(instances_path))
    CONF.set_override("host", host)
    CONF.set_override("lock_path", os.path.join(instances_path, "locks"), "oslo_concurrency")
    CONF.set_override("images_type", images_type, "libvirt")
    CONF.set_override("default_ephemeral_format", default_ephemeral_format)
    for each in virt_mkfs:
        nova.privsep.fs.load_mkfs_command(*each.split("=", 1))
    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    objects.register_all()


def ephemeral_name(size_gb, os_type):
    kind = nova.privsep.fs.get_fs_type_for_os_type(os_type)
    digits = nova.privsep.fs.get_file_extension_for_os_type(kind, CONF.default_ephemeral_format)
    return f"ephemeral_{size_gb}_{digits}"


def names(os_types):
    return [ephemeral_name(1, os_type) for os_type in os_types]


def instance(uuid, *, os_type="linux", image_ref="", **_more):
    return objects.Instance(
        id=1,
        uuid=uuid,
        image_ref=image_ref,
        kernel_id="",
        ramdisk_id="",
        host=CONF.host,
        vm_state="active",
        task_state=None,
        os_type=os_type,
        display_name=uuid,
        hostname=uuid,
    )


def mapping(uuid, number, size, guest_format):
    return block_device.BlockDeviceDict(
        {
            "id": number,
            "instance_uuid": uuid,
            "device_name": f"/dev/vd{chr(98 + number)}",
            "source_type": "blank",
            "destination_type": "local",
            "disk_bus": "virtio",
            "device_type": "disk",
            "volume_size": size,
            "guest_format": guest_format,
            "delete_on_termination": True,
            "boot_index": -1,
        }
    )


def mappings_of(instances, ctxt):
    found = {}
    for each in instances:
        rows = [
            mapping(each["uuid"], number, gib, None) for number, gib in enumerate(each.get("ephemerals", ()))
        ]
        if each.get("swap_mb"):
            rows.append(mapping(each["uuid"], len(rows), each["swap_mb"], "swap"))
        found[each["uuid"]] = block_device_objects.block_device_make_list_from_dicts(ctxt, rows)
    return found


def run_pass(instances, side="nova"):
    """Run the periodic pass over the directory.

    :param side: whose: ``nova`` or ``adapter``.
    """
    ctxt = context.get_admin_context()
    found = mappings_of(instances, ctxt)
    objects.BlockDeviceMappingList.bdms_by_instance_uuid = classmethod(lambda *_arguments: found)
    listed = objects.InstanceList(objects=[instance(**each) for each in instances])
    lab_disks.image_cache_manager(side).update(ctxt, listed)
    return sorted(os.listdir(os.path.join(CONF.instances_path, CONF.image_cache.subdirectory_name)))


def formats(paths):
    """Return the format in which Nova's qcow2 image type lets QEMU open each disk."""
    return [imagebackend.Qcow2(path=path).driver_format for path in paths]


def make_ephemeral(uuid, number, size_gb, os_type, guest_format=None):
    """Make an ephemeral disk as Nova's driver does when it boots an instance."""
    owner = instance(uuid, os_type=os_type)
    os.makedirs(libvirt_utils.get_instance_path(owner), exist_ok=True)
    disk = imagebackend.Qcow2(instance=owner, disk_name=f"disk.eph{number}")
    make = functools.partial(
        driver.LibvirtDriver._create_ephemeral,
        fs_label=f"ephemeral{number}",
        os_type=os_type,
        is_block_dev=False,
        vm_mode=None,
    )
    disk.cache(
        fetch_func=make,
        context=context.get_admin_context(),
        filename=ephemeral_name(size_gb, os_type),
        size=size_gb * GIB,
        ephemeral_size=size_gb,
        safe=True,
        **({"specified_fs": guest_format} if guest_format else {}),
    )
    return disk.path


def use_disks(side, glance_url, token, disks):
    """Make disks, or make sure of those that are there; see :func:`lab_disks.use`."""
    ctxt = lab_disks.request_context(glance_url, token)
    return [lab_disks.use(side, ctxt, instance(**each["of"]), each) for each in disks]


def resize_disk(uuid, name, kind, size_gb):
    """Grow a disk with Nova's own image type, as a resize does."""
    lab_disks.backend("nova").by_name(instance(uuid), name, kind).resize_image(size_gb * GIB)


class Conductor:
    """What Nova's objects reach the database through: counts the calls, and knows nothing."""

    def __init__(self):
        self.calls = []

    def object_class_action_versions(self, _context, objname, objmethod, _versions, _args, _kwargs):
        self.calls.append(f"{objname}.{objmethod}")
        raise nova.exception.InstanceNotFound(instance_id="any")

    def object_action(self, _context, objinst, objmethod, _args, _kwargs):
        self.calls.append(f"{objinst.obj_name()}.{objmethod}")
        raise nova.exception.InstanceNotFound(instance_id=objinst.uuid)


def report(instances):
    """Translate instances as Nova loads them. Returns what was translated, and the calls it took."""
    from imagecache_lib import nova as translate

    nova_base.NovaObject.indirection_api = conductor = Conductor()
    ctxt = context.get_admin_context()
    listed = []
    for each in instances:
        listed.append(instance(**each))
        listed[-1]._context = ctxt
    queries = []

    def bdms(uuids):
        queries.append(uuids)
        return mappings_of(instances, ctxt)

    found = translate.instances(objects.InstanceList(objects=listed), bdms=bdms)
    return {
        "instances": [
            [each.uuid, each.host, list(each.images), each.swap_mb, [one.size_gb for one in each.ephemerals]]
            for each in found
        ],
        "calls": conductor.calls,
        "queries": len(queries),
    }


def main():
    logging.disable(logging.WARNING)
    asked = json.load(sys.stdin)
    configure(**asked["configuration"])
    actions = (names, run_pass, formats, make_ephemeral, report, use_disks, resize_disk)
    action = {each.__name__: each for each in actions}[asked["action"]]
    json.dump(action(**asked["arguments"]), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # Nova's privilege-separation threads do not end by themselves


if __name__ == "__main__":
    main()
