"""Which blocks of its memory a resumed guest uses first, and how to have them read before it does.

Firecracker maps the memory file privately. The kernel tells of each page of a process whether it
is there, and whether it is still the file's: then it was read, else written
(https://docs.kernel.org/admin-guide/mm/pagemap.html). A page that is read brings neighbours along
that are in the page cache, up to 16, so what is told is a little too much. A VMM that does not map
the file, as the stand-in, uses nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from activities.contract.results import UsedBlocks
from activities.contract.units import MIB

BLOCK_BYTES = 4096  # a page, as the kernel tells of it
MAX_RANGES = 1024  # what a history and `metadata.json` bear
MAPS_BYTES = MIB  # of a VMM that a guest may have taken over
ENTRY_BYTES = 8
CHUNK_ENTRIES = 1 << 17
PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
READ, WRITTEN = 1, 2
ACCESS = {READ: "r", WRITTEN: "w"}


class _Mapping(NamedTuple):
    """Where a process has which part of a file; all in bytes."""

    start: int
    end: int
    offset: int
    link: Path
    """What leads to the file."""


def used_blocks(
    pid: int, memory: Path, check: Callable[[], None] = lambda: None
) -> tuple[UsedBlocks, ...]:
    """Return which blocks of the file a process has in its memory, in order; () if none is told.

    At most `MAX_RANGES` of them: where there are more, small gaps between them count as read.
    `check` is called often, and ends it by raising.
    """
    if os.sysconf("SC_PAGE_SIZE") != BLOCK_BYTES:
        return ()
    try:
        return _ranges(_marks(pid, memory, check))
    except OSError:  # it has just ended, or this kernel does not tell
        return ()


def read_ahead(memory: Path, blocks: Sequence[UsedBlocks]) -> None:
    """Have the kernel read blocks of the file into the page cache, without waiting for them.

    What is not in the file is left out: the blocks may be from a file that somebody has changed.
    """
    with memory.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for block, blocks_long, _ in blocks[:MAX_RANGES]:
            start, length = block * BLOCK_BYTES, blocks_long * BLOCK_BYTES
            if start >= 0 and 0 < length <= size - start:
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _marks(pid: int, memory: Path, check: Callable[[], None]) -> NDArray[np.uint8]:
    """Return for each block of the file whether the process has read or written it, or neither.

    A VMM has each block mapped once. One that has mapped the file ten thousand times would keep us
    for minutes: no more is looked at than the file has.
    """
    wanted = memory.stat()
    marks = np.zeros(wanted.st_size // BLOCK_BYTES, dtype=np.uint8)
    left = len(marks)
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages:
        for mapping in _mappings(pid):
            check()
            if left > 0 and os.path.samestat(mapping.link.stat(), wanted):
                left -= _note(pages, mapping, marks[: mapping.offset // BLOCK_BYTES + left], check)
    return marks


def _mappings(pid: int) -> Iterator[_Mapping]:
    """Yield what a process has mapped of files (proc(5), `/proc/PID/maps`)."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        lines = file.read(MAPS_BYTES).splitlines()
    for line in lines:
        place, _, offset, _, inode, *_ = line.split(maxsplit=5) + [""] * 5
        start, dash, end = place.partition("-")
        if dash and inode not in ("", "0"):
            link = Path(f"/proc/{pid}/map_files/{place}")
            yield _Mapping(int(start, 16), int(end, 16), int(offset, 16), link)


def _note(
    pages: BinaryIO, mapping: _Mapping, marks: NDArray[np.uint8], check: Callable[[], None]
) -> int:
    """Mark the blocks that are there in one mapping; returns how many were looked at."""
    first = mapping.offset // BLOCK_BYTES
    count = min((mapping.end - mapping.start) // BLOCK_BYTES, len(marks) - first)
    pages.seek(mapping.start // BLOCK_BYTES * ENTRY_BYTES)
    for begin in range(first, first + count, CHUNK_ENTRIES):
        check()
        data = pages.read(min(CHUNK_ENTRIES, first + count - begin) * ENTRY_BYTES)
        entries = np.frombuffer(data, dtype=np.uint64)
        there = (entries & (PRESENT | SWAPPED)) != 0
        found = np.where((entries & OF_FILE) != 0, READ, WRITTEN) * there
        part = marks[begin : begin + len(found)]
        np.maximum(part, found.astype(np.uint8), out=part)
    return max(count, 0)


def _ranges(marks: NDArray[np.uint8]) -> tuple[UsedBlocks, ...]:
    """Join neighbours with one mark, of ever larger blocks until there are few enough ranges."""
    size = 1
    while len(found := _runs(_coarse(marks, size))) > MAX_RANGES:
        size *= 2
    return tuple(found)


def _coarse(marks: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Give all blocks of each group of `size` the highest mark among them."""
    padded = np.pad(marks, (0, -len(marks) % size))
    highest = padded.reshape(-1, size).max(axis=1)
    whole: NDArray[np.uint8] = np.repeat(highest, size)[: len(marks)]
    return whole


def _runs(marks: NDArray[np.uint8]) -> list[UsedBlocks]:
    changes = np.flatnonzero(np.diff(marks)) + 1
    edges = [0, *changes.tolist(), len(marks)]
    return [
        UsedBlocks(first, end - first, ACCESS[int(marks[first])])
        for first, end in pairwise(edges)
        if first < len(marks) and marks[first]
    ]
