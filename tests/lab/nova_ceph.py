# SPDX-License-Identifier: Apache-2.0
"""Runs in Nova's own environment: the adapter's driver over a real Ceph cluster.

The environment names the cluster, and a Glance that keeps images there.
"""

from __future__ import annotations

import json
import os
import pathlib

import rados
import rbd
from nova import context, exception
from nova.compute import vm_states
from nova.virt.libvirt import utils as libvirt_utils

from imagecache_lib.testing import bootdisk
from tests.lab import guest
from tests.lab.ceph import Ceph
from tests.lab.glance import MEMBER, Glance
from tests.lab.nova_files import GIB, KERNEL, MIB, ROOT, FilesCase, raw_disk


class CephCase(FilesCase):
    images_type = "rbd"
    user = "admin"

    def setUp(self):
        conf, fsid, osd = os.environ["IMAGECACHE_CEPH"].split(",")
        self.ceph = Ceph(pathlib.Path(conf), fsid, {"osd": int(osd)})
        self.data = raw_disk()
        super().setUp()

    def configure(self):
        self.flags(images_rbd_pool="vms", images_rbd_ceph_conf=str(self.ceph.conf), group="libvirt")
        self.flags(rbd_user=self.user, group="libvirt")

    def new_instance(self, image=ROOT, **more):
        number = os.urandom(6).hex()
        return self.instance(image, uuid=f"6d1a3a0e-2222-4000-8000-{number}", **more)

    def make(self, instance):
        """Make the root disk alone, by what a spawn and a hard reboot call."""
        image = self.driver.image_backend.by_name(instance, "disk", "rbd")
        image.cache(
            fetch_func=libvirt_utils.fetch_image,
            context=self.context,
            filename="base",
            image_id=instance.image_ref,
            size=GIB,
            trusted_certs=None,
        )

    def info(self, instance, name="disk"):
        return json.loads(self.ceph.rbd("info", "--format", "json", f"vms/{instance.uuid}_{name}"))

    def left(self, instance):
        return [name for name in self.ceph.rbd("ls", "vms").split() if instance.uuid in name]

    def content(self, instance, name="disk", length=8 * MIB):
        with (
            rados.Rados(conffile=str(self.ceph.conf)) as cluster,
            cluster.open_ioctx("vms") as pool,
            rbd.Image(pool, f"{instance.uuid}_{name}", read_only=True) as image,
        ):
            return image.read(0, length)

    def cached(self):
        """Return the base images, and what is on its way to become one."""
        places = (self.bases, self.bases / ".imagecache/stage")
        return [path for where in places if where.exists() for path in where.iterdir() if path.is_file()]


