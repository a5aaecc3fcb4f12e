# SPDX-License-Identifier: Apache-2.0
"""A chain of hosts that pass an image on while they receive it: what arrives, from whom, and what is kept."""

from __future__ import annotations

import os
import pathlib
import ssl
import unittest
from collections.abc import Sequence

import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import imagecache_lib as ic
from imagecache_lib import errors
from imagecache_lib.sources.glance import GlanceSource
from imagecache_lib.sources.interface import SourceRefused
from imagecache_lib.sources.parents import Parents, path_of
from imagecache_lib.sources.route import Route
from imagecache_lib.store.pieces import PIECE
from imagecache_lib.store.spool import Spool
from imagecache_lib.testing.bad_server import Answer, data_answer
from imagecache_lib.testing.sources import FakeSource
from tests.support.cache_case import ID, disk_image, raw_image
from tests.support.certificates import certificate
from tests.support.ports import free_port
from tests.support.relay_hosts import TOKEN, GatedSource, RelayCase, RelayHost, until
from tests.support.servers import GlanceServer

DATA = raw_image(5, size=8 * PIECE)


def spool_of(host: RelayHost) -> Spool:
    until(lambda: host.spools.find(ID) is not None)
    found = host.spools.find(ID)
    assert found is not None
    return found


class TestChain(RelayCase):
    def test_bytes_are_passed_on_while_they_arrive_and_fetched_once(self) -> None:
        origin = GatedSource({ID: DATA})
        hosts = self.hosts(3, origin)
        origin.allow(3 * PIECE)
        running = [
            self.fetching(host, ID, route) for host, route in zip(hosts, self.chain(hosts), strict=True)
        ]
        until(lambda: spool_of(hosts[2]).have == 3 * PIECE)
        self.assertEqual([False] * 3, [host.manager.is_cached(ID) for host in hosts])
        origin.allow(None)
        self.assertEqual([ic.CacheResult.CACHED] * 3, [each.result() for each in running])
        self.assertEqual([DATA] * 3, [host.content(ID) for host in hosts])
        self.assertEqual(len(DATA), origin.bytes_sent)

    def test_each_host_converts_what_it_passes_on_as_it_came(self) -> None:
        image = disk_image(self.directory, "qcow2", data=DATA)
        origin = FakeSource({ID: image}, disk_format="qcow2")
        hosts = self.hosts(2, origin)
        for host, route in zip(hosts, self.chain(hosts), strict=True):
            host.fetch(ID, route)
        self.assertEqual([DATA, DATA], [host.content(ID) for host in hosts])
        self.assertEqual(len(image), origin.bytes_sent)

    def test_what_is_in_the_cache_as_it_came_needs_no_spool(self) -> None:
        origin = FakeSource({ID: DATA})
        hosts = self.hosts(2, origin)
        hosts[0].manager.cache_image(ID, request=ic.Request(hash_pieces=True))
        hosts[1].fetch(ID, Route([hosts[0].name], origin=False))
        self.assertEqual(DATA, hosts[1].content(ID))
        self.assertEqual(1, origin.opens)

    def test_a_converted_image_without_a_spool_is_not_passed_on(self) -> None:
        origin = FakeSource({ID: disk_image(self.directory, "qcow2", data=DATA)}, disk_format="qcow2")
        (host,) = self.hosts(1, origin)
        host.manager.cache_image(ID)
        self.assertIsNone(host.parents.has(host.name, origin.describe(ID)))

    def test_a_parent_that_goes_away_is_replaced_at_the_same_byte(self) -> None:
        origin = GatedSource({ID: DATA})
        first, second, third = hosts = self.hosts(3, origin)
        origin.allow(2 * PIECE)
        running = [
            self.fetching(host, ID, route) for host, route in zip(hosts, self.chain(hosts), strict=True)
        ]
        until(lambda: spool_of(third).have == 2 * PIECE)
        second.stop()
        second.spools.close()
        origin.allow(None)
        self.assertEqual(ic.CacheResult.CACHED, running[2].result())
        self.assertEqual(DATA, third.content(ID))
        self.assertEqual(frozenset({first.name, second.name}), spool_of(third).suppliers())
        self.assertEqual(first.name, spool_of(third).supplier_of(2 * PIECE))

    def test_a_new_route_is_followed_at_the_same_byte(self) -> None:
        origin = GatedSource({ID: DATA})
        first, _second, third = hosts = self.hosts(3, origin)
        origin.allow(2 * PIECE)
        routes = self.chain(hosts)
        running = [self.fetching(host, ID, route) for host, route in zip(hosts, routes, strict=True)]
        until(lambda: spool_of(third).have == 2 * PIECE)
        routes[2].change([first.name], origin=False)
        origin.allow(None)
        for each in running:
            each.result()
        self.assertEqual(first.name, spool_of(third).supplier_of(len(DATA) - 1))

    def test_what_broke_off_goes_on_from_what_is_there(self) -> None:
        origin = FakeSource({ID: DATA})
        (host,) = self.hosts(1, origin)
        origin.break_at(3 * PIECE)
        host.fetch(ID, Route())
        self.assertEqual([0, 3 * PIECE], origin.offsets)
        self.assertEqual(DATA, host.content(ID))


