# SPDX-License-Identifier: Apache-2.0
"""The walk along a qcow2 file: what is awaited next, and what to do with it when it has arrived."""

from __future__ import annotations

import heapq
from array import array
from typing import Protocol

from imagecache_lib import errors
from imagecache_lib.formats.qcow2 import tables
from imagecache_lib.formats.qcow2.output import RUN_BYTES, Output
from imagecache_lib.formats.qcow2.spill import Spill
from imagecache_lib.formats.qcow2.window import Window

#: Memory for what is awaited: offsets of L2 tables, and maps. More is set aside like data.
MAP_BYTES = 56 * 2**20
_L1_PIECE = 2**16
_SECTOR = 512
_MAX_TAILS = 2**13
_NEVER = 2**63


class Unstreamable(errors.ImageCacheError):
    """The image may be fine, but it takes qemu-img and the whole file to convert it.

    Raised for a compression whose library is not installed, and for data that two tables share when the
    second table comes after it: legal, but no known writer does it.
    """


class Leave(Protocol):
    """Says whether decoding may go on. A piece of a few KiB may map terabytes, and take hours."""

    def require(self, needed: int) -> None:
        """Raise if decoding is to end.

        :param needed: bytes that the tables so far map and that were set aside: what the image takes.
        """


class _Unconditional:
    """The leave of an image that nothing bounds but its virtual size."""

    def require(self, needed: int) -> None:
        """Let it go on."""


UNCONDITIONAL = _Unconditional()


