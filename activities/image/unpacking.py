"""Unpacking layers piece by piece: whatever a few bytes unpack to, memory stays bounded.

A layer is packed as its first bytes say, as dockerd sees it; its media type counts for nothing.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import Protocol, cast

from backports import zstd
from isal import isal_zlib

PIECE_BYTES = 256 * 1024
LZMA_MEMORY_BYTES = 256 * 1024 * 1024
ZSTD_WINDOW_LOG = 27  # 128 MiB, as the zstd program allows unless it is told otherwise
GZIP_WINDOW = 31  # zlib's word for a gzip header
HEAD_BYTES = 6
# Frames of zstd that hold nothing, by which newer dockerds know it, too.
SKIPPABLE = tuple(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))
DECODING_ERRORS: tuple[type[Exception], ...] = (
    cast(type[Exception], isal_zlib.error),  # its stub says that it is an exception itself
    lzma.LZMAError,
    zstd.ZstdError,
    OSError,
    EOFError,
    ValueError,
)


class Decoder(Protocol):
    """A decompressor of Python's usual form."""

    @property
    def eof(self) -> bool:
        """Whether its stream has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether it has nothing more to say of what it was given."""

    @property
    def unused_data(self) -> bytes:
        """What came behind the stream's end."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return what follows, at most so much."""


class _Gzip:
    """A gzip stream, by ISA-L: three times as fast as zlib."""

    def __init__(self) -> None:
        self._stream = isal_zlib.decompressobj(GZIP_WINDOW)
        self._is_full = False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._is_full and not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        piece = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        self._is_full = len(piece) == max_length
        return piece


def _zstd() -> Decoder:
    limit = {int(zstd.DecompressionParameter.window_log_max): ZSTD_WINDOW_LOG}
    return zstd.ZstdDecompressor(options=limit)


def _xz() -> Decoder:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_BYTES)


# By the first bytes, as dockerd knows them.
DECODERS: dict[bytes, Callable[[], Decoder]] = {
    b"\x1f\x8b\x08": _Gzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}


class Unpacker:
    """Unpacks one layer as it comes; one that is not packed passes as it is.

    What is packed in what it unpacks to does not: dockerd would have a program unpack that, beyond
    any limit of ours. A tar can be written so that it is both.
    """

    def __init__(self) -> None:
        self._head = b""
        self._make: Callable[[], Decoder] | None = None
        self._decoder: Decoder | None = None
        self._is_known = False
        self._plain_head = b""
        """What it begins with, until that is long enough to be looked at."""
        self._is_plain = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` unpacks to, in pieces. Raises one of DECODING_ERRORS."""
        if not self._is_known:
            self._head += data
            if len(self._head) < HEAD_BYTES:
                return
            data = self._begin()
        yield from self._plain(self._unpacked(data))

    def finish(self) -> Iterator[bytes]:
        """Yield what is left. Raises one of DECODING_ERRORS when the layer is not at its end."""
        if not self._is_known:
            yield from self._plain(self._unpacked(self._begin()))
        if self._decoder is not None:
            raise EOFError("it ends too early")
        if not self._is_plain:
            yield self._looked_at_head()

    def _plain(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            if self._is_plain:
                yield piece
                continue
            self._plain_head += piece
            if len(self._plain_head) >= HEAD_BYTES:
                yield self._looked_at_head()

    def _looked_at_head(self) -> bytes:
        head, self._plain_head, self._is_plain = self._plain_head, b"", True
        if head.startswith((*DECODERS, *SKIPPABLE)):
            raise ValueError("it is packed twice")
        return head

    def _begin(self) -> bytes:
        head, self._head, self._is_known = self._head, b"", True
        fitting = (make for magic, make in DECODERS.items() if head.startswith(magic))
        self._make = next(fitting, None)
        return head

    def _unpacked(self, data: bytes) -> Iterator[bytes]:
        if self._make is None:
            yield data
            return
        # One stream may follow another: together they are one layer.
        while data or (self._decoder is not None and not self._decoder.needs_input):
            self._decoder = self._decoder or self._make()
            yield self._decoder.decompress(data, PIECE_BYTES)
            data = b""
            if self._decoder.eof:
                data, self._decoder = self._decoder.unused_data, None
