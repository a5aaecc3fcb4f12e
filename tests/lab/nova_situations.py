# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: what operators set, and what befalls instances, beyond a plain spawn."""

from __future__ import annotations

import json
import pathlib
import subprocess
import threading

import nova.privsep.fs
from nova import context, exception, objects
from nova.compute import vm_states
from nova.virt.libvirt import utils as libvirt_utils

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


class Situations(FilesCase):
    def setUp(self):
        super().setUp()
        self.stub_out("nova.objects.BlockDeviceMappingList.bdms_by_instance_uuid", lambda *_arguments: {})

    def qcow2(self, *options):
        """Return a qcow2 image with the data of raw_disk(2)."""
        raw, made = self.directory / "raw", self.directory / "image.qcow2"
        raw.write_bytes(raw_disk(2))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, made], check=True)
        return made.read_bytes()

    def test_space_is_allocated_ahead_where_that_is_configured(self):
        self.flags(preallocate_images="space")
        for number, kind in enumerate(("qcow2", "raw")):
            self.flags(images_type=kind, group="libvirt")
            made = self.create(self.instance(uuid=f"6d1a3a0e-1111-4000-8000-00000000000{number}", swap=8))
            self.assertGreaterEqual((made / "disk").stat().st_blocks * 512, GIB, kind)
            self.assertGreaterEqual((made / "disk.swap").stat().st_blocks * 512, 8 * MIB, kind)

    def test_a_flat_disk_of_an_image_that_is_kept_as_it_came_is_what_disk_info_says(self):
        self.flags(force_raw_images=False)
        self.flags(images_type="raw", group="libvirt")
        self.glance.add(OTHER, self.qcow2(), disk_format="qcow2")
        instance = self.instance(OTHER)
        for _ in range(2):
            made = self.create(instance)
            found = image_info(made / "disk")
            self.assertEqual(("qcow2", GIB), (found["format"], found["virtual-size"]))
            self.assertNotIn("full-backing-filename", found)
            self.assertEqual("qcow2", json.loads((made / "disk.info").read_text())[str(made / "disk")])
            disk = self.driver.image_backend.by_name(instance, "disk")
            self.assertEqual("qcow2", disk.driver_format)
        self.assertEqual(raw_disk(2), content(made / "disk"))

    def test_an_overlay_has_clusters_of_64_kib_whatever_its_base_has(self):
        self.flags(force_raw_images=False)
        self.glance.add(OTHER, self.qcow2("-o", "cluster_size=1M"), disk_format="qcow2")
        made = self.create(self.instance(OTHER))
        found = image_info(made / "disk")
        self.assertEqual((65536, "qcow2"), (found["cluster-size"], found["backing-filename-format"]))
        self.assertEqual(raw_disk(2), content(made / "disk"))

    def test_disks_stand_alone_where_copy_on_write_is_off(self):
        self.flags(use_cow_images=False)
        self.flags(images_type="default", group="libvirt")
        made = self.create(self.instance(ephemeral_gb=1, swap=8))
        for name in ("disk", "disk.local", "disk.swap"):
            self.assertEqual("raw", image_info(made / name)["format"])
        self.assertEqual(raw_disk(), content(made / "disk", "raw"))

    def test_a_flavor_without_a_root_size_gets_the_images_size(self):
        made = self.create(self.instance(root_gb=0))
        self.assertEqual(8 * MIB, image_info(made / "disk")["virtual-size"])

    def test_guests_outlive_a_change_of_the_caches_directory(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        before = {path.name: content(path) for path in made.glob("disk*") if path.suffix != ".info"}
        self.flags(subdirectory_name="_elsewhere", group="image_cache")
        self.create(instance)
        self.driver.image_cache_manager.update(self.context, objects.InstanceList(objects=[instance]))
        self.assertEqual(
            before,
            {path.name: content(path) for path in made.glob("disk*") if path.suffix != ".info"},
        )
        self.create(self.instance(uuid="6d1a3a0e-1111-4000-8000-000000000001"))
        self.assertTrue((self.instances / "_elsewhere" / self.base().name).exists())

    def test_what_glance_lost_comes_from_the_directory_that_the_other_host_has_it_in(self):
        """Where the directory's name has the host's address in it, as in ``_base_$my_ip``."""
        self.flags(subdirectory_name="_base_theirs", group="image_cache")
        instance = self.instance()
        made = self.create(instance)
        theirs = self.directory / "theirs"
        (self.instances / "_base_theirs").rename(theirs)
        right = self.glance.answer
        self.glance.answer = lambda seen: Answer(status=404) if ROOT in seen.path else right(seen)
        self.stand_in_for_ssh(theirs, "*/_base_theirs/*")
        self.flags(subdirectory_name="_base_ours", group="image_cache")
        self.create(instance, fallback_from_host="elsewhere")
        self.assertEqual(raw_disk(), content(made / "disk"))

    def test_guests_of_windows_and_of_nothing_in_particular_get_their_filesystems(self):
        for number, (os_type, filesystem) in enumerate((("windows", "ntfs"), (None, "vfat"))):
            uuid = f"6d1a3a0e-1111-4000-8000-00000000000{number}"
            made = self.create(self.instance(ephemeral_gb=1 + number, os_type=os_type, uuid=uuid))
            flat = self.directory / f"flat{number}"
            subprocess.run(
                ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", made / "disk.local", flat], check=True
            )
            self.assertIn(f"TYPE={filesystem}", output("blkid", "-o", "export", flat))

    def test_an_ephemeral_disk_moves_to_a_host_without_its_base_whatever_type_its_guest_has(self):
        for number, os_type in enumerate(("linux", None, "other")):
            uuid = f"6d1a3a0e-1111-4000-8000-00000000000{number}"
            instance = self.instance(uuid=uuid, ephemeral_gb=1, os_type=os_type)
            made = self.create(instance)
            before = content(made / "disk.local")
            for path in self.bases.glob("ephemeral_*"):
                path.unlink()
            self.create(instance)
            self.assertEqual(before, content(made / "disk.local"))

    def test_a_command_of_the_operators_makes_the_filesystem(self):
        command = "mkfs.ext3 -L %(fs_label)s -F %(target)s"
        self.flags(virt_mkfs=[f"linux={command}"])
        nova.privsep.fs.load_mkfs_command("linux", command)
        self.addCleanup(nova.privsep.fs._MKFS_COMMAND.clear)
        made = self.create(self.instance(ephemeral_gb=1))
        # Nothing tells whether the command makes the same twice, so that the disk stands alone.
        self.assertNotIn("full-backing-filename", image_info(made / "disk.local"))
        flat = self.directory / "flat"
        subprocess.run(["qemu-img", "convert", "-O", "raw", made / "disk.local", flat], check=True)
        self.assertIn("TYPE=ext3", output("blkid", "-o", "export", flat))

    def test_an_unshelve_that_is_interrupted_is_done_again(self):
        rebase = self.driver._rebase_with_qemu_img
        for number, original in enumerate((ROOT, "6d1a3a0e-0000-4000-8000-0000000000ff")):
            uuid = f"6d1a3a0e-1111-4000-8000-00000000000{number}"
            instance = self.instance(OTHER, vm_state=vm_states.SHELVED_OFFLOADED, uuid=uuid)
            instance.system_metadata["image_base_image_ref"] = original
            self.interrupt(instance, rebase)
            made = self.create(instance)
            base = str(self.base()) if original == ROOT else None
            self.assertEqual(base, image_info(made / "disk").get("full-backing-filename"))
            self.assertEqual(raw_disk(2), content(made / "disk"))

    def interrupt(self, instance, rebase):
        """Have a spawn end before and after the disk is put back onto its own image."""
        for when in ("before", "after"):

            def interrupted(*arguments, when=when):
                if when == "after":
                    rebase(*arguments)
                raise exception.InternalError("the host is rebooted")

            self.driver._rebase_with_qemu_img = interrupted
            self.assertRaises(exception.InternalError, self.create, instance)
            self.assertEqual([], list((self.bases / ".imagecache/pins").rglob("*.json")))
        self.driver._rebase_with_qemu_img = rebase

    def test_a_guest_that_is_rescued_keeps_the_base_of_its_rescue_disk(self):
        instance = self.instance()
        self.create(instance)
        images = {"image_id": OTHER, "kernel_id": None, "ramdisk_id": None}
        made = self.create(instance, suffix=".rescue", images=images)
        self.grow_old()
        self.driver.image_cache_manager.update(self.context, objects.InstanceList(objects=[instance]))
        self.assertTrue(self.base(OTHER).exists())
        (made / "disk.rescue").unlink()
        self.grow_old()
        self.driver.image_cache_manager.update(self.context, objects.InstanceList(objects=[instance]))
        self.assertFalse(self.base(OTHER).exists())
        self.assertTrue(self.base().exists())

    def test_an_evacuated_instance_keeps_its_disks_on_shared_storage(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        before = {path.name: path.read_bytes() for path in made.iterdir()}
        self.flags(host="there")
        instance.host = "there"
        self.create(instance)
        self.assertEqual(before, {path.name: path.read_bytes() for path in made.iterdir()})
        self.assertEqual(1, self.downloads())

    def test_a_resize_makes_a_swap_disk_of_another_size_and_none(self):
        instance = self.instance(swap=8)
        made = self.create(instance)
        for size in (16, 0):
            (made / "disk.swap").unlink()  # it is not brought along
            instance.flavor.swap = size
            self.create(instance)
            path = made / "disk.swap"
            self.assertEqual(bool(size), path.exists())
            if size:
                self.assertEqual(size * MIB, image_info(path)["virtual-size"])
                self.assertEqual(str(self.bases / "swap_16"), image_info(path)["full-backing-filename"])

    def test_spawns_that_nova_limits_to_one_at_a_time_all_end(self):
        self.stub_out("nova.compute.utils.disk_ops_semaphore", threading.BoundedSemaphore(1))
        done = []

        def spawn(number):
            uuid = f"6d1a3a0e-1111-4000-8000-00000000000{number}"
            image = (ROOT, OTHER)[number % 2]
            self.create(self.instance(image, uuid=uuid, ephemeral_gb=1, swap=8, kernel_id=KERNEL))
            done.append(number)

        threads = [threading.Thread(target=spawn, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([0, 1, 2, 3], sorted(done))

    def test_an_image_that_is_cached_is_refused_to_a_user_whom_glance_refuses_it(self):
        self.create(self.instance())
        right = self.glance.answer

        def answer(seen):
            return right(seen) if seen.headers.get("X-Auth-Token") == "user-token" else Answer(status=403)

        self.glance.answer = answer
        self.context = context.RequestContext("other", "elsewhere", auth_token="another")
        stranger = self.instance(uuid="6d1a3a0e-1111-4000-8000-000000000001")
        self.create(stranger)  # as Nova has it
        self.flags(authorize_hits="closed", group="image_cache")
        again = self.instance(uuid="6d1a3a0e-1111-4000-8000-000000000002")
        self.assertRaises(exception.ImageNotAuthorized, self.create, again)
        self.assertEqual([], list(pathlib.Path(libvirt_utils.get_instance_path(again)).glob("disk")))
        self.create(stranger)  # whose disk is there

    def test_a_service_that_ends_cancels_what_is_in_flight_and_starts_again(self):
        started, right = threading.Event(), self.glance.answer

        def slow(seen):
            if seen.path == f"/v2/images/{ROOT}/file":
                started.set()
                return Answer(body=raw_disk(), pause=0.1, piece=4096)
            return right(seen)

        self.glance.answer = slow
        failures = []

        def spawn():
            try:
                self.create(self.instance())
            except exception.NovaException as error:
                failures.append(str(error))

        thread = threading.Thread(target=spawn)
        thread.start()
        self.assertTrue(started.wait(60))
        self.driver.cleanup_host("here")
        thread.join(60)
        self.assertIn("cancel", " ".join(failures))
        self.assert_nothing_in_flight()
        self.assertRaises(exception.InternalError, self.driver.cache_image, self.context, OTHER)
        self.driver.init_host("here")
        self.assertTrue(self.driver.cache_image(self.context, OTHER))
