"""Layers that cost far more than their bytes, or that lie about what is in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Mapping

from backports import zstd

MIB = 1024 * 1024
PIB = 1 << 50
TIB = 1 << 40
BLOCK = 512


def header(
    name: str,
    size: int,
    kind: bytes = tarfile.REGTYPE,
    records: Mapping[str, str] | None = None,
) -> bytes:
    """Return an entry's header alone; `records` are PAX's."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.pax_headers = kind, size, dict(records or {})
    return entry.tobuf(tarfile.PAX_FORMAT if records else tarfile.GNU_FORMAT)


def zeros(mebibytes: int, pack: Callable[[bytes], bytes]) -> bytes:
    """Return a layer of one file of zeros."""
    return pack(header("zeros", mebibytes * MIB) + bytes(mebibytes * MIB) + bytes(2 * BLOCK))


def sparse(size: int) -> bytes:
    """Return a layer with a sparse file of that size, without any content (PAX 1.0)."""
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "hole",
        "GNU.sparse.realsize": str(size),
    }
    content = f"1\n{size}\n0\n".encode().ljust(BLOCK, b"\0")
    return header("hole", len(content), records=records) + content + bytes(2 * BLOCK)


def old_sparse(size: int) -> bytes:
    """Return the same in GNU's old form."""
    block = bytearray(header("hole", 0, tarfile.GNUTYPE_SPARSE))
    block[386:398] = b"%011o\0" % size  # a map of one part of no bytes, at the end
    block[398:410] = b"%011o\0" % 0
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(2 * BLOCK)


def claim(size: int) -> bytes:
    """Return a layer that announces a file of that size, and has nothing of it."""
    return header("claim", size) + bytes(8 * BLOCK)


def empty_files(count: int) -> bytes:
    """Return a layer of that many empty files."""
    return b"".join(header(f"f{n}", 0) for n in range(count)) + bytes(2 * BLOCK)


def long_name(length: int) -> bytes:
    """Return a layer with one file of a long name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("d/" * (length // 2)))
    return out.getvalue()


def negative_size() -> bytes:
    """Return the header of a size below zero, at which readers have gone backwards."""
    block = bytearray(header("back", 0))
    block[124:136] = b"\xff" * 11 + b"\x00"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(2 * BLOCK)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda tar: gzip.compress(tar, 9),
    "two gzip streams": lambda tar: gzip.compress(tar[:BLOCK]) + gzip.compress(tar[BLOCK:], 9),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
