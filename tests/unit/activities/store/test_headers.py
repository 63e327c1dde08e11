from __future__ import annotations

import hashlib
import itertools
import os
import struct
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.store import headers
from activities.store.bucket import crc32c_of
from activities.store.headers import (
    HEADER,
    RECORD,
    BlockKind,
    Extent,
    ExtentBuilder,
    Header,
    HeaderError,
    block_runs,
    parse_header,
)
from activities.store.objects import NAME_SAFE, part_name
from activities.template import repeats, upload
from activities.template.upload import Below, LeftOut, Scan, scan
from tests.support.step_checks import go_on

BUILD = uuid.UUID("11111111-2222-4333-8444-555555555555")
BLOCK = 4096


def header_of(found: Scan, block_size: int = BLOCK) -> Header:
    return Header(block_size, found.size_bytes, BUILD, BUILD, found.extents)


def restored(header: Header, stored: bytes) -> bytes:
    """What a consumer of the format makes of a header and the compacted data."""
    whole = bytearray(header.size)
    for extent in header.extents:
        if extent.storage_offset is not None:
            end = extent.storage_offset + extent.length
            whole[extent.offset : extent.offset + extent.length] = stored[
                extent.storage_offset : end
            ]
    return bytes(whole)


block = st.sampled_from(["hole", "zeros", "data", "last byte", "first byte"])


def write_blocks(path: Path, kinds: list[str], block_size: int) -> None:
    contents = {
        "zeros": bytes(block_size),
        "data": b"x" * block_size,
        "last byte": bytes(block_size - 1) + b"\1",
        "first byte": b"\1" + bytes(block_size - 1),
    }
    with path.open("wb") as file:
        file.truncate(len(kinds) * block_size)
        for number, kind in enumerate(kinds):
            if kind != "hole":
                file.seek(number * block_size)
                file.write(contents[kind])


