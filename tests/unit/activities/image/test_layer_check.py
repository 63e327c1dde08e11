"""Layers beyond a limit, or in no form at all: told before a byte too many is passed on."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from activities.contract.errors import (
    ImageBeyondLimitError,
    ImageUnusableError,
    RegistryUnavailableError,
)
from activities.image.layer_check import ImageBudget, ImageLimits, required_layer, unpacked_layer
from tests.support import hostile_layers as layers
from tests.support.hostile_layers import MIB, PACKERS, PIB, TIB

LIMITS = ImageLimits(packed_bytes=MIB, unpacked_bytes=16 * MIB, entries=1000, name_bytes=4096)
MAX_MEMORY_BYTES = 16 * MIB


def in_parts(packed: bytes, size: int = 1000) -> Iterator[bytes]:
    return (packed[at : at + size] for at in range(0, len(packed), size))


def digest_of(packed: bytes) -> str:
    return f"sha256:{hashlib.sha256(packed).hexdigest()}"


def passed(packed: bytes, limits: ImageLimits = LIMITS, size: int = 1000) -> bytes:
    budget = ImageBudget("an image", limits)
    return b"".join(unpacked_layer("an image", digest_of(packed), in_parts(packed, size), budget))


def layer(*names: str) -> bytes:
    blocks = (layers.header(name, 600) + b"x" * 600 + bytes(424) for name in names)
    return b"".join(blocks) + bytes(1024)


@pytest.mark.parametrize("pack", [bytes, *PACKERS.values()])
@pytest.mark.parametrize("size", [1, 700, 1 << 20])
def test_a_layer_is_passed_on_as_it_was_before_it_was_packed(
    pack: Callable[[bytes], bytes], size: int
) -> None:
    tar = layer("one", "two")
    assert passed(pack(tar), size=size) == tar


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_a_bomb_is_told_in_bounded_memory(pack: Callable[[bytes], bytes]) -> None:
    packed = layers.zeros(64, pack)
    tracemalloc.start()
    with pytest.raises(ImageBeyondLimitError, match=rf"the limit is {16 * MIB}"):
        passed(packed, size=64 * 1024)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MAX_MEMORY_BYTES


@pytest.mark.parametrize(
    ("tar", "told"),
    [
        (layers.sparse(15 * TIB), f"{15 * TIB} bytes unpacked; the limit is {16 * MIB}"),
        (layers.old_sparse(15 * TIB), f"{15 * TIB} bytes unpacked; the limit is {16 * MIB}"),
        (layers.claim(PIB), f"{PIB} bytes unpacked; the limit is {16 * MIB}"),
        (layers.empty_files(1001), "1001 files and directories; the limit is 1000"),
        (layers.long_name(9000), "bytes in one name; the limit is 4096"),
        (gzip.compress(layer("a") + bytes(32 * MIB)), "bytes unpacked"),  # behind the end
    ],
)
def test_what_is_beyond_a_limit_is_told_with_both_numbers(tar: bytes, told: str) -> None:
    with pytest.raises(ImageBeyondLimitError, match=told) as error:
        passed(tar)
    assert error.value.hint
    assert not error.value.retryable


@pytest.mark.parametrize("way", layers.hidden_ways(b""))
def test_what_go_s_reader_finds_in_a_file_is_counted_or_refused(way: str) -> None:
    """dockerd's: what it takes for entries must not be to us what a file holds."""
    tar = layers.hidden_ways(layers.sparse(15 * TIB))[way]
    with pytest.raises(
        (ImageBeyondLimitError, ImageUnusableError), match=r"unpacked; |what follows"
    ):
        passed(tar)


@pytest.mark.parametrize("size", [1, 700, 1 << 20])
@pytest.mark.parametrize(
    "tar",
    [
        layers.twice_packed(layer("a")),
        *(pack(bytes(MIB)) for pack in PACKERS.values()),  # too short for an entry
        b"\x5a\x2a\x4d\x18".ljust(1024, b"\0"),
    ],
)
def test_dockerd_is_given_nothing_that_it_would_unpack(tar: bytes, size: int) -> None:
    given: list[bytes] = []
    packed = gzip.compress(tar)
    budget = ImageBudget("an image", LIMITS)
    with pytest.raises(ImageUnusableError, match="packed twice"):
        given.extend(unpacked_layer("an image", digest_of(packed), in_parts(packed, size), budget))
    assert not b"".join(given)


