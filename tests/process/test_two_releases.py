# SPDX-License-Identifier: Apache-2.0
"""Two releases on one directory: processes of the release before, beside those of this one and after them.

The release before is the one that the notes on older releases in :mod:`imagecache_lib.store.layout` are
about. Its files come from the history of this repository; where that is not there, as in an sdist, each of
these tests says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any

import imagecache_lib as ic
from imagecache_lib.nova.disk_info import DiskInfo
from imagecache_lib.store import layout

#: The last commit of the release before.
BEFORE = "bdf7ced"

ROOT = pathlib.Path(__file__).resolve().parents[2]

#: Acts on a cache as it is told, a JSON list a line, with the API that both releases have.
ACTOR = """
import json, os, sys
import imagecache_lib as ic
instances, images = sys.argv[1], json.loads(sys.argv[2])
source = ic.FileSource({name: ic.FileImage(path, "raw") for name, path in images.items()})
config = ic.CacheConfig(
    instances_path=instances, remove_unused_original_minimum_age_seconds=0, space_minimum_age_seconds=0,
    stage_idle_seconds=int(sys.argv[4]), num_retries=0,
)
cache = ic.ImageCacheManager(config, source, "qcow2", host=ic.Host(name=sys.argv[3]), observers=[])
def act(what, *given):
    if what == "where":
        return ic.__file__
    if what == "spawn":
        os.makedirs(os.path.dirname(given[1]), exist_ok=True)
        return cache.create_disk(*given).base
    if what == "cached":
        return cache.cache_image(*given).value
    if what == "backing":
        return cache.ensure_backing(given[0], image_id=given[1]).name
    if what == "pass":
        reported = None if given[0] is None else [ic.Instance(**each) for each in given[0]]
        report = cache.verify_base_images(reported)
        return [{base.name: base.reason for base in report.bases if not base.evicted}, list(report.problems)]
    if what == "pin":
        return cache.pin(given[0], owner=given[1])
    if what == "unpin":
        return cache.unpin(given[0], owner=given[1])
    if what == "pins":
        return [pin.owner for base in cache.list_bases() for pin in base.pins]
    if what == "evict":
        return cache.evict_image(given[0])
    if what == "scrub":
        return [base.verdict.value for base in cache.scrub(rate=0).bases]
    raise ValueError(what)
for line in sys.stdin:
    try:
        answer = ["returned", act(*json.loads(line))]
    except ic.ImageCacheError as error:
        answer = [type(error).__name__, error.cause]
    print(json.dumps(answer), flush=True)
"""

#: Tells whether the release before would write a disk.info now, or wait. It does not read it back.
WRITES = """
import sys
import imagecache_lib as ic
from imagecache_lib.backends.disk_info import DiskInfo
config = ic.CacheConfig(instances_path=sys.argv[1], lock_timeout=0.01)
with DiskInfo(config, ic.Host())._locked(sys.argv[2]) as got:
    print(got)