class TestImageService(RelayCase):
    def test_one_endpoint_of_several_has_a_damaged_copy(self) -> None:
        servers = [self.enterContext(GlanceServer()) for _ in range(2)]
        for server in servers:
            server.add(ID, DATA)
        damaged = bytes(8) + DATA[8:]
        servers[0].script(f"/v2/images/{ID}/file", lambda seen: data_answer(damaged, seen))
        origin = GlanceSource([server.url for server in servers], timeout=(60.0, 60.0))
        first, second = self.hosts(2, origin)
        first.fetch(ID, Route())
        second.fetch(ID, Route([first.name], origin=False))
        self.assertEqual([DATA, DATA], [host.content(ID) for host in (first, second)])

    def test_what_it_sends_beside_the_data_is_not_the_images_fault(self) -> None:
        server = self.enterContext(GlanceServer())
        server.add(ID, DATA)
        page = Answer(headers={"Content-Type": "text/html"}, body=b"<html>".ljust(len(DATA)))
        server.script(f"/v2/images/{ID}/file", page)
        (host,) = self.hosts(1, GlanceSource(server.url, timeout=(60.0, 60.0)))
        with self.assertRaisesRegex(SourceRefused, "text/html"):
            host.fetch(ID, Route())


class TestLeave(RelayCase):
    def test_without_leave_the_image_service_is_not_asked(self) -> None:
        origin = FakeSource({ID: DATA})
        (host,) = self.hosts(1, origin)
        route = Route(["127.0.0.99"], origin=False)
        with self.assertRaisesRegex(errors.SourceError, "leave"):
            host.fetch(ID, route, starved=0.5)
        self.assertEqual(0, origin.opens)
        self.assertFalse(host.manager.is_cached(ID))

    def test_leave_that_comes_late_is_taken(self) -> None:
        origin = FakeSource({ID: DATA})
        (host,) = self.hosts(1, origin)
        route = Route(["127.0.0.99"], origin=False)
        running = self.fetching(host, ID, route)
        until(lambda: route.state.wants_origin)
        route.change(["127.0.0.99"], origin=True)
        self.assertEqual(ic.CacheResult.CACHED, running.result())

    def test_an_image_without_a_digest_is_not_passed_on(self) -> None:
        origin = FakeSource({ID: DATA}, digests=False)
        first, second = self.hosts(2, origin)
        first.fetch(ID, Route())
        with self.assertRaisesRegex(errors.SourceError, "leave"):
            second.fetch(ID, Route([first.name], origin=False), starved=0.5)
        second.fetch(ID, Route([first.name], origin=True))
        self.assertEqual(2, origin.opens)
        self.assertIsNone(first.spools.find(ID))

    def test_an_image_that_this_host_may_not_see_is_not_fetched_from_others(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second = self.hosts(2, origin)
        first.fetch(ID, Route())
        origin.remove(ID)
        with self.assertRaises(errors.ImageNotFound):
            second.fetch(ID, Route([first.name], origin=False))


class TestWrongBytes(RelayCase):
    def corrupt(self, host: RelayHost, offset: int) -> None:
        """Change a byte of what a host passes on, and not of its cache."""
        with spool_of(host).reading() as reader:
            path = f"/proc/self/fd/{reader._fd}"
            fd = os.open(path, os.O_RDWR)
        try:
            byte = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
        finally:
            os.close(fd)

    def test_a_wrong_piece_is_not_passed_on_and_its_sender_is_named(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second, third = self.hosts(3, origin)
        first.fetch(ID, Route())
        second.fetch(ID, Route([first.name], origin=False))
        self.corrupt(second, 5 * PIECE + 7)
        route = Route([second.name, first.name], origin=False)
        third.fetch(ID, route)
        self.assertEqual(DATA, third.content(ID))
        self.assertEqual((second.name,), route.state.wrong)
        self.assertEqual(0, spool_of(third).cuts)
        self.assertEqual(second.name, spool_of(third).supplier_of(5 * PIECE - 1))
        self.assertEqual(first.name, spool_of(third).supplier_of(5 * PIECE))
        self.assertEqual(1, origin.opens)

    def test_without_hashes_the_digest_decides_and_the_image_is_not_to_blame(self) -> None:
        origin = GatedSource({ID: DATA})
        first, second = hosts = self.hosts(2, origin)
        origin.allow(4 * PIECE)
        routes = self.chain(hosts)
        running = [self.fetching(host, ID, route) for host, route in zip(hosts, routes, strict=True)]
        until(lambda: spool_of(first).have == 4 * PIECE)
        until(lambda: spool_of(second).have == 4 * PIECE)
        self.corrupt(second, 7)  # what it received from the first
        origin.allow(None)
        self.assertEqual(ic.CacheResult.CACHED, running[0].result())
        running[1].result()
        self.assertEqual([DATA, DATA], [host.content(ID) for host in hosts])
        self.assertEqual(1, origin.opens)

    def test_hashes_that_two_hosts_contradict_are_not_believed(self) -> None:
        origin = FakeSource({ID: DATA})
        first, second, third = self.hosts(3, origin)
        first.fetch(ID, Route())
        second.fetch(ID, Route([first.name], origin=False))
        known = spool_of(second).known
        assert known is not None
        lies = type(known)(known.digest, known.size, bytes(len(known.hashes)))
        spool_of(second).learn(lies)
        route = Route([second.name, first.name], origin=False)
        third.fetch(ID, route)
        self.assertEqual(DATA, third.content(ID))
        self.assertEqual((), route.state.wrong)

    def test_other_data_under_the_same_id_is_refused(self) -> None:
        first, second = self.hosts(2, FakeSource({ID: DATA}))
        first.fetch(ID, Route())
        second.origin = FakeSource({ID: raw_image(6, size=len(DATA))})
        with self.assertRaises(errors.SourceError):
            second.fetch(ID, Route([first.name], origin=False), starved=0.5)


class Authority:
    """A certificate authority of a test's own, in a directory."""

    def __init__(self, directory: pathlib.Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.cafile = str(directory / f"{name}.pem")
        own = certificate(name, self._key, name, self._key, signs=True)
        pathlib.Path(self.cafile).write_bytes(own)

    def server(self, address: str) -> ssl.SSLContext:
        """Return what a server has to serve under an address."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self._directory / f"{self._name}-{address}.pem"
        path.write_bytes(
            certificate(address, key, self._name, self._key, address=address)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


class TestTls(RelayCase):
    def tls_hosts(self, origin: FakeSource, contexts: Sequence[ssl.SSLContext]) -> list[RelayHost]:
        numbers = range(11, 11 + len(contexts))
        port = free_port(*(f"127.0.0.{number}" for number in numbers))
        return [
            RelayHost(self, number, port, origin, tls=context, cafile=self.authority.cafile)
            for number, context in zip(numbers, contexts, strict=True)
        ]

    def setUp(self) -> None:
        super().setUp()
        self.authority = Authority(self.directory, "authority")

    def pass_on(self, origin: GatedSource, hosts: Sequence[RelayHost]) -> None:
        """Have all hosts fetch the image at the same time."""
        origin.allow(2 * PIECE)
        running = [
            self.fetching(host, ID, route) for host, route in zip(hosts, self.chain(hosts), strict=True)
        ]
        until(lambda: all(spool_of(host).have == 2 * PIECE for host in hosts))
        origin.allow(None)
        self.assertEqual([ic.CacheResult.CACHED] * len(hosts), [each.result() for each in running])
        self.assertEqual([DATA] * len(hosts), [host.content(ID) for host in hosts])
        self.assertEqual(len(DATA), origin.bytes_sent)

    def test_hosts_with_certificates_of_an_authority_pass_an_image_on(self) -> None:
        origin = GatedSource({ID: DATA})
        hosts = self.tls_hosts(
            origin, [self.authority.server(f"127.0.0.{number}") for number in (11, 12, 13)]
        )
        self.pass_on(origin, hosts)
        self.assertEqual(frozenset({hosts[1].name}), spool_of(hosts[2]).suppliers())

    def test_a_host_whose_certificate_is_wrong_is_passed_over(self) -> None:
        other = Authority(self.directory, "other")
        for what, wrong in (
            ("of another authority", other.server("127.0.0.12")),
            ("for another host", self.authority.server("127.0.0.13")),
        ):
            with self.subTest(what=what):
                origin = GatedSource({ID: DATA})
                self.directory = self.directory / what
                self.directory.mkdir()
                first, last = (self.authority.server(f"127.0.0.{number}") for number in (11, 13))
                hosts = self.tls_hosts(origin, [first, wrong, last])
                self.pass_on(origin, hosts)
                self.assertEqual(frozenset({hosts[0].name}), spool_of(hosts[2]).suppliers())
                for host in hosts:
                    host.stop()

    def test_without_tls_nothing_is_taken_where_certificates_are_asked_for(self) -> None:
        origin = FakeSource({ID: DATA})
        port = free_port("127.0.0.11", "127.0.0.12")
        plain = RelayHost(self, 11, port, origin)
        careful = RelayHost(
            self, 12, port, origin, tls=self.authority.server("127.0.0.12"), cafile=self.authority.cafile
        )
        plain.fetch(ID, Route())
        with self.assertRaisesRegex(errors.SourceError, "leave"):
            careful.fetch(ID, Route([plain.name], origin=False), starved=0.5)
        self.assertEqual(1, origin.opens)


class TestSpools(RelayCase):
    def test_a_spool_goes_with_its_release(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: DATA}))
        before = host.manager.get_disk_usage()
        host.fetch(ID, Route())
        self.assertEqual(
            [], [path for path in os.listdir(self.directory / "host-11" / "_base") if "." in path[1:]]
        )
        self.assertGreaterEqual(host.manager.get_disk_usage() - before, 2 * (len(DATA) // 2))
        host.spools.release([ID])
        stages = self.directory / "host-11" / "_base" / ".imagecache" / "stage"
        self.assertEqual([], os.listdir(stages))
        self.assertIsNone(host.spools.find(ID))

    def test_a_spool_without_room_is_refused_before_its_first_byte(self) -> None:
        origin = FakeSource({ID: DATA})
        (host,) = self.hosts(1, origin, free_space_low=2**60)
        with self.assertRaises(errors.NoSpaceError):
            host.fetch(ID, Route())
        self.assertEqual(0, origin.opens)

    def test_a_dead_process_leaves_a_spool_that_is_swept(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: DATA}))
        host.fetch(ID, Route())
        spool = spool_of(host)
        path = spool._stage.path
        spool._stage.leave()  # its lock goes, as with its process
        os.utime(path, (1000, 1000))
        host.manager.verify_base_images([])
        self.manager(instances_path=str(self.directory / "host-11")).verify_base_images([])
        self.assertFalse(os.path.exists(path))


class TestServer(RelayCase):
    def get(self, host: RelayHost, path: str, *, method: str = "GET", **headers: str) -> requests.Response:
        assert host.server is not None
        given = {"Authorization": f"Bearer {TOKEN}", **headers}
        url = f"http://{host.name}:{host.server.port}{path}"
        return requests.request(method, url, headers=given, timeout=60)

    def test_only_who_has_the_token_is_served(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: DATA}))
        host.fetch(ID, Route())
        for path in (path_of(ID), f"{path_of(ID)}/pieces"):
            self.assertEqual(401, self.get(host, path, Authorization="Bearer no").status_code)
            self.assertEqual(200, self.get(host, path).status_code)

    def test_ranges(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: DATA}))
        host.fetch(ID, Route())
        for asked, status, content in (
            ("bytes=100-", 206, DATA[100:]),
            (f"bytes={len(DATA) - 1}-", 206, DATA[-1:]),
            (f"bytes={len(DATA)}-", 416, b""),
            ("bytes=0-1,5-6", 200, DATA),
        ):
            with self.subTest(asked=asked):
                found = self.get(host, path_of(ID), Range=asked)
                self.assertEqual((status, content), (found.status_code, found.content))
                self.assertEqual(f'"{host.origin.describe(ID).digest}"', found.headers["ETag"])

    def test_how_much_is_there_is_told_without_waiting_for_more(self) -> None:
        origin = GatedSource({ID: DATA})
        (host,) = self.hosts(1, origin)
        host.spools.expect([ID])
        self.assertEqual("0", self.get(host, path_of(ID), method="HEAD").headers["Imagecache-Have"])
        origin.allow(2 * PIECE)
        running = self.fetching(host, ID, Route())
        until(lambda: spool_of(host).have == 2 * PIECE)
        found = self.get(host, path_of(ID), method="HEAD")
        self.assertEqual(str(2 * PIECE), found.headers["Imagecache-Have"])
        self.assertEqual(404, self.get(host, f"{path_of(ID)}/pieces").status_code)
        origin.allow(None)
        running.result()

    def test_what_is_neither_here_nor_expected_is_not_found(self) -> None:
        (host,) = self.hosts(1, FakeSource({ID: DATA}))
        # No image can have an id with a NUL, whose base64 this is.
        odd = [f"/v1/raw/YQBi{part}" for part in ("", "/pieces")]
        own = [path_of(ID), f"{path_of(ID)}/data", "/v1/raw/", f"/v1/images{path_of(ID)}/pieces"]
        for path in own + odd:
            self.assertEqual(404, self.get(host, path).status_code)

    def test_a_name_that_could_mean_more_in_a_url_is_not_asked(self) -> None:
        parents = Parents("http://{host}:1", token=TOKEN)
        image = FakeSource({ID: DATA}).describe(ID)
        for name in ("a/b", "user@host", "host:80", "host?", "", "-", "h\n", "a" * 300):
            with (
                self.subTest(name=name),
                self.assertRaisesRegex(errors.SourceError, "no name"),
                parents.data(name, image, 0),
            ):
                raise AssertionError("it was asked")

    def test_a_url_without_a_place_for_the_name_is_refused(self) -> None:
        for url in ("https://host:9293", "https://{host}.{host}:1", "ftp://{host}/"):
            with self.subTest(url=url), self.assertRaises(errors.ConfigError):
                Parents(url, token=TOKEN)


if __name__ == "__main__":
    unittest.main()
