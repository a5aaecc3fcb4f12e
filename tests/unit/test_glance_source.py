# SPDX-License-Identifier: Apache-2.0
"""The Glance source against a server that keeps to the API, and against some that do not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pickle
import random
import unittest
from collections.abc import Callable
from typing import Any

import keystoneauth1.adapter
import keystoneauth1.session
import keystoneauth1.token_endpoint

from imagecache_lib import errors, model
from imagecache_lib.sources import transfer
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.sources.interface import CannotCopy, SourceBusy, SourceRefused
from imagecache_lib.system.host import System
from imagecache_lib.testing import http_faults as faults
from imagecache_lib.testing.bad_server import Answer, BadServer
from tests.support.cache_case import ID
from tests.support.servers import GlanceServer

DATA = random.Random(4).randbytes(200_000)
TOKEN = "gAAAA-s3same"
#: A port that nothing listens on: loopback refuses it at once.
DOWN = "http://127.0.0.1:1"
QUIET = System(name="here", sleep=lambda seconds: None)


class GlanceCase(unittest.TestCase):
    def setUp(self) -> None:
        self.server = self.enterContext(GlanceServer(token=TOKEN))
        self.server.add(ID, DATA)

    def source(self, *endpoints: str, **options: Any) -> GlanceSource:
        return GlanceSource(endpoints or self.server.url, **{"token": TOKEN, **options})

    def describe(self, metadata: object) -> model.Image:
        """Describe the image by these metadata: text, or what is made JSON of."""
        body = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        self.server.script(f"/v2/images/{ID}", Answer(body=body))
        return self.source().describe(ID)


class TestMetadata(GlanceCase):
    def test_maps_what_glance_says(self) -> None:
        self.server.add(
            ID,
            DATA,
            disk_format="qcow2",
            virtual_size=2**30,
            locations=[{"url": "rbd://fsid/pool/image/snap", "metadata": {}}],
            direct_url="rbd://fsid/pool/image/snap",
            stores="fast,ceph",
            img_signature="abc",
            os_hidden=True,
        )
        image = self.source().describe(ID)
        self.assertEqual(("qcow2", "bare"), (image.disk_format, image.container_format))
        self.assertEqual("active", image.status)
        self.assertEqual((len(DATA), 2**30), (image.size, image.virtual_size))
        self.assertEqual(model.Digest("sha512", hashlib.sha512(DATA).hexdigest()), image.digest)
        self.assertEqual(("rbd://fsid/pool/image/snap",), image.locations)
        self.assertEqual(("fast", "ceph"), image.stores)
        self.assertEqual("abc", image.properties["img_signature"])
        self.assertTrue(image.properties["os_hidden"])
        self.assertNotIn("os_hash_value", image.properties)

    def test_falls_back_to_md5(self) -> None:
        md5 = model.Digest("md5", hashlib.md5(DATA).hexdigest())
        self.server.add(ID, DATA, os_hash_algo=None, os_hash_value=None)
        self.assertEqual(md5, self.source().describe(ID).digest)
        self.server.add(ID, DATA, os_hash_algo="whirlpool9", os_hash_value="00")
        self.assertEqual(md5, self.source().describe(ID).digest)

    def test_an_unknown_digest_alone_is_refused(self) -> None:
        self.server.add(ID, DATA, os_hash_algo="whirlpool9", os_hash_value="00", checksum=None)
        with self.assertRaisesRegex(SourceRefused, "whirlpool9"):
            self.source().describe(ID)

    def test_a_queued_image_has_neither_size_nor_digest(self) -> None:
        self.server.add(ID, None)
        image = self.source().describe(ID)
        self.assertEqual(("queued", None, None), (image.status, image.size, image.digest))
        with self.assertRaisesRegex(errors.SourceError, "queued"):
            transfer.describe(self.source(), ID, host=QUIET)

    def test_an_active_image_without_data_is_rejected(self) -> None:
        self.server.add(ID, None, status="active")
        source = self.source()
        with self.assertRaisesRegex(errors.ImageRejected, "no data"), source.open(source.describe(ID)):
            pass

    def test_no_answer_to_the_question_for_them_is_no_fault_of_the_images(self) -> None:
        for answer in (Answer(status=204), Answer(status=205)):
            self.server.script(f"/v2/images/{ID}", answer)
            with self.subTest(answer.status), self.assertRaisesRegex(SourceRefused, str(answer.status)):
                self.source().describe(ID)

    def test_nonsense_is_a_source_error(self) -> None:
        good = {"id": ID, "status": "active"}
        documents: tuple[object, ...] = (
            b"",
            b"<html>",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"id": ' + b"9" * 5000 + b"}",
            [],
            "text",
            None,
            {},
            {"id": "another"},
            {**good, "size": "1"},
            {**good, "size": -1},
            {**good, "size": True},
            {**good, "size": 1.5},
            {**good, "virtual_size": [1]},
            {**good, "status": 1},
            {**good, "disk_format": {}},
            {**good, "locations": "rbd://"},
            {**good, "os_hash_algo": "sha512", "os_hash_value": "xyz"},
            {**good, "os_hash_algo": "sha512", "os_hash_value": "../../etc"},
            {**good, "checksum": "abc"},
        )
        for metadata in documents:
            with self.subTest(metadata=str(metadata)[:60]), self.assertRaises(errors.SourceError):
                self.describe(metadata)

    def test_properties_of_the_owners_are_not_taken_for_what_a_server_said(self) -> None:
        self.server.add(
            ID, DATA, hinted_size=str(10 * len(DATA)), etag='"mine"', os_hash_algo=None, checksum=None
        )
        image = self.source().describe(ID)
        self.assertEqual({"hinted_size", "etag"} & set(image.properties), set())
        fetching = transfer.Transfer(self.source(), image, host=QUIET, retries=0)
        self.assertEqual(len(DATA), fetching.sure_size)
        self.assertEqual(DATA, b"".join(fetching.chunks()))

    def test_huge_metadata_are_not_read_to_the_end(self) -> None:
        self.server.script(f"/v2/images/{ID}", Answer(body=b'{"a": "', length=-1, after="endless"))
        with self.assertRaisesRegex(errors.SourceError, "more than 4194304 bytes"):
            self.source().describe(ID)


class TestIds(GlanceCase):
    def test_no_id_reaches_another_resource(self) -> None:
        for image_id in ("../x", "..", ".", f"x/../{ID}", f"{ID}/file", "a\\b"):
            with self.subTest(image_id=image_id), self.assertRaises(errors.ImageNotFound):
                self.source().describe(image_id)
        self.assertEqual([], self.server.requests())

    def test_odd_characters_are_quoted(self) -> None:
        for image_id in ("a?b", "a#b", "K\u00f6ln", "%2e%2e", "a b", "a\r\nX-Evil: 1"):
            with self.subTest(image_id=image_id), self.assertRaises(errors.ImageNotFound):
                self.source().describe(image_id)
            self.assertRegex(self.server.requests()[-1].path, r"^/v2/images/[A-Za-z0-9%-]+$")


class TestStatuses(GlanceCase):
    def test_a_wrong_token_is_a_source_error_that_says_so(self) -> None:
        with self.assertRaisesRegex(SourceRefused, "token") as caught:
            self.source(token="wrong-token").describe(ID)
        self.assertNotIn("wrong-token", str(caught.exception))

    def test_no_permission_says_so(self) -> None:
        self.server.script(f"/v2/images/{ID}/file", Answer(403))
        source = self.source()
        with self.assertRaisesRegex(errors.ImageNotFound, "no permission"), source.open(source.describe(ID)):
            pass

    def test_a_broken_download_resumes(self) -> None:
        source = self.source()
        found, image = transfer.describe(source, ID, host=QUIET)
        cut = Answer(body=DATA[:70_000], length=len(DATA), after="reset")
        rest = Answer(206, {"Content-Range": f"bytes 70000-199999/{len(DATA)}"}, DATA[70_000:])
        self.server.script(f"/v2/images/{ID}/file", cut, rest)
        fetching = transfer.Transfer(found, image, host=QUIET)
        self.assertEqual(DATA, b"".join(fetching.chunks()))
        self.assertTrue(fetching.resumed)


class TestEndpoints(GlanceCase):
    def test_are_tried_in_turn(self) -> None:
        source = self.source(DOWN, self.server.url)
        image = source.describe(ID)
        with source.open(image) as stream:
            self.assertEqual(DATA, b"".join(stream))

    def test_with_or_without_version(self) -> None:
        for suffix in ("/", "/v2", "/v2/", "/v2.1/"):
            self.assertEqual(len(DATA), self.source(self.server.url + suffix).describe(ID).size)

    def test_under_a_path(self) -> None:
        self.server.script(f"/image/v2/images/{ID}", Answer(body=json.dumps({"id": ID}).encode()))
        self.assertEqual(ID, self.source(self.server.url + "/image/v2").describe(ID).id)

    def test_not_found_is_an_answer(self) -> None:
        other = self.enterContext(GlanceServer(token=TOKEN))
        with self.assertRaises(errors.ImageNotFound):
            self.source(other.url, self.server.url).describe(ID)
        self.assertEqual([], self.server.requests())

    def test_a_failure_that_may_pass_outranks_one_that_will_not(self) -> None:
        refusing = self.enterContext(GlanceServer(token="another"))
        for endpoints in ((refusing.url, DOWN), (DOWN, refusing.url)):
            with self.assertRaises(errors.SourceError) as caught:
                self.source(*endpoints).describe(ID)
            self.assertNotIsInstance(caught.exception, SourceRefused)

    def test_after_a_broken_transfer_another_one_is_asked(self) -> None:
        broken = self.enterContext(GlanceServer(token=TOKEN))
        broken.add(ID, DATA)
        start = Answer(body=DATA[:99], length=len(DATA), after="close")
        rest = Answer(206, {"Content-Range": f"bytes 99-199999/{len(DATA)}"}, length=9, after="close")
        broken.script(f"/v2/images/{ID}/file", start, rest)
        found, image = transfer.describe(self.source(broken.url, self.server.url), ID, host=QUIET)
        fetching = transfer.Transfer(found, image, host=QUIET, retries=1)
        self.assertEqual(DATA, b"".join(fetching.chunks()))

    def test_digests_that_users_may_have_stated_are_not_vouched_for(self) -> None:
        image = self.source().describe(ID)
        web = dataclasses.replace(image, locations=("rbd://a/b/c/d", "https://images.example.org/1"))
        where = {"endpoints": self.server.url}
        yes, no = ({**where, "computes_digests": said} for said in ("yes", "no"))
        self.assertFalse(self.source().vouches_for_digest(image))
        for source in (self.source(computes_digests=True), GlanceSource.from_options(yes)):
            self.assertTrue(source.vouches_for_digest(image))
            self.assertFalse(source.vouches_for_digest(web))
        for options in (where, no):
            self.assertFalse(GlanceSource.from_options(options).vouches_for_digest(image))
        with self.assertRaisesRegex(errors.ConfigError, "computes_digests=yes"):
            GlanceSource.from_options({**where, "computes_digests": "true"})

    def test_wrong_set_ups_are_refused_when_the_source_is_made(self) -> None:
        wrong: tuple[tuple[Any, dict[str, Any]], ...] = (
            ((), {}),
            ("ftp://x", {}),
            ("x", {}),
            (["http://ok", "nonsense"], {}),
            ("http://ok", {"token": "t", "session": object()}),
        )
        for endpoints, options in wrong:
            with self.subTest(endpoints=endpoints), self.assertRaises(errors.ConfigError):
                GlanceSource(endpoints, **options)


class TestSecrets(GlanceCase):
    def test_the_token_never_follows_a_redirect_to_another_origin(self) -> None:
        other = self.enterContext(BadServer())
        for path in (f"/v2/images/{ID}", f"/v2/images/{ID}/file"):
            self.server.script(path, Answer(302, {"Location": f"{other.url}/steal"}))
        source = self.source()
        with self.assertRaisesRegex(SourceRefused, "another origin"):
            source.describe(ID)
        with self.assertRaises(SourceRefused), source.open(model.Image(ID)):
            pass
        self.assertEqual([], other.requests())

    def test_within_the_origin_it_does(self) -> None:
        self.server.script(f"/v2/images/{ID}", Answer(301, {"Location": "/moved"}))
        self.server.script("/moved", Answer(body=json.dumps({"id": ID}).encode()))
        self.source().describe(ID)
        self.assertEqual([TOKEN, TOKEN], [seen.headers["X-Auth-Token"] for seen in self.server.requests()])

    def test_a_callable_is_asked_for_every_request(self) -> None:
        tokens = iter([TOKEN, "expired", "expired", TOKEN])
        source = self.source(token=lambda: next(tokens))
        self.assertEqual(ID, source.describe(ID).id)
        with self.assertRaises(SourceRefused):
            source.describe(ID)
        self.assertEqual(ID, source.describe(ID).id)

    def test_a_callable_is_asked_once_more_after_a_401(self) -> None:
        for renewed, requests in ((TOKEN, 2), ("expired too", 2), ("expired", 1)):
            tokens = iter(["expired", renewed])
            self.server.seen.clear()
            source = self.source(token=lambda tokens=tokens: next(tokens))
            with self.subTest(renewed=renewed):
                if renewed == TOKEN:
                    self.assertEqual(ID, source.describe(ID).id)
                else:
                    self.assertRaises(SourceRefused, source.describe, ID)
                self.assertEqual(requests, len(self.server.requests()))

    def test_a_token_that_no_header_can_have_is_the_callers_fault_and_not_tried_again(self) -> None:
        for token in (f"{TOKEN}\n", f"{TOKEN}\r\nX-Other: 1", "\u0142", 5):
            asked: list[object] = []

            def give(token: object = token, asked: list[object] = asked) -> object:
                asked.append(token)
                return token

            source = self.source(token=give)
            with self.subTest(token), self.assertRaisesRegex(SourceRefused, "stray characters") as caught:
                transfer.describe(source, ID, host=System(name="here"), retries=2)
            self.assertEqual(1, len(asked))
            self.assertNotIn(TOKEN, str(caught.exception))

    def test_a_token_that_expires_during_a_transfer_is_renewed(self) -> None:
        cut = Answer(body=DATA[:70_000], length=len(DATA), after="reset")
        rest = Answer(206, {"Content-Range": f"bytes 70000-199999/{len(DATA)}"}, DATA[70_000:])
        self.server.script(f"/v2/images/{ID}/file", cut, Answer(401), rest)
        tokens = iter([TOKEN, TOKEN, "expired", TOKEN])
        found, image = transfer.describe(self.source(token=lambda: next(tokens)), ID, host=QUIET)
        self.assertEqual(DATA, b"".join(transfer.Transfer(found, image, host=QUIET).chunks()))

    def test_is_in_no_message_log_or_repr(self) -> None:
        def fail() -> str:
            raise RuntimeError(TOKEN)

        shown: list[str] = []
        with self.assertLogs(level=logging.DEBUG) as logs:
            logging.getLogger("tests").debug("so that there is one")
            self.source().describe(ID)
            for source in (
                self.source(DOWN),
                self.source(token=TOKEN + "\n"),
                self.source(token=TOKEN + "\u2028"),
                self.source(token=fail),
                self.source(token="wrong" + TOKEN),
            ):
                with self.assertRaises(errors.SourceError) as caught:
                    transfer.describe(source, ID, host=QUIET, retries=1)
                shown += [str(caught.exception), repr(caught.exception), repr(source)]
                shown.append(repr(pickle.dumps(caught.exception)))
        self.assertNotIn(TOKEN, "".join(shown) + "".join(logs.output))


class TestSeveralEndpoints(GlanceCase):
    """One service behind several addresses, one of which is wrong."""

    def setUp(self) -> None:
        super().setUp()
        self.wrong = self.enterContext(GlanceServer(token=TOKEN))
        self.wrong.add(ID, DATA)

    def fetched(self) -> bytes:
        """Return the image's data; the address that is wrong is asked first."""
        source, image = transfer.describe(self.source(self.wrong.url, self.server.url), ID, host=QUIET)
        return b"".join(transfer.Transfer(source, image, host=QUIET, retries=1).chunks())

    def test_what_is_wrong_with_one_does_not_matter(self) -> None:
        path = f"/v2/images/{ID}"
        for where in (path, f"{path}/file"):
            for fault in (
                faults.status(401),
                faults.status(500),
                faults.busy(503),
                faults.dropped(),
                faults.truncated(1000),
                faults.cut_without_length(1000),
                faults.redirected("http://127.0.0.1:1/"),
                faults.chunk_size_told("zz"),
            ):
                with self.subTest(where=where, fault=fault):
                    self.wrong.forget(where)
                    self.wrong.always_fail(where, fault)
                    self.assertEqual(DATA, self.fetched())
            self.wrong.forget(where)

    def test_a_page_instead_of_the_description_does_not_matter(self) -> None:
        self.wrong.always_fail(f"/v2/images/{ID}", faults.document())
        self.assertEqual(DATA, self.fetched())