@settings(max_examples=60)
@given(st.lists(block, max_size=40), st.sampled_from([4096, 8192, 65536]))
def test_header_and_compacted_data_give_the_file_back(kinds: list[str], block_size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        write_blocks(path, kinds, block_size)
        stored = bytearray()
        found = scan(path, block_size, stored.extend, go_on)
        content = path.read_bytes()
    header = parse_header(header_of(found, block_size).to_bytes())
    assert restored(header, bytes(stored)) == content
    assert header == header_of(found, block_size)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.stored_crc32c == crc32c_of(bytes(stored))
    assert len(stored) == block_size * sum(kind not in ("hole", "zeros") for kind in kinds)


@settings(max_examples=60)
@given(st.lists(block, max_size=40))
def test_neighbouring_blocks_of_a_kind_share_one_record(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        write_blocks(path, kinds, BLOCK)
        extents = scan(path, BLOCK, lambda _: None, go_on).extents
    stored = [extent.storage_offset is not None for extent in extents]
    assert all(one != next_one for one, next_one in itertools.pairwise(stored))
    assert sum(extent.length for extent in extents) == len(kinds) * BLOCK


@settings(max_examples=60)
@given(st.lists(block, min_size=8, max_size=200))
def test_however_often_it_changes_there_are_few_records(kinds: list[str]) -> None:
    many, hole = 4, 16 * BLOCK
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.multiple(headers, MANY_EXTENTS=many, MIN_HOLE_BYTES=hole),
    ):
        path = Path(directory) / "file"
        write_blocks(path, kinds, BLOCK)
        stored = bytearray()
        found = scan(path, BLOCK, stored.extend, go_on)
        content = path.read_bytes()
    assert len(found.extents) <= many + 2 * -(-len(content) // hole)
    assert restored(header_of(found, BLOCK), bytes(stored)) == content
    assert found.stored_crc32c == crc32c_of(bytes(stored))


def test_the_bytes_are_the_documented_ones() -> None:
    extents = (Extent(0, 4096, None), Extent(4096, 8192, 0), Extent(12288, 4096, None))
    data = Header(4096, 16384, BUILD, BUILD, extents).to_bytes()
    assert len(data) == 64 + 3 * 40
    assert data[:8] == (3).to_bytes(8, "little")
    assert data[8:16] == (4096).to_bytes(8, "little")
    assert data[16:24] == (16384).to_bytes(8, "little")
    assert data[24:32] == bytes(8)
    assert data[32:64] == BUILD.bytes * 2
    assert data[64:104] == bytes(8) + (4096).to_bytes(8, "little") + bytes(24)
    assert data[104:144] == (
        (4096).to_bytes(8, "little") + (8192).to_bytes(8, "little") + BUILD.bytes + bytes(8)
    )


# Two layers and three blocks: the first of the base, the second its own, the third zeros. E2B's own
# reader takes exactly this.
TWO_LAYERS = bytes.fromhex(
    "030000000000000000100000000000000030000000000000010000000000000022222222222242228222222222222222"
    "11111111111141118111111111111111"
    "00000000000000000010000000000000111111111111411181111111111111110010000000000000"
    "00100000000000000010000000000000222222222222422282222222222222220000000000000000"
    "00200000000000000010000000000000000000000000000000000000000000000000000000000000"
)


def test_a_header_of_layers_is_e2bs_own() -> None:
    base = uuid.UUID("11111111-1111-4111-8111-111111111111")
    own = uuid.UUID("22222222-2222-4222-8222-222222222222")
    extents = (
        Extent(0, BLOCK, BLOCK, base),
        Extent(BLOCK, BLOCK, 0),
        Extent(2 * BLOCK, BLOCK, None),
    )
    header = Header(BLOCK, 3 * BLOCK, own, base, extents, generation=1)
    assert header.to_bytes() == TWO_LAYERS
    assert parse_header(TWO_LAYERS) == header
    stored = {base.bytes: b"-" * BLOCK + b"b" * BLOCK, own.bytes: b"o" * BLOCK}
    assert read_as_e2b(TWO_LAYERS, stored) == b"b" * BLOCK + b"o" * BLOCK + bytes(BLOCK)


BLOCKS = {"z": bytes(BLOCK), "a": b"a" * BLOCK, "b": b"b" * BLOCK, "c": bytes(BLOCK - 1) + b"c"}


def read_as_e2b(header: bytes, stored: dict[bytes, bytes]) -> bytes:
    """Put a disk together as E2B's orchestrator does, by the format alone.

    `stored` is what each build's object has, by the build's 16 bytes.
    """
    version, block_size, size, generation, own, base = struct.unpack_from("<QQQQ16s16s", header)
    assert (version, block_size) == (3, BLOCK)
    assert (generation == 0) == (own == base) and own in stored and base in stored
    whole = bytearray()
    for at in range(64, len(header), 40):
        offset, length, owner, where = struct.unpack_from("<QQ16sQ", header, at)
        assert (offset, length % BLOCK) == (len(whole), 0)
        piece = bytes(length) if owner == bytes(16) else stored[owner][where : where + length]
        assert len(piece) == length and (owner != bytes(16) or where == 0)
        whole += piece
    assert len(whole) == size
    return bytes(whole)


def stack_of(directory: Path, disks: list[list[str]]) -> tuple[list[bytes], dict[bytes, bytes]]:
    """Scan disks, each on top of the one before; returns headers, and what each build stores."""
    below: Below | None = None
    written, stored = list[bytes](), dict[bytes, bytes]()
    for number, kinds in enumerate(disks):
        path, own = directory / f"disk-{number}", uuid.UUID(int=number + 1)
        path.write_bytes(b"".join(BLOCKS[kind] for kind in kinds))
        data = bytearray()
        found = scan(path, BLOCK, data.extend, go_on, below=below)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (found.stored_bytes, found.stored_crc32c) == (len(data), crc32c_of(bytes(data)))
        stored[own.bytes] = bytes(data)
        base = uuid.UUID(int=1)
        header = Header(BLOCK, found.size_bytes, own, base, found.extents, generation=number)
        assert parse_header(header.to_bytes()) == header
        written.append(header.to_bytes())
        below = Below(path, header, path.stat().st_mtime_ns)
    return written, stored


disk = st.lists(st.sampled_from(sorted(BLOCKS)), max_size=24)


@settings(max_examples=80)
@given(st.lists(disk, min_size=1, max_size=4))
def test_each_disk_of_a_stack_is_read_from_its_layers(disks: list[list[str]]) -> None:
    """Disks grow, shrink, become zeros and get back what they had."""
    with tempfile.TemporaryDirectory() as directory:
        written, stored = stack_of(Path(directory), disks)
    for header, kinds in zip(written, disks, strict=True):
        assert read_as_e2b(header, stored) == b"".join(BLOCKS[kind] for kind in kinds)


@settings(max_examples=40)
@given(st.lists(disk, min_size=2, max_size=4))
def test_a_layer_stores_only_what_is_not_the_same_below(disks: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _, stored = stack_of(Path(directory), disks)
    for number, (lower, upper) in enumerate(itertools.pairwise(disks), 2):
        below = [*lower, *"z" * len(upper)]
        own = [kind for kind, was in zip(upper, below, strict=False) if kind not in ("z", was)]
        assert stored[uuid.UUID(int=number).bytes] == b"".join(BLOCKS[kind] for kind in own)


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from("ab"), min_size=40, max_size=40), min_size=3, max_size=3))
def test_however_mixed_a_stack_is_there_are_few_records(disks: list[list[str]]) -> None:
    many, hole = 4, 16 * BLOCK
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.multiple(headers, MANY_EXTENTS=many, MIN_HOLE_BYTES=hole),
    ):
        written, stored = stack_of(Path(directory), disks)
    for header, kinds in zip(written, disks, strict=True):
        assert len(parse_header(header).extents) <= many + 2 * -(-len(kinds) * BLOCK // hole)
        assert read_as_e2b(header, stored) == b"".join(BLOCKS[kind] for kind in kinds)


# ---- Blocks that a file has more than once


memory = st.lists(st.sampled_from("abc.z"), max_size=40)  # "." is a hole, "z" written zeros


def scanned_once(directory: Path, kinds: Sequence[str]) -> tuple[bytes, bytes, Scan]:
    """Write a memory file, and scan it for what is to be stored; return both and what was found."""
    path = directory / "memfile"
    contents = {kind: kind.encode() * BLOCK for kind in "abc"} | {"z": bytes(BLOCK)}
    with path.open("wb") as file:
        file.truncate(len(kinds) * BLOCK)
        for number, kind in enumerate(kinds):
            if kind != ".":
                os.pwrite(file.fileno(), contents[kind], number * BLOCK)
    stored = bytearray()
    with mock.patch.object(upload, "CHUNK_BYTES", 3 * BLOCK):
        found = scan(path, BLOCK, stored.extend, go_on, left_out=LeftOut.REPEATS)
    return path.read_bytes(), bytes(stored), found


@given(memory)
def test_equal_blocks_are_stored_once(kinds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        content, stored, found = scanned_once(Path(directory), kinds)
    header = header_of(found).to_bytes()
    assert read_as_e2b(header, {BUILD.bytes: stored}) == content
    assert restored(parse_header(header), stored) == content
    blocks = [stored[at : at + BLOCK] for at in range(0, len(stored), BLOCK)]
    assert len(blocks) == len(set(blocks)) == len(set(kinds) & set("abc"))
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert (found.stored_bytes, found.stored_crc32c) == (len(stored), crc32c_of(stored))


def test_a_copy_of_a_long_stretch_is_one_record(tmp_path: Path) -> None:
    content, stored, found = scanned_once(tmp_path, "abc.abc.zabc")
    assert found.extents == (
        Extent(0, 3 * BLOCK, 0),
        Extent(3 * BLOCK, BLOCK, None),
        Extent(4 * BLOCK, 3 * BLOCK, 0),
        Extent(7 * BLOCK, 2 * BLOCK, None),
        Extent(9 * BLOCK, 3 * BLOCK, 0),
    )
    assert stored == content[: 3 * BLOCK]


@given(memory)
def test_blocks_of_one_hash_are_compared(kinds: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(repeats, "hash", lambda _: 7, create=True),
    ):
        content, stored, found = scanned_once(Path(directory), kinds)
    assert restored(header_of(found), stored) == content


@given(memory)
def test_only_so_many_blocks_are_remembered(kinds: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(repeats, "REMEMBERED", 1),
    ):
        content, stored, found = scanned_once(Path(directory), kinds)
    assert restored(header_of(found), stored) == content
    own = [kind for kind in kinds if kind in "abc"]
    assert len(stored) == BLOCK * (len(own) - max(0, own.count((own or ["a"])[0]) - 1))


@given(st.lists(st.sampled_from("abc"), min_size=8, max_size=200))
def test_however_often_blocks_repeat_there_are_few_records(kinds: list[str]) -> None:
    many, hole = 4, 16 * BLOCK
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.multiple(headers, MANY_EXTENTS=many, MIN_HOLE_BYTES=hole),
    ):
        content, stored, found = scanned_once(Path(directory), kinds)
    assert len(found.extents) <= many + 2 * -(-len(content) // hole)
    assert restored(header_of(found), stored) == content


def test_headers_of_version_1_are_read() -> None:
    header = Header(BLOCK, BLOCK, BUILD, BUILD, (Extent(0, BLOCK, 0),))
    written = header.to_bytes()
    assert parse_header((1).to_bytes(8, "little") + written[8:]) == header


def record(offset: int, length: int, owner: uuid.UUID = BUILD, stored: int = 0) -> bytes:
    return RECORD.pack(offset, length, owner.bytes, stored)


def head(size: int, version: int = 3, block_size: int = BLOCK) -> bytes:
    return HEADER.pack(version, block_size, size, 0, BUILD.bytes, BUILD.bytes)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be a header"),
        (head(0)[:-1], "cannot be a header"),
        (head(BLOCK) + record(0, BLOCK)[:-1], "cannot be a header"),
        (head(0, version=2), "version 2"),
        (head(BLOCK), "cover 0 of"),
        (head(2 * BLOCK) + record(0, BLOCK), "cover 4096 of"),
        (head(BLOCK) + record(BLOCK, BLOCK), "not contiguous"),
        (head(2 * BLOCK) + record(0, BLOCK) + record(0, BLOCK), "not contiguous"),
        (head(BLOCK) + record(0, 0) + record(0, BLOCK), "not contiguous"),
        (head(100) + record(0, 100), "whole blocks"),
        (head(BLOCK, block_size=0) + record(0, BLOCK), "whole blocks"),
    ],
)
def test_what_breaks_the_format_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(HeaderError, match=why):
        parse_header(data)


