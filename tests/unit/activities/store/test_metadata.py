from __future__ import annotations

import json

from activities.contract.sources import FromImage
from activities.store.metadata import FORMAT_VERSION, TemplateMetadata
from tests.support.example_template import BUILD, metadata


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