class Walk:
    """Takes what is awaited in the order of the file: the L1 table, L2 tables, clusters of data.

    ``_window`` holds the stream's bytes that were not passed yet. ``_mark`` is the end of what was taken or
    set aside; it only grows. What starts before the end of a table just read is *late*: it was set aside.

    :param map_bytes: memory for maps; tables that would exceed it are read at the end.
    :param leave: asked before anything is taken.
    """

    def __init__(
        self,
        geometry: tables.Geometry,
        output: Output,
        spill: Spill,
        *,
        map_bytes: int,
        leave: Leave,
    ) -> None:
        self._geometry = geometry
        self._spill = spill
        self._output = output
        self._map_bytes = map_bytes
        self._leave = leave
        self._window = Window()
        # Nothing may point into the header's cluster.
        self._mark = geometry.cluster_size
        self._needed = 0
        self._l1_at = geometry.l1_start if geometry.l1_start < geometry.l1_end else _NEVER
        self._tables = tables.TableList(geometry)
        self._tables_known = self._l1_at == _NEVER
        self._deferred: array[int] = array("Q")
        self._pending: list[tuple[int, int, tables.Mapping]] = []
        self._pending_bytes = 0
        self._sequence = 0
        self._tail_end = 0
        self._tails = 0
        self.mapped_bytes = 0

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file, up to a few MiB."""
        self._window.add(piece)
        if self._window.end >= self._needed:
            self._advance(final=False)

    def finish(self) -> None:
        """Resolve what is left after the last byte."""
        self._advance(final=True)
        if self._next_start() != _NEVER:
            raise _outside(self._next_start())
        deferred, self._deferred = self._deferred, array("Q")
        for position in range(0, len(deferred), 2):
            offset, index = deferred[position], deferred[position + 1]
            mapping = self._parse_aside(offset, index)
            self.mapped_bytes += len(mapping) * self._geometry.cluster_size
            while mapping.next < len(mapping):
                self._take_late(mapping)
        self._output.drain()
        self._spill.close()

    def close(self) -> None:
        self._output.close()
        self._window.clear()

    # -- the walk ------------------------------------------------------------------------------------

    def _advance(self, *, final: bool) -> None:
        end = self._window.end
        while True:
            self._require_leave()
            start = self._next_start()
            self._skip(min(start, end), start)
            if start >= end:
                self._needed = min(start + 1, end + RUN_BYTES)
                break
            # 0: taken. Otherwise how far the stream has to come.
            if needed := self._take(start, end, final):
                self._needed = needed
                break
        self._window.drop(min(start, end))

    def _require_leave(self) -> None:
        self._leave.require(self.mapped_bytes + self._spill.spilled)

    def _next_start(self) -> int:
        start = self._l1_at
        if start == _NEVER:
            table = self._tables.peek()
            if table is not None:
                start = table
        if self._pending and self._pending[0][0] < start:
            start = self._pending[0][0]
        return start

    def _skip(self, upto: int, next_start: int) -> None:
        """Pass over bytes that no table has named. Until all tables are known, one may still name them."""
        if upto <= self._mark:
            return
        keep = not self._tables_known
        if keep and next_start <= self._tail_end:
            # The rest of a sector between two compressed clusters: nearly always it belongs to the first.
            # A third, tiny one may hide there, but remembering all rests would take too much memory.
            self._tails += 1
            keep = self._tails <= _MAX_TAILS
        if keep:
            self._keep(self._mark, upto)
        self._mark = upto

    def _keep(self, start: int, stop: int) -> None:
        if stop - start < _SECTOR:
            data, first, last = self._window.one(start, stop)
            self._spill.keep(start, data[first:last])
            return
        for data, first, last in self._window.pieces(start, stop):
            self._spill.keep(start, memoryview(data)[first:last])
            start += last - first

    def _taken(self, upto: int) -> None:
        if not self._spill.crowded and upto > self._mark:
            self._mark = upto

    def _take(self, start: int, end: int, final: bool) -> int:
        if start == self._l1_at:
            return self._take_l1(end, final)
        if self._l1_at == _NEVER and start == self._tables.peek():
            return self._take_table(start, end)
        return self._take_data(start, end, final)

    # -- tables --------------------------------------------------------------------------------------

    def _take_l1(self, end: int, final: bool) -> int:
        wanted = min(self._geometry.l1_end - self._l1_at, _L1_PIECE)
        if self._l1_at + wanted > end:
            if final:
                raise _outside(self._l1_at)
            return self._l1_at + wanted
        data, first, last = self._window.one(self._l1_at, self._l1_at + wanted)
        self._tables.add(data[first:last])
        self._l1_at += wanted
        self._mark = max(self._mark, self._l1_at)
        if self._l1_at == self._geometry.l1_end:
            self._l1_at = _NEVER
            self._tables.finish()
            self._load_early_tables()
        return 0

    def _load_early_tables(self) -> None:
        """Read the tables that came before the L1 table, when it was not known yet that they are tables."""
        while (offset := self._tables.peek()) is not None and offset < self._geometry.l1_start:
            index = self._tables.pop()
            self._load(self._parse_aside(offset, index), offset, index, self._geometry.l1_end)
        self._check_tables_known()

    def _take_table(self, start: int, end: int) -> int:
        stop = start + self._geometry.cluster_size
        if stop > end:
            # At the end of the stream it is still awaited, and refused for that.
            return stop
        index = self._tables.pop()
        data, first, last = self._window.one(start, stop)
        mapping = tables.parse_l2(data[first:last], self._geometry, index, self._tables)
        if self._load(mapping, start, index, stop):
            self._mark = max(self._mark, stop)
        self._check_tables_known()
        return 0

    def _parse_aside(self, offset: int, index: int) -> tables.Mapping:
        raw = self._spill.read(offset, self._geometry.cluster_size)
        if len(raw) < self._geometry.cluster_size:
            raise _outside(offset)
        return tables.parse_l2(raw, self._geometry, index, self._tables)

    def _load(self, mapping: tables.Mapping, offset: int, index: int, boundary: int) -> bool:
        """Await what a table maps behind the boundary, and take at once what came before it.

        Returns False if there is no memory for the map: the table itself is then set aside, to be read at
        the end.
        """
        if self._pending_bytes + self._tables.allocated + mapping.allocated > self._map_bytes:
            self._deferred.extend((offset, index))
            return False
        self.mapped_bytes += len(mapping) * self._geometry.cluster_size
        while mapping.next < len(mapping) and self._start_of_next(mapping) < boundary:
            self._take_late(mapping)
        if mapping.next < len(mapping):
            self._pending_bytes += mapping.allocated
            self._sequence += 1
            heapq.heappush(self._pending, (self._start_of_next(mapping), self._sequence, mapping))
        return True

    def _check_tables_known(self) -> None:
        if self._tables.peek() is None and not self._deferred:
            self._tables_known = True
            self._spill.close()

    def _start_of_next(self, mapping: tables.Mapping) -> int:
        return self._geometry.start(mapping.descriptors[mapping.next])

    # -- data ----------------------------------------------------------------------------------------

    def _take_data(self, start: int, end: int, final: bool) -> int:
        mapping = self._pending[0][2]
        if mapping.descriptors[mapping.next] & tables.COMPRESSED:
            needed = self._take_compressed(mapping, end, final)
        else:
            needed = self._take_run(mapping, start, end, final)
        if not needed:
            self._requeue(mapping)
        return needed

    def _take_run(self, mapping: tables.Mapping, start: int, end: int, final: bool) -> int:
        count, length = self._output.run(mapping, end - start)
        if start + length > end:
            if final:
                raise _outside(start)
            return start + length
        self._output.write(mapping, length, self._window.pieces(start, start + length))
        mapping.next += count
        self._taken(start + count * self._geometry.cluster_size)
        return 0

    def _take_compressed(self, mapping: tables.Mapping, end: int, final: bool) -> int:
        """Take the mapping's compressed clusters up to whatever else is awaited, and up to a batch."""
        geometry, descriptors = self._geometry, mapping.descriptors
        limit = min(self._next_other(), end)
        most = min(len(descriptors), mapping.next + self._output.room)
        clusters: list[memoryview] = []
        needed, passed_before = 0, self._tail_end
        view, low, high = memoryview(b""), 0, 0  # of the chunk that the clusters come from
        for descriptor in descriptors[mapping.next : most]:
            if not descriptor & tables.COMPRESSED:
                break
            start, stop = geometry.compressed_range(descriptor)
            if clusters and start >= limit:
                break
            stop = min(stop, geometry.file_size)
            if stop > end:
                if not final:
                    needed = stop
                    break
                stop = end
            if self._tables_known:
                self._mark = max(self._mark, start)
            else:
                self._skip(start, start)
            if start < low or stop > high:
                data, first, _last = self._window.one(start, stop)
                view, low = memoryview(data), start - first
                high = low + len(data)
            clusters.append(view[start - low : stop - low])
            # Its last sector may also hold the beginning of another compressed cluster.
            self._tail_end = stop
            self._taken(max(start + 1, (stop - 1) // _SECTOR * _SECTOR))
        if clusters:
            self._output.inflate(mapping, clusters, max(self._tail_end - passed_before, 0))
            mapping.next += len(clusters)
            return 0
        return needed

    def _next_other(self) -> int:
        """Return where in the file that begins which is awaited next beside the first mapping's data."""
        others = [entry[0] for entry in self._pending[1:3]]
        if self._l1_at != _NEVER:
            others.append(self._l1_at)
        elif (table := self._tables.peek()) is not None:
            others.append(table)
        return min(others, default=_NEVER)

    def _requeue(self, mapping: tables.Mapping) -> None:
        if mapping.next < len(mapping):
            self._sequence += 1
            heapq.heapreplace(self._pending, (self._start_of_next(mapping), self._sequence, mapping))
        else:
            heapq.heappop(self._pending)
            self._pending_bytes -= mapping.allocated

    def _take_late(self, mapping: tables.Mapping) -> None:
        """Take the mapping's next data from what was set aside."""
        self._require_leave()
        descriptor = mapping.descriptors[mapping.next]
        start = self._geometry.start(descriptor)
        if descriptor & tables.COMPRESSED:
            stop = min(self._geometry.compressed_range(descriptor)[1], self._geometry.file_size)
            self._submit_late(mapping, self._spill.read(start, stop - start), stop - start)
            mapping.next += 1
            return
        count, length = self._output.run(mapping, RUN_BYTES)
        data = self._spill.read(start, length)
        if len(data) < length:
            raise self._missing(start + len(data))
        self._output.write(mapping, length, [(data, 0, length)])
        mapping.next += count

    def _submit_late(self, mapping: tables.Mapping, data: bytes, length: int) -> None:
        if not data:
            raise self._missing(self._start_of_next(mapping))
        if len(data) == length:
            self._output.inflate(mapping, [data], length)
            return
        # Its last sector went to the cluster that begins there. Most likely what is left is all of it.
        try:
            self._output.inflate_now(mapping, data)
        except errors.ImageRejected as error:
            raise self._missing(self._start_of_next(mapping) + len(data)) from error

    def _missing(self, offset: int) -> errors.ImageCacheError:
        if offset >= self._window.end:
            return _outside(offset)
        return Unstreamable(
            f"a qcow2 table maps data at {offset} that other clusters hold and that passed already",
            next_step="convert it with qemu-img",
        )


def _outside(offset: int) -> errors.ImageRejected:
    return errors.ImageRejected(f"what the qcow2 tables name at {offset} lies outside of the file")
