# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: the adapter's driver, loaded as Nova loads it, over real files.

Many of Nova's own tests replace whatever touches a file. These state the same behaviours and replace nothing
but libvirt's module, with Nova's stand-in for it. Images come over HTTP, disks are made by the driver's
methods, and what lies on the filesystem in the end is looked at.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import threading
import time

import nova.conf
from nova import context, exception, objects, test
from nova.compute import vm_states
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit import fake_instance
from nova.virt import driver as virt_driver
from nova.virt import fake
from nova.virt.libvirt import blockinfo, imagecache
from nova.virt.libvirt import utils as libvirt_utils

from tests.support.servers import GlanceServer

CONF = nova.conf.CONF
MIB, GIB, DAY = 2**20, 2**30, 86400
ROOT, KERNEL, RAMDISK, OTHER = (f"6d1a3a0e-0000-4000-8000-00000000000{each}" for each in range(4))


def raw_disk(seed=1, size=8 * MIB):
    """Return a disk with a partition table and some data."""
    data = bytearray(size)
    data[MIB : 2 * MIB] = bytes([seed]) * MIB
    data[446:462] = (
        bytes([0x80, 1, 1, 0, 0x83, 1, 1, 0]) + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    )
    data[510:512] = b"\x55\xaa"
    return bytes(data)


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def image_info(path):
    return json.loads(output("qemu-img", "info", "-U", "--output=json", path))


def content(path, format="qcow2", length=8 * MIB):
    """Return what a guest reads at the start of a disk, where the images of the tests are."""
    with tempfile.TemporaryDirectory() as directory:
        flat = pathlib.Path(directory) / "flat"
        subprocess.run(["qemu-img", "convert", "-U", "-f", format, "-O", "raw", path, flat], check=True)
        with flat.open("rb") as file:
            return file.read(length)


