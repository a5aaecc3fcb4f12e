# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import unittest

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import decoder
from tests.support import qcow2_images
from tests.support.qcow2_images import Cluster

# Seeds instead of drawn choices: an image takes thousands of them.
SEEDED = st.builds(random.Random, st.integers(0, 2**32))
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


def random_clusters(
    rng: random.Random, count: int, size: int, version: int, extended: bool
) -> dict[int, Cluster]:
    clusters = {}
    for guest in rng.sample(range(count), rng.randint(0, count)):
        kind = rng.choice(["data", "data", "compressed", "compressed", "zero" if version == 3 else "data"])
        block = rng.choice([rng.randbytes(size), rng.randbytes(8) * (size // 8), bytes(size)])
        partial = extended and kind == "data" and rng.random() < 0.7
        bitmap = rng.getrandbits(32) | 1 if partial else 0xFFFF_FFFF
        clusters[guest] = Cluster(kind, b"" if kind == "zero" else block, bitmap)
    return clusters


class Drawn:
    """A random valid image, its disk, and how the stream is cut."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.version = rng.choice([2, 3, 3])
        self.extended = self.version == 3 and rng.random() < 0.25
        self.cluster_bits = 14 if self.extended else rng.choice([9, 9, 10, 12])
        size = 1 << self.cluster_bits
        self.count = rng.randint(1, 24 if self.extended else 150)
        self.virtual_size = self.count * size - rng.randrange(0, size, 512)
        self.clusters = random_clusters(rng, self.count, size, self.version, self.extended)
        self.image = qcow2_images.build(
            self.virtual_size,
            self.clusters,
            cluster_bits=self.cluster_bits,
            version=self.version,
            extended=self.extended,
            order=rng if rng.random() < 0.8 else None,
        )

    @property
    def disk(self) -> bytes:
        return qcow2_images.disk_of(
            self.virtual_size, self.clusters, cluster_bits=self.cluster_bits, extended=self.extended
        )

    def chunks(self) -> int:
        return self.rng.choice([1, 7, 512, 4096, 100_000])


class ValidImages(unittest.TestCase):
    @settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
    @given(SEEDED, st.booleans(), st.sampled_from([2**20, 4000, 0]))
    def test_any_layout_gives_the_disk(self, rng: random.Random, file_size: bool, map_bytes: int) -> None:
        drawn = Drawn(rng)
        seen, decoded = qcow2_images.decode(
            drawn.image, chunks=drawn.chunks, file_size=file_size, map_bytes=map_bytes
        )
        self.assertEqual(seen, drawn.disk)
        self.assertEqual(decoded.virtual_size, drawn.virtual_size)

    @settings(max_examples=12, deadline=None, suppress_health_check=QUIET)
    @given(SEEDED)
    def test_qemu_agrees_that_these_images_are_valid(self, rng: random.Random) -> None:
        drawn = Drawn(rng)
        self.assertEqual(qcow2_images.convert(drawn.image), drawn.disk)


class MutatedImages(unittest.TestCase):
    def check(self, image: bytes) -> None:
        try:
            seen, _ = qcow2_images.decode(image, max_virtual_size=2**24)
        except (errors.ImageRejected, decoder.Unstreamable):
            return
        expected = qcow2_images.convert(image)
        if expected is not None:
            self.assertEqual(seen, expected)

    @settings(max_examples=80, deadline=None, suppress_health_check=QUIET)
    @given(SEEDED, st.integers(1, 6), st.booleans())
    def test_changed_bytes(self, rng: random.Random, changes: int, in_tables: bool) -> None:
        image = bytearray(Drawn(rng).image)
        l1 = int.from_bytes(image[40:48], "big")
        places = [range(8, 112), range(l1, min(l1 + 64, len(image))), range(len(image))]
        for entry in range(l1, l1 + 64, 8):
            table = int.from_bytes(image[entry : entry + 8], "big") & 0xFFFFFFFFFFFE00
            if 0 < table < len(image):
                places.append(range(table, min(table + 512, len(image))))
        for _ in range(changes):
            place = rng.choice(places[1:] if in_tables else places)
            image[rng.choice(place)] ^= 1 << rng.randrange(8)
        self.check(bytes(image))

    @settings(max_examples=50, deadline=None, suppress_health_check=QUIET)
    @given(SEEDED)
    def test_entries_that_point_anywhere(self, rng: random.Random) -> None:
        image = bytearray(Drawn(rng).image)
        size = 1 << int.from_bytes(image[20:24], "big")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(size, max(size + 8, len(image) - 8), 8)
            target = rng.randrange(0, len(image) + size, size) | rng.choice(
                [0, 1 << 62, 1 << 63, 1, 1 << 62 | 77]
            )
            image[at : at + 8] = target.to_bytes(8, "big")
        self.check(bytes(image))

    @settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
    @given(SEEDED)
    def test_cut_short(self, rng: random.Random) -> None:
        image = Drawn(rng).image
        self.check(image[: rng.randrange(len(image))])
