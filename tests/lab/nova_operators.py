# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: options that change under disks that exist, and what operators meet."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess

from nova import exception, objects
from nova.compute import vm_states
from nova.virt.libvirt import driver
from nova.virt.libvirt import utils as libvirt_utils

import imagecache_lib as ic
from imagecache_lib.testing.bad_server import Answer
from tests.lab.nova_files import (
    GIB,
    KERNEL,
    MIB,
    OTHER,
    ROOT,
    FilesCase,
    content,
    image_info,
    output,
    raw_disk,
)

GONE = "6d1a3a0e-0000-4000-8000-0000000000ff"


class Operators(FilesCase):
    def setUp(self):
        super().setUp()
        self.stub_out("nova.objects.BlockDeviceMappingList.bdms_by_instance_uuid", lambda *_arguments: {})

    def other_instance(self, number=1, image=ROOT, **more):
        return self.instance(image, uuid=f"6d1a3a0e-1111-4000-8000-00000000000{number}", **more)

    def update(self, *instances):
        self.driver.image_cache_manager.update(self.context, objects.InstanceList(objects=list(instances)))

    def qcow2(self, *options, seed=2):
        raw, made = self.directory / "raw", self.directory / "image.qcow2"
        raw.write_bytes(raw_disk(seed))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, made], check=True)
        return made.read_bytes()

    def hard_reboot(self, instance, *names, **more):
        """Make sure of the bases of disks, as a hard reboot does of those in the guest's XML."""
        made = pathlib.Path(libvirt_utils.get_instance_path(instance))
        disks = []
        for name in names:
            found = image_info(made / name)
            disks.append(
                {
                    "path": str(made / name),
                    "type": found["format"],
                    "virt_disk_size": found["virtual-size"],
                    "backing_file": os.path.basename(found.get("full-backing-filename", "")),
                }
            )
        self.driver._create_images_and_backing(self.context, instance, str(made), disks, **more)

    def glance_answers(self, answer):
        right = self.glance.answer
        self.glance.answer = lambda seen: answer(seen) or right(seen)
        return right

    # -- images ----------------------------------------------------------------------------------------

    def test_an_image_whose_minimum_and_name_change_is_not_fetched_again(self):
        self.create(self.instance())
        self.glance.add(
            ROOT, raw_disk(), min_disk=1, min_ram=64, name="another", updated_at="2026-11-26T00:00:00Z"
        )
        made = self.create(self.other_instance())
        self.assertEqual((raw_disk(), 1), (content(made / "disk"), self.downloads()))

    def test_what_exists_needs_no_glance(self):
        instance = self.instance(ephemeral_gb=1, swap=8, kernel_id=KERNEL)
        made = self.create(instance)
        before = {path.name: path.read_bytes() for path in made.iterdir()}
        self.glance_answers(lambda seen: Answer(status=503))
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.create(instance)
        self.assertEqual(before, {path.name: path.read_bytes() for path in made.iterdir()})

    def test_a_deactivated_image_serves_from_the_cache(self):
        instance = self.instance()
        self.create(instance)
        self.glance.add(ROOT, raw_disk(), status="deactivated")
        self.glance_answers(lambda seen: Answer(status=403) if seen.path.endswith(f"{ROOT}/file") else None)
        self.hard_reboot(instance, "disk")
        made = self.create(self.other_instance())
        self.assertEqual(raw_disk(), content(made / "disk"))

    def test_a_lost_base_of_an_image_that_is_gone_fails_the_reboot_and_touches_no_disk(self):
        instance = self.instance()
        made = self.create(instance)
        before = (made / "disk").read_bytes()
        self.base().unlink()
        self.glance_answers(lambda seen: Answer(status=404) if ROOT in seen.path else None)
        self.assertRaises(exception.ImageNotFound, self.reboot_lost, instance)
        self.assertEqual(before, (made / "disk").read_bytes())
        self.assert_nothing_in_flight()

    def reboot_lost(self, instance, **more):
        made = pathlib.Path(libvirt_utils.get_instance_path(instance))
        info = {
            "path": str(made / "disk"),
            "type": "qcow2",
            "virt_disk_size": GIB,
            "backing_file": self.base(instance.image_ref).name,
        }
        self.driver._create_images_and_backing(self.context, instance, str(made), [info], **more)

    def test_a_rescue_image_may_be_larger_than_the_flavor(self):
        instance = self.instance()
        self.create(instance)
        large = self.directory / "large.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", large, "2G"], check=True)
        self.glance.add(OTHER, large.read_bytes(), disk_format="qcow2")
        images = {"image_id": OTHER, "kernel_id": None, "ramdisk_id": None}
        made = self.create(instance, suffix=".rescue", images=images)
        self.assertEqual(2 * GIB, image_info(made / "disk.rescue")["virtual-size"])
        self.assertEqual(GIB, image_info(made / "disk")["virtual-size"])

    # -- instances -------------------------------------------------------------------------------------

    def test_a_rebuild_uses_the_other_image_and_the_old_base_goes(self):
        instance = self.instance()
        shutil.rmtree(self.create(instance))
        instance.image_ref = OTHER
        instance.system_metadata["image_base_image_ref"] = OTHER
        made = self.create(instance)
        self.grow_old()
        self.update(instance)
        self.assertEqual([False, True], [self.base(each).exists() for each in (ROOT, OTHER)])
        self.assertEqual(raw_disk(2), content(made / "disk"))

    def test_an_old_base_that_is_evicted_during_a_rebuild_is_not_missed(self):
        instance = self.instance()
        shutil.rmtree(self.create(instance))
        self.grow_old()
        self.update()
        self.assertFalse(self.base().exists())
        made = self.create(instance)
        self.assertEqual((raw_disk(), 2), (content(made / "disk"), self.downloads()))

    def test_an_instance_in_error_without_a_directory_keeps_its_image_and_no_other(self):
        for image in (ROOT, OTHER):
            self.driver.cache_image(self.context, image)
        self.grow_old()
        self.update(self.instance(vm_state=vm_states.ERROR))
        self.assertEqual([True, False], [self.base(each).exists() for each in (ROOT, OTHER)])

    def test_an_instance_that_boots_from_a_volume_keeps_no_image(self):
        self.driver.cache_image(self.context, ROOT)
        self.grow_old()
        self.update(self.instance(image=""))
        self.assertFalse(self.base().exists())

    def test_a_larger_flavor_grows_an_ephemeral_disk_and_keeps_what_it_holds(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        path = made / "disk.local"
        output("qemu-io", "-f", "qcow2", "-c", "write -P 7 512M 1M", path)
        (made / "disk.swap").unlink()
        instance.flavor.ephemeral_gb, instance.flavor.swap = 2, 16
        self.create(instance, ignore_bdi_for_swap=True)
        self.assertEqual(2 * GIB, image_info(path)["virtual-size"])
        self.assertEqual(16 * MIB, image_info(made / "disk.swap")["virtual-size"])
        self.assertNotIn("fail", output("qemu-io", "-f", "qcow2", "-c", "read -P 7 512M 1M", path))

    def test_a_swap_disk_of_the_old_flavor_stays_as_it_is(self):
        instance = self.instance(swap=8)
        made = self.create(instance)
        for size in (4, 16):
            instance.flavor.swap = size
            self.create(instance)
            self.hard_reboot(instance, "disk", "disk.swap")
        found = image_info(made / "disk.swap")
        self.assertIn(found["virtual-size"], (8 * MIB, 16 * MIB))
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", made / "disk.swap"], check=True)

    def test_an_instance_is_unshelved_where_neither_image_was(self):
        instance = self.instance(OTHER, vm_state=vm_states.SHELVED_OFFLOADED, ephemeral_gb=1, swap=8)
        instance.system_metadata["image_base_image_ref"] = ROOT
        made = self.create(instance)
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        # Nothing needs the snapshot any more, which Nova deletes; the pass removes its base.
        instance.image_ref, instance.vm_state = ROOT, vm_states.ACTIVE
        self.glance_answers(lambda seen: Answer(status=404) if OTHER in seen.path else None)
        self.grow_old()
        self.update(instance)
        self.assertEqual([True, False], [self.base(each).exists() for each in (ROOT, OTHER)])
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.assertEqual(raw_disk(2), content(made / "disk"))

    def test_a_snapshot_that_is_being_made_keeps_its_base(self):
        made = self.create(self.instance())
        directory = self.instances / "snapshots/tmpabc"
        directory.mkdir(parents=True)
        overlay = directory / "snapshot"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base(), overlay]
        subprocess.run(command, check=True)
        shutil.rmtree(made)
        self.grow_old()
        self.update()
        self.assertTrue(self.base().exists())

    # -- options ---------------------------------------------------------------------------------------

    def test_overlays_go_on_where_new_disks_are_raw(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        before = {path.name: content(path) for path in made.glob("disk*") if path.suffix != ".info"}
        self.flags(images_type="raw", group="libvirt")
        self.create(instance)
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        for name, held in before.items():
            self.assertEqual("qcow2", self.opened_as(instance, name), name)
            self.assertEqual(held, content(made / name), name)
        instance.flavor.root_gb = 2
        self.create(instance)
        self.assertEqual(2 * GIB, image_info(made / "disk")["virtual-size"])
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        self.grow_old()
        self.update(instance)
        self.assertTrue(self.base().exists())

    def test_a_lost_base_of_an_overlay_is_brought_back_where_new_disks_are_raw(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        before = {name: content(made / name) for name in ("disk", "disk.local", "disk.swap")}
        infos = [
            {
                "path": str(made / name),
                "type": "qcow2",
                "virt_disk_size": image_info(made / name)["virtual-size"],
                "backing_file": os.path.basename(image_info(made / name)["full-backing-filename"]),
            }
            for name in before
        ]
        for path in list(self.bases.iterdir()):
            if path.is_file():
                path.unlink()
        self.flags(images_type="raw", group="libvirt")
        self.driver._create_images_and_backing(self.context, instance, str(made), infos)
        self.assertEqual(before, {name: content(made / name) for name in before})

    def test_raw_disks_go_on_where_new_disks_are_overlays(self):
        """A disk is opened in the format that it was made in, whatever its guest wrote into it."""
        self.flags(images_type="raw", group="libvirt")
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        names = ("disk", "disk.local", "disk.swap")
        self.flags(images_type="qcow2", group="libvirt")
        self.create(instance)
        self.hard_reboot(instance, *names)
        self.assertEqual(["raw"] * 3, [self.opened_as(instance, name) for name in names])
        self.assertEqual(raw_disk(), content(made / "disk", "raw"))
        # A header that a guest writes into its disk changes nothing, whoever made the disk.
        hostile = self.directory / "hostile"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.base(), hostile]
        subprocess.run(command, check=True)
        for name in names:
            with open(made / name, "r+b") as disk:
                disk.write(hostile.read_bytes()[:65536])
        os.removexattr(made / "disk", "user.imagecache.format")  # as Nova makes them
        self.assertEqual(["raw"] * 3, [self.opened_as(instance, name) for name in names])
        self.assertEqual("raw", self.driver.image_backend.by_name(instance, "disk").get_model(None).format)
        pinned = (made / "disk.info").read_bytes()
        (made / "disk.info").unlink()
        self.assertEqual("raw", self.opened_as(instance, "disk.swap"))
        (made / "disk.info").write_bytes(pinned)
        instance.flavor.root_gb = 2
        self.create(instance)
        self.assertEqual(2 * GIB, (made / "disk").stat().st_size)

    def opened_as(self, instance, name):
        """Return the format in which QEMU is told to open a disk."""
        mapping = {"bus": "virtio", "dev": "vda", "type": "disk"}
        disk = self.driver.image_backend.by_name(instance, name, disk_info_mapping=mapping)
        return disk.libvirt_info("none", {}, None).driver_format

    def test_a_raw_disk_that_moves_to_a_host_with_overlays_becomes_one(self):
        for kind in ("qcow2", "raw"):
            self.flags(images_type="raw", group="libvirt")
            instance = self.other_instance(len(kind))
            made = self.create(instance)
            os.removexattr(made / "disk", "user.imagecache.format")  # a copy by ssh has none
            self.flags(images_type=kind, group="libvirt")
            self.create(instance)
            self.driver._disk_raw_to_qcow2(str(made / "disk"))
            self.assertEqual("qcow2", json.loads((made / "disk.info").read_text())[str(made / "disk")])
            self.assertEqual("qcow2", self.opened_as(instance, "disk"))
            self.assertEqual(raw_disk(), content(made / "disk"))
            instance.flavor.root_gb = 2
            self.create(instance)
            self.assertEqual(2 * GIB, image_info(made / "disk")["virtual-size"])

    def test_a_disk_that_novas_driver_made_qcow2_is_opened_as_that(self):
        self.flags(images_type="raw", group="libvirt")
        instance = self.instance()
        made = self.create(instance)
        driver.LibvirtDriver._disk_raw_to_qcow2(str(made / "disk"))
        self.flags(images_type="qcow2", group="libvirt")
        self.create(instance)
        self.assertEqual("qcow2", self.opened_as(instance, "disk"))
        instance.flavor.root_gb = 2
        self.create(instance)
        self.assertEqual(2 * GIB, image_info(made / "disk")["virtual-size"])

    def test_a_base_of_the_other_kind_serves_when_images_are_forced_raw_no_more(self):
        self.glance.add(OTHER, self.qcow2(), disk_format="qcow2")
        instance = self.instance(OTHER)
        first = self.create(instance)
        self.flags(force_raw_images=False)
        second = self.create(self.other_instance(1, OTHER))
        self.hard_reboot(instance, "disk")
        self.flags(force_raw_images=True)
        third = self.create(self.other_instance(2, OTHER))
        for made in (first, second, third):
            self.assertEqual("raw", image_info(made / "disk")["backing-filename-format"])
            self.assertEqual(raw_disk(2), content(made / "disk"))
        self.assertEqual(1, self.downloads(OTHER))

    def test_guests_on_a_base_that_is_kept_as_it_came_outlive_that_images_are_forced_raw(self):
        self.flags(force_raw_images=False)
        self.glance.add(OTHER, self.qcow2(), disk_format="qcow2")
        instance = self.instance(OTHER)
        first = self.create(instance)
        self.flags(force_raw_images=True)
        self.hard_reboot(instance, "disk")
        self.create(instance)
        second = self.create(self.other_instance(1, OTHER))
        self.grow_old()
        self.update(instance, self.other_instance(1, OTHER))
        for made in (first, second):
            self.assertEqual(raw_disk(2), content(made / "disk"))
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", made / "disk"], check=True)
        self.base(OTHER).unlink()
        self.reboot_lost(instance)
        self.assertEqual(raw_disk(2), content(first / "disk"))

    def test_instances_lie_behind_a_symlink(self):
        behind, link = self.directory / "disk1", self.directory / "link"
        behind.mkdir()
        link.symlink_to(behind)
        self.instances, self.bases = link, link / "_base"
        self.flags(instances_path=str(link))
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        self.driver.cache_image(self.context, OTHER)
        self.assertEqual(
            str(link / "_base" / self.base().name), image_info(made / "disk")["full-backing-filename"]
        )
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.grow_old()
        self.update()
        self.assertEqual([True, False], [self.base(each).exists() for each in (ROOT, OTHER)])
        # The directory is named by what the link leads to from now on.
        self.instances, self.bases = behind, behind / "_base"
        self.flags(instances_path=str(behind))
        self.create(instance)
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.grow_old()
        self.update()
        self.assertTrue(self.base().exists())
        self.assertEqual(raw_disk(), content(made / "disk"))

    def test_a_path_that_ends_in_a_slash_is_the_same_directory(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        before = (made / "disk").read_bytes()
        self.flags(instances_path=f"{self.instances}/")
        self.create(instance)
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.create(self.other_instance(ephemeral_gb=1, swap=8))
        self.grow_old()
        self.update()
        self.assertEqual((before, 1), ((made / "disk").read_bytes(), self.downloads()))
        self.assertTrue(self.base().exists())
        self.flags(disk_roots=[str(self.instances)], group="image_cache")
        self.update()

    def test_a_filesystem_of_another_kind_is_configured_under_ephemeral_disks(self):
        instance = self.instance(ephemeral_gb=1)
        made = self.create(instance)
        before = (made / "disk.local").read_bytes()
        self.flags(default_ephemeral_format="vfat")
        self.create(instance)
        self.hard_reboot(instance, "disk.local")
        self.assertEqual(before, (made / "disk.local").read_bytes())

    def test_drivers_in_one_process_have_a_cache_each(self):
        first = self.driver
        self.flags(subdirectory_name="_others", group="image_cache")
        self.assertIsNot(first, self.driver)
        for driver_, image in ((first, ROOT), (self.driver, OTHER)):
            self.assertTrue(driver_.cache_image(self.context, image))
        others = self.instances / "_others"
        self.assertEqual([True, False], [self.base(each).exists() for each in (ROOT, OTHER)])
        self.assertEqual([False, True], [(others / self.base(each).name).exists() for each in (ROOT, OTHER)])
        first.cleanup_host("here")
        self.assertTrue(self.driver.cache_image(self.context, ROOT))

    def test_minimum_ages_of_zero_and_of_years(self):
        self.driver.cache_image(self.context, ROOT)
        self.flags(remove_unused_original_minimum_age_seconds=10**10, group="image_cache")
        self.grow_old()
        self.update()
        self.assertTrue(self.base().exists())
        self.flags(remove_unused_original_minimum_age_seconds=0, group="image_cache")
        self.update()
        self.assertFalse(self.base().exists())
        name = "remove_unused_original_minimum_age_seconds"
        error = self.assertRaises(ic.ConfigError, self.flags, **{name: -1}, group="image_cache")
        self.assertIn(name, str(error))

    def test_a_pass_that_is_turned_off_or_as_frequent_as_can_be_is_no_error(self):
        for interval in (-1, 0, 1):
            self.flags(manager_interval=interval, group="image_cache")
            self.create(self.other_instance(interval + 2))
        self.assertEqual(1, self.downloads())

    def test_space_is_allocated_ahead_for_disks_that_exist(self):
        instance = self.instance(swap=8)
        made = self.create(instance)
        before = content(made / "disk")
        self.flags(preallocate_images="space")
        self.create(instance)
        self.assertEqual(before, content(made / "disk"))
        self.assertEqual("native", self.driver.image_backend.by_name(instance, "disk").driver_io)

    def test_cache_modes_change_no_disk(self):
        instance = self.instance()
        made = self.create(instance)
        before = (made / "disk").read_bytes()
        self.flags(disk_cachemodes=["file=writeback"], group="libvirt")
        self.create(instance)
        self.assertEqual(before, (made / "disk").read_bytes())

    def test_encrypted_ephemeral_disks_are_refused_as_nova_does(self):
        self.flags(enabled=True, group="ephemeral_storage_encryption")
        self.assertRaises(exception.NovaException, self.create, self.instance())
        self.assertFalse(self.base().exists())
        self.assertFalse(self.driver.capabilities["supports_ephemeral_encryption"])

    def test_flat_is_another_word_for_raw(self):
        self.flags(images_type="flat", group="libvirt")
        made = self.create(self.instance(swap=8))
        self.assertEqual(
            ["raw", "raw"], [image_info(made / name)["format"] for name in ("disk", "disk.swap")]
        )
        self.assertEqual("raw", json.loads((made / "disk.info").read_text())[str(made / "disk")])

    def test_a_config_drive_is_no_reference_whatever_it_says(self):
        instance = self.instance()
        made = self.create(instance)
        (made / "disk.config").write_bytes(
            b"user data that names " + str(self.base(OTHER)).encode() + bytes(MIB)
        )
        self.driver.cache_image(self.context, OTHER)
        self.grow_old()
        self.update(instance)
        self.assertEqual([True, False], [self.base(each).exists() for each in (ROOT, OTHER)])

    def test_resized_and_deleted_directories_keep_their_bases(self):
        for number, suffix in enumerate(("_resize", "_del")):
            image = (ROOT, OTHER)[number]
            instance = self.other_instance(number, image)
            made = self.create(instance)
            made.rename(f"{made}{suffix}")
        self.grow_old()
        self.update()
        self.assertEqual([True, True], [self.base(each).exists() for each in (ROOT, OTHER)])

    def test_a_cold_migration_that_is_reverted_finds_its_disks(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        made.rename(f"{made}_resize")
        shutil.copytree(f"{made}_resize", made)
        instance.flavor.root_gb = 2
        self.create(instance)
        shutil.rmtree(made)
        pathlib.Path(f"{made}_resize").rename(made)
        instance.flavor.root_gb = 1
        self.create(instance)
        self.hard_reboot(instance, "disk", "disk.local", "disk.swap")
        self.assertEqual(GIB, image_info(made / "disk")["virtual-size"])

    def test_kernels_serve_as_kernels_whatever_else_their_image_serves_as(self):
        """An image that is a kernel for one and a disk for another."""
        self.create(self.instance(OTHER))
        made = self.create(self.other_instance(1, kernel_id=OTHER))
        self.assertEqual(raw_disk(2), (made / "kernel").read_bytes())
        disk = self.create(self.other_instance(2, OTHER))
        self.assertEqual(raw_disk(2), content(disk / "disk"))

    def test_a_truncated_kernel_is_told_from_a_whole_one(self):
        instance = self.instance(kernel_id=KERNEL)
        made = self.create(instance)
        (made / "kernel").write_bytes(b"")
        self.assertRaises(exception.NovaException, self.create, instance)
