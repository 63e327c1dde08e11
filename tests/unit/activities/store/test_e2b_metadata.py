"""What E2B's orchestrator reads of our objects, by a reader that knows nothing of ours."""

from __future__ import annotations

import json
import struct
import uuid
from typing import Any

import pytest

from activities.contract.requests import Commands
from activities.contract.results import ImageConfig, UsedBlocks
from activities.contract.sources import FromTemplate
from activities.store.e2b_metadata import MAX_PREFETCH_BLOCKS, context_of, start_of
from activities.store.headers import BLOCK_BYTES as BLOCK
from activities.store.headers import Extent, Header
from activities.store.metadata import TemplateMetadata
from tests.support.example_template import BUILD, metadata

BASE = "22222222-2222-4222-8222-222222222222"


def read(told: TemplateMetadata) -> dict[str, Any]:
    """Read the metadata of the second kind: `version` says which it is."""
    found: dict[str, Any] = json.loads(told.to_json())
    assert found["version"] == 2
    return found


def verified(*used: UsedBlocks) -> TemplateMetadata:
    """Return metadata of a template whose guest has used these blocks of its memory."""
    told = metadata()
    verification = told.verification.model_copy(update={"prefetch": used})
    return told.model_copy(update={"verification": verification})


def test_the_keys_of_e2b_stand_beside_ours() -> None:
    found = read(metadata(start_command="serve", ready_command="check", env={"B": "2"}))
    assert found["template"] == {
        "build_id": BUILD,
        "kernel_version": "vmlinux-6.1",
        "firecracker_version": "v1.13.1",
    }
    context = {"user": "root", "workdir": "/", "env_vars": {"A": "b", "B": "2"}}
    assert found["context"] == context
    assert found["start"] == {
        "start_command": "serve",
        "ready_command": "check",
        "context": context,
    }
    assert found["from_image"] == "registry/web:1"
    assert "from_template" not in found
    assert found["format_version"] == 1
    assert found["config"]["start_command"] == "serve"


def test_what_is_not_there_is_left_out() -> None:
    found = read(metadata(source=FromTemplate(build_id=BASE)))
    assert "start" not in found
    assert "from_image" not in found
    assert found["from_template"] == {"alias": "", "build_id": BASE}
    assert "prefetch" not in found


def test_a_base_is_told_by_what_it_was_called_and_by_its_build() -> None:
    told = metadata(source=FromTemplate(build_id=BASE, alias="web:stable"))
    assert read(told)["from_template"] == {"alias": "web:stable", "build_id": BASE}
    assert TemplateMetadata.model_validate_json(told.to_json()) == told


def test_what_a_resumed_guest_uses_first_is_told_block_by_block() -> None:
    told = verified(UsedBlocks(3, 2, "r"), UsedBlocks(9, 1, "w"))
    assert read(told)["prefetch"] == {
        "memory": {
            "indices": [3, 4, 9],
            "access_types": ["r", "r", "w"],
            "block_size": BLOCK,
        }
    }
    assert TemplateMetadata.model_validate_json(told.to_json()) == told


def test_of_a_guest_that_uses_all_of_a_large_memory_only_a_part_is_told() -> None:
    memory = read(verified(UsedBlocks(7, 1 << 40, "w")))["prefetch"]["memory"]
    assert len(memory["indices"]) == len(memory["access_types"]) == MAX_PREFETCH_BLOCKS
    assert memory["indices"][:2] == [7, 8]


def test_our_own_reader_takes_what_is_written_as_if_it_were_not_there() -> None:
    told = metadata(start_command="serve")
    assert TemplateMetadata.model_validate_json(told.to_json()) == told


@pytest.mark.parametrize(
    ("config", "user", "workdir"),
    [
        (ImageConfig(), "root", "/"),
        (ImageConfig(user="web:staff", working_dir="/srv"), "web", "/srv"),
        (ImageConfig(user="1000:1000"), "1000", "/"),
        (ImageConfig(user=":5"), "root", "/"),
    ],
)
def test_user_and_directory_are_the_image_s(config: ImageConfig, user: str, workdir: str) -> None:
    context = context_of(config, {})
    assert (context.user, context.workdir) == (user, workdir)


def test_the_image_s_own_command_is_told_in_words() -> None:
    image = ImageConfig(entrypoint=("/bin/sh", "-c"), cmd=("echo it's",))
    start = start_of(Commands(start="image"), image, context_of(image, {}))
    assert start is not None
    assert start.start_command == """/bin/sh -c 'echo it'"'"'s'"""
    assert start_of(Commands(), image, context_of(image, {})) is None


# ---- Blocks: which build has each, by the bytes of a header


def mapping(header: bytes) -> list[tuple[str, int] | None]:
    """Return for each block the build that has it and where; None is zeros.

    Layout: version, block size, size, generation (u64 each), build id, base build id; then records
    of offset, length, build id, storage offset.
    """
    version, block, size, _ = struct.unpack_from("<QQQQ", header)
    assert version in (1, 3)
    found: list[tuple[str, int] | None] = []
    for start in range(64, len(header), 40):
        offset, length, build, stored = struct.unpack_from("<QQ16sQ", header, start)
        assert offset == len(found) * block
        for at in range(0, length, block):
            found.append(None if build == bytes(16) else (build.hex(), stored + at))
    assert len(found) * block == size
    return found


def test_a_stack_of_layers_gives_each_block_to_the_build_that_has_it() -> None:
    base, own = uuid.UUID(BASE), uuid.UUID(BUILD)
    extents = (
        Extent(0, 2 * BLOCK, 5 * BLOCK, base),
        Extent(2 * BLOCK, BLOCK, None),
        Extent(3 * BLOCK, 2 * BLOCK, 0),
        Extent(5 * BLOCK, BLOCK, 0, base),
    )
    header = Header(BLOCK, 6 * BLOCK, own, base, extents, generation=1).to_bytes()
    assert mapping(header) == [
        (base.hex, 5 * BLOCK),
        (base.hex, 6 * BLOCK),
        None,
        (own.hex, 0),
        (own.hex, BLOCK),
        (base.hex, 0),
    ]