def test_one_byte_makes_a_block_nonzero() -> None:
    data = bytes(BLOCK) + bytes(BLOCK - 1) + b"\1" + b"\1" + bytes(BLOCK - 1)
    runs = list(block_runs(data, BLOCK))
    assert runs == [(BlockKind.ZEROS, 0, BLOCK), (BlockKind.OWN, BLOCK, 3 * BLOCK)]


def test_one_byte_makes_a_block_another_than_below() -> None:
    data = b"x" * 3 * BLOCK + bytes(BLOCK)
    below = b"x" * BLOCK + b"x" * (BLOCK - 1) + b"y"  # and then it ends
    assert list(block_runs(data, BLOCK, below)) == [
        (BlockKind.SHARED, 0, BLOCK),
        (BlockKind.OWN, BLOCK, 3 * BLOCK),
        (BlockKind.ZEROS, 3 * BLOCK, 4 * BLOCK),
    ]
    assert next(iter(block_runs(data, BLOCK, b""))) == (BlockKind.OWN, 0, 3 * BLOCK)


def test_an_empty_file_has_a_header_without_records() -> None:
    assert list(block_runs(b"", BLOCK)) == []
    assert ExtentBuilder().extents() == ()
    assert parse_header(head(0)).size == 0


def test_a_dense_scan_hands_on_everything(tmp_path: Path) -> None:
    content = bytes(5000) + b"x" + bytes(5000)
    path = tmp_path / "snapfile"
    path.write_bytes(content)
    stored = bytearray()
    found = scan(path, BLOCK, stored.extend, go_on, left_out=LeftOut.NOTHING)
    assert bytes(stored) == content
    assert (found.size_bytes, found.stored_bytes) == (len(content), len(content))
    assert found.sha256 == hashlib.sha256(content).hexdigest()


