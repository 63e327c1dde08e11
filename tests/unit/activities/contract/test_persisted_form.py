"""What an earlier version has written is read, and is written in the same bytes again."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.contract.checkpoints import (
    Checkpoint,
    RootfsCheckpoint,
    RootfsFacts,
    SnapshotCheckpoint,
    SnapshotFacts,
    StoredFile,
)
from activities.contract.image_steps import Arg, Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.inputs import (
    ArchiveLogInput,
    BuildImageInput,
    BuildInput,
    DeleteTemplateInput,
    FindSnapshotInput,
    PublishTemplateInput,
    PullImageInput,
    SnapshotVmInput,
    StartVmInput,
    UploadArtifactInput,
    VerifySnapshotInput,
)
from activities.contract.model import Model
from activities.contract.names import ArtifactName
from activities.contract.registry_logins import (
    AwsLogin,
    GoogleDefaultLogin,
    GoogleKeyLogin,
    PasswordLogin,
    RegistryLogin,
    Sealed,
)
from activities.contract.requests import TemplateConfig
from activities.contract.sources import FromImage, FromTemplate, Source
from activities.contract.status import BuildResult, BuildStatus
from activities.store.metadata import TemplateMetadata
from api.server.validation import config_sha256
from tests.support.persisted import PERSISTED, lines_of, text_of

PAYLOADS: dict[str, type[Model]] = {
    "build_input.json": BuildInput,
    "build_status.json": BuildStatus,
    "build_result.json": BuildResult,
    "pull_image_input.json": PullImageInput,
    "build_image_input.json": BuildImageInput,
    "find_snapshot_input.json": FindSnapshotInput,
    "start_vm_input.json": StartVmInput,
    "snapshot_vm_input.json": SnapshotVmInput,
    "verify_snapshot_input.json": VerifySnapshotInput,
    "upload_artifact_input.json": UploadArtifactInput,
    "publish_template_input.json": PublishTemplateInput,
    "archive_log_input.json": ArchiveLogInput,
    "delete_template_input.json": DeleteTemplateInput,
    "checkpoint_without_facts.json": RootfsCheckpoint,
}
FILES: dict[str, type[Model]] = {
    "rootfs_manifest.json": RootfsCheckpoint,
    "snapshot_manifest.json": SnapshotCheckpoint,
    "metadata.json": TemplateMetadata,
}


def without_dead_fields(text: str) -> str:
    """Leave out two fields that always had the same value: an old reader takes that again."""
    return re.sub(r',\s*"(?:attempts": 1|attempts":1|block_size_bytes":4096)', "", text)


def test_every_document_is_looked_at() -> None:
    lists = {path.name for path in PERSISTED.glob("*.jsonl")}
    assert lists == {"image_steps.jsonl", "registry_logins.jsonl", "template_configs.jsonl"}
    assert {path.name for path in PERSISTED.glob("*.json")} == PAYLOADS.keys() | FILES.keys()


@pytest.mark.parametrize(("name", "kind"), PAYLOADS.items())
async def test_a_payload_in_a_history_keeps_its_bytes(name: str, kind: type[Model]) -> None:
    model = kind.model_validate_json(text_of(name))
    [payload] = await pydantic_data_converter.encode([model])
    assert payload.data.decode() == without_dead_fields(text_of(name))
    [decoded] = await pydantic_data_converter.decode([payload], [kind])
    assert decoded == model


@pytest.mark.parametrize(("name", "kind"), FILES.items())
def test_a_file_keeps_its_bytes(name: str, kind: type[Model]) -> None:
    model = kind.model_validate_json(text_of(name))
    assert model.model_dump_json(indent=2) == without_dead_fields(text_of(name))


STEPS: list[ImageStep] = [
    Run(command="make  install"),
    Run(command="make", user=""),
    Run(command="make", user="web"),
    Run(command="make", force=True),
    Copy(source="src", destination="/app", files_sha256="5" * 64),
    Copy(source="src", destination="/app", owner="web:web", files_sha256="5" * 64),
    Copy(source="src", destination="/app", owner="", mode="", files_sha256="5" * 64),
    Copy(
        source="*.py",
        destination="/app/",
        owner="1000",
        mode="0644",
        files_sha256="5" * 64,
        force=True,
    ),
    Env(variables=(("A", "it's é"),)),
    Env(variables=(("A", "1"), ("B", "2"), ("A", "3"))),
    Arg(variables=(("VERSION", "7"),)),
    Workdir(path="/app"),
    User(name="web", force=True),
]


@pytest.mark.parametrize(
    ("line", "step"), list(zip(lines_of("image_steps.jsonl"), STEPS, strict=True))
)
def test_a_step_keeps_its_meaning_and_its_bytes(line: str, step: ImageStep) -> None:
    assert TypeAdapter(ImageStep).validate_json(line) == step
    assert step.model_dump_json() == line
    assert TypeAdapter(ImageStep).dump_json(step).decode() == line


SEALED = Sealed(key_id="k1", token="c2VhbGVk")
LOGINS: list[RegistryLogin] = [
    PasswordLogin(username="me", secret=SEALED),
    GoogleKeyLogin(secret=SEALED),
    GoogleDefaultLogin(),
    AwsLogin(access_key_id="AKIAEXAMPLE", secret=SEALED, region="eu-central-1"),
]


@pytest.mark.parametrize(
    ("line", "login"), list(zip(lines_of("registry_logins.jsonl"), LOGINS, strict=True))
)
def test_a_login_keeps_its_meaning_and_its_bytes(line: str, login: RegistryLogin) -> None:
    assert TypeAdapter(RegistryLogin).validate_json(line) == login
    assert login.model_dump_json() == line
    assert TypeAdapter(RegistryLogin).dump_json(login).decode() == line


BUILD = "11111111-1111-4111-8111-111111111111"


def config(source: Source, **more: Any) -> TemplateConfig:
    return TemplateConfig(
        template_id="web",
        build_id=BUILD,
        source=source,
        memory_mb=512,
        vcpu_count=2,
        disk_size_mb=1024,
        kernel_version="vmlinux-6.1",
        firecracker_version="v1.13.1",
        **more,
    )


CONFIGS = [
    config(FromImage(reference="docker.io/library/debian:12")),
    config(FromImage(reference=f"127.0.0.1:5000/web:{BUILD}", is_own=True)),
    config(
        FromTemplate(build_id="22222222-2222-4222-8222-222222222222"), steps=(STEPS[2], STEPS[8])
    ),
    config(
        FromImage(reference="debian", login=LOGINS[3]),
        start_command="serve",
        ready_command="check",
        env={"B": "2", "A": "1"},
        force=True,
        team_id="t",
        steps=tuple(STEPS),
        ready_timeout_seconds=7,
    ),
]


@pytest.mark.parametrize(
    ("line", "config"), list(zip(lines_of("template_configs.jsonl"), CONFIGS, strict=True))
)
def test_a_config_keeps_its_meaning_and_its_bytes(line: str, config: TemplateConfig) -> None:
    assert TemplateConfig.model_validate_json(line) == config
    assert config.model_dump_json() == line


def test_a_config_keeps_its_identity() -> None:
    assert [config_sha256(config) for config in CONFIGS] == lines_of("template_config_hashes.txt")


# ---- Checkpoints


def file(mebibytes: int, digit: str) -> StoredFile:
    return StoredFile(
        size_bytes=mebibytes << 20,
        allocated_bytes=1 << 20,
        sha256=digit * 64,
        mtime_ns=1795609418945846123,
    )


ROOTFS = RootfsCheckpoint(
    fingerprint="f" * 64,
    host="h1",
    files={ArtifactName.ROOTFS: file(70, "0")},
    facts=RootfsFacts(
        size_mb=70,
        free_mb=64,
        files=307,
        init="added",
        agent_version="",
        added_paths=("/.template", "/etc/hosts", "/café"),
    ),
    reused=True,
)
SNAPSHOT = SnapshotCheckpoint(
    fingerprint="e" * 64,
    host="h1",
    files={
        ArtifactName.ROOTFS: file(70, "0"),
        ArtifactName.MEMFILE: file(512, "2"),
        ArtifactName.SNAPFILE: file(1, "1"),
    },
    facts=SnapshotFacts(
        vmm_name="Firecracker",
        vmm_version="1.13.1",
        cpu_model="A CPU",
        snapshot_at=1795609418.9458463,
        boot_seconds=4,
        kernel_version="vmlinux-6.1",
        fsck_clean=True,
    ),
)


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [("rootfs_manifest.json", ROOTFS), ("snapshot_manifest.json", SNAPSHOT)],
)
def test_a_checkpoint_keeps_its_meaning_and_its_bytes(name: str, checkpoint: Checkpoint) -> None:
    assert type(checkpoint).model_validate_json(text_of(name)) == checkpoint
    assert checkpoint.model_dump_json(indent=2) == text_of(name)


def test_a_checkpoint_is_of_its_own_step_only() -> None:
    with pytest.raises(ValidationError, match="build_rootfs"):
        RootfsCheckpoint.model_validate_json(text_of("snapshot_manifest.json"))


def test_a_template_keeps_the_facts_of_its_checkpoints() -> None:
    metadata = TemplateMetadata.model_validate_json(text_of("metadata.json"))
    assert metadata.rootfs_facts == ROOTFS.facts
    assert metadata.snapshot_facts == SNAPSHOT.facts
    assert metadata.config == CONFIGS[3].without_secrets()


def test_a_build_keeps_what_it_has_done() -> None:
    build = BuildInput.model_validate_json(text_of("build_input.json"))
    assert build.config == CONFIGS[3]
    assert build.done is not None
    assert (build.done.rootfs, build.done.snapshot) == (ROOTFS, SNAPSHOT)