class RbdDisks(CephCase):
    """A Glance that says what the tests want to hear."""

    def setUp(self):
        super().setUp()
        self.image = f"image-{os.urandom(8).hex()}"
        source = self.directory / "source"
        source.write_bytes(self.data)
        self.ceph.rbd("import", str(source), f"images/{self.image}")
        self.ceph.rbd("snap", "create", f"images/{self.image}@snap")
        self.ceph.rbd("snap", "protect", f"images/{self.image}@snap")
        self.url = f"rbd://{self.ceph.fsid}/images/{self.image}/snap"
        self.locate(self.url)

    def locate(self, url):
        self.glance.add(ROOT, raw_disk(), locations=[{"url": url, "metadata": {}}])

    def test_a_root_disk_is_a_clone_and_nothing_is_downloaded(self):
        instance = self.new_instance(ephemeral_gb=1, swap=8, kernel_id=KERNEL)
        made = self.create(instance)
        self.assertEqual(self.image, self.info(instance)["parent"]["image"])
        self.assertEqual(GIB, self.info(instance)["size"])
        self.assertEqual(self.data, self.content(instance))
        self.assertEqual(GIB, self.info(instance, "disk.local")["size"])
        self.assertEqual(8 * MIB, self.info(instance, "disk.swap")["size"])
        self.assertEqual(b"kernel" * 1000, (made / "kernel").read_bytes())
        self.assertEqual(0, self.downloads())
        self.create(instance)
        self.assertEqual(3, len(self.left(instance)))

    def test_a_resize_grows_it(self):
        instance = self.new_instance()
        self.create(instance)
        instance.flavor.root_gb = 2
        self.create(instance)
        self.assertEqual(2 * GIB, self.info(instance)["size"])

    def test_an_unshelved_disk_needs_its_snapshot_no_more(self):
        instance = self.new_instance(vm_state=vm_states.SHELVED_OFFLOADED)
        self.create(instance)
        self.assertNotIn("parent", self.info(instance))
        self.assertEqual(self.data, self.content(instance))

    def test_what_is_not_in_the_cluster_is_fetched_and_imported(self):
        self.locate("file:///elsewhere")
        instance = self.new_instance()
        self.create(instance)
        self.assertNotIn("parent", self.info(instance))
        self.assertEqual(self.data, self.content(instance))

    def test_a_snapshot_that_is_gone_is_no_more_than_a_download(self):
        self.locate(f"{self.url}-gone")
        instance = self.new_instance()
        self.create(instance)
        self.assertEqual((self.data, 1), (self.content(instance), self.downloads()))

    def test_where_a_download_is_forbidden_it_is_novas_error(self):
        self.flags(never_download_image_if_on_rbd=True, group="workarounds")
        self.locate(f"{self.url}-gone")
        instance = self.new_instance()
        error = self.assertRaises(exception.ImageUnacceptable, self.create, instance)
        self.assertIn("never_download_image_if_on_rbd", str(error))
        self.assertEqual(([], 0), (self.left(instance), self.downloads()))

    def test_nothing_is_cached_ahead_of_time(self):
        self.assertRaises(NotImplementedError, self.driver.cache_image, self.context, ROOT)

    def test_a_flavor_that_is_too_small_is_novas_error(self):
        large = f"{self.image}-large"
        self.ceph.rbd("create", "--size", "2G", f"images/{large}")
        self.ceph.rbd("snap", "create", f"images/{large}@snap")
        self.ceph.rbd("snap", "protect", f"images/{large}@snap")
        self.locate(self.url.replace(self.image, large))
        instance = self.new_instance()
        self.assertRaises(exception.FlavorDiskSmallerThanImage, self.create, instance)
        self.assertEqual([], self.left(instance))

    def test_a_cluster_that_does_not_answer_is_told(self):
        conf = self.directory / "ceph.conf"
        conf.write_text("[global]\nmon host = v2:127.0.0.1:1\nauth client required = none\n")
        self.flags(images_rbd_ceph_conf=str(conf), group="libvirt")
        error = self.assertRaises(exception.InternalError, self.make, self.new_instance())
        self.assertIn(ROOT, str(error))
        self.assertIn("Ceph", str(error))

    def test_bytes_are_read_from_the_cluster_for_disks_that_are_files(self):
        self.flags(images_type="qcow2", group="libvirt")
        self.flags(
            enable_rbd_download=True, rbd_ceph_conf=str(self.ceph.conf), rbd_user="admin", group="glance"
        )
        self.assertTrue(self.driver.cache_image(self.context, ROOT))
        self.assertEqual((self.data, 0), (self.base().read_bytes(), self.downloads()))


