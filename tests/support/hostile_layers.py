"""Layers that cost far more than their bytes, or that lie about what is in them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zlib
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


def _records(kind: bytes, **records: str) -> bytes:
    """Return an entry of attributes alone, without what they are of."""
    content = b"".join(_record(f"{key}={value}\n".encode()) for key, value in records.items())
    return header("x", len(content), kind) + content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")


def _record(text: bytes) -> bytes:
    length = len(text) + 2
    while len(b"%d %b" % (length, text)) != length:
        length += 1
    return b"%d %b" % (length, text)


def hidden_ways(tar: bytes) -> dict[str, bytes]:
    """Return a tar as what a careless reader takes for the content of a file, and Go's for more
    entries."""
    size = str(len(tar))
    no_name = bytearray(header("", len(tar), tarfile.AREGTYPE))
    no_name[257:265], no_name[345:348] = b"ustar\x0000", b"etc"
    no_name[148:156] = b" " * 8
    no_name[148:156] = b"%06o\0 " % sum(no_name)
    long_name = header("x", 4, tarfile.GNUTYPE_LONGNAME) + b"etc/".ljust(BLOCK, b"\0")
    of_file = _records(tarfile.XHDTYPE, size=size)
    return {
        "an old directory": header("etc/", len(tar), tarfile.AREGTYPE) + tar,
        "one without a name": bytes(no_name) + tar,
        "one of a long name": long_name + header("x", len(tar), tarfile.AREGTYPE) + tar,
        "one by its path": _records(tarfile.XHDTYPE, path="etc/")
        + header("x", len(tar), tarfile.AREGTYPE)
        + tar,
        "a size before global attributes": of_file
        + _records(tarfile.XGLTYPE, comment="c")
        + header("f", 0)
        + tar,
        "a size before no attributes": of_file
        + header("x", 0, tarfile.XHDTYPE)
        + header("f", 0)
        + tar,
    }


def twice_packed(tar: bytes) -> bytes:
    """Return what is a tar of one file, and a gzip stream of another tar."""
    compressed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = compressed.compress(tar) + compressed.flush()
    stream += struct.pack("<II", zlib.crc32(tar), len(tar) & 0xFFFFFFFF)
    extra = 4  # a field that readers of gzip pass over: the rest of the tar's header
    gzip_head = struct.pack("<3sBIBBH", b"\x1f\x8b\x08", extra, 0, 0, 255, BLOCK - 12)
    block = bytearray(header("x", len(stream)))
    block[: len(gzip_head)] = gzip_head
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + stream


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda tar: gzip.compress(tar, 9),
    "two gzip streams": lambda tar: gzip.compress(tar[:BLOCK]) + gzip.compress(tar[BLOCK:], 9),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
