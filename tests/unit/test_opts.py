# SPDX-License-Identifier: Apache-2.0
"""The options: names, groups and defaults that operators have in their files, and what becomes of them."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import unittest

from oslo_config import cfg

from imagecache_lib import config, errors, opts

GIB = 2**30

# Nova's names, groups, defaults and units. The three that describe the machine are below.
NOVAS = {
    ("image_cache", "manager_interval"): 2400,
    ("image_cache", "subdirectory_name"): "_base",
    ("image_cache", "remove_unused_base_images"): True,
    ("image_cache", "remove_unused_original_minimum_age_seconds"): 86400,
    ("image_cache", "remove_unused_resized_minimum_age_seconds"): 3600,
    ("image_cache", "precache_concurrency"): 1,
    ("DEFAULT", "instances_path"): "$state_path/instances",
    ("DEFAULT", "force_raw_images"): True,
    ("DEFAULT", "use_cow_images"): True,
    ("DEFAULT", "preallocate_images"): "none",
    ("DEFAULT", "default_ephemeral_format"): None,
    ("DEFAULT", "virt_mkfs"): [],
    ("compute", "max_concurrent_disk_ops"): 0,
    ("compute", "vmdk_allowed_types"): ["streamOptimized", "monolithicSparse"],
    ("libvirt", "images_type"): "default",
    ("libvirt", "images_rbd_pool"): "rbd",
    ("libvirt", "images_rbd_ceph_conf"): "",
    ("libvirt", "rbd_user"): None,
    ("libvirt", "rbd_connect_timeout"): 5,
    ("libvirt", "images_rbd_glance_store_name"): "",
    ("libvirt", "images_rbd_glance_copy_poll_interval"): 15,
    ("libvirt", "images_rbd_glance_copy_timeout"): 600,
    ("libvirt", "images_cpu_time_limit"): 30,
    ("libvirt", "images_address_space_limit"): 2,
    ("glance", "num_retries"): 3,
    ("glance", "verify_glance_signatures"): False,
    ("glance", "enable_certificate_validation"): False,
    ("glance", "default_trusted_certificate_ids"): [],
    ("glance", "enable_rbd_download"): False,
    ("glance", "rbd_user"): "",
    ("glance", "rbd_connect_timeout"): 5,
    ("glance", "rbd_pool"): "",
    ("glance", "rbd_ceph_conf"): "",
    ("workarounds", "disable_deep_image_inspection"): False,
    ("workarounds", "never_download_image_if_on_rbd"): False,
    ("workarounds", "reserve_disk_resource_for_image_cache"): False,
}
OF_THE_MACHINE = {("DEFAULT", "state_path"), ("DEFAULT", "my_ip"), ("DEFAULT", "host")}
NEW: dict[tuple[str, str], object] = {
    ("image_cache", "disk_roots"): [],
    ("image_cache", "passed_over_directories"): [],
    ("image_cache", "lock_path"): None,
    ("image_cache", "max_cache_size"): 0,
    ("image_cache", "precache_job_age_seconds"): 0,
    ("image_cache", "free_space_low"): 0,
    ("image_cache", "free_space_high"): 0,
    ("image_cache", "space_minimum_age_seconds"): 3600,
    ("image_cache", "scrub_rate"): 32 * 2**20,
    ("image_cache", "history_age_seconds"): 60 * 86400,
    ("image_cache", "certificates_path"): None,
    ("image_cache", "sync_copied_disks"): True,
    ("image_cache", "max_virtual_size"): 16 * 2**40,
    ("image_cache", "decompress_images"): False,
    ("image_cache", "min_transfer_rate"): 1024,
    ("image_cache", "convert_cpu_time_limit"): 3600,
    ("image_cache", "convert_address_space_limit"): 8 * GIB,
    ("image_cache", "lock_timeout"): 600.0,
    ("image_cache", "authorize_hits"): "no",
    ("image_cache", "authorize_timeout"): 10.0,
    ("image_cache", "stage_idle_seconds"): 3600,
    ("image_cache", "foreign_stage_idle_seconds"): 86400,
    ("image_cache", "rbd_op_timeout"): 120,
}


class OptsCase(unittest.TestCase):
    def conf(self, text: str = "", *, conf: cfg.ConfigOpts | None = None) -> cfg.ConfigOpts:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = pathlib.Path(directory.name, "nova.conf")
        path.write_text(text)
        conf = conf or cfg.ConfigOpts()
        conf([], project="nova", default_config_files=[str(path)])
        return conf

    def config(self, text: str = "") -> config.CacheConfig:
        return opts.config_from(self.conf(text))


class TableTest(OptsCase):
    def test_names_groups_and_defaults(self) -> None:
        found = {
            (group, option.name): option.default
            for group, options in opts.list_opts()
            for option in options
            if (group, option.name) not in OF_THE_MACHINE
        }
        self.assertEqual({**NOVAS, **NEW}, found)

    def test_options_of_the_machine_are_there(self) -> None:
        found = {(group, option.name) for group, options in opts.list_opts() for option in options}
        self.assertLessEqual(OF_THE_MACHINE, found)

    def test_every_option_is_explained(self) -> None:
        for _group, options in opts.list_opts():
            for option in options:
                self.assertTrue(option.help, option.name)

    def test_the_sample_says_nothing_of_the_machine_it_was_made_on(self) -> None:
        options = dict(opts.list_opts())["DEFAULT"]
        samples = {option.name: option.sample_default for option in options}
        self.assertEqual(("<host_ipv4>", "<current_hostname>"), (samples["my_ip"], samples["host"]))


class ConfigFromTest(OptsCase):
    def test_defaults_are_those_of_the_dataclass(self) -> None:
        self.assertEqual(config.CacheConfig(instances_path="/var/lib/nova/instances"), self.config())

    def test_every_field_can_be_set(self) -> None:
        found = self.config(
            """
            [DEFAULT]
            instances_path = /srv/instances
            force_raw_images = false
            preallocate_images = space
            default_ephemeral_format = ext3
            virt_mkfs = linux=mkfs.ext4 -L %(fs_label)s %(target)s
            virt_mkfs = default=mkfs.vfat %(target)s
            [compute]
            max_concurrent_disk_ops = 2
            vmdk_allowed_types = streamOptimized
            [glance]
            num_retries = 7
            verify_glance_signatures = true
            enable_certificate_validation = true
            default_trusted_certificate_ids = a,b
            [libvirt]
            images_type = rbd
            images_cpu_time_limit = 31
            images_address_space_limit = 3
            images_rbd_pool = vms
            images_rbd_ceph_conf = /etc/ceph/ceph.conf
            rbd_user = cinder
            rbd_connect_timeout = 17
            images_rbd_glance_store_name = ceph
            images_rbd_glance_copy_poll_interval = 16
            images_rbd_glance_copy_timeout = 601
            [workarounds]
            disable_deep_image_inspection = true
            never_download_image_if_on_rbd = true
            [image_cache]
            subdirectory_name = _cache
            manager_interval = -1
            remove_unused_base_images = false
            remove_unused_original_minimum_age_seconds = 1
            remove_unused_resized_minimum_age_seconds = 2
            precache_concurrency = 3
            precache_job_age_seconds = 86400
            disk_roots = /srv/instances,/mnt/more
            passed_over_directories = backups,old
            lock_path = /run/lock/images
            max_cache_size = 4
            free_space_low = 5
            free_space_high = 6
            space_minimum_age_seconds = 7
            scrub_rate = 8
            history_age_seconds = 9
            certificates_path = /etc/nova/image-certificates
            sync_copied_disks = false
            max_virtual_size = 8
            decompress_images = true
            min_transfer_rate = 7
            convert_cpu_time_limit = 9
            convert_address_space_limit = 10
            lock_timeout = 11.5
            authorize_hits = closed
            authorize_timeout = 4
            stage_idle_seconds = 12
            foreign_stage_idle_seconds = 13
            rbd_op_timeout = 14
            """.replace("            ", "")
        )
        default = config.CacheConfig(instances_path="/elsewhere")
        unchanged = [
            field.name
            for field in dataclasses.fields(found)
            if getattr(found, field.name) == getattr(default, field.name)
        ]
        self.assertEqual([], unchanged)
        self.assertEqual(3 * GIB, found.images_address_space_limit)
        self.assertEqual(("/srv/instances", "/mnt/more"), found.disk_roots)
        self.assertEqual("linux=mkfs.ext4 -L %(fs_label)s %(target)s", found.virt_mkfs[0])

    def test_values_refer_to_other_options(self) -> None:
        found = self.config(
            "[DEFAULT]\nmy_ip = 192.0.2.7\nstate_path = /srv/nova\n"
            "[image_cache]\nsubdirectory_name = _base_$my_ip\n"
        )
        self.assertEqual("/srv/nova/instances/_base_192.0.2.7", found.base_path)

    def test_the_host_is_the_one_that_the_option_names(self) -> None:
        self.assertEqual("compute-7", opts.host_from(self.conf("[DEFAULT]\nhost = compute-7\n")).name)

    def test_options_under_their_old_names(self) -> None:
        found = self.config(
            "[DEFAULT]\nimage_cache_manager_interval = 5\nimage_cache_subdirectory_name = _old\n"
            "remove_unused_base_images = false\nremove_unused_original_minimum_age_seconds = 6\n"
            "[libvirt]\nremove_unused_resized_minimum_age_seconds = 7\n"
        )
        self.assertEqual(
            (5, "_old", False),
            (found.manager_interval, found.subdirectory_name, found.remove_unused_base_images),
        )
        self.assertEqual(6, found.remove_unused_original_minimum_age_seconds)
        self.assertEqual(7, found.remove_unused_resized_minimum_age_seconds)

    def test_what_cannot_be_read_is_a_configuration_error(self) -> None:
        for text in (
            "[image_cache]\nmanager_interval = often\n",
            "[image_cache]\nmanager_interval = -2\n",
            "[image_cache]\nprecache_concurrency = 0\n",
            "[image_cache]\nsubdirectory_name = a/b\n",
            "[DEFAULT]\ninstances_path = $nobody_knows/instances\n",
            "[DEFAULT]\ninstances_path = instances\n",
            "[DEFAULT]\nvirt_mkfs = mkfs.ext4 %(target)s\n",
        ):
            with self.subTest(text=text), self.assertRaises(errors.ConfigError) as caught:
                self.config(text)
            self.assertIsNotNone(caught.exception.next_step)


class BackendTest(OptsCase):
    def test_images_type_and_use_cow_images_choose_the_backend(self) -> None:
        for images_type, cow, backend in (
            ("default", True, "qcow2"),
            ("default", False, "raw"),
            ("qcow2", False, "qcow2"),
            ("raw", True, "raw"),
            ("flat", True, "raw"),
            ("rbd", True, "rbd"),
        ):
            with self.subTest(images_type=images_type, cow=cow):
                text = f"[DEFAULT]\nuse_cow_images = {cow}\n[libvirt]\nimages_type = {images_type}\n"
                self.assertEqual(backend, self.config(text).backend)

    def test_storage_without_a_backend_is_refused(self) -> None:
        for images_type in ("lvm", "ploop"):
            said = f"images_type is {images_type}.*raw, rbd"
            with self.subTest(images_type=images_type), self.assertRaisesRegex(errors.ConfigError, said):
                self.config(f"[libvirt]\nimages_type = {images_type}\n")


class BesideNovaTest(OptsCase):
    def test_registering_twice_is_fine(self) -> None:
        conf = self.conf()
        self.assertEqual(opts.config_from(conf), opts.config_from(conf))

    def test_an_option_that_is_registered_already_stands(self) -> None:
        conf = cfg.ConfigOpts()
        conf.register_opt(cfg.IntOpt("manager_interval", default=99, help="Nova's words"), "image_cache")
        conf.register_opt(cfg.StrOpt("state_path", default="/opt/nova"))
        found = opts.config_from(self.conf("[image_cache]\nmax_cache_size = 5\n", conf=conf))
        self.assertEqual(99, found.manager_interval)
        self.assertEqual("/opt/nova/instances", found.instances_path)
        self.assertEqual(5, found.max_cache_size)
        self.assertEqual("Nova's words", conf._groups["image_cache"]._opts["manager_interval"]["opt"].help)