class GlanceOnCeph(CephCase):
    """Glance itself keeps its images in the cluster, and users have the rights that Ceph recommends."""

    user = "nova"

    def setUp(self):
        url, home = os.environ["IMAGECACHE_GLANCE"].split(",")
        self.ceph_glance = Glance(url, pathlib.Path(home))
        super().setUp()
        self.rights("profile rbd pool=vms, profile rbd-read-only pool=images")
        self.flags(api_servers=[self.ceph_glance.url], group="glance")
        self.context = context.RequestContext("user", "project", auth_token=MEMBER)

    def rights(self, osd, user=user):
        self.ceph.user(user, mon="profile rbd", osd=osd)

    def uploaded(self, data, **more):
        return self.ceph_glance.upload(data, **{"store": "ceph", **more})

    def become(self, user):
        self.flags(rbd_user=user, group="libvirt")

    def assert_nothing_was_made(self, instance, image):
        self.assertEqual(
            ([], [], []), (self.left(instance), self.cached(), self.ceph_glance.downloads(image))
        )

    def boot(self, instance):
        url = f"rbd:vms/{instance.uuid}_disk:conf={self.ceph.conf}:id={self.user}"
        return guest.boot(bootdisk.boot_command(url, "raw"))

    def test_a_guest_boots_from_a_clone_and_keeps_its_disk_in_a_hard_reboot(self):
        path = self.directory / "boot.raw"
        bootdisk.write_boot_disk(str(path), greeting="CLONED")
        image = self.uploaded(path)
        instance, other = self.new_instance(image), self.new_instance(image)
        self.create(instance)
        self.assertEqual(image, self.info(instance)["parent"]["image"])
        self.assertIn("CLONED BOOT 0", self.boot(instance))
        self.create(instance)
        self.assertIn("CLONED BOOT 1", self.boot(instance))
        self.create(other)
        self.assertIn("CLONED BOOT 0", self.boot(other))
        self.assertEqual(([], []), (self.ceph_glance.downloads(image), self.cached()))

    def test_bytes_are_read_from_the_cluster_and_compared_with_glances_digest(self):
        self.flags(images_type="qcow2", group="libvirt")
        options = {"rbd_ceph_conf": str(self.ceph.conf), "rbd_user": self.user}
        self.flags(enable_rbd_download=True, group="glance", **options)
        image = self.uploaded(self.data)
        self.assertTrue(self.driver.cache_image(self.context, image))
        self.assertEqual((self.data, []), (self.base(image).read_bytes(), self.ceph_glance.downloads(image)))
        damaged = self.uploaded(raw_disk(3))
        self.damage(damaged)
        error = self.assertRaises(exception.ImageUnacceptable, self.driver.cache_image, self.context, damaged)
        self.assertIn("sha512", str(error))
        self.assertEqual([self.base(image)], self.cached())

    def damage(self, image):
        """Have other bytes in the snapshot that Glance names."""
        path = self.directory / "damaged"
        path.write_bytes(raw_disk(2))
        name, snapshot = f"images/{image}", f"images/{image}@snap"
        for command in (
            ("snap", "unprotect", snapshot),
            ("snap", "rm", snapshot),
            ("rm", name),
            ("import", str(path), name),
            ("snap", "create", snapshot),
            ("snap", "protect", snapshot),
        ):
            self.ceph.rbd(*command)

    def test_a_user_who_may_make_no_disks_is_named_and_nothing_is_fetched(self):
        image = self.uploaded(self.data)
        self.rights("profile rbd-read-only pool=vms, profile rbd-read-only pool=images", "limited")
        self.become("limited")
        instance = self.new_instance(image)
        error = self.assertRaises(exception.InternalError, self.make, instance)
        self.assertIn("client.limited has no permission", str(error))
        self.assert_nothing_was_made(instance, image)

    def test_a_snapshot_that_is_gone_is_refused_where_downloads_are_forbidden(self):
        self.flags(never_download_image_if_on_rbd=True, group="workarounds")
        image = self.uploaded(self.data)
        self.ceph.rbd("snap", "unprotect", f"images/{image}@snap")
        instance = self.new_instance(image)
        error = self.assertRaises(exception.ImageUnacceptable, self.make, instance)
        self.assertIn("not protected", str(error))
        self.ceph.rbd("snap", "rm", f"images/{image}@snap")
        error = self.assertRaises(exception.ImageUnacceptable, self.make, instance)
        self.assertIn(f"images/{image}@snap", str(error))
        self.assert_nothing_was_made(instance, image)

    def test_an_image_that_guests_were_cloned_from_is_busy_until_they_are_gone(self):
        image = self.uploaded(self.data)
        instance = self.new_instance(image)
        self.create(instance)
        self.assertEqual(409, self.ceph_glance.call("DELETE", f"/images/{image}").status_code)
        self.assertEqual(self.data, self.content(instance))
        self.driver.image_backend.by_name(instance, "disk", "rbd").flatten()
        self.ceph_glance.delete(image)
        self.assertEqual(self.data, self.content(instance))

    def test_a_cluster_that_stops_is_told_in_time_and_works_again_later(self):
        self.flags(rbd_op_timeout=2, group="image_cache")
        image = self.uploaded(self.data)
        instance = self.new_instance(image)
        disk = self.driver.image_backend.by_name(instance, "disk", "rbd")
        options = {"fetch_func": libvirt_utils.fetch_image, "context": self.context, "filename": "base"}
        options |= {"image_id": image, "size": GIB, "trusted_certs": None}
        with self.ceph.stopped("osd"):
            error = self.assertRaises(exception.InternalError, disk.cache, **options)
        self.assertIn("Ceph did not answer in time", str(error))
        self.assert_nothing_was_made(instance, image)
        disk.cache(**options)
        self.assertEqual(image, self.info(instance)["parent"]["image"])
