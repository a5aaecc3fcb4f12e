# SPDX-License-Identifier: Apache-2.0
"""A dry run is the pass, what is not there is not thereby deleted, and every spelling of a name is found."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import unittest
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imagecache_lib as ic
from imagecache_lib.store import layout, membership
from imagecache_lib.store.hosts import HostRef
from imagecache_lib.store.last_scan_form import parse, to_json
from imagecache_lib.store.seen import (
    Boundary,
    Identity,
    LastScan,
    SeenDirectory,
    SeenDisk,
)
from imagecache_lib.testing.sources import FakeSource
from imagecache_lib.upkeep import evict, policy
from imagecache_lib.upkeep.absence import Absence
from imagecache_lib.upkeep.facts import Found, ReadDirectory
from imagecache_lib.upkeep.inventory import Entry
from imagecache_lib.upkeep.names import Names
from imagecache_lib.upkeep.policy import Fate, InTrash, Limits, Situation
from imagecache_lib.upkeep.references import LEASED, References
from tests.support import files

NOW = 2_000_000_000.0
NAMES = [layout.base_name(f"image-{number}") for number in range(4)]
OTHERS = st.lists(st.builds(HostRef, st.sampled_from("abc"), st.sampled_from("123")), max_size=2).map(tuple)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Situation, References]:
    """Draw what a pass may have to decide about."""
    bases = tuple(
        Entry(
            name=name,
            kind=layout.Kind.ORIGINAL,
            allocated=draw(st.integers(0, 2**30)),
            apparent=2**30,
            last_use=NOW - draw(st.sampled_from([0, 3600, 86399, 86400, 10**7])),
            links=draw(st.integers(1, 2)),
        )
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    )
    trash = tuple(
        InTrash(name, f"{name}.{number}", 4096, draw(st.integers(1, 2)), draw(st.booleans()), draw(OTHERS))
        for number, name in enumerate(draw(st.lists(st.sampled_from(NAMES), max_size=3)))
    )
    held = dict.fromkeys(draw(st.lists(st.sampled_from(NAMES), max_size=1)), LEASED)
    users = dict.fromkeys(draw(st.lists(st.sampled_from(NAMES), max_size=2)), "a user")
    unknown = draw(st.none() | st.just("something cannot be told"))
    return Situation(bases, trash, held=held, others=draw(OTHERS)), References(users, unknown)


class TestDecide(unittest.TestCase):
    @given(situations(), st.booleans())
    def test_nothing_that_is_needed_held_or_unknown_goes(
        self, drawn: tuple[Situation, References], remove: bool
    ) -> None:
        situation, references = drawn
        decided = policy.decide(situation, references, Limits(remove=remove), now=NOW)
        for victim in decided.plan.victims:
            self.assertTrue(remove and references.unknown is None)
            self.assertNotIn(victim.entry.name, {**references.users, **situation.held})
        for decision in decided.trash:
            if decision.fate is not Fate.PUT_BACK:
                self.assertTrue(remove and references.unknown is None)
                self.assertNotIn(decision.entry.name, references.users)
            if decision.fate is Fate.GOES:
                self.assertEqual((), decision.entry.waiting)

    @given(st.sampled_from([LEASED, evict.PUBLISHED_NOW]), st.integers(86400, 10**7))
    def test_an_old_base_that_is_held_stays_and_says_by_whom(self, held: str, age: int) -> None:
        base = Entry(NAMES[0], layout.Kind.ORIGINAL, 4096, 4096, NOW - age, 1)
        for by, goes in (({NAMES[0]: held}, False), ({NAMES[1]: held}, True)):
            decided = policy.decide(Situation((base,), held=by), References({}), Limits(), now=NOW)
            (decision,) = decided.plan.decisions
            self.assertEqual((goes, goes), (decision.evict, decision.reason != held))

    @given(situations())
    def test_a_dry_run_says_of_everything_what_becomes_of_it(
        self, drawn: tuple[Situation, References]
    ) -> None:
        situation, references = drawn
        decided = policy.decide(situation, references, Limits(), now=NOW)
        foreseen = evict.foresee(decided, situation.others)
        told = [victim.entry.name for victim in decided.plan.victims]
        self.assertEqual(told + [entry.name for entry in situation.trash], [each.name for each in foreseen])


class TestDryRun(unittest.TestCase):
    """On real directories: nothing happens between the two, so that both must say the same."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def test_a_dry_run_reports_what_the_pass_then_does(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(prefix="imagecache-") as directory:
            world = _World(pathlib.Path(directory), data)
            dry = world.manager().verify_base_images(world.report, dry_run=True)
            before = world.bases()
            report = world.manager().verify_base_images(world.report)
            self.assertEqual(dry.bases, report.bases)
            self.assertEqual(dry.problems, report.problems)
            gone = {base.name for base in report.evicted}
            self.assertEqual(before - gone, world.bases())


