from __future__ import annotations

import json
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from activities.contract.names import ArtifactName
from activities.contract.results import UsedBlocks
from activities.contract.sources import FromImage
from activities.store.metadata import FORMAT_VERSION, TemplateMetadata
from tests.support.example_template import BUILD, metadata
from tests.support.hostile_text import hostile_bytes


def test_metadata_says_everything_that_a_consumer_needs() -> None:
    found = json.loads(metadata().model_dump_json())
    assert found["format_version"] == FORMAT_VERSION
    assert found["image"]["digest"] == "sha256:" + "a" * 64
    assert found["image"]["config"]["env"] == ["A=b"]
    assert found["vmm"] == {
        "name": "Firecracker",
        "version": "1.13.1",
        "kernel_version": "vmlinux-6.1",
        "cpu_model": "A CPU",
        "vcpu_count": 2,
        "memory_mb": 512,
        "snapshot_format": "8.0.0",
        "architecture": "x86_64",
    }
    assert found["rootfs_size_mb"] == 512
    assert found["agent_version"] == "0.2"
    assert found["rootfs_facts"]["added_paths"] == '["/.template"]'
    assert found["verification"]["resume_ms"] == 17.5
    assert found["verification"]["clock_skew_ms"] == -40
    assert found["timeline"][0]["step"] == "pull_image"
    data = found["artifacts"]["memfile"]["objects"]["data"]
    assert (data["generation"], data["size_bytes"], data["crc32c"]) == (7, 3, "AAAAAA==")
    assert found["artifacts"]["memfile"]["sha256"] == "c" * 64


def test_what_a_guest_uses_first_is_told_where_it_is_known() -> None:
    made = metadata()
    assert "prefetch" not in json.loads(made.model_dump_json())["verification"]
    told = made.verification.model_copy(update={"prefetch": (UsedBlocks(7, 2, "w"),)})
    text = made.model_copy(update={"verification": told}).model_dump_json()
    assert json.loads(text)["verification"]["prefetch"] == [[7, 2, "w"]]
    assert TemplateMetadata.model_validate_json(text).verification == told


def test_metadata_has_no_secret_not_even_sealed() -> None:
    text = metadata().model_dump_json()
    assert "sealed-token" not in text
    source = metadata().config.source
    assert isinstance(source, FromImage) and source.login is None


def test_metadata_names_every_object_of_the_template() -> None:
    names = {stored.name.removeprefix(f"{BUILD}/") for stored in metadata().objects()}
    assert names == {
        "rootfs.ext4",
        "rootfs.ext4.header",
        "memfile",
        "memfile.header",
        "snapfile",
        "build.log",
    }


def test_metadata_of_a_later_version_with_more_fields_is_read() -> None:
    found = json.loads(metadata().model_dump_json()) | {"new": 1}
    assert TemplateMetadata.model_validate(found).build_id == BUILD


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
    max_leaves=8,
)


def places_in(document: object) -> list[tuple[str | int, ...]]:
    """Return the ways to every value of a document."""
    inner: list[tuple[str | int, object]] = []
    if isinstance(document, dict):
        inner = list(document.items())
    elif isinstance(document, list):
        inner = list(enumerate(document))
    return [(key, *rest) for key, value in inner for rest in ((), *places_in(value))]


@given(st.data())
def test_metadata_with_any_value_in_any_place_is_read_or_not_valid(data: st.DataObject) -> None:
    document = json.loads(metadata().model_dump_json())
    *way, last = data.draw(st.sampled_from(places_in(document)))
    place = document
    for key in way:
        place = place[key]
    place[last] = data.draw(JSON)
    try:
        found = TemplateMetadata.model_validate_json(json.dumps(document))
    except ValidationError:
        return
    assert TemplateMetadata.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("name", ArtifactName)
def test_metadata_without_an_artifact_or_its_data_is_none(name: ArtifactName) -> None:
    """Whoever reads it would end at the missing one, without a word of what is wrong."""
    document = json.loads(metadata().model_dump_json())
    artifact = document["artifacts"].pop(name)
    with pytest.raises(ValidationError, match=f"there is no {name}"):
        TemplateMetadata.model_validate(document)
    document["artifacts"][name] = artifact | {"objects": {}}
    with pytest.raises(ValidationError, match=f"there is no {name}"):
        TemplateMetadata.model_validate(document)
    header = {"header": artifact["objects"]["data"]}
    layer = {"layer_id": str(uuid.uuid4()), "objects": header}
    document["artifacts"][name] = artifact | {"layers": [layer]}
    with pytest.raises(ValidationError, match=f"{name} has a layer without data"):
        TemplateMetadata.model_validate(document)


@given(st.one_of(st.binary(max_size=100), hostile_bytes))
def test_any_bytes_are_no_metadata(content: bytes) -> None:
    with pytest.raises(ValidationError):
        TemplateMetadata.model_validate_json(content)


@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"a":' * 1_000_000, "1" * 4_000_000])
def test_deep_or_endless_metadata_is_refused_soon(content: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValidationError):
        TemplateMetadata.model_validate_json(content)
    assert time.monotonic() - began < 20
