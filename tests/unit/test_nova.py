# SPDX-License-Identifier: Apache-2.0
"""Nova's instances, as a driver inside Nova has them, are reported with everything they use."""

from __future__ import annotations

import types
import unittest

import imagecache_lib as ic
from imagecache_lib import nova


def nova_instance(**attributes: object) -> types.SimpleNamespace:
    found = {
        "uuid": "6b1d0f3e-0000-4000-8000-000000000001",
        "name": "instance-00000001",
        "host": "compute-1",
        "image_ref": "root",
        "kernel_id": "",
        "ramdisk_id": "",
        "system_metadata": {},
        "flavor": types.SimpleNamespace(swap=0, ephemeral_gb=0),
    }
    return types.SimpleNamespace(**{**found, **attributes})


class NovaTest(unittest.TestCase):
    def test_root_kernel_and_ramdisk_are_used_images(self) -> None:
        found = nova.instance(nova_instance(kernel_id="kernel", ramdisk_id="ramdisk"))
        self.assertEqual(("root", "kernel", "ramdisk"), found.images)

    def test_an_instance_booted_from_a_snapshot_keeps_the_image_below_it(self) -> None:
        found = nova.instance(nova_instance(system_metadata={"image_base_image_ref": "below"}))
        self.assertEqual(("root", "below"), found.images)

    def test_an_instance_booted_from_a_volume_has_no_image(self) -> None:
        self.assertEqual((), nova.instance(nova_instance(image_ref="")).images)

    def test_its_directory_may_have_its_name(self) -> None:
        self.assertEqual(("instance-00000001",), nova.instance(nova_instance()).directories)

    def test_swap_and_ephemeral_disks_come_from_the_flavor(self) -> None:
        flavor = types.SimpleNamespace(swap=512, ephemeral_gb=10)
        found = nova.instance(nova_instance(flavor=flavor))
        self.assertEqual((512, (ic.Ephemeral(10),)), (found.swap_mb, found.ephemerals))

    def test_a_deleted_instance_without_host_is_nobodys(self) -> None:
        self.assertEqual("", nova.instance(nova_instance(host=None)).host)

    def test_all_are_translated(self) -> None:
        hosts = [each.host for each in nova.instances([nova_instance(), nova_instance(host="compute-2")])]
        self.assertEqual(["compute-1", "compute-2"], hosts)
