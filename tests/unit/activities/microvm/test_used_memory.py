"""What a process has used of a file that it maps, and reading it before another does."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from activities.contract.results import UsedBlocks
from activities.microvm import used_memory
from activities.microvm.used_memory import read_ahead, used_blocks
from tests.support.step_checks import Stopped, stop_at

BLOCK = 4096
BLOCKS = 4096
AROUND = 512  # blocks of the page cache that a read may bring along, at a multiple of as many

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOTHING WAS SHOWN: it takes root")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that no test changes."""
    path = tmp_path_factory.mktemp("memory") / "memfile"
    path.write_bytes(os.urandom(BLOCKS * BLOCK))
    return path


@contextmanager
def mapped(path: Path, offset: int = 0) -> Iterator[mmap.mmap]:
    """Have it mapped by this process as Firecracker does."""
    with path.open("rb") as file:
        made = mmap.mmap(
            file.fileno(),
            0 if offset == 0 else BLOCKS * BLOCK - offset,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset,
        )
    with made:
        yield made


def blocks_of(used: tuple[UsedBlocks, ...], access: str) -> set[int]:
    return {
        block
        for first, count, kind in used
        if kind == access
        for block in range(first, first + count)
    }


def around(block: int) -> set[int]:
    first = block - block % AROUND
    return set(range(first, first + AROUND))


@needs_root
def test_what_is_read_and_what_is_written_is_told(memory: Path) -> None:
    with mapped(memory) as mapping:
        assert used_blocks(os.getpid(), memory) == ()
        mapping[100 * BLOCK] = 1
        mapping[101 * BLOCK] = 1
        assert mapping[2000 * BLOCK : 2000 * BLOCK + 1]
        used = used_blocks(os.getpid(), memory)
    assert blocks_of(used, "w") == {100, 101}
    assert 2000 in blocks_of(used, "r") <= around(2000) | around(100)
    assert [stretch.first for stretch in used] == sorted(stretch.first for stretch in used)


@needs_root
def test_a_mapping_of_a_part_tells_of_that_part(memory: Path) -> None:
    with mapped(memory, offset=1024 * BLOCK) as mapping:
        mapping[3 * BLOCK] = 1
        assert blocks_of(used_blocks(os.getpid(), memory), "w") == {1027}


@needs_root
def test_another_file_is_not_told_of(memory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(BLOCKS * BLOCK))
    with mapped(other) as mapping:
        mapping[0] = 1
        assert used_blocks(os.getpid(), memory) == ()


@needs_root
def test_many_stretches_become_fewer_and_larger(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_memory, "MAX_RANGES", 10)
    written = set(range(0, BLOCKS, 64))
    with mapped(memory) as mapping:
        for block in written:
            mapping[block * BLOCK] = 1
        used = used_blocks(os.getpid(), memory)
    assert len(used) <= 10
    assert written <= blocks_of(used, "w")
    assert all(first + count <= BLOCKS for first, count, _ in used)


def test_a_process_that_has_ended_has_used_nothing(memory: Path) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert used_blocks(pid, memory) == ()


@needs_root
def test_who_maps_it_again_and_again_is_looked_at_no_longer(memory: Path) -> None:
    """As a VMM that a guest has taken over: of 2000 mappings one is looked at."""
    looks = []
    with ExitStack() as stack:
        first = stack.enter_context(mapped(memory))
        first[7 * BLOCK] = 1
        others = [stack.enter_context(mapped(memory)) for _ in range(2000)]
        for each in others:
            each[9 * BLOCK] = 1
        used = used_blocks(os.getpid(), memory, lambda: looks.append(1))
        lines = len(Path("/proc/self/maps").read_text().splitlines())
    assert len(looks) < lines + 10
    assert len(blocks_of(used, "w")) == 1


def test_it_ends_when_it_is_told_to(memory: Path) -> None:
    with mapped(memory), pytest.raises(Stopped):
        used_blocks(os.getpid(), memory, stop_at(1))


def test_what_is_read_ahead_comes_into_the_page_cache(memory: Path) -> None:
    with memory.open("rb") as file:
        os.fsync(file.fileno())  # what is not on the disk yet stays
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(memory)):
        pytest.skip("NOTHING WAS SHOWN: this file system does not let go of what it has in memory")
    read_ahead(memory, [UsedBlocks(64, 32, "r"), UsedBlocks(1024, 1, "w")])
    deadline = time.monotonic() + 60
    while not (there := resident(memory))[1024] or not all(there[64:96]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(there[2048:])


@pytest.mark.parametrize(
    "wrong",
    [(-1, 2), (0, -1), (0, 0), (BLOCKS - 1, 2), (BLOCKS, 1), (1 << 70, 1), (0, 1 << 70)],
)
def test_what_is_not_in_the_file_is_left_out(memory: Path, wrong: tuple[int, int]) -> None:
    read_ahead(memory, [UsedBlocks(*wrong, "r")])


def resident(path: Path) -> list[bool]:
    """Tell for each block whether the page cache has it (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        found = (ctypes.c_ubyte * BLOCKS)()
        view = ctypes.c_char.from_buffer(mapping)
        start = ctypes.c_void_p(ctypes.addressof(view))
        assert libc.mincore(start, ctypes.c_size_t(len(mapping)), found) == 0
        del view
    return [bool(each & 1) for each in found]