class TestKeystoneSessions(GlanceCase):
    def session(self, endpoint: str, token: str = TOKEN) -> keystoneauth1.session.Session:
        return keystoneauth1.session.Session(auth=keystoneauth1.token_endpoint.Token(endpoint, token))

    def test_bring_token_and_endpoint(self) -> None:
        source = GlanceSource(session=self.session(self.server.url + "/v2"))
        image = source.describe(ID)
        with source.open(image, 100) as stream:
            self.assertEqual(DATA[100:], b"".join(stream))

    def test_an_adapter_keeps_its_catalog_entry_and_its_endpoint_override(self) -> None:
        asked: list[dict[str, Any]] = []
        url = self.server.url

        class Auth(keystoneauth1.token_endpoint.Token):
            def get_endpoint(self, session: Any, **kwargs: Any) -> str:
                asked.append(kwargs)
                return url

        wanted: dict[str, Any] = {"interface": ["internal", "public"], "region_name": "RegionTwo"}
        session = keystoneauth1.session.Session(auth=Auth("http://unused", TOKEN))
        ways: tuple[Callable[[Any], GlanceSource], ...] = (
            lambda adapter: GlanceSource(adapter=adapter),
            lambda adapter: GlanceSource(session=adapter),
        )
        for make in ways:
            asked.clear()
            adapter = keystoneauth1.adapter.Adapter(session, service_type="image", **wanted)
            self.assertEqual(ID, make(adapter).describe(ID).id)
            self.assertEqual(wanted, {key: asked[0][key] for key in wanted})
            overriding = keystoneauth1.adapter.Adapter(
                keystoneauth1.session.Session(auth=Auth("http://unused", TOKEN)),
                endpoint_override=url + "/v2",
            )
            asked.clear()
            image = make(overriding).describe(ID)
            self.assertEqual((ID, []), (image.id, asked))

    def test_an_adapter_sends_its_own_authentication_and_request_id(self) -> None:
        class WithServiceToken(keystoneauth1.token_endpoint.Token):
            def get_headers(self, session: Any) -> dict[str, str]:
                return {"X-Auth-Token": TOKEN, "X-Service-Token": "the service's"}

        adapter = keystoneauth1.adapter.Adapter(
            keystoneauth1.session.Session(),
            auth=WithServiceToken(self.server.url, TOKEN),
            global_request_id="req-0123",
        )
        source = GlanceSource(adapter=adapter)
        with source.open(source.describe(ID)) as stream:
            self.assertEqual(DATA, b"".join(stream))
        for seen in self.server.requests():
            headers = {name.lower(): value for name, value in seen.headers.items()}
            self.assertEqual("the service's", headers["x-service-token"])
            self.assertEqual("req-0123", headers["x-openstack-request-id"])

    def test_may_be_given_endpoints(self) -> None:
        source = GlanceSource([DOWN, self.server.url], session=self.session("http://unused"))
        self.assertEqual(ID, source.describe(ID).id)

    def test_failures_are_translated(self) -> None:
        with self.assertRaisesRegex(errors.SourceError, "refused"):
            GlanceSource(session=self.session(DOWN)).describe(ID)
        with self.assertRaisesRegex(SourceRefused, "token"):
            GlanceSource(session=self.session(self.server.url, "wrong")).describe(ID)
        with self.assertRaises(errors.SourceError):
            GlanceSource(session=keystoneauth1.session.Session()).describe(ID)
        with self.assertRaises(errors.SourceError):
            GlanceSource(session=object()).describe(ID)

    def test_a_dead_kept_alive_connection_is_invisible(self) -> None:
        source = GlanceSource(session=self.session(self.server.url))
        source.describe(ID)
        good = Answer(body=json.dumps({"id": ID}).encode())
        self.server.script(f"/v2/images/{ID}", Answer(after="drop"), good)
        self.assertEqual(ID, source.describe(ID).id)

    def test_redirects_to_another_origin_are_refused(self) -> None:
        other = self.enterContext(BadServer())
        self.server.script(f"/v2/images/{ID}", Answer(302, {"Location": f"{other.url}/steal"}))
        with self.assertRaisesRegex(SourceRefused, "another origin"):
            GlanceSource(session=self.session(self.server.url)).describe(ID)
        self.assertEqual([], other.requests())