"""


@functools.cache
def release_before() -> pathlib.Path:
    """Return a directory with the package of the release before.

    :raises SkipTest: the repository's history is not here.
    """
    directory = pathlib.Path(tempfile.mkdtemp(prefix="imagecache-before-"))
    unittest.addModuleCleanup(shutil.rmtree, directory)
    words = ["git", "-C", str(ROOT), "archive", "--format=tar", BEFORE, "imagecache_lib"]
    try:
        archive = subprocess.run(words, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        # Not something to install: a shallow clone and an sdist have no history.
        raise unittest.SkipTest("the release before is not in the history of this checkout") from error
    subprocess.run(["tar", "x", "-C", str(directory)], input=archive, check=True)
    return directory


class Actor:
    """A process of one release."""

    def __init__(self, package: pathlib.Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", ACTOR, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        # Not the package that is installed, nor the one in the working directory.
        if self.act("where") != str(package / "imagecache_lib" / "__init__.py"):
            raise AssertionError("another release than the one meant was loaded")

    def ask(self, *what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        kind, value = json.loads(self._process.stdout.readline())
        if kind != "returned":
            raise AssertionError(f"{kind}: {value}")
        return value

    def act(self, *what: Any) -> Any:
        self.ask(*what)
        return self.answer()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class TwoReleasesCase(unittest.TestCase):
    def setUp(self) -> None:
        release_before()
        directory = tempfile.TemporaryDirectory(prefix="imagecache-two-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.instances = self.directory / "instances"
        self.instances.mkdir()
        self.images = {}
        for number in range(3):
            path = self.directory / f"image-{number}"
            path.write_bytes(random.Random(number).randbytes(2**20))
            self.images[f"image-{number}"] = str(path)

    def actor(self, package: pathlib.Path, *, host: str = "here", idle: int = 3600) -> Actor:
        actor = Actor(package, str(self.instances), json.dumps(self.images), host, str(idle))
        self.addCleanup(actor.kill)
        return actor

    def before(self, **options: Any) -> Actor:
        return self.actor(release_before(), **options)

    def now(self, **options: Any) -> Actor:
        return self.actor(ROOT, **options)

    def both_ways(self) -> Iterator[tuple[Actor, Actor]]:
        """Yield a process of either release as the first to act, and one of the other."""
        for releases in ((self.before, self.now), (self.now, self.before)):
            yield releases[0](), releases[1]()
            shutil.rmtree(self.instances)
            self.instances.mkdir()

    def disk(self, instance: str = "vm") -> str:
        return str(self.instances / instance / "disk")

    def base(self, image: str = "image-0") -> pathlib.Path:
        return self.instances / "_base" / layout.base_name(image)

    def content(self, disk: str) -> str:
        flat = self.directory / "flat"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, flat], check=True)
        return hashlib.sha256(flat.read_bytes()).hexdigest()

    def original(self, image: str = "image-0") -> str:
        return hashlib.sha256(pathlib.Path(self.images[image]).read_bytes()).hexdigest()


class TestSpawnAndPass(TwoReleasesCase):
    def test_each_uses_what_the_other_fetched(self) -> None:
        for first, second in self.both_ways():
            self.assertEqual("cached", first.act("cached", "image-0"))
            inode = self.base().stat().st_ino
            self.assertEqual("existing", second.act("cached", "image-0"))
            second.act("spawn", "image-0", self.disk())
            self.assertEqual((inode, self.original()), (self.base().stat().st_ino, self.content(self.disk())))
            self.assertEqual(["sound"], second.act("scrub"))

    def test_each_keeps_what_the_others_disks_need(self) -> None:
        for first, second in self.both_ways():
            first.act("spawn", "image-0", self.disk())
            for actor in (second, first, second):
                kept, problems = actor.act("pass", [])
                self.assertEqual(([self.base().name], []), (list(kept), problems))

    def test_each_evicts_what_nothing_needs_any_more(self) -> None:
        for first, second in self.both_ways():
            first.act("spawn", "image-0", self.disk())
            for actor in (first, second):
                actor.act("pass", [])
            shutil.rmtree(os.path.dirname(self.disk()))
            self.assertEqual([{}, []], second.act("pass", []))
            self.assertFalse(self.base().exists())
            self.assertEqual([{}, []], first.act("pass", []))
            private = self.instances / "_base" / ".imagecache"
            left = [*(private / "records").iterdir(), *(private / "trash").iterdir()]
            self.assertEqual([], left)

    def test_each_makes_sure_of_the_others_disks(self) -> None:
        for first, second in self.both_ways():
            first.act("spawn", "image-0", self.disk())
            self.base().unlink()
            self.assertEqual(self.base().name, second.act("backing", self.disk(), "image-0"))
            self.assertEqual(self.original(), self.content(self.disk()))

    def test_a_base_is_unlinked_only_when_hosts_of_both_releases_looked(self) -> None:
        for releases in ((self.before, self.now), (self.now, self.before)):
            first, second = releases[0](host="one"), releases[1](host="two")
            first.act("cached", "image-0")
            second.act("cached", "image-1")
            first.act("pass", [])
            trash = self.instances / "_base" / ".imagecache" / "trash"
            self.assertEqual(2, len(list(trash.iterdir())))
            second.act("pass", [])
            first.act("pass", [])
            self.assertEqual([], list(trash.iterdir()))

    def test_what_either_left_in_flight_is_swept_by_the_other(self) -> None:
        for first, second in ((self.before, self.now), (self.now, self.before)):
            actor = first()
            actor.act("cached", "image-0")
            actor.kill()
            stage = self.instances / "_base" / ".imagecache" / "stage"
            for name, data in (
                ("0" * 32, b"half"),
                (f"{'0' * 32}.json", b'{"name": "swap_1", "reserved": 9, "record": null, "origin": ""}'),
                (f"{layout.base_name('image-0')}.{'0' * 32}.waits", b""),
                (f"{layout.base_name('image-0')}.failed", b"{}"),
            ):
                (stage / name).write_bytes(data)
                os.utime(stage / name, (0, 0))
            second(idle=1).act("pass", None)
            left = sorted(each.name for each in stage.iterdir())
            # The release before knows nothing of those who wait, and is not disturbed by them.
            self.assertEqual([], [each for each in left if not each.endswith((".waits", ".failed"))])
            self.now(idle=1).act("pass", None)
            self.assertEqual([], list(stage.iterdir()))


class TestPins(TwoReleasesCase):
    def test_each_keeps_what_the_other_pinned(self) -> None:
        for first, second in self.both_ways():
            first.act("cached", "image-0")
            first.act("pin", "image-0", "operator")
            for actor in (second, first):
                kept, _problems = actor.act("pass", [])
                self.assertIn("pinned", kept[self.base().name])

    def test_what_is_unpinned_goes_in_either(self) -> None:
        for first, second in self.both_ways():
            first.act("cached", "image-0")
            first.act("pin", "image-0", "operator")
            second.act("pass", [])
            self.assertTrue(first.act("unpin", "image-0", "operator"))
            self.assertEqual([{}, []], second.act("pass", []))

    def test_pins_of_both_releases_count_together(self) -> None:
        for first, second in self.both_ways():
            first.act("cached", "image-0")
            first.act("pin", "image-0", "first")
            second.act("pin", "image-0", "second")
            self.assertTrue(first.act("unpin", "image-0", "first"))
            for actor in (first, second):
                self.assertIn("pinned", actor.act("pass", [])[0][self.base().name])
            self.assertTrue(second.act("unpin", "image-0", "second"))
            for actor in (first, second):
                self.assertEqual({}, actor.act("pass", [])[0])


class TestLastReadings(TwoReleasesCase):
    def volume(self) -> pathlib.Path:
        """Let the instance's directory be a link to another volume."""
        volume = self.directory / "volume"
        volume.mkdir()
        (self.instances / "vm").symlink_to(volume)
        return volume

    def test_what_one_saw_on_a_volume_the_other_remembers(self) -> None:
        for first, second in self.both_ways():
            volume = self.volume()
            first.act("spawn", "image-0", self.disk())
            first.act("pass", [])
            volume.rename(self.directory / "unmounted")
            for actor in (second, first, second):
                kept, problems = actor.act("pass", [])
                self.assertEqual([self.base().name], list(kept))
                self.assertTrue(problems)
            (self.directory / "unmounted").rename(volume)
            shutil.rmtree(volume)
            (self.instances / "vm").unlink()

    def test_the_marker_in_the_readings_is_no_disk_of_the_release_before(self) -> None:
        now, before = self.now(), self.before()
        now.act("spawn", "image-0", self.disk())
        now.act("pass", [])
        (readings,) = (self.instances / "_base" / ".imagecache" / "hosts").glob("*.readings")
        self.assertIn(b'""', readings.read_bytes())
        self.assertEqual([], before.act("pass", [])[1])
        self.assertNotIn(b'"": []', readings.read_bytes())
        self.assertEqual([], now.act("pass", [])[1])

    def test_a_disk_that_only_the_release_before_saw_is_remembered(self) -> None:
        now, before = self.now(), self.before()
        now.act("pass", [])
        volume = self.volume()
        before.act("spawn", "image-0", self.disk())
        before.act("pass", [])
        (self.instances / "vm").unlink()
        kept, problems = now.act("pass", [])
        self.assertEqual([self.base().name], list(kept))
        self.assertIn("imagecache disk forget", problems[0])
        self.assertTrue(volume.exists())


