from __future__ import annotations

from pathlib import Path

import pytest

from activities.contract.units import MIB
from activities.disk import ext4
from activities.disk.tree_content import BLOCK, Content

UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.mark.parametrize(
    ("files", "content_mb", "free_mb"),
    [(10, 5, 64), (9_650, 40, 64), (30_000, 900, 512), (100, 5_000, 2048), (1, 0, 1)],
)
def test_how_large_an_ext4_must_be_is_known_before_it_is_made(
    tmp_path: Path, files: int, content_mb: int, free_mb: int
) -> None:
    content = Content(files=files, blocks=content_mb * MIB // BLOCK)
    image = tmp_path / "image"
    size = ext4.make_filesystem(image, content, free_mb * MIB, UUID, lambda: None)
    assert image.stat().st_size == size == ext4.bytes_for(content, free_mb * MIB)
    excess = ext4.available_blocks(image) - content.blocks - free_mb * MIB // BLOCK
    assert excess >= 0
    assert excess <= 8 or size == ext4.MIN_BYTES


def test_an_ext4_whose_many_inodes_make_its_groups_smaller_gets_its_free_space_too(
    tmp_path: Path,
) -> None:
    content = Content(files=60_000, blocks=240 * MIB // BLOCK)
    image = tmp_path / "image"
    size = ext4.make_filesystem(image, content, 64 * MIB, UUID, lambda: None)
    assert image.stat().st_size == size
    excess = ext4.available_blocks(image) - content.blocks - 64 * MIB // BLOCK
    assert 0 <= excess <= 64 * MIB // BLOCK // 200
