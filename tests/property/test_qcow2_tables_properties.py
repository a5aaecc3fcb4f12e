# SPDX-License-Identifier: Apache-2.0
"""An L2 table means the same whether its entries are checked all at once or one by one."""

from __future__ import annotations

import random
import struct
import unittest

from hypothesis import given, settings
from hypothesis import strategies as st

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import tables

SIZE, ENTRIES, CLUSTERS = 512, 64, 200
COMPRESSED, COPIED = 1 << 62, 1 << 63
#: An entry that maps nothing, and that is looked at by itself.
ZERO = 1


class Drawn:
    """A table of which nearly every entry is usual, in an image that has a few more tables."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.geometry = tables.Geometry(
            version=3,
            cluster_bits=9,
            cluster_size=SIZE,
            extended=False,
            virtual_size=rng.choice([ENTRIES, 2 * ENTRIES]) * SIZE - rng.choice([0, 0, 0, SIZE, 100]),
            l2_entries=ENTRIES,
            l1_start=SIZE,
            l1_end=SIZE + 16,
            file_size=rng.choice([CLUSTERS, CLUSTERS, CLUSTERS - 20]) * SIZE - rng.choice([0, 0, 100]),
        )
        self.first = rng.choice([0, 0, 1])
        self.offsets = sorted(rng.sample(range(2, CLUSTERS), 2))
        low = rng.choice([0, 2, 3, *self.offsets])
        free = [each for each in range(low, CLUSTERS + 1) if rng.random() < 0.02 or each not in self.offsets]
        kinds = rng.choice([[self._plain], [self._compressed], [self._plain, self._compressed]])
        self.entries = [0] + [
            rng.choice(kinds)(rng.choice(free)) if rng.random() < 0.8 else 0 for _ in range(ENTRIES - 1)
        ]
        if rng.random() < 0.2:
            self.entries[rng.randrange(1, ENTRIES)] = rng.choice([ZERO, COPIED, 8, 700, COMPRESSED, 1 << 55])
        if rng.random() < 0.5:
            self.entries[1:] = sorted(self.entries[1:])

    def _plain(self, cluster: int) -> int:
        return cluster * SIZE | COPIED

    def _compressed(self, cluster: int) -> int:
        return COMPRESSED | cluster * SIZE + self._rng.randrange(SIZE) | self._rng.randrange(2) << 61

    def meaning(self, first_entry: int) -> object:
        """Return what the table maps, or why it is refused, with another first entry."""
        listed = tables.TableList(self.geometry)
        try:
            listed.add(struct.pack(">2Q", *(offset * SIZE for offset in self.offsets)))
            raw = struct.pack(f">{ENTRIES}Q", first_entry, *self.entries[1:])
            mapping = tables.parse_l2(raw, self.geometry, self.first, listed)
        except errors.ImageRejected as error:
            return error.cause
        return list(mapping.descriptors), list(mapping.indexes), mapping.first


class TestTables(unittest.TestCase):
    @settings(max_examples=400, deadline=None)
    @given(st.builds(random.Random, st.integers(0, 2**32)))
    def test_a_table_means_the_same_with_an_entry_that_is_looked_at_by_itself(
        self, rng: random.Random
    ) -> None:
        drawn = Drawn(rng)
        self.assertEqual(drawn.meaning(0), drawn.meaning(ZERO))