class _World:
    """A cache with bases in every state that a pass may meet."""

    def __init__(self, instances: pathlib.Path, data: st.DataObject) -> None:
        self.instances = instances
        self.private = instances / "_base" / ".imagecache"
        ids = [f"image-{number}" for number in range(4)]
        manager = self.manager()
        for image_id in ids:
            manager.cache_image(image_id)
            name = layout.base_name(image_id)
            state = data.draw(st.sampled_from(["unused", "young", "disk", "pinned", "linked", "reported"]))
            base = instances / "_base" / name
            if state == "disk":
                files.overlay(instances / f"uuid-{name}" / "disk", base)
            elif state == "pinned":
                manager.pin(image_id, owner="owner")
            elif state == "linked":
                os.link(base, instances / f"link-{name}")
            if state != "young":
                files.age(base, self.private / "records" / f"{name}.json", seconds=2 * 86400)
            if state == "reported":
                self.report = (ic.Instance("uuid", "elsewhere", images=(image_id,)),)
            if data.draw(st.booleans()) and state != "linked":
                entry = self.private / "trash" / f"{name}.{'1' * 32}"
                entry.mkdir()
                base.rename(entry / "base")
        if data.draw(st.booleans()):
            other = membership.HostFile("f" * 32, "silent").to_json()
            (self.private / "hosts" / f"{'f' * 32}.json").write_bytes(other)

    report: tuple[ic.Instance, ...] = ()

    def manager(self) -> ic.ImageCacheManager:
        config = ic.CacheConfig(instances_path=str(self.instances))
        source = FakeSource({f"image-{number}": bytes([number]) * 4096 for number in range(4)})
        return ic.ImageCacheManager(config, source, host=ic.System(name="here"), observers=())

    def in_trash(self) -> set[str]:
        return {base.parent.name.partition(".")[0] for base in (self.private / "trash").glob("*/base")}

    def bases(self) -> set[str]:
        found = {entry.name for entry in (self.instances / "_base").iterdir() if len(entry.name) == 40}
        return found | self.in_trash()


IDENTITIES = st.builds(
    Identity, st.integers(1, 2), st.integers(1, 4), st.sampled_from([0, 7]), st.sampled_from(list(Boundary))
)


def chain(identities: list[Identity]) -> SeenDirectory:
    """Return a directory, of which the first identity is the disk root's."""
    seen: SeenDirectory | None = None
    for depth, identity in enumerate(identities):
        seen = SeenDirectory("/root" + "/d" * depth, identity, seen)
    assert seen is not None
    return seen


class TestAbsence(unittest.TestCase):
    def proved(self, identities: list[Identity], read: list[ReadDirectory], **changes: Any) -> bool:
        directory = chain(identities)
        disk = SeenDisk(f"{directory.path}/disk", (NAMES[0],), directory, instance=changes.get("instance"))
        last = LastScan({disk.path: disk}, {"/root": identities[0]}, changes.get("then_lost", {}))
        roots = {"/root": changes.get("root", identities[0])}
        found = Found((), roots, tuple(read), changes.get("lost", {}))
        return Absence(last, found, changes.get("reported")).is_proved(disk)

    @given(st.lists(IDENTITIES, min_size=1, max_size=3))
    def test_nothing_is_proved_where_nothing_was_read(self, identities: list[Identity]) -> None:
        self.assertFalse(self.proved(identities, []))

    @given(st.lists(IDENTITIES, min_size=2, max_size=4), IDENTITIES)
    def test_nothing_is_proved_behind_a_mount_or_a_link(
        self, identities: list[Identity], now: Identity
    ) -> None:
        root = Identity(9, 9, 9)
        for boundary in (Boundary.MOUNT, Boundary.LINK):
            there = [root, *identities[:-1], Identity(5, 5, 5, boundary)]
            read = ReadDirectory(SeenDirectory("/root", root), {})
            other = ReadDirectory(SeenDirectory("/root" + "/d" * len(identities), now), {})
            self.assertFalse(self.proved(there, [read]))
            self.assertFalse(self.proved(there, [read, other]))

    @given(st.lists(st.integers(10, 99), unique=True, min_size=1, max_size=4), st.data())
    def test_a_plain_directory_that_its_own_lacks_now_was_removed(
        self, inodes: list[int], data: st.DataObject
    ) -> None:
        identities = [Identity(1, inode, 3) for inode in inodes]
        kept = data.draw(st.integers(1, len(identities)))
        directories = [chain(identities[: depth + 1]) for depth in range(kept)]
        read = [
            ReadDirectory(each, {"d": identities[depth + 1].inode} if depth + 1 < kept else {})
            for depth, each in enumerate(directories)
        ]
        self.assertTrue(self.proved(identities, read))
        self.assertFalse(self.proved(identities, read, lost={"/root": 1}), "fsck put something aside since")
        self.assertTrue(self.proved(identities, read, lost={"/root": 1}, then_lost={"/root": 1}))
        # The same numbers on another filesystem are another directory.
        moved = [
            ReadDirectory(
                SeenDirectory(each.seen.path, Identity(1, each.seen.identity.inode, 4)), each.entries
            )
            for each in read
            if each.seen.identity is not None
        ]
        self.assertFalse(self.proved(identities, moved, root=Identity(1, inodes[0], 4)))

    @given(st.lists(IDENTITIES, min_size=1, max_size=3), st.sampled_from([None, "uuid", "another"]))
    def test_an_instance_that_left_the_report_proves_it(
        self, identities: list[Identity], instance: str | None
    ) -> None:
        left = instance == "another"
        self.assertEqual(left, self.proved(identities, [], instance=instance, reported=["uuid"]))
        self.assertFalse(self.proved(identities, [], instance=instance, reported=None))


