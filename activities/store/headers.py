"""Which blocks of a file hold data, and the header that says where they are in the bucket.

The header's format (E2B's, version 3; version 1 differs in the number alone), little-endian: 64
bytes (version u64, block size u64, size u64, generation u64, build id 16 bytes, base build id 16
bytes), then records of 40 bytes to the end: offset u64, length u64, build id 16 bytes (nil: zeros),
storage offset u64. The records are sorted, contiguous, of whole blocks, and cover the whole size. A
record names the build that has the stretch; generation is how many builds are below this one, and
base build id the lowest.
"""

from __future__ import annotations

import struct
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt

HEADER = struct.Struct("<QQQQ16s16s")
RECORD = struct.Struct("<QQ16sQ")
VERSION = 3
READABLE = frozenset({1, VERSION})
BLOCK_BYTES = 4096  # of the headers that we write
# A guest decides how often its disk and memory change between zeros and data. From so many extents
# on, only holes of a certain length are ones: a header stays small, whatever a guest has written.
MANY_EXTENTS = 1 << 17
MIN_HOLE_BYTES = 1 << 20
NIL = uuid.UUID(int=0)


class HeaderError(ValueError):
    """The bytes are not a header of a version that is known."""


@dataclass(frozen=True)
class Extent:
    """A stretch of a file. `storage_offset` is None where it is all zeros. All in bytes."""

    offset: int
    length: int
    storage_offset: int | None
    build_id: uuid.UUID | None = None
    """Of the build below that has it; None is the header's own."""

    @property
    def storage_end(self) -> int | None:
        """Where the stored bytes end; None of zeros."""
        return None if self.storage_offset is None else self.storage_offset + self.length

    def part(self, begin: int, end: int) -> Extent:
        """Return what of it lies between two offsets of the file."""
        begin, end = max(begin, self.offset), min(end, self.offset + self.length)
        stored = self.storage_offset
        moved = None if stored is None else stored + begin - self.offset
        return Extent(begin, end - begin, moved, self.build_id)


@dataclass(frozen=True)
class Header:
    """A parsed header."""

    block_size: int
    size: int
    build_id: uuid.UUID
    base_build_id: uuid.UUID
    extents: tuple[Extent, ...]
    generation: int = 0

    def to_bytes(self) -> bytes:
        """Write the header in its format."""
        ids = (self.build_id.bytes, self.base_build_id.bytes)
        head = HEADER.pack(VERSION, self.block_size, self.size, self.generation, *ids)
        return head + b"".join(self._record(extent) for extent in self.extents)

    def parts(self, begin: int, end: int) -> Iterator[Extent]:
        """Yield the extents between two offsets of the file, each naming the build that has it."""
        first = bisect_right(self.extents, begin, key=lambda extent: extent.offset) - 1
        for number in range(max(first, 0), len(self.extents)):
            extent = self.extents[number]
            if extent.offset >= end:
                return
            yield replace(extent, build_id=extent.build_id or self.build_id).part(begin, end)

    def _record(self, extent: Extent) -> bytes:
        if extent.storage_offset is None:
            return RECORD.pack(extent.offset, extent.length, NIL.bytes, 0)
        owner = extent.build_id or self.build_id
        return RECORD.pack(extent.offset, extent.length, owner.bytes, extent.storage_offset)


def parse_header(data: bytes) -> Header:
    """Read a header. Raises HeaderError when it breaks any rule of the format."""
    if len(data) < HEADER.size or (len(data) - HEADER.size) % RECORD.size:
        raise HeaderError(f"{len(data)} bytes cannot be a header")
    version, block_size, size, generation, build, base = HEADER.unpack_from(data)
    if version not in READABLE:
        raise HeaderError(f"version {version} is none of {sorted(READABLE)}")
    records = RECORD.iter_unpack(data[HEADER.size :])
    extents = tuple(
        Extent(offset, length, None)
        if owner == NIL.bytes
        else Extent(offset, length, stored, None if owner == build else uuid.UUID(bytes=owner))
        for offset, length, owner, stored in records
    )
    _require_cover(extents, block_size, size)
    ids = (uuid.UUID(bytes=build), uuid.UUID(bytes=base))
    return Header(block_size, size, *ids, extents, generation)


def _require_cover(extents: Sequence[Extent], block_size: int, size: int) -> None:
    position = 0
    for extent in extents:
        if extent.offset != position or extent.length <= 0:
            raise HeaderError(f"the records are not contiguous at {position}")
        position += extent.length
        if block_size <= 0 or extent.length % block_size:
            raise HeaderError(f"the record at {extent.offset} is not of whole blocks")
    if position != size:
        raise HeaderError(f"the records cover {position} of {size} bytes")


class BlockKind(IntEnum):
    """What a block is, compared with that of the disk below."""

    ZEROS = 0
    OWN = 1
    SHARED = 2
    """As below, and not zeros."""


def block_runs(
    data: bytes, block_size: int, below: bytes | None = None
) -> Iterator[tuple[BlockKind, int, int]]:
    """Yield the stretches of blocks of one kind in `data`: kind, begin and end in bytes.

    `below` is what the disk below has in the same place, if there is one; where it ends, zeros
    follow. `len(data)` must be a multiple of `block_size`, and that of 8: words are compared.
    """
    words = _words(data, block_size)
    kinds = np.any(words, axis=1).astype(np.int8)
    if below:
        lower = _words(below + bytes(len(data) - len(below)), block_size)
        kinds[(kinds != 0) & ~np.any(words != lower, axis=1)] = BlockKind.SHARED
    changes = (np.flatnonzero(np.diff(kinds)) + 1).tolist()
    for begin, end in pairwise([0, *changes, len(kinds)]):
        if end > begin:
            yield BlockKind(int(kinds[begin])), begin * block_size, end * block_size


def _words(data: bytes, block_size: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(data, dtype=np.uint64).reshape(-1, block_size // 8)


class ExtentBuilder:
    """Joins blocks, given in order of their offsets, into the fewest extents.

    There are at most MANY_EXTENTS, and two more for each MIN_HOLE_BYTES of the file.
    """

    def __init__(self) -> None:
        self._extents: list[Extent] = []
        self._position = 0
        self.stored_bytes = 0

    def may_leave_out(self, length: int) -> bool:
        """Whether a stretch may be left out of what is stored; else it is to be added as data."""
        return length >= MIN_HOLE_BYTES or len(self._extents) < MANY_EXTENTS

    def zeros(self, length: int) -> None:
        """Add a stretch of zeros that is left out."""
        self._add(length, None, None)

    def data(self, length: int) -> None:
        """Add a stretch of data."""
        self._add(length, self.stored_bytes, None)
        self.stored_bytes += length

    def shared(self, length: int, storage_offset: int, build_id: uuid.UUID) -> None:
        """Add a stretch that a build below has, stored there at that offset."""
        self._add(length, storage_offset, build_id)

    def again(self, length: int, first: int) -> None:
        """Add a stretch with the bytes of that at the offset `first`, which was added as data."""
        number = bisect_right(self._extents, first, key=lambda extent: extent.offset) - 1
        self._add(length, self._extents[number].part(first, first + length).storage_offset, None)

    def extents(self) -> tuple[Extent, ...]:
        """Return what was added so far."""
        return tuple(self._extents)

    def _add(self, length: int, where: int | None, owner: uuid.UUID | None) -> None:
        if length == 0:
            return
        last = self._extents[-1] if self._extents else None
        if last is not None and last.build_id == owner and last.storage_end == where:
            self._extents[-1] = replace(last, length=last.length + length)
        else:
            self._extents.append(Extent(self._position, length, where, owner))
        self._position += length
