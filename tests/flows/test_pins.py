# SPDX-License-Identifier: Apache-2.0
"""Pins of several owners, with and without locks, and beside a release that keeps them in one file."""

from __future__ import annotations

import json
import os
import threading

from imagecache_lib import errors
from imagecache_lib.store import layout, pins
from imagecache_lib.system import locks
from tests.support.cache_case import ID, CacheCase

NAME = layout.base_name(ID)
DAY = 86400


class TestPins(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.pins = self.instances / "_base" / ".imagecache" / "pins"

    def owners(self) -> set[str]:
        (base,) = self.manager().list_bases()
        return {pin.owner for pin in base.pins}

    def evicted(self) -> bool:
        os.utime(self.base(), (1, 1))
        os.utime(self.record(), (1, 1))
        return bool(self.manager().verify_base_images([]).evicted)

    def former(self) -> dict[str, float | None]:
        """Return what an earlier release reads."""
        path = self.pins / f"{NAME}.json"
        if not path.exists():
            return {}
        return {each["owner"]: each["expires"] for each in json.loads(path.read_text())["pins"]}

    def write_former(self, **owners: float | None) -> None:
        found = [{"owner": owner, "expires": expires} for owner, expires in owners.items()]
        (self.pins / f"{NAME}.json").write_text(json.dumps({"image_id": ID, "pins": found}))

    def at_once(self, *actions: object) -> None:
        failed: list[BaseException] = []

        def run(action: object) -> None:
            try:
                action()  # type: ignore[operator]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failed)

    def test_without_locks_none_of_many_pins_at_once_is_lost(self) -> None:
        self.manager().cache_image(ID)
        owners = {f"owner-{number}" for number in range(120)}
        managers = [self.manager(host=self.host(locking=False)) for _ in range(4)]
        self.at_once(
            *(
                lambda owner=owner, manager=managers[number % 4]: manager.pin(ID, owner=owner)
                for number, owner in enumerate(sorted(owners))
            )
        )
        self.assertEqual(owners, self.owners())
        self.assertFalse(self.evicted())

    def test_without_locks_an_unpin_takes_no_other_owners_pin_away(self) -> None:
        manager = self.manager(host=self.host(locking=False))
        manager.cache_image(ID)
        for number in range(40):
            manager.pin(ID, owner="going")
            self.at_once(
                lambda: manager.unpin(ID, owner="going"),
                lambda number=number: manager.pin(ID, owner=f"staying-{number}"),
            )
            self.assertEqual({f"staying-{each}" for each in range(number + 1)}, self.owners())

    def test_an_owner_has_one_pin(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.pin(ID, owner="a/../b", expires=self.now() + DAY)
        manager.pin(ID, owner="a/../b", expires=self.now() + 2 * DAY)
        (base,) = manager.list_bases()
        self.assertEqual(1, len(base.pins))
        self.assertTrue(manager.unpin(ID, owner="a/../b"))
        self.assertFalse(manager.unpin(ID, owner="a/../b"))
        self.assertEqual([], os.listdir(self.pins))
        self.assertTrue(self.evicted())

    def now(self) -> float:
        return self.base().stat().st_mtime

    def test_a_torn_pin_keeps_its_base_and_is_named(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.pin(ID, owner="night-shift")
        (path,) = (self.pins / NAME).iterdir()
        no_time = '{"image_id": "x", "pins": [{"owner": "x", "expires": true}]}'
        for damage in ("", "{", "[]", '{"image_id": "x", "pins": 7}', no_time):
            with self.subTest(damage):
                path.write_text(damage)
                self.assertFalse(self.evicted())
                (base,) = manager.verify_base_images([]).bases
                self.assertIn(str(path), base.reason)
        path.unlink()
        path.mkdir()
        self.assertFalse(self.evicted())

    def test_what_is_no_pin_in_the_directory_of_pins_is_passed_over(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        (self.pins / NAME).mkdir()
        leftover = self.pins / NAME / f".{'0' * 40}.json.{'0' * 32}.new"
        leftover.write_text("{")
        os.utime(leftover, (1, 1))
        self.assertTrue(self.evicted())
        self.assertFalse(leftover.exists())

    # -- beside an earlier release -------------------------------------------------------------------

    def test_the_pins_of_an_earlier_release_count(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.write_former(old=None, gone=1.0)
        self.assertEqual({"old", "gone"}, self.owners())
        self.assertFalse(self.evicted())
        self.assertTrue(manager.unpin(ID, owner="old"))
        self.assertTrue(self.evicted())

    def test_an_earlier_release_keeps_what_is_pinned_here_until_it_no_longer_is(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.pin(ID, owner="one")
        self.assertEqual({pins.STAND_IN: None}, self.former())
        manager.pin(ID, owner="two")
        manager.unpin(ID, owner="one")
        self.assertEqual({pins.STAND_IN: None}, self.former())
        self.assertEqual({"two"}, self.owners())
        manager.unpin(ID, owner="two")
        self.assertEqual({}, self.former())

    def test_the_pins_of_an_earlier_release_stay_when_others_come_and_go(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.write_former(old=None, older=5.0)
        manager.pin(ID, owner="new")
        self.assertEqual({"old": None, "older": 5.0, pins.STAND_IN: None}, self.former())
        manager.unpin(ID, owner="new")
        self.assertEqual({"old": None, "older": 5.0}, self.former())

    def test_pins_that_ended_go_and_the_others_stay(self) -> None:
        manager = self.manager(stage_idle_seconds=60)
        manager.cache_image(ID)
        manager.pin(ID, owner="ended", expires=self.now() - 61)
        manager.pin(ID, owner="ended just now", expires=self.now() - 1)
        manager.pin(ID, owner="holds", expires=self.now() + DAY)
        manager.verify_base_images([])
        self.assertEqual({"ended just now", "holds"}, self.owners())
        manager.unpin(ID, owner="holds")
        manager.pin(ID, owner="ended just now", expires=self.now() - 61)
        manager.verify_base_images([])
        self.assertEqual([], os.listdir(self.pins))

    def test_a_pin_that_a_crash_left_under_another_name_is_its_owners_again(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        manager.pin(ID, owner="holds")
        (path,) = (self.pins / NAME).iterdir()
        path.rename(path.with_name(f"{'0' * 40}.json"))
        self.assertEqual({"holds"}, self.owners())
        manager.verify_base_images([])
        manager.unpin(ID, owner="holds")
        self.assertEqual([], os.listdir(self.pins))

    def test_an_owners_pin_here_stands_for_its_pin_there(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        self.write_former(job=None)
        manager.pin(ID, owner="job", expires=1.0)
        self.assertTrue(self.evicted())
        manager.unpin(ID, owner="job")
        self.assertEqual({}, self.former())

    def test_a_torn_file_of_an_earlier_release_is_never_written_over(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        former = self.pins / f"{NAME}.json"
        former.write_text('{"image_id": "x", "pi')
        manager.pin(ID, owner="new")
        manager.unpin(ID, owner="new")
        self.assertEqual('{"image_id": "x", "pi', former.read_text())
        self.assertFalse(self.evicted())

    def test_a_pin_that_is_interrupted_leaves_none(self) -> None:
        manager = self.manager()
        lock = str(self.instances / "locks" / layout.lock_name(pins.LOCK))

        def interrupt() -> None:
            raise KeyboardInterrupt

        manager.list_hosts()  # makes the directory of locks
        self.points.at("lock:waiting", interrupt)
        with locks.without_waiting(lock, host=self.host()), self.assertRaises(KeyboardInterrupt):
            manager.pin(ID, owner="interrupted")
        self.assertEqual((), manager.list_pins())

    def test_a_pin_that_fails_leaves_what_was_there_before(self) -> None:
        manager = self.manager()
        manager.cache_image(ID)
        where = layout.Layout(str(self.instances / "_base"), str(self.instances / "locks"))
        os.mkdir(where.lock(pins.LOCK))  # what earlier releases read cannot be written
        with self.assertRaises(errors.BackendError):
            manager.pin(ID, owner="deployer")
        self.assertEqual((), manager.list_pins())
        os.rmdir(where.lock(pins.LOCK))
        manager.pin(ID, owner="deployer", expires=2e9)
        (before,) = manager.list_pins()
        os.unlink(where.former_pins(layout.base_name(ID)))
        os.unlink(where.lock(pins.LOCK))
        os.mkdir(where.lock(pins.LOCK))
        with self.assertRaises(errors.BackendError):
            manager.pin(ID, owner="deployer")
        self.assertEqual((before,), manager.list_pins())
