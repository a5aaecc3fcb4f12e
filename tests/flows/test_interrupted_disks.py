# SPDX-License-Identifier: Apache-2.0
"""Work on a disk ends once its caller no longer waits, however long the program it takes would go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from oslo_concurrency import processutils

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, CacheCase, content_of, disk_image, raw_image


class Stuck:
    """A :attr:`System.execute` with which a subcommand of qemu-img never ends.

    :param subcommand: of qemu-img.
    """

    def __init__(self, subcommand: str) -> None:
        self._subcommand = subcommand
        self.began = threading.Event()

    def __call__(self, *command: str, **options: Any) -> tuple[str, str]:
        if self._subcommand in command:
            self.began.set()
            end = next(at for at, word in enumerate(command) if word.endswith(("bwrap", "qemu-img")))
            command = (*command[:end], "sleep", "600")
        out, err = processutils.execute(*command, **options)
        return str(out), str(err)


class TestInterruptedDisks(CacheCase):
    def test_a_deadline_ends_growing_and_flattening_and_the_disk_stays_whole(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        works: dict[str, Callable[[ic.ImageCacheManager, ic.Request], object]] = {
            "resize": lambda manager, request: manager.resize_disk(made, 8 * MIB, request=request),
            "rebase": lambda manager, request: manager.flatten_disk(made, request=request),
        }
        for subcommand, work in works.items():
            with self.subTest(subcommand):
                manager = self.manager(host=self.host(execute=Stuck(subcommand)))
                began = time.monotonic()
                with self.assertRaises(errors.LockTimeoutError):
                    work(manager, ic.Request(deadline=time.time() + 1))
                self.assertLess(time.monotonic() - began, 60)
                self.assertEqual(raw_image(1), content_of(made.target, "qcow2"))
                self.assertEqual(made, manager.inspect_disk(made.target))

    def test_a_token_ends_what_is_at_work(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        stuck, cancel = Stuck("rebase"), threading.Event()
        manager = self.manager(host=self.host(execute=stuck))
        running = self.running(lambda: manager.flatten_disk(made, request=ic.Request(cancel=cancel)))
        self.assertTrue(stuck.began.wait(60))
        cancel.set()
        with self.assertRaises(errors.CancelledError):
            running.result()
        self.assertEqual(made, manager.inspect_disk(made.target))

    def test_a_shutdown_ends_what_is_at_work(self) -> None:
        made = self.manager().create_disk(ID, self.target())
        stuck = Stuck("resize")
        manager = self.manager(host=self.host(execute=stuck))
        running = self.running(lambda: manager.resize_disk(made, 8 * MIB))
        self.assertTrue(stuck.began.wait(60))
        manager.shutdown()
        with self.assertRaises(errors.CancelledError):
            running.result()

    def test_a_deadline_ends_growing_a_copy_and_nothing_is_left(self) -> None:
        image = disk_image(self.directory, "qcow2")
        source = FakeSource({ID: image}, disk_format="qcow2")
        manager = self.manager(
            source, backend="raw", force_raw_images=False, host=self.host(execute=Stuck("resize"))
        )
        manager.cache_image(ID)
        target = self.target()
        with self.leaves_nothing(), self.assertRaises(errors.LockTimeoutError):
            manager.create_disk(ID, target, size=8 * MIB, request=ic.Request(deadline=time.time() + 1))
