# SPDX-License-Identifier: Apache-2.0
"""Each small file of a cache, and what lies beside it, replaced by what it should never be.

None may stop more than it is about: a call ends, with the library's error if need be; a base that a disk
needs stays; and what a link leads to is left as it is.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
import stat
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping

import imagecache_lib as ic
from imagecache_lib.store import layout
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import raw_image

A, B, C = "image-a", "image-b", "image-c"
_IMAGES = {image: raw_image(number, 2**16) for number, image in enumerate((A, B, C))}
_NAMES = {image: layout.base_name(image) for image in _IMAGES}

#: Of files that another process or host made.
_OTHER = "ab" * 16

#: How long a call may take, in seconds.
_LIMIT = 60


def _json(**fields: object) -> Callable[[pathlib.Path], object]:
    return lambda path: path.write_text(json.dumps(fields))


def _zeros(path: pathlib.Path) -> None:
    path.touch()
    os.truncate(path, 10 * 2**30)


_HUGE = "9" * 4000
#: The keys of all that is written as JSON.
_ALL = (
    *("name", "image_id", "pins", "owner", "expires", "roots", "cleared", "version", "directories", "report"),
    *("lost", "readings", "record", "reserved", "at", "what", "why", "host", "process", "program", "schema"),
    *("digest", "inode", "size"),
)


#: What is put in a file's place, by what it is.
ODDITIES: Mapping[str, Callable[[pathlib.Path], object]] = {
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda path: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5)),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link elsewhere": lambda path: path.symlink_to(_victim(path)),
    "empty": lambda path: path.write_bytes(b""),
    "ten gigabytes of zeros": _zeros,
    "noise": lambda path: path.write_bytes(os.urandom(5000)),
    "deep lists": lambda path: path.write_bytes(b"[" * 200_000),
    "deep objects": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "a list": lambda path: path.write_text("[1, null, {}]"),
    "null": lambda path: path.write_text("null"),
    "a number of 100,000 digits": lambda path: path.write_bytes(b"9" * 100_000),
    "no numbers": _json(**dict.fromkeys(_ALL, float("nan"))),
    "huge numbers": lambda path: path.write_text("{" + ",".join(f'"{key}": {_HUGE}' for key in _ALL) + "}"),
    "lists": _json(**{key: [[{}], None] for key in _ALL}),
    "objects": _json(**{key: {"a": [None]} for key in _ALL}),
    "no text": _json(**dict.fromkeys(_ALL, "\ud800\n\x1b[2J")),
    "keys twice": lambda path: path.write_text('{"name": "a", "name": 1, "pins": [], "pins": 2}'),
    "a report of odd types": _json(
        version=1, roots={}, lost={}, directories=[], report=[["u", "h", [1, {}], [None], 0, ["x"]]]
    ),
}


def _victim(path: pathlib.Path) -> pathlib.Path:
    home = next(each.parent for each in path.parents if each.name == "instances")
    return home / "victim"


class World:
    """A cache with a disk on one base, a second base, and a pin on a third image.

    :param home: an existing, empty directory.
    """

    def __init__(self, home: pathlib.Path) -> None:
        self.home = home
        self.instances = home / "instances"
        self.instances.mkdir()
        (home / "victim").write_bytes(b"victim")
        (self.instances / "vm").mkdir()
        manager = self.manager()
        manager.create_disk(A, str(self.instances / "vm" / "disk"), size=2**20)
        manager.pin(C, owner="me")
        manager.verify_base_images([])
        manager.cache_image(B)  # which a pass would have taken away, and each call is to find
        manager.scrub()
        self.own_id = next(host.id for host in manager.list_hosts())
        self._numbers = itertools.count()

    def manager(self) -> ic.ImageCacheManager:
        config = ic.CacheConfig(
            instances_path=str(self.instances),
            num_retries=0,
            lock_timeout=3.0,
            remove_unused_original_minimum_age_seconds=0,
            space_minimum_age_seconds=0,
        )
        host = ic.System(name="here")
        return ic.ImageCacheManager(config, FakeSource(_IMAGES), backend="qcow2", host=host, observers=())

    def places(self) -> Mapping[str, tuple[pathlib.Path, ...]]:
        """Return the files that are replaced together, since they have nothing to do with each other."""
        bases, locks = self.instances / "_base", self.instances / "locks"
        private = bases / ".imagecache"
        records, stage, hosts, pins = (private / name for name in ("records", "stage", "hosts", "pins"))
        return {
            "what lies beside": (
                records / f"{_NAMES[A]}.sums",
                records / f"{_NAMES[A]}.pieces",
                records / f"{_NAMES[B]}.json",
                stage / f"{_NAMES[A]}.{_OTHER}.waits",
                stage / f"{_NAMES[A]}.failed",
                stage / f"{_OTHER}.outside",
                private / "spare",
                private / "scrubbed",
                private / "history" / "0.old",
                hosts / f"{_OTHER}.readings",
                bases / f"{_NAMES[C]}.part",
                bases / "od\nd \udcff",
                self.instances / "od\nd \udcff",
                self.instances / "vm" / "od\nd \udcff",
            ),
            "a note": (
                stage / f"{_OTHER}.json",
                private / "history" / self.own_id,
                self.instances / "vm" / "disk.1",
                self.instances / "compute_nodes",
                pins / f"{_NAMES[B]}.json",
            ),
            "a file in flight": (stage / _OTHER, pins / _NAMES[B] / f"{'c' * 40}.json"),
            "another host": (hosts / f"{_OTHER}.json",),
            "the last scan": (hosts / f"{self.own_id}.scan",),
            "the last readings": (hosts / f"{self.own_id}.readings",),
            "both": (hosts / f"{self.own_id}.scan", hosts / f"{self.own_id}.readings", pins / _NAMES[A]),
            "in the trash": (
                private / "trash" / f"{_NAMES[B]}.{_OTHER}",
                self.instances / "vm" / "disk.info",
            ),
            "a base in the trash": (
                private / "trash" / f"{_NAMES[C]}.{_OTHER}" / "base",
                locks / f"nova-{_NAMES[A]}",
            ),
            "pins": (pins / _NAMES[B], bases / _NAMES[C]),
            "the own host": (hosts / f"{self.own_id}.json",),
            "a record": (records / f"{_NAMES[A]}.json",),
            "a base": (bases / _NAMES[B], locks / "nova-imagecache-space"),
            "the version": (private / "version",),
        }

    def replace(self, place: str, oddity: str) -> None:
        """Put something odd in the place of some files."""
        for path in self.places()[place]:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            ODDITIES[oddity](path)
            if path.parent.name == "stage":
                note = path.with_suffix(".json")
                if path.name == _OTHER:
                    fields = {"name": _NAMES[A], "reserved": 4096, "record": None}
                    note.write_text(json.dumps(fields))
                elif path == note:
                    path.with_suffix("").write_bytes(b"data")

    def calls(self) -> Iterator[tuple[str, Callable[[ic.ImageCacheManager], object]]]:
        """Yield every public call, those last that evict."""
        disk = str(self.instances / "vm" / "disk")
        yield "list_bases", lambda manager: manager.list_bases()
        yield "list_pins", lambda manager: manager.list_pins()
        yield "list_hosts", lambda manager: manager.list_hosts()
        yield "history", lambda manager: manager.history(A)
        yield "is_cached", lambda manager: manager.is_cached(A)
        yield "a hit", lambda manager: self._spawn(manager, A)
        yield "reuse", lambda manager: manager.create_disk(A, disk, size=2**20, if_exists="reuse")
        yield "a miss", lambda manager: self._spawn(manager, C)
        yield "pin", lambda manager: manager.pin(A, owner="x")
        yield "unpin", lambda manager: manager.unpin(A, owner="x")
        yield "swap", lambda manager: manager.create_swap(f"{disk}.{next(self._numbers)}", size_mb=1)
        yield "get_space", lambda manager: manager.get_space()
        yield "get_disk_usage", lambda manager: manager.get_disk_usage()
        yield "a dry run", lambda manager: manager.verify_base_images([], dry_run=True)
        yield "explain", lambda manager: manager.explain(A, [])
        yield "audit", lambda manager: manager.audit([])
        yield "survey", lambda manager: manager.survey([])
        yield "preflight", lambda manager: manager.preflight()
        yield "scrub", lambda manager: manager.scrub()
        yield "evict_image", lambda manager: manager.evict_image(B)
        yield "evict what is in use", lambda manager: manager.evict_image(A)
        yield "prune", lambda manager: manager.prune([])
        yield "a pass", lambda manager: manager.verify_base_images([])

    def _spawn(self, manager: ic.ImageCacheManager, image_id: str) -> None:
        directory = self.instances / f"vm-{next(self._numbers)}"
        directory.mkdir()
        disk = manager.create_disk(image_id, str(directory / "disk"), size=2**20)
        manager.ensure_backing(disk.target, image_id=image_id)
        manager.remove_disk(disk)
        shutil.rmtree(directory)

    def wrong(self) -> Iterator[str]:
        """Make every call. Yields what is wrong, a text each."""
        manager = self.manager()
        for name, call in self.calls():
            error = _ending(lambda call=call, manager=manager: call(manager))  # type: ignore[misc]
            if error is not None and not isinstance(error, ic.ImageCacheError):
                yield f"{name}: {''.join(traceback.format_exception(error))}"
        if not (self.instances / "_base" / _NAMES[A]).is_file():
            yield "the base of a disk is gone"
        if (self.home / "victim").read_bytes() != b"victim":
            yield "a file outside was changed"


def _ending(call: Callable[[], object]) -> BaseException | None:
    """Return what a call raises, or None if it returns."""
    endings: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            endings.append(None)
        except BaseException as error:
            endings.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_LIMIT)
    return endings[0] if endings else TimeoutError("it does not end")