def test_a_scan_stops_when_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "memfile"
    path.write_bytes(b"x" * BLOCK)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        scan(path, BLOCK, lambda _: None, stop)


@given(st.lists(st.binary(max_size=50), min_size=2, max_size=2, unique=True))
def test_parts_of_other_content_have_other_names(contents: list[bytes]) -> None:
    names = {part_name("p/", 1, crc32c_of(data), len(data)) for data in contents}
    checksums = {(crc32c_of(data), len(data)) for data in contents}
    assert len(names) == len(checksums)
    assert all(set(name) <= set(SAFE) for name in names)


SAFE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/-_."


def test_parts_sort_by_position_and_need_no_escaping() -> None:
    assert part_name("p/", 9, "+/==", 1) == "p/000009--_..-1"
    assert part_name("p/", 9, "A", 1) < part_name("p/", 10, "A", 1)
    assert "+/=".translate(NAME_SAFE) == "-_."


def test_the_checksum_is_written_as_google_does() -> None:
    assert crc32c_of(b"Hello, world!") == "yKEG5Q=="


NUMBER = st.one_of(st.integers(0, 8), st.just(BLOCK), st.integers(0, 2**64 - 1))
LYING_RECORD = st.tuples(NUMBER, NUMBER, st.sampled_from([bytes(16), BUILD.bytes]), NUMBER)
FIRST = HEADER.pack(3, BLOCK, 0, 0, BUILD.bytes, BUILD.bytes)


