"""Blocks that a file has more than once."""

from __future__ import annotations

import os
from collections.abc import Iterator

REMEMBERED = 1 << 18  # blocks, 1 GiB of them; some 30 MiB of memory


class Repeats:
    """Finds the blocks of a file that it had before, as the file is read from its beginning.

    A block is found by its hash and then compared, so what is found is right whoever made the file.
    Of a longer file, only repetitions of its first REMEMBERED blocks are found.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._firsts: dict[int, int] = {}

    def of(self, data: bytes, position: int, block_size: int) -> Iterator[tuple[int, int]]:
        """Yield which blocks of the file's next data were there before.

        Each as its offset in `data` and as that in the file of the first block with its bytes.
        """
        for at in range(0, len(data), block_size):
            block = data[at : at + block_size]
            first = self._firsts.get(key := hash(block))
            if first is not None and os.pread(self._descriptor, block_size, first) == block:
                yield at, first
            elif first is None and len(self._firsts) < REMEMBERED:
                self._firsts[key] = position + at
