"""Ids that say how large a build's VM is to be."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.contract.names import canonical_build_id
from api.rest.build_ids import VmSize, new_build_id, size_in

SIZES = st.builds(
    VmSize,
    st.integers(0, (1 << 12) - 1),
    st.integers(0, (1 << 24) - 1),
    st.integers(0, (1 << 24) - 1),
)


@given(SIZES)
def test_an_id_says_what_it_was_told_and_is_a_uuid(size: VmSize) -> None:
    build_id = new_build_id(size)
    assert size_in(build_id) == size
    assert canonical_build_id(build_id) == build_id
    assert uuid.UUID(build_id).variant == uuid.RFC_4122


def test_two_ids_differ() -> None:
    size = VmSize(2, 1024, 512)
    assert len({new_build_id(size) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "size", [VmSize(1 << 12, 1, 1), VmSize(1, 1 << 24, 1), VmSize(1, 1, 1 << 24), VmSize(-1, 1, 1)]
)
def test_what_does_not_fit_is_known(size: VmSize) -> None:
    assert not size.is_tellable


@given(st.text() | st.uuids(version=4).map(str))
def test_other_ids_say_nothing(text: str) -> None:
    assert size_in(text) is None


def test_an_id_is_read_in_one_spelling_only() -> None:
    build_id = new_build_id(VmSize(2, 1024, 0xABCDEF))
    for spelled in (build_id.upper(), build_id.replace("-", ""), f"{{{build_id}}}"):
        assert size_in(spelled) is None