class FilesCase(test.NoDBTestCase):
    images_type = "qcow2"

    def setUp(self):
        super().setUp()
        self.useFixture(fakelibvirt.LibvirtFixture())
        directory = tempfile.TemporaryDirectory(prefix="imagecache-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.instances = self.directory / "instances"
        self.instances.mkdir()
        self.bases = self.instances / "_base"
        self.glance = GlanceServer()
        self.glance.__enter__()
        self.addCleanup(self.glance.__exit__, None, None, None)
        self.flags(instances_path=str(self.instances), state_path=str(self.directory), host="here")
        self.flags(compute_driver="imagecachelib.LibvirtDriver")
        self.flags(images_type=self.images_type, virt_type="qemu", group="libvirt")
        self.flags(api_servers=[self.glance.url], num_retries=0, group="glance")
        self.configure()
        self.glance.add(ROOT, raw_disk())
        self.glance.add(KERNEL, b"kernel" * 1000, disk_format="aki", container_format="aki")
        self.glance.add(RAMDISK, b"ramdisk" * 1000, disk_format="ari", container_format="ari")
        self.glance.add(OTHER, raw_disk(2))
        self.driver = self.load()
        self.context = context.RequestContext("user", "project", auth_token="user-token")

    def configure(self):
        """Set what a test case wants beside the options above."""

    def flags(self, **options):
        """Set options, which the service reads when it starts."""
        super().flags(**options)
        if hasattr(self, "driver"):
            self.driver = self.load()

    def load(self):
        return virt_driver.load_compute_driver(fake.FakeVirtAPI())

    def instance(self, image=ROOT, *, root_gb=1, ephemeral_gb=0, swap=0, **more):
        flavor = objects.Flavor(
            id=1,
            name="f",
            memory_mb=128,
            vcpus=1,
            root_gb=root_gb,
            ephemeral_gb=ephemeral_gb,
            swap=swap,
            flavorid="1",
            extra_specs={},
        )
        values = {
            "image_ref": image,
            "kernel_id": "",
            "ramdisk_id": "",
            "os_type": "linux",
            "ephemeral_gb": ephemeral_gb,
            "host": "here",
            "system_metadata": {"image_base_image_ref": image},
            "expected_attrs": ["system_metadata"],
            **more,
        }
        made = fake_instance.fake_instance_obj(self.context, flavor=flavor, **values)
        made.trusted_certs = None
        made.image_ref = image
        return made

    def create(self, instance, *, ephemerals=(), suffix="", images=None, **more):
        """Make an instance's disks as a spawn does. Returns its directory."""
        mappings = [
            {
                "device_name": f"/dev/vd{chr(98 + number)}",
                "size": size,
                "guest_format": guest_format,
                "device_type": "disk",
                "disk_bus": "virtio",
            }
            for number, (size, guest_format) in enumerate(ephemerals)
        ]
        devices = {"ephemerals": mappings, "block_device_mapping": [], "swap": None, "root_device_name": None}
        meta = objects.ImageMeta.from_dict({"disk_format": "raw"})
        devices = devices if ephemerals else None
        found = blockinfo.get_disk_info("qemu", instance, meta, devices, rescue=bool(suffix))
        self.driver._create_image(
            self.context,
            instance,
            found["mapping"],
            suffix=suffix,
            disk_images=images,
            block_device_info=devices,
            **more,
        )
        return pathlib.Path(libvirt_utils.get_instance_path(instance))

    def base(self, image=ROOT):
        return self.bases / imagecache.get_cache_fname(image)

    def downloads(self, image=ROOT):
        return sum(seen.path == f"/v2/images/{image}/file" for seen in self.glance.seen)

    def grow_old(self):
        then = time.time() - 2 * DAY
        for path in (*self.bases.iterdir(), *(self.bases / ".imagecache/records").iterdir()):
            os.utime(path, (then, then))

    def assert_nothing_in_flight(self):
        self.assertEqual([], os.listdir(self.bases / ".imagecache/stage"))
        left = [each for each in os.listdir(self.bases) if "." in each]
        self.assertEqual([".imagecache"], left)

    def stand_in_for_ssh(self, directory, paths="*"):
        """Let ``ssh ... -- HOST cat PATH`` read a file of that name in a directory.

        :param paths: a pattern of the shell's for the paths that are there.
        """
        script = self.directory / "bin/ssh"
        script.parent.mkdir()
        found = f'{paths}) exec cat "{directory}/$(basename "$each")";;'
        script.write_text(f'#!/bin/sh\nfor each; do :; done\ncase "$each" in {found} esac\nexit 1\n')
        script.chmod(0o755)
        before = os.environ["PATH"]
        self.addCleanup(os.environ.__setitem__, "PATH", before)
        os.environ["PATH"] = f"{script.parent}:{before}"


class Qcow2Disks(FilesCase):
    def test_a_spawn_makes_every_kind_of_disk(self):
        instance = self.instance(ephemeral_gb=1, swap=8, kernel_id=KERNEL, ramdisk_id=RAMDISK)
        made = self.create(instance)
        self.assertEqual(b"kernel" * 1000, (made / "kernel").read_bytes())
        self.assertEqual(b"ramdisk" * 1000, (made / "ramdisk").read_bytes())
        for name, size, base in (
            ("disk", GIB, self.base().name),
            ("disk.local", GIB, "ephemeral_1_0706d66"),
            ("disk.swap", 8 * MIB, "swap_8"),
        ):
            found = image_info(made / name)
            self.assertEqual(("qcow2", size), (found["format"], found["virtual-size"]))
            self.assertEqual(str(self.bases / base), found["full-backing-filename"])
            self.assertEqual("raw", found["backing-filename-format"])
        self.assertEqual(raw_disk(), content(made / "disk"))
        self.assertEqual("qcow2", json.loads((made / "disk.info").read_text())[str(made / "disk")])

    def test_several_ephemeral_disks_have_what_was_asked_for(self):
        made = self.create(self.instance(), ephemerals=[(1, None), (1, "ext3"), (2, None)])
        for number, size in enumerate((1, 1, 2)):
            path = made / f"disk.eph{number}"
            found = image_info(path)
            self.assertEqual(("qcow2", size * GIB), (found["format"], found["virtual-size"]))
            flat = self.directory / f"flat{number}"
            subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat], check=True)
            label = output("blkid", "-o", "export", flat)
            self.assertIn(f"LABEL=ephemeral{number}", label)
            self.assertIn("TYPE=ext3" if number == 1 else "TYPE=ext4", label)

    def test_a_second_spawn_downloads_nothing(self):
        for number in range(3):
            self.create(self.instance(uuid=f"6d1a3a0e-1111-4000-8000-00000000000{number}", kernel_id=KERNEL))
        self.assertEqual((1, 1), (self.downloads(), self.downloads(KERNEL)))

    def test_a_spawn_that_is_done_again_keeps_its_disks(self):
        instance = self.instance(ephemeral_gb=1, swap=8, kernel_id=KERNEL)
        made = self.create(instance)

        def files():
            return {each.name: (each.stat().st_ino, each.read_bytes()) for each in made.iterdir()}

        before = files()
        self.create(instance)
        self.assertEqual(before, files())

    def test_token_and_request_id_go_to_glance(self):
        self.context.global_id  # noqa: B018  made when it is asked for
        self.create(self.instance())
        for seen in self.glance.seen:
            self.assertEqual("user-token", seen.headers.get("X-Auth-Token"))
            self.assertEqual(self.context.global_id, seen.headers.get("X-OpenStack-Request-ID"))

    def test_a_rescue_disk_is_the_rescue_image(self):
        instance = self.instance(kernel_id=KERNEL)
        made = self.create(instance)
        images = {"image_id": OTHER, "kernel_id": KERNEL, "ramdisk_id": None}
        self.create(instance, suffix=".rescue", images=images)
        self.assertEqual(raw_disk(2), content(made / "disk.rescue"))
        self.assertEqual(b"kernel" * 1000, (made / "kernel.rescue").read_bytes())
        self.assertEqual(raw_disk(), content(made / "disk"))

    def test_a_resize_grows_the_root_disk(self):
        instance = self.instance()
        made = self.create(instance)
        instance.flavor.root_gb = 2
        self.create(instance, ignore_bdi_for_swap=True, fallback_from_host="elsewhere")
        self.assertEqual(2 * GIB, image_info(made / "disk")["virtual-size"])

    def test_a_flavor_that_is_too_small_is_novas_error(self):
        disk = self.directory / "large.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "2G"], check=True)
        self.glance.add(OTHER, disk.read_bytes(), disk_format="qcow2")
        error = self.assertRaises(exception.FlavorDiskSmallerThanImage, self.create, self.instance(OTHER))
        self.assertIn(str(2 * GIB), str(error))
        self.assert_nothing_in_flight()

    def test_an_image_that_glance_lacks_is_novas_error(self):
        gone = "6d1a3a0e-0000-4000-8000-0000000000ff"
        self.assertRaises(exception.ImageNotFound, self.create, self.instance(gone))

    def test_a_hard_reboot_brings_lost_bases_back(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        made = self.create(instance)
        disks = [
            {
                "path": str(made / name),
                "type": "qcow2",
                "virt_disk_size": image_info(made / name)["virtual-size"],
                "backing_file": os.path.basename(image_info(made / name)["full-backing-filename"]),
            }
            for name in ("disk", "disk.local", "disk.swap")
        ]
        before = {name: content(made / name) for name in ("disk", "disk.swap")}
        for path in list(self.bases.iterdir()):
            if path.is_file():
                path.unlink()
        self.driver._create_images_and_backing(self.context, instance, str(made), disks)
        self.assertEqual(before, {name: content(made / name) for name in ("disk", "disk.swap")})
        subprocess.run(["qemu-img", "check", "-q", made / "disk.local"], check=True)

    def test_a_block_migration_makes_the_disks_that_will_be_filled(self):
        instance = self.instance()
        made = pathlib.Path(libvirt_utils.get_instance_path(instance))
        made.mkdir()
        disks = [
            {
                "path": "/elsewhere/disk",
                "type": "qcow2",
                "virt_disk_size": GIB,
                "backing_file": self.base().name,
            },
            {
                "path": "/elsewhere/disk.local",
                "type": "qcow2",
                "virt_disk_size": GIB,
                "backing_file": "ephemeral_1_0706d66",
            },
        ]
        self.driver._create_images_and_backing(self.context, instance, str(made), disks)
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        self.assertEqual(GIB, image_info(made / "disk.local")["virtual-size"])

    def test_kernel_and_ramdisk_are_there_before_a_live_migration(self):
        instance = self.instance(kernel_id=KERNEL, ramdisk_id=RAMDISK)
        made = pathlib.Path(libvirt_utils.get_instance_path(instance))
        made.mkdir()
        for _ in range(2):
            self.driver._fetch_instance_kernel_ramdisk(self.context, instance)
        self.assertEqual(b"kernel" * 1000, (made / "kernel").read_bytes())
        self.assertEqual(b"ramdisk" * 1000, (made / "ramdisk").read_bytes())
        self.assertEqual(1, self.downloads(KERNEL))

    def test_an_unshelved_disk_is_put_back_onto_its_own_image(self):
        """The snapshot has what the guest wrote, and the disk's own base keeps the rest."""
        snapshot = raw_disk(2)
        instance = self.instance(OTHER, vm_state=vm_states.SHELVED_OFFLOADED)
        instance.system_metadata["image_base_image_ref"] = ROOT
        made = self.create(instance)
        self.assertEqual(str(self.base()), image_info(made / "disk")["full-backing-filename"])
        self.assertEqual(snapshot, content(made / "disk"))
        self.assertEqual([], list((self.bases / ".imagecache/pins").rglob("*.json")))

    def test_an_unshelved_disk_whose_image_is_gone_stands_alone(self):
        instance = self.instance(OTHER, vm_state=vm_states.SHELVED_OFFLOADED)
        instance.system_metadata["image_base_image_ref"] = "6d1a3a0e-0000-4000-8000-0000000000ff"
        made = self.create(instance)
        self.assertNotIn("full-backing-filename", image_info(made / "disk"))
        self.assertEqual(raw_disk(2), content(made / "disk"))
        self.assertEqual([], list((self.bases / ".imagecache/pins").rglob("*.json")))

    def test_another_hosts_cache_has_what_glance_lost(self):
        gone = "6d1a3a0e-0000-4000-8000-0000000000ff"
        theirs = self.directory / "theirs"
        theirs.mkdir()
        (theirs / imagecache.get_cache_fname(gone)).write_bytes(raw_disk(3))
        self.stand_in_for_ssh(theirs)
        made = self.create(self.instance(gone), fallback_from_host="elsewhere")
        self.assertEqual(raw_disk(3), content(made / "disk"))
        # Where that host lacks it too, it is Glance's answer that counts.
        none = "6d1a3a0e-0000-4000-8000-0000000000fe"
        again = self.instance(none, uuid="6d1a3a0e-1111-4000-8000-000000000001")
        self.assertRaises(exception.NovaException, self.create, again, fallback_from_host="elsewhere")
        self.assert_nothing_in_flight()


class FlatDisks(FilesCase):
    images_type = "raw"

    def test_disks_are_raw_and_stand_alone(self):
        made = self.create(self.instance(ephemeral_gb=1, swap=8))
        for name, size in (("disk", GIB), ("disk.local", GIB), ("disk.swap", 8 * MIB)):
            self.assertEqual(("raw", size), (image_info(made / name)["format"], (made / name).stat().st_size))
        with open(made / "disk", "rb") as file:
            self.assertEqual(raw_disk(), file.read(8 * MIB))

    def test_a_filesystem_without_partitions_is_grown(self):
        image = self.directory / "filesystem"
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", image, "16M"], check=True)
        self.glance.add(OTHER, image.read_bytes())
        made = self.create(self.instance(OTHER))
        shown = [line.partition(":") for line in output("dumpe2fs", "-h", made / "disk").splitlines()]
        sizes = {name: value.strip() for name, _, value in shown}
        self.assertEqual(GIB, int(sizes["Block count"]) * int(sizes["Block size"]))
        subprocess.run(["e2fsck", "-fn", made / "disk"], check=True, capture_output=True)

    def test_a_resize_grows_the_disk(self):
        instance = self.instance()
        made = self.create(instance)
        instance.flavor.root_gb = 2
        self.create(instance)
        self.assertEqual(2 * GIB, (made / "disk").stat().st_size)


class LvmDisks(FilesCase):
    images_type = "lvm"

    def test_they_stay_novas(self):
        from nova.virt.libvirt import imagebackend

        self.flags(images_volume_group="group", group="libvirt")
        for name, kind in (("lvm", imagebackend.Lvm), ("ploop", imagebackend.Ploop)):
            self.assertIs(kind, self.driver.image_backend.backend(name))
        # What is cached for them is the library's.
        self.assertTrue(self.driver.cache_image(self.context, ROOT))


class FetchToRaw(FilesCase):
    """What Nova's fetch_to_raw accepts, refuses and converts."""

    def fetched(self, data, disk_format, **more):
        self.glance.add(OTHER, data, disk_format=disk_format, **more)
        self.driver.cache_image(self.context, OTHER)
        return self.base(OTHER).read_bytes()

    def refused(self, data, disk_format, why="", **more):
        error = self.assertRaises(exception.ImageUnacceptable, self.fetched, data, disk_format, **more)
        self.assertIn(why, str(error))
        self.assertFalse(self.base(OTHER).exists())
        self.assert_nothing_in_flight()

    def converted(self, format, *options):
        raw, made = self.directory / "raw", self.directory / f"image.{format}"
        raw.write_bytes(raw_disk(2))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, made], check=True)
        return made.read_bytes()

    def test_raw_is_taken_as_it_is(self):
        self.assertEqual(raw_disk(2), self.fetched(raw_disk(2), "raw"))

    def test_qcow2_is_converted(self):
        self.assertEqual(raw_disk(2), self.fetched(self.converted("qcow2"), "qcow2"))

    def test_compressed_qcow2_is_converted(self):
        self.assertEqual(raw_disk(2), self.fetched(self.converted("qcow2", "-c"), "qcow2"))

    def test_qcow2_is_kept_where_images_are_not_forced_raw(self):
        self.flags(force_raw_images=False)
        self.assertEqual(self.converted("qcow2"), self.fetched(self.converted("qcow2"), "qcow2"))

    def test_vdi_and_vhdx_are_converted(self):
        for format in ("vdi", "vhdx"):
            self.assertEqual(raw_disk(2), self.fetched(self.converted(format), format)[: 8 * MIB])
            self.base(OTHER).unlink()

    def test_vmdk_of_an_allowed_subformat_is_converted(self):
        image = self.converted("vmdk", "-o", "subformat=streamOptimized")
        self.assertEqual(raw_disk(2), self.fetched(image, "vmdk"))

    def test_vmdk_of_another_subformat_is_refused(self):
        self.flags(vmdk_allowed_types=["streamOptimized"], group="compute")
        self.refused(self.converted("vmdk", "-o", "subformat=monolithicSparse"), "vmdk")

    def test_vmdk_is_refused_where_none_is_allowed(self):
        self.flags(vmdk_allowed_types=[], group="compute")
        self.refused(self.converted("vmdk", "-o", "subformat=streamOptimized"), "vmdk")

    def test_a_backing_file_is_refused(self):
        parent, made = self.directory / "parent", self.directory / "child"
        parent.write_bytes(bytes(MIB))
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", parent, made]
        subprocess.run(command, check=True)
        self.refused(made.read_bytes(), "qcow2")

    def test_a_data_file_is_refused(self):
        made = self.directory / "with-data"
        option = f"data_file={self.directory}/data"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", option, made, "1M"], check=True)
        self.refused(made.read_bytes(), "qcow2")

    def test_a_damaged_qcow2_is_refused(self):
        self.refused(self.converted("qcow2")[:70000], "qcow2")

    def test_content_that_is_not_what_glance_says_is_refused(self):
        self.refused(self.converted("qcow2"), "raw", "qcow2")
        self.refused(raw_disk(2), "qcow2")
        self.refused(self.converted("qcow2"), "vdi")

    def test_a_format_that_nobody_knows_is_refused(self):
        self.refused(raw_disk(2), "strange")

    def test_an_iso_is_raw(self):
        # A primary volume descriptor and the one that ends them: ECMA-119, 8.4 and 8.3.
        image = bytes(32768) + (b"\1CD001\1" + bytes(2041)) + (b"\xffCD001\1" + bytes(2041)) + bytes(MIB)
        self.assertEqual(image, self.fetched(image, "iso"))

    def test_amazon_images_are_raw(self):
        for format in ("ami", "aki", "ari"):
            self.assertEqual(raw_disk(2), self.fetched(raw_disk(2), format, container_format=format))
            self.base(OTHER).unlink()

    def test_without_inspection_what_glance_says_is_believed(self):
        self.flags(disable_deep_image_inspection=True, group="workarounds")
        self.assertEqual(raw_disk(2), self.fetched(self.converted("qcow2"), "qcow2"))

    def test_bytes_with_another_digest_are_refused(self):
        self.refused(raw_disk(2), "raw", os_hash_value="0" * 128)


