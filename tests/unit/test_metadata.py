from __future__ import annotations

import json

from activities.metadata import FORMAT_VERSION, TemplateMetadata, metadata_of
from activities.models import (
    BuildScope,
    Checkpoint,
    HostLease,
    ImageConfig,
    PublishTemplateInput,
    PulledImage,
    RegistryAuth,
    Sealed,
    Step,
    StepRecord,
    StoredObject,
    TemplateConfig,
    UploadedArtifact,
    Verification,
    utc_now,
)

BUILD = "11111111-1111-4111-8111-111111111111"
MIB = 1024 * 1024


def stored(name: str) -> StoredObject:
    return StoredObject(name=f"{BUILD}/{name}", generation=7, size_bytes=3, crc32c="AAAAAA==")


def uploaded(name: str, *parts: str) -> UploadedArtifact:
    return UploadedArtifact(
        name=name,
        objects={part: stored(name if part == "data" else f"{name}.{part}") for part in parts},
        size_bytes=512 * MIB,
        sent_bytes=3,
        sha256="c" * 64,
    )


def checkpoint(step: Step, **facts: str | int | float) -> Checkpoint:
    return Checkpoint(step=step, fingerprint="f" * 64, host="h1", files={}, facts=facts)


def metadata() -> TemplateMetadata:
    secret = Sealed(key_id="k", token="sealed-token")
    publish = PublishTemplateInput(
        scope=BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h1", number=1)),
        config=TemplateConfig(
            template_id="web",
            build_id=BUILD,
            image="registry/web:1",
            registry_auth=RegistryAuth(kind="password", username="me", secret=secret),
            memory_mb=512,
            vcpu_count=2,
            disk_size_mb=0,
            kernel_version="vmlinux-6.1",
            firecracker_version="v1.13.1",
        ),
        image=PulledImage(
            reference="registry/web@sha256:" + "a" * 64,
            digest="sha256:" + "a" * 64,
            image_id="sha256:" + "b" * 64,
            architecture="amd64",
            size_bytes=1,
            layer_count=1,
            config=ImageConfig(env=("A=b",)),
        ),
        rootfs=checkpoint(Step.ROOTFS, added="/.template", agent_version="0.2"),
        snapshot=checkpoint(
            Step.BOOT, vmm_name="Firecracker", vmm_version="1.13.1", cpu_model="A CPU"
        ),
        verification=Verification(
            resume_ms=17.5, load_ms=3, clock_skew_ms=-40, seconds_since_snapshot=2
        ),
        uploads={
            "rootfs.ext4": uploaded("rootfs.ext4", "data", "header"),
            "memfile": uploaded("memfile", "data", "header"),
            "snapfile": uploaded("snapfile", "data"),
        },
        timeline=(StepRecord(step=Step.PULL, started=utc_now(), ended=utc_now()),),
    )
    return metadata_of(publish, stored("build.log"))


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
    }
    assert found["rootfs_size_mb"] == 512
    assert found["agent_version"] == "0.2"
    assert found["rootfs_facts"]["added"] == "/.template"
    assert found["verification"]["resume_ms"] == 17.5
    assert found["verification"]["clock_skew_ms"] == -40
    assert found["timeline"][0]["step"] == "pull_image"
    data = found["artifacts"]["memfile"]["objects"]["data"]
    assert (data["generation"], data["size_bytes"], data["crc32c"]) == (7, 3, "AAAAAA==")
    assert found["artifacts"]["memfile"]["sha256"] == "c" * 64


def test_metadata_has_no_secret_not_even_sealed() -> None:
    text = metadata().model_dump_json()
    assert "sealed-token" not in text
    assert metadata().config.registry_auth is None


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