class TestCopyingToAStore(GlanceCase):
    PATH = f"/v2/images/{ID}/import"

    def copy(self, *answers: Answer) -> None:
        self.server.script(self.PATH, *answers)
        self.source().copy_to_store(model.Image(ID), "ceph")

    def test_asks_for_the_import_method_copy_image(self) -> None:
        self.copy(Answer(status=202))
        (seen,) = self.server.requests("POST")
        self.assertEqual({"method": {"name": "copy-image"}, "stores": ["ceph"]}, json.loads(seen.body))
        self.assertEqual(
            (TOKEN, "application/json"), (seen.headers["X-Auth-Token"], seen.headers["Content-Type"])
        )

    def test_a_copy_that_another_host_asked_for_is_fine(self) -> None:
        self.server.add(ID, DATA, os_glance_import_task="9c0c1d1e")
        self.copy(Answer(status=409))
        self.server.add(ID, DATA, stores="file,ceph")
        self.copy(Answer(status=400))

    def test_a_refusal_says_what_to_check(self) -> None:
        for status in (400, 403, 404, 409):
            with self.subTest(status), self.assertRaises(CannotCopy) as caught:
                self.copy(Answer(status=status))
            for part in (ID, str(status), "copy_image"):
                self.assertIn(part, str(caught.exception))

    def test_a_server_in_trouble_is_no_refusal(self) -> None:
        with self.assertRaises(SourceBusy):
            self.copy(Answer(status=503))

    def test_a_session_sends_the_same(self) -> None:
        auth = keystoneauth1.token_endpoint.Token(self.server.url, TOKEN)
        source = GlanceSource(session=keystoneauth1.session.Session(auth=auth))
        self.server.script(self.PATH, Answer(status=202))
        source.copy_to_store(model.Image(ID), "ceph")
        (seen,) = self.server.requests("POST")
        self.assertIn(b"copy-image", seen.body)