@given(st.one_of(st.binary(max_size=400), st.binary(max_size=120).map(lambda rest: FIRST + rest)))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    try:
        header = parse_header(data)
    except HeaderError:
        return
    assert header.to_bytes()[8 : HEADER.size] == data[8 : HEADER.size]


@given(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), st.lists(LYING_RECORD, max_size=5))
def test_a_header_that_lies_is_an_error(
    head: tuple[int, int, int, int], records: list[tuple[int, int, bytes, int]]
) -> None:
    data = HEADER.pack(*head, BUILD.bytes, BUILD.bytes) + b"".join(
        RECORD.pack(*record) for record in records
    )
    try:
        header = parse_header(data)
    except HeaderError:
        return
    assert sum(extent.length for extent in header.extents) == header.size
    assert all(extent.length > 0 for extent in header.extents)


def test_a_large_header_takes_time_by_its_length() -> None:
    count = 500_000
    records = b"".join(RECORD.pack(n * BLOCK, BLOCK, BUILD.bytes, n * BLOCK) for n in range(count))
    began = time.monotonic()
    head = HEADER.pack(1, BLOCK, count * BLOCK, 0, BUILD.bytes, BUILD.bytes)
    assert len(parse_header(head + records).extents) == count
    assert time.monotonic() - began < 60
