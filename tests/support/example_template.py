"""A template that has everything: its config, image and metadata."""

from __future__ import annotations

from typing import Any

from activities.contract.checkpoints import (
    RootfsCheckpoint,
    RootfsFacts,
    SnapshotCheckpoint,
    SnapshotFacts,
)
from activities.contract.inputs import PublishTemplateInput
from activities.contract.names import Step
from activities.contract.registry_logins import PasswordLogin, Sealed
from activities.contract.requests import TemplateConfig
from activities.contract.results import (
    BuildCheckpoints,
    ImageConfig,
    PulledImage,
    StoredObject,
    UploadedArtifact,
    Verification,
)
from activities.contract.scope import BuildScope, HostLease
from activities.contract.sources import FromImage, Source
from activities.contract.status import BuildState, BuildStatus, StepRecord
from activities.process.clock import utc_now
from activities.store.metadata import TemplateMetadata, metadata_of

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


def template_config(**changes: Any) -> TemplateConfig:
    values: dict[str, Any] = {
        "template_id": "web",
        "build_id": BUILD,
        "source": FromImage(reference="registry/web:1"),
        "memory_mb": 512,
        "vcpu_count": 2,
        "disk_size_mb": 0,
        "kernel_version": "vmlinux-6.1",
        "firecracker_version": "v1.13.1",
    }
    return TemplateConfig(**(values | changes))


def registry_login() -> PasswordLogin:
    secret = Sealed(key_id="k", token="sealed-token")
    return PasswordLogin(username="me", secret=secret)


def pulled_image() -> PulledImage:
    return PulledImage(
        reference="registry/web@sha256:" + "a" * 64,
        digest="sha256:" + "a" * 64,
        image_id="sha256:" + "b" * 64,
        architecture="amd64",
        size_bytes=1,
        layer_count=1,
        config=ImageConfig(env=("A=b",)),
    )


def build_status(state: BuildState, step: Step, config: TemplateConfig) -> BuildStatus:
    """Return the last status of a build that has ended without a host."""
    return BuildStatus(
        config=config,
        state=state,
        step=step,
        host=None,
        lease_number=None,
        done=BuildCheckpoints(),
        timeline=(),
    )


def metadata(
    build_id: str = BUILD, source: Source | None = None, **changes: Any
) -> TemplateMetadata:
    """Return it; it is of an image with a login unless `source` says something else."""
    source = source or FromImage(reference="registry/web:1", login=registry_login())
    publish = PublishTemplateInput(
        scope=BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h1", number=1)),
        config=template_config(build_id=build_id, source=source, **changes),
        image=pulled_image(),
        rootfs=RootfsCheckpoint(
            fingerprint="f" * 64,
            host="h1",
            facts=RootfsFacts(added_paths=("/.template",), agent_version="0.2"),
        ),
        snapshot=SnapshotCheckpoint(
            fingerprint="f" * 64,
            host="h1",
            facts=SnapshotFacts(
                vmm_name="Firecracker",
                vmm_version="1.13.1",
                snapshot_format="8.0.0",
                architecture="x86_64",
                cpu_model="A CPU",
            ),
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
