# SPDX-License-Identifier: Apache-2.0
"""Nova's instances, as a driver inside Nova has them, are reported with everything they use."""

from __future__ import annotations

import types
import unittest
from typing import ClassVar

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


def mapping(**attributes: object) -> types.SimpleNamespace:
    found = {"source_type": "blank", "destination_type": "local", "guest_format": None, "volume_size": 1}
    return types.SimpleNamespace(**{**found, **attributes})


class LazyInstance:
    """As Nova's pass has them: reading what is not loaded is a call to the conductor."""

    loads: ClassVar[list[str]] = []

    def __init__(self, **loaded: object) -> None:
        self.__dict__.update(loaded)

    def obj_attr_is_set(self, name: str) -> bool:
        return name in self.__dict__

    @property
    def name(self) -> str:
        return f"instance-{self.__dict__['uuid']}"

    def __getattr__(self, name: str) -> object:
        if name in ("system_metadata", "flavor", "kernel_id", "ramdisk_id", "os_type"):
            self.loads.append(name)
            return {}
        raise AttributeError(name)


class InstanceNotFound(Exception):
    """Named as Nova's."""


class DeletedInstance(InstanceNotFound):
    """A kind of it."""


class GoneInstance:
    uuid = "gone"

    @property
    def image_ref(self) -> str:
        raise DeletedInstance


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

    def test_swap_and_ephemeral_disks_come_from_the_mappings_of_all_in_one_call(self) -> None:
        asked: list[list[str]] = []

        def bdms(uuids: list[str]) -> dict[str, list[types.SimpleNamespace]]:
            asked.append(uuids)
            return {
                "one": [
                    mapping(volume_size=512, guest_format="swap"),
                    mapping(volume_size=10),
                    mapping(volume_size=20, guest_format="xfs"),
                    mapping(volume_size=30, destination_type="volume"),
                    mapping(volume_size=40, source_type="image"),
                ]
            }

        flavor = types.SimpleNamespace(swap=1, ephemeral_gb=1)
        listed = [nova_instance(uuid=uuid, flavor=flavor, os_type="linux") for uuid in ("one", "two")]
        one, two = nova.instances(listed, bdms=bdms)
        expected = (ic.Ephemeral(10, "linux"), ic.Ephemeral(20, "linux", "xfs"))
        self.assertEqual((512, expected), (one.swap_mb, one.ephemerals))
        self.assertEqual((0, ()), (two.swap_mb, two.ephemerals))
        self.assertEqual([["one", "two"]], asked)

    def test_nothing_is_loaded_for_a_report(self) -> None:
        listed = [
            LazyInstance(uuid=f"uuid-{number}", host="here", image_ref="root") for number in range(1000)
        ]
        found = nova.instances(listed, bdms=lambda _uuids: {})
        self.assertEqual([], LazyInstance.loads)
        self.assertEqual({("root",)}, {each.images for each in found})
        self.assertEqual(1000, len(nova.instances(listed)))
        self.assertEqual([], LazyInstance.loads)

    def test_an_instance_that_was_deleted_meanwhile_is_passed_over(self) -> None:
        found = nova.instances([GoneInstance(), nova_instance(uuid="there")])
        self.assertEqual(["there"], [each.uuid for each in found])

    def test_another_failure_ends_the_report(self) -> None:
        class Unreachable:
            uuid = "uuid"

            @property
            def image_ref(self) -> str:
                raise TimeoutError

        with self.assertRaises(TimeoutError):
            nova.instances([nova_instance(), Unreachable()])

    def test_a_deleted_instance_without_host_is_nobodys(self) -> None:
        self.assertEqual("", nova.instance(nova_instance(host=None)).host)

    def test_all_are_translated(self) -> None:
        hosts = [each.host for each in nova.instances([nova_instance(), nova_instance(host="compute-2")])]
        self.assertEqual(["compute-1", "compute-2"], hosts)