class TestEndpointsThatSendSomethingElse(GlanceCase):
    """One of two endpoints answers 200 with what is not the image. The one that has it is asked in turn."""

    def setUp(self) -> None:
        super().setUp()
        self.other = self.enterContext(GlanceServer(token=TOKEN))
        self.other.add(ID, DATA)

    def read(self, image: model.Image) -> bytes:
        with self.source(self.other.url, self.server.url).open(image) as stream:
            return b"".join(stream)

    def test_the_next_one_is_asked(self) -> None:
        pages = {
            "text/html": b"<!DOCTYPE html><html>maintenance</html>",
            "application/json": b'{"error": "maintenance"}',
            "application/octet-stream": b"<!DOCTYPE html><html>".ljust(len(DATA)),
        }
        described = self.source().describe(ID)
        for kind, page in pages.items():
            for image in (described, dataclasses.replace(described, digest=None)):
                with self.subTest(kind=kind, digest=image.digest):
                    answer = Answer(headers={"Content-Type": kind}, body=page)
                    self.other.script(f"/v2/images/{ID}/file", answer)
                    self.assertEqual(DATA, self.read(image))

    def test_where_none_has_it_each_is_named(self) -> None:
        image = dataclasses.replace(self.source().describe(ID), digest=None)
        for server in (self.server, self.other):
            server.script(f"/v2/images/{ID}/file", Answer(headers={"Content-Type": "text/html"}, body=b"<p>"))
        with self.assertRaises(errors.SourceError) as caught:
            self.read(image)
        self.assertIn(self.server.url, str(caught.exception))
        self.assertIn(self.other.url, str(caught.exception))

    def test_with_a_digest_the_bytes_decide_what_all_of_them_send(self) -> None:
        image = self.source().describe(ID)
        for server in (self.server, self.other):
            answer = Answer(headers={"Content-Type": "text/html"}, body=DATA)
            server.script(f"/v2/images/{ID}/file", answer)
        self.assertEqual(DATA, self.read(image))
