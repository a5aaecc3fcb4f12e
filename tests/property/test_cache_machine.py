# SPDX-License-Identifier: Apache-2.0
"""Two hosts that share a cache, and everything that happens to one, in any order: no base in use is lost.

Real files in a temporary directory. After each step the base of every overlay has its name and its bytes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import header
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.support import campaign, files

IMAGES = {
    f"{number}1111111-aaaa-4bbb-8ccc-0123456789ab": bytes([number]) * 8192 + bytes(4096) for number in (1, 2)
}
CONTENT = {layout.base_name(image_id): data for image_id, data in IMAGES.items()}
HOSTS = ("one", "two")

images = st.sampled_from(sorted(IMAGES))
hosts = st.sampled_from(HOSTS)
instances = st.sampled_from(["uuid-1", "uuid-2", "uuid-3"])


class Killed(BaseException):
    """The process dies here."""


class TwoHosts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # In memory, where a sync takes no time.
        where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="imagecache-", dir=where))
        self.source = FakeSource(IMAGES)
        self.countdown = 0
        self.managers = {name: self.start(name) for name in HOSTS}

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    def start(self, name: str, *, locking: bool = True) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(self.directory), num_retries=0)
        host = ic.System(name=name, trace=self.trace, locking=locking)
        manager = ic.ImageCacheManager(config, self.source, host=host, observers=())
        manager.unpin(next(iter(IMAGES)), owner="nobody")  # starts it
        return manager

    def trace(self, _point: str) -> None:
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                raise Killed

    def attempt(self, name: str, action: Callable[[ic.ImageCacheManager], object], dies: int) -> None:
        """Do something on a host, which dies at the trace point of that number, and starts again."""
        self.countdown = dies
        try:
            with contextlib.suppress(errors.BackendError, errors.DiskExistsError):
                action(self.managers[name])
        except Killed:
            self.countdown = 0
            self.managers[name] = self.start(name)
        finally:
            self.countdown = 0

    dying = st.one_of(st.just(0), st.integers(1, 14))

    @rule(
        host=hosts,
        image=images,
        instance=instances,
        disk=st.sampled_from(["disk", "disk.rescue"]),
        dies=dying,
    )
    def spawn(self, host: str, image: str, instance: str, disk: str, dies: int) -> None:
        directory = self.directory / instance
        directory.mkdir(exist_ok=True)
        self.attempt(host, lambda manager: manager.create_disk(image, str(directory / disk)), dies)

    @rule(host=hosts, image=images, dies=dying)
    def cache(self, host: str, image: str, dies: int) -> None:
        self.attempt(host, lambda manager: manager.cache_image(image), dies)

    @rule(host=hosts, dies=dying)
    def verify(self, host: str, dies: int) -> None:
        self.attempt(host, lambda manager: manager.verify_base_images([]), dies)

    @rule()
    def verify_everywhere(self) -> None:
        for _round in range(2):
            for manager in self.managers.values():
                manager.verify_base_images([])

    @rule(host=hosts, image=images, dies=dying)
    def evict(self, host: str, image: str, dies: int) -> None:
        self.attempt(host, lambda manager: manager.evict_image(image), dies)

    @rule(instance=instances, suffix=st.sampled_from(["_resize", "_del"]))
    def rename(self, instance: str, suffix: str) -> None:
        here, there = self.directory / instance, self.directory / (instance + suffix)
        if there.exists() and not here.exists():
            there.rename(here)
        elif here.exists() and not there.exists():
            here.rename(there)

    @rule(host=hosts, instance=instances, image=images)
    def arrive(self, host: str, instance: str, image: str) -> None:
        """An overlay comes from a host that does not share the storage."""
        found = self.directory / instance / "disk"
        arriving = self.directory / f"{instance}-copy"
        if found.exists() and not arriving.exists():
            backing = header.parse(found.read_bytes()[:65536]).backing_file or b""
            if os.path.basename(backing).decode() == layout.base_name(image):
                arriving.mkdir()
                shutil.copyfile(found, arriving / "disk")
                self.managers[host].ensure_backing(str(arriving / "disk"), image_id=image)

    @rule(instance=instances)
    def destroy(self, instance: str) -> None:
        for name in (instance, f"{instance}_resize", f"{instance}-copy"):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    @rule(hours=st.sampled_from([2, 48, -1000]))
    def let_time_pass(self, hours: int) -> None:
        files.age_tree(self.directory / "_base", seconds=hours * 3600, directories=True)

    @rule(host=hosts, locking=st.booleans())
    def restart(self, host: str, locking: bool) -> None:
        self.managers[host] = self.start(host, locking=locking)

    @rule()
    def forget_a_host(self) -> None:
        manager = self.managers["one"]
        for registered in manager.list_hosts():
            if registered.name == "two":
                manager.forget_host(registered.id)
        self.managers["two"] = self.start("two")

    @invariant()
    def every_overlay_has_its_base(self) -> None:
        for path in self.directory.glob("uuid-*/*"):
            data = path.read_bytes()[:65536]
            if not data.startswith(header.MAGIC):
                continue
            base = pathlib.Path(os.fsdecode(header.parse(data).backing_file or b""))
            assert base.exists(), f"the base of {path} is gone"
            assert base.read_bytes() == CONTENT[base.name], f"the base of {path} is other bytes now"

    @invariant()
    def nothing_strange_lies_about(self) -> None:
        known = {".imagecache", *CONTENT}
        assert {entry.name for entry in (self.directory / "_base").iterdir()} <= known


TwoHosts.TestCase.settings = settings(
    max_examples=campaign.pick(sample=40, whole=20_000),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.campaign
class TestTwoHosts(TwoHosts.TestCase):  # type: ignore[misc,valid-type]
    """Run by unittest and pytest alike."""


del RuleBasedStateMachine