class TestOneAfterTheOther(TwoReleasesCase):
    def test_one_writes_no_disk_info_while_the_other_does(self) -> None:
        (self.instances / "vm").mkdir()
        (self.instances / "locks").mkdir()
        (self.directory / "link").symlink_to(self.instances / "vm")

        def writes() -> str:
            words = [sys.executable, "-P", "-c", WRITES, str(self.instances)]
            environment = {**os.environ, "PYTHONPATH": str(release_before())}
            words.append(str(self.instances / "vm" / "disk.info"))
            return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout

        config = ic.CacheConfig(instances_path=str(self.instances))
        with DiskInfo(config, ic.System()).pinned(str(self.directory / "link" / "disk"), "qcow2"):
            self.assertEqual("False\n", writes())
        self.assertEqual("True\n", writes())

    def test_an_upgrade_and_the_way_back(self) -> None:
        """All that one release left, the next serves, keeps and evicts; and again the other way."""
        for number, release in enumerate((self.before, self.now, self.before, self.now)):
            actor = release()
            actor.act("spawn", "image-0", self.disk(f"vm{number}"))
            actor.act("cached", "image-1")
            actor.act("pin", "image-2", f"owner{number}")
            actor.act("cached", "image-2")
            kept, problems = actor.act("pass", [{"uuid": f"vm{number}", "host": "here", "images": []}])
            self.assertEqual([], problems)
            self.assertEqual({self.base("image-0").name, self.base("image-2").name}, set(kept))
            for earlier in range(number + 1):
                self.assertEqual(self.original(), self.content(self.disk(f"vm{earlier}")))
            actor.kill()


class TestAtOnce(TwoReleasesCase):
    def test_no_disk_loses_its_base_while_both_spawn_and_evict(self) -> None:
        actors = [self.before(), self.now(), self.before(host="other"), self.now(host="other")]
        chance, disks, turn = random.Random(7), [], 0
        for _round in range(20):
            for number, actor in enumerate(actors):
                turn += 1
                image = f"image-{chance.randrange(3)}"
                if chance.random() < 0.6:
                    disks.append((self.disk(f"vm{turn}"), image))
                    actor.ask("spawn", image, disks[-1][0])
                elif number % 2:
                    actor.ask("pass", [])
                else:
                    actor.ask("pass", None)
            for actor in actors:
                actor.answer()
            if len(disks) > 12:
                disk, _image = disks.pop(chance.randrange(len(disks)))
                shutil.rmtree(os.path.dirname(disk))
        for disk, image in disks:
            self.assertEqual(self.original(image), self.content(disk), disk)