def test_of_a_layer_that_is_another_the_end_is_kept_back() -> None:
    tar = layer("a", "b")
    packed = gzip.compress(tar)

    def given(diff_id: str) -> Iterator[bytes]:
        budget, parts = ImageBudget("an image", LIMITS), in_parts(packed)
        return required_layer("an image", digest_of(packed), diff_id, parts, budget)

    assert b"".join(given(digest_of(tar))) == tar
    came: list[bytes] = []
    with pytest.raises(ImageUnusableError, match="not the one that its config names"):
        came.extend(given(digest_of(b"another")))
    assert len(b"".join(came)) < len(tar)


def test_what_is_sent_is_counted_too() -> None:
    with pytest.raises(ImageBeyondLimitError, match=f"bytes to fetch; the limit is {MIB}"):
        passed(bytes(MIB + 1))


def test_layers_of_one_image_are_counted_together() -> None:
    budget = ImageBudget("an image", LIMITS)
    tar = layers.empty_files(600)
    list(unpacked_layer("an image", digest_of(tar), [tar], budget))
    with pytest.raises(ImageBeyondLimitError):
        list(unpacked_layer("an image", digest_of(tar), [tar], budget))


@pytest.mark.parametrize(
    "broken",
    [
        layers.negative_size(),
        b"not a tar at all, but long enough to be looked at as one".ljust(1024, b"!"),
        gzip.compress(layer("a"))[:-9],
        gzip.compress(layer("a")) + b"garbage",
        b"\x1f\x8b\x08" + bytes(100),
        gzip.compress(gzip.compress(layer("a"))),
        layers.header("x", 2 << 20, tarfile.XHDTYPE) + bytes(4 << 10),
        layers.header("x", 10, tarfile.XHDTYPE) + b"9999999 a=b\n".ljust(512, b"\0"),
        layers.header("x", 10, tarfile.XHDTYPE) + b"0 a=b\n\n\n\n\n".ljust(512, b"\0"),
        layers.header("x", 11, tarfile.XHDTYPE)
        + b"11 size=-1\n".ljust(512, b"\0")
        + layers.header("f", 0),
    ],
)
def test_what_cannot_be_unpacked_is_the_images_fault(broken: bytes) -> None:
    with pytest.raises(ImageUnusableError, match="cannot be unpacked"):
        passed(broken)


def test_what_came_damaged_is_asked_for_again() -> None:
    packed = gzip.compress(layer("a"))
    damaged = packed[:20] + bytes([packed[20] ^ 255]) + packed[21:]
    for sent in (damaged, packed[:-1] + b"?"):
        with pytest.raises(RegistryUnavailableError, match="damaged") as error:
            budget = ImageBudget("an image", LIMITS)
            list(unpacked_layer("an image", digest_of(packed), in_parts(sent), budget))
        assert error.value.retryable


class Full(Exception):
    """Stands for a disk without room."""


@pytest.mark.parametrize("tar", [layers.sparse(TIB), layers.old_sparse(TIB), layers.claim(TIB)])
def test_room_is_asked_for_what_headers_claim_before_they_are_passed_on(tar: bytes) -> None:
    """dockerd writes the holes of a sparse file: 27 GB in a minute, of a layer of a KB."""
    wanted: list[int] = []

    def full(more: int) -> None:
        wanted.append(more)
        raise Full

    budget = ImageBudget("an image", ImageLimits(MIB, 2 * TIB, 1000, 4096), full)
    with pytest.raises(Full):
        next(unpacked_layer("an image", digest_of(tar), [tar], budget))
    assert TIB - MIB < wanted[0] <= TIB


def test_room_is_asked_for_while_a_layer_streams() -> None:
    wanted: list[int] = []
    budget = ImageBudget("an image", ImageLimits(MIB, TIB, 1000, 4096), wanted.append)
    packed = gzip.compress(layers.zeros(100, bytes))
    size = sum(map(len, unpacked_layer("an image", digest_of(packed), [packed], budget)))
    assert size > 100 * MIB
    assert wanted == sorted(wanted, reverse=True)
    assert 5 <= len(wanted) <= 100
