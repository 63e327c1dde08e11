from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.disk.sparse_files import (
    CHUNK_BYTES,
    allocated_bytes,
    copy_private,
    dig_holes,
    sha256_of,
)
from tests.support.step_checks import Stopped, go_on, stop_at

MIB = 1024 * 1024


def write(path: Path, size: int, pieces: list[tuple[int, bytes]]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


@settings(max_examples=30)
@given(
    size=st.integers(0, 3 * MIB),
    pieces=st.lists(st.tuples(st.integers(0, 2 * MIB), st.binary(min_size=1, max_size=9000))),
)
def test_a_copy_has_the_same_bytes_and_hash(
    tmp_path_factory: pytest.TempPathFactory, size: int, pieces: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    source, target = directory / "source", directory / "target"
    write(source, size, pieces)
    copy_private(source, target, go_on)
    content = source.read_bytes()
    assert target.read_bytes() == content
    assert sha256_of(target, go_on) == hashlib.sha256(content).hexdigest()


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, 512 * MIB, [(0, b"start"), (300 * MIB, b"middle")])
    copy_private(source, target, go_on)
    assert target.stat().st_size == 512 * MIB
    assert allocated_bytes(target) < MIB


def test_writing_to_the_copy_leaves_the_source_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"a" * 10_000)
    copy_private(source, target, go_on)
    with target.open("r+b") as file:
        file.write(b"changed")
    assert source.read_bytes() == b"a" * 10_000


def test_a_copy_tells_how_many_bytes_of_data_it_has_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, 512 * MIB, [(0, b"x" * (CHUNK_BYTES + 4096)), (300 * MIB, b"y" * 4096)])
    told: list[int] = []
    copy_private(source, tmp_path / "target", go_on, told.append)
    if told:  # a reflink copies nothing
        assert told == sorted(told)
        assert told[-1] == CHUNK_BYTES + 2 * 4096


def test_a_hash_tells_how_many_bytes_it_has_read_and_counts_holes(tmp_path: Path) -> None:
    memory = tmp_path / "memfile"
    write(memory, 64 * MIB + 5, [(10 * MIB, b"x" * 5000)])
    told: list[int] = []
    sha256_of(memory, go_on, told.append)
    assert told == sorted(told)
    assert told[-1] == 64 * MIB + 5


def test_a_hash_stops_when_it_is_told_to(tmp_path: Path) -> None:
    memory = tmp_path / "memfile"
    write(memory, 64 * MIB, [])
    with pytest.raises(Stopped):
        sha256_of(memory, stop_at(2))


def test_a_copy_stops_when_it_is_told_to(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (3 * CHUNK_BYTES))
    with pytest.raises(Stopped):
        copy_private(source, tmp_path / "target", stop_at(2))


def test_holes_are_dug_where_there_are_only_zeros(tmp_path: Path) -> None:
    memory = tmp_path / "memfile"
    content = bytearray(32 * MIB)  # every page is written, as Firecracker does
    for offset in (0, 5 * MIB + 17, 32 * MIB - 1):
        content[offset] = 7
    memory.write_bytes(content)
    assert allocated_bytes(memory) >= 32 * MIB
    before = sha256_of(memory, go_on)
    freed = dig_holes(memory, go_on)
    assert freed >= 31 * MIB
    assert allocated_bytes(memory) <= MIB
    assert memory.stat().st_size == 32 * MIB
    assert sha256_of(memory, go_on) == before == hashlib.sha256(content).hexdigest()
    assert dig_holes(memory, go_on) == 0  # again, after a crash


def test_digging_can_be_stopped(tmp_path: Path) -> None:
    memory = tmp_path / "memfile"
    memory.write_bytes(bytes(MIB))
    with pytest.raises(Stopped):
        dig_holes(memory, stop_at(1))
    assert memory.read_bytes() == bytes(MIB)