class ImageCache(FilesCase):
    """The periodic pass, pre-caching and the disk usage, as Nova's compute manager calls them."""

    def update(self, *instances):
        self.driver.image_cache_manager.update(self.context, objects.InstanceList(objects=list(instances)))

    def setUp(self):
        super().setUp()
        self.stub_out("nova.objects.BlockDeviceMappingList.bdms_by_instance_uuid", lambda *_arguments: {})

    def names(self):
        return sorted(each for each in os.listdir(self.bases) if each != ".imagecache")

    def test_an_image_is_cached_once(self):
        self.assertTrue(self.driver.cache_image(self.context, ROOT))
        self.assertFalse(self.driver.cache_image(self.context, ROOT))
        self.assertEqual(raw_disk(), self.base().read_bytes())
        self.assertEqual(1, self.downloads())

    def test_an_image_that_is_not_there_is_novas_error(self):
        gone = "6d1a3a0e-0000-4000-8000-0000000000ff"
        self.assertRaises(exception.ImageNotFound, self.driver.cache_image, self.context, gone)

    def test_a_hit_makes_a_base_young_again(self):
        self.driver.cache_image(self.context, ROOT)
        self.grow_old()
        self.driver.cache_image(self.context, ROOT)
        self.assertLess(time.time() - self.base().stat().st_mtime, DAY)

    def test_what_instances_use_stays_and_the_rest_goes_when_it_is_old(self):
        instance = self.instance(ephemeral_gb=1, swap=8)
        self.create(instance)
        self.driver.cache_image(self.context, OTHER)
        before = self.names()
        self.update(instance)
        self.assertEqual(before, self.names())
        self.grow_old()
        self.update(instance)
        self.assertEqual(sorted({*before} - {self.base(OTHER).name}), self.names())

    def test_what_only_the_disks_show_stays(self):
        self.create(self.instance(ephemeral_gb=1, swap=8))
        before = self.names()
        self.grow_old()
        self.update()
        self.assertEqual(before, self.names())

    def test_without_instances_swap_and_ephemeral_bases_go_too(self):
        made = self.create(self.instance(ephemeral_gb=1, swap=8))
        made.rename(self.directory / "deleted")
        self.grow_old()
        self.update()
        self.assertEqual([], self.names())

    def test_nothing_goes_where_removing_is_turned_off(self):
        self.flags(remove_unused_base_images=False, group="image_cache")
        self.driver.cache_image(self.context, ROOT)
        self.grow_old()
        self.update()
        self.assertEqual([self.base().name], self.names())

    def test_instances_of_other_hosts_keep_what_they_use(self):
        elsewhere = self.instance(host="elsewhere")
        self.driver.cache_image(self.context, ROOT)
        self.grow_old()
        self.update(elsewhere)
        self.assertEqual([self.base().name], self.names())

    def test_a_resized_base_of_an_old_release_goes_sooner_and_a_stranger_stays(self):
        self.driver.cache_image(self.context, ROOT)
        resized, stranger = self.bases / f"{self.base(OTHER).name}_10", self.bases / "notes"
        for path in (resized, stranger):
            path.write_bytes(b"x")
            os.utime(path, (time.time() - 7200,) * 2)
        self.update()
        self.assertEqual(sorted([self.base().name, "notes"]), self.names())

    def test_a_pass_without_a_cache_is_no_error(self):
        self.instances.rmdir()
        self.update()
        self.assertFalse(self.instances.exists())

    def test_a_base_that_cannot_be_removed_stops_no_other(self):
        for image in (ROOT, OTHER):
            self.driver.cache_image(self.context, image)
        self.grow_old()
        subprocess.run(["chattr", "+i", self.base()], check=False)
        self.addCleanup(subprocess.run, ["chattr", "-i", self.base()], check=False)
        self.update()
        self.assertFalse(self.base(OTHER).exists())

    def test_the_disk_usage_is_what_the_cache_takes(self):
        self.assertEqual(0, self.driver.image_cache_manager.get_disk_usage())
        self.driver.cache_image(self.context, ROOT)
        used = self.driver.image_cache_manager.get_disk_usage()
        self.assertGreaterEqual(used, self.base().stat().st_blocks * 512)
        self.assertLess(used, 4 * MIB)

    def test_the_disk_usage_of_a_cache_that_is_gone_is_nothing(self):
        self.instances.rmdir()
        self.assertEqual(0, self.driver.image_cache_manager.get_disk_usage())


class Concurrency(FilesCase):
    def spawn(self, image, number, done):
        def make():
            self.create(self.instance(image, uuid=f"6d1a3a0e-1111-4000-8000-00000000000{number}"))
            done.append(number)

        thread = threading.Thread(target=make)
        thread.start()
        return thread

    def test_spawns_of_one_image_share_a_download(self):
        done = []
        for thread in [self.spawn(ROOT, number, done) for number in range(4)]:
            thread.join()
        self.assertEqual([0, 1, 2, 3], sorted(done))
        self.assertEqual(1, self.downloads())

    def test_an_image_that_is_slow_holds_up_no_other(self):
        stop, started, right, done = threading.Event(), threading.Event(), self.glance.answer, []

        def slow(seen):
            if seen.path == f"/v2/images/{ROOT}/file":
                started.set()
                stop.wait(60)
            return right(seen)

        self.glance.answer = slow
        first = self.spawn(ROOT, 0, done)
        try:
            self.assertTrue(started.wait(60))
            self.spawn(OTHER, 1, done).join()
            self.assertEqual([1], done)
        finally:
            stop.set()
            first.join()
        self.assertEqual([1, 0], done)