class TestLastScanOnDisk(unittest.TestCase):
    @given(
        st.lists(
            st.tuples(st.lists(IDENTITIES, min_size=1, max_size=3), st.text("ab", min_size=1)), max_size=4
        )
    )
    def test_what_was_seen_survives_being_stored(self, drawn: list[tuple[list[Identity], str]]) -> None:
        disks = {}
        for identities, name in drawn:
            directory = chain(identities)
            path = f"{directory.path}/{name}"
            disks[path] = SeenDisk(path, tuple(sorted(NAMES[:2])), directory, 5, 6, "uuid")
        report = (ic.Instance("uuid", "here", ("image",), ("name",), 64, (ic.Ephemeral(5),)),)
        last = LastScan(disks, {"/root": Identity(1, 2, 3)}, {"/": 4}, report)
        found = parse(to_json(last))
        assert found is not None
        self.assertEqual(to_json(last), to_json(found))
        self.assertEqual((last.roots, last.lost), (found.roots, found.lost))
        self.assertEqual(report, tuple(found.report or ()))

    @given(
        st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
    )
    def test_nothing_that_is_torn_or_strange_is_believed_or_fatal(self, data: bytes) -> None:
        self.assertIsNone(parse(data))

    @given(
        st.dictionaries(
            st.sampled_from(["roots", "lost", "directories", "report"]),
            st.none()
            | st.integers()
            | st.lists(st.lists(st.integers()))
            | st.dictionaries(st.text(), st.text()),
        )
    )
    def test_fields_of_other_types_are_not_fatal(self, fields: dict[str, Any]) -> None:
        whole = {"version": 1, "roots": {}, "lost": {}, "directories": [], "report": None, **fields}
        parse(json.dumps(whole).encode())


class TestNames(unittest.TestCase):
    names = (*NAMES, f"{NAMES[0]}_20", f"{NAMES[0]}_sm", "swap_64", "ephemeral_5_40d1d2c")

    @given(st.sampled_from(names), st.binary(max_size=60), st.binary(max_size=60))
    def test_a_name_is_found_wherever_it_stands(self, name: str, before: bytes, after: bytes) -> None:
        self.assertIn(name, Names(self.names).find([before + name.encode() + after]))

    @given(
        st.sampled_from(NAMES),
        st.text("0123456789abcdef", max_size=50),
        st.lists(st.integers(0, 3), min_size=40),
    )
    def test_a_name_is_found_however_its_letters_are_written(
        self, name: str, before: str, ways: list[int]
    ) -> None:
        written = "".join(
            (letter, f"\\u{ord(letter):04x}", f"%{ord(letter):02x}", letter.upper())[way]
            for letter, way in zip(name, ways, strict=False)
        )
        self.assertIn(name, Names(self.names).find([f"/{before}{written}".encode()]))

    @given(st.binary(max_size=300))
    def test_nothing_is_found_that_is_not_there(self, text: bytes) -> None:
        self.assertLessEqual(Names(self.names).find([text]), set(self.names))
