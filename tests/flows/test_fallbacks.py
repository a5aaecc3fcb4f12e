# SPDX-License-Identifier: Apache-2.0
"""Several places that may have an image: the one that is wrong is passed over for the next one."""

from __future__ import annotations

import gzip
import hashlib
import threading

import imagecache_lib as ic
from imagecache_lib import errors, events
from imagecache_lib.sources.http import HttpImage, HttpSource
from imagecache_lib.sources.interface import NotPermitted, SourceBusy, SourceRefused, Unauthorized
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import BadServer, Fault
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, MIB, CacheCase, raw_image

GOOD, OTHER = raw_image(1), raw_image(2)
DIGEST = ic.Digest("sha256", hashlib.sha256(GOOD).hexdigest())
OF_OTHER = ic.Digest("sha256", hashlib.sha256(OTHER).hexdigest())

#: What is wrong with a place, as the data that it has, the digest that it states, and what every answer has.
WRONG: dict[str, tuple[bytes, ic.Digest | None, tuple[Fault, ...]]] = {
    "not there": (GOOD, None, (faults.status(404),)),
    "not for this caller": (GOOD, None, (faults.status(403),)),
    "credentials lacking": (GOOD, None, (faults.status(401),)),
    "down": (GOOD, None, (faults.status(503),)),
    "dropping": (GOOD, None, (faults.dropped(),)),
    "page": (GOOD, None, (faults.document(),)),
    "page called data": (GOOD, None, (faults.document("application/octet-stream"),)),
    "compressed": (gzip.compress(GOOD), None, ()),
    "empty": (b"", None, ()),
    "breaking off": (GOOD, None, (faults.truncated(MIB // 2),)),
    "unlike its own digest": (OTHER, ic.Digest("md5", hashlib.md5(GOOD).hexdigest()), ()),
}
#: What shows only by the digest that is demanded.
OTHER_DATA: dict[str, tuple[bytes, ic.Digest | None, tuple[Fault, ...]]] = {
    "another digest stated": (OTHER, OF_OTHER, ()),
    "no digest stated": (OTHER, None, ()),
    "another algorithm stated": (OTHER, ic.Digest("md5", hashlib.md5(OTHER).hexdigest()), ()),
    "short": (GOOD[:-512], None, ()),
    "long": (GOOD + bytes(512), None, ()),
}


class FallbackCase(CacheCase):
    def setUp(self) -> None:
        super().setUp()
        self.server = self.enterContext(BadServer())

    def place(
        self, name: str, data: bytes = GOOD, digest: ic.Digest | None = None, *spoiled: Fault
    ) -> HttpSource:
        """Return a source that reads its image at a path of its own."""
        url = self.server.put(f"/{name}", data)
        self.server.forget(f"/{name}")
        self.server.always_fail(f"/{name}", *spoiled)
        return HttpSource({ID: HttpImage(url, "raw", digest)}, timeout=(60.0, 60.0))

    def gone(self, digest: ic.Digest | None = None) -> HttpSource:
        return self.place("gone", GOOD, digest, faults.status(404))

    def wrong(self, name: str) -> HttpSource:
        data, digest, spoiled = (WRONG | OTHER_DATA)[name]
        return self.place(name.replace(" ", "-"), data, digest, *spoiled)

    def spawned(self, *sources: ic.ImageSource, **fields: object) -> bytes:
        """Return the disk that is made from the first source and the others as fallbacks."""
        request = ic.Request(source=sources[0], fallbacks=sources[1:], **fields)  # type: ignore[arg-type]
        return self.spawn(self.manager(FakeSource({}), num_retries=0), request=request)


class TestThatOnePlaceIsWrong(FallbackCase):
    def test_the_next_one_is_asked_for_the_data_that_are_demanded(self) -> None:
        for name in (*WRONG, *OTHER_DATA):
            with self.subTest(name):
                found = self.spawned(self.gone(DIGEST), self.wrong(name), self.place("right"))
                self.assertEqual(GOOD, found)
                self.assertEqual([], self.in_flight())
                self.manager().evict_image(ID)

    def test_the_next_one_is_asked_without_a_digest_too(self) -> None:
        for name in WRONG:
            with self.subTest(name):
                found = self.spawned(self.gone(), self.wrong(name), self.place("right"))
                self.assertEqual(GOOD, found)
                self.assertEqual([], self.in_flight())
                self.manager().evict_image(ID)

    def test_all_of_them_may_be_wrong_but_the_last(self) -> None:
        wrong = [self.wrong(name) for name in (*WRONG, *OTHER_DATA)]
        self.assertEqual(GOOD, self.spawned(self.gone(DIGEST), *wrong, self.place("right")))
        self.assertEqual([], self.in_flight())

    def test_what_one_place_gives_is_refused_and_the_image_only_if_no_other_gives_it(self) -> None:
        self.spawned(self.gone(), self.wrong("compressed"), self.place("right"))
        self.assertEqual(0, self.happened(events.Rejected))
        self.manager().evict_image(ID)
        with self.assertRaises(errors.ImageRejected):
            self.spawned(self.gone(), self.wrong("compressed"), self.wrong("not there"))
        self.assertEqual(1, self.happened(events.Rejected))

    def test_what_states_another_digest_is_not_transferred(self) -> None:
        self.spawned(self.gone(DIGEST), self.wrong("another digest stated"), self.place("right"))
        self.assertEqual([], self.server.requests("GET", "/another-digest-stated"))

    def test_the_first_may_have_lost_the_data_since_it_was_asked(self) -> None:
        first = self.place("first")
        self.server.always_fail("/first", faults.status(404), method="GET")
        self.assertEqual(GOOD, self.spawned(first, self.place("right")))


class TestThatAllPlacesAreWrong(FallbackCase):
    def failed(self, *sources: ic.ImageSource, **fields: object) -> errors.ImageCacheError:
        with self.assertRaises(errors.ImageCacheError) as caught:
            self.spawned(*sources, **fields)
        self.assertFalse(self.base().exists())
        self.assertEqual([], self.in_flight())
        return caught.exception

    def test_the_error_names_each_place_and_what_is_wrong_with_it(self) -> None:
        names = ("another digest stated", "no digest stated", "page", "not there", "credentials lacking")
        failure = self.failed(self.gone(DIGEST), *[self.wrong(name) for name in names])
        for where, what in (
            ("/gone: no such image", "HTTP 404"),
            ("/another-digest-stated: its sha256 is", OF_OTHER.value),
            ("/no-digest-stated: its sha256 is", DIGEST.value),
            ("/page: ", "document"),
            ("/not-there: no such image", "404"),
            ("/credentials-lacking: the token", "HTTP 401"),
        ):
            self.assertIn(where, str(failure))
            self.assertIn(what, str(failure))
        self.assertIsInstance(failure, SourceRefused)

    def test_who_has_to_act_follows_from_what_was_wrong(self) -> None:
        for names, kind in (
            (("no digest stated", "not there"), errors.ImageRejected),
            (("no digest stated", "down"), errors.SourceError),
            (("another digest stated", "not there"), SourceRefused),
            (("not there", "down"), errors.ImageNotFound),
        ):
            with self.subTest(names):
                failure = self.failed(self.gone(DIGEST), *[self.wrong(name) for name in names])
                self.assertIs(kind, type(failure))
                self.assertIn("none of its 3 sources", str(failure))

    def test_each_is_asked_as_often_as_the_configuration_says(self) -> None:
        wrong = [self.wrong(name) for name in (*WRONG, *OTHER_DATA)]
        self.failed(self.gone(DIGEST), *wrong, self.wrong("no digest stated"))
        for name in (*WRONG, *OTHER_DATA):
            gets = self.server.requests("GET", f"/{name.replace(' ', '-')}")
            whole = [seen for seen in gets if "Range" not in seen.headers]
            self.assertLessEqual(len(whole), 2 if name == "no digest stated" else 4, name)

    def test_secrets_of_addresses_are_not_shown(self) -> None:
        url = self.server.put("/signed", OTHER)
        secret = url.replace("//", "//user:password@") + "?signature=secret"
        signed = HttpSource({ID: HttpImage(secret, "raw")})
        failure = self.failed(self.gone(DIGEST), signed, self.wrong("not there"))
        self.assertIn("/signed: its sha256", str(failure))
        for word in ("password", "secret"):
            self.assertNotIn(word, str(failure))


class TestThatNoOtherPlaceIsAsked(FallbackCase):
    def test_the_first_ones_refusal_and_failure_are_the_answer(self) -> None:
        for status, kind in ((401, Unauthorized), (403, NotPermitted), (503, errors.SourceError)):
            with self.subTest(status=status):
                right = FakeSource({ID: GOOD})
                first = self.place("first", GOOD, DIGEST, faults.status(status))
                with self.assertRaises(kind):
                    self.spawned(first, right)
                self.assertEqual(0, right.describes)

    def test_its_data_that_are_bad_are_the_answer(self) -> None:
        right = FakeSource({ID: GOOD})
        with self.assertRaises(errors.ImageRejected):
            self.spawned(self.place("first", OTHER, DIGEST), right)
        self.assertEqual(0, right.describes)

    def test_none_is_asked_once_the_deadline_would_pass(self) -> None:
        busy, right = FakeSource({ID: GOOD}), FakeSource({ID: GOOD})
        busy.fail_describe(SourceBusy("busy", retry_after=100.0))
        manager = self.manager(FakeSource({}), num_retries=3)
        request = ic.Request(fallbacks=(busy, right), deadline=self.host().clock() + 50)
        with self.assertRaisesRegex(errors.SourceError, "deadline"):
            manager.create_disk(ID, self.target(), request=request)
        self.assertEqual(0, right.describes)

    def test_none_is_asked_after_the_caller_cancelled(self) -> None:
        cancel = threading.Event()

        class Cancelling(FakeSource):
            def describe(self, image_id: str) -> ic.Image:
                cancel.set()
                raise errors.SourceError("down")

        right = FakeSource({ID: GOOD})
        with self.assertRaises(errors.CancelledError):
            self.spawned(self.gone(DIGEST), Cancelling({}), right, cancel=cancel)
        self.assertEqual(0, right.describes)


class TestDownloadsThatBreakOff(FallbackCase):
    """With downloads that go on where an earlier one broke off."""

    def test_one_place_does_not_go_on_with_the_bytes_of_another(self) -> None:
        resume = threading.Event()
        wrong = self.place("wrong", OTHER, None, faults.truncated(MIB))
        found = self.spawned(self.gone(DIGEST), wrong, self.place("right"), resume=resume)
        self.assertEqual(GOOD, found)
        ranges = [seen.headers.get("Range") for seen in self.server.requests("GET", "/right")]
        self.assertEqual([None], ranges)

    def test_the_same_place_goes_on_with_its_own(self) -> None:
        resume = threading.Event()
        sources = self.gone(DIGEST), self.place("half", GOOD, None, faults.truncated(MIB))
        with self.assertRaises(errors.SourceError):
            self.spawned(*sources, resume=resume)
        self.server.forget("/half")
        self.assertEqual(GOOD, self.spawned(*sources, resume=resume))
        self.assertTrue(self.server.requests("GET", "/half")[-1].headers["Range"].startswith("bytes="))

    def test_what_is_shown_to_be_wrong_is_not_left(self) -> None:
        page = self.place("page", OTHER, DIGEST, faults.header("Content-Type", "text/html"))
        with self.assertRaises(SourceRefused):
            self.spawned(page, resume=threading.Event())
        self.assertEqual([], self.in_flight())
