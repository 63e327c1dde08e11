"""Each error that a build can fail with is provoked somewhere on real parts: here, or as named."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Awaitable
from pathlib import Path

import pytest
import reference
from pydantic import SecretStr
from temporalio.client import Client

from activities.contract.errors import (
    DockerUnavailableError,
    FilesystemDamagedError,
    FilesystemToolError,
    StartCommandError,
    StorageDriverError,
    TemplateManagerError,
)
from activities.contract.inputs import BuildInput
from activities.disk.ext4 import check_filesystem, resize_filesystem
from activities.image.docker_daemon import InspectedImage, make_docker_client
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.rootfs.rootfs import image_layers
from api.client.client import CallError
from api.errors import ApiError
from api.pb import template_manager_pb2 as pb
from api.server.validation import validate
from tests.support.pages import ROOT
from tests.support.recording_host import RecordingHost
from tests.support.running_api import Api, forget, template_of
from tests.support.step_checks import go_on
from tests.support.workflow_runs import OPTIONS, config, start
from workflows.build_template import BuildTemplate

pytestmark = pytest.mark.counts_nothing

HERE = "integration/test_errors.py"
# Where each is provoked. What is named raises the type, or shows it to a user.
PROVOKED = {
    "ImageNotFoundError": "integration/test_image.py::test_a_missing_image_says_so",
    "RegistryAuthError": (
        "integration/test_image.py::test_without_the_right_password_the_registry_refuses"
    ),
    "RegistryRefusedError": (
        "attacks/test_registries.py::test_a_registry_of_the_inside_is_not_called"
    ),
    "RegistryUnavailableError": (
        "integration/test_image.py::test_an_unreachable_registry_can_be_tried_again"
    ),
    "WrongArchitectureError": (
        "integration/test_image.py::test_another_architecture_is_refused_before_unpacking"
    ),
    "ImageUnusableError": "integration/test_image.py::test_a_damaged_layer_is_never_taken",
    "DockerUnavailableError": f"{HERE}::test_a_docker_that_is_away_is_told_with_its_address",
    "StorageDriverError": f"{HERE}::test_another_storage_driver_is_named",
    "ImageStepError": (
        "integration/test_disk_steps.py::test_a_failing_step_is_named_with_its_reason"
    ),
    "EarlierWorkerError": (
        "integration/test_template_bases.py::test_a_worker_of_an_earlier_version_is_told"
    ),
    "FilesMissingError": (
        "integration/test_disk_steps.py::test_files_that_are_not_there_are_named"
    ),
    "FilesTooLargeError": (
        "integration/test_files_upload.py::test_files_over_the_limit_are_refused_before_any_is_read"
    ),
    "UnsafeToolsError": (
        "unit/activities/host/test_tool_versions.py::test_a_host_with_a_hole_does_not_start"
    ),
    "RootfsTooLargeError": (
        "integration/test_rootfs.py::test_too_large_says_both_sizes_before_any_copy"
    ),
    "HostDiskFullError": (
        "integration/test_rootfs.py::test_a_full_disk_is_said_and_leaves_nothing"
    ),
    "ProvisioningError": "integration/test_rootfs.py::test_an_unknown_user_fails_with_its_name",
    "ImageBeyondLimitError": (
        "attacks/test_pulled_layers.py::test_a_bomb_is_refused_with_both_numbers"
    ),
    "TooManyLayersError": (
        "integration/test_odd_images.py::test_too_many_layers_are_refused_before_anything_is_pulled"
    ),
    "NotAnImageError": (
        "unit/activities/image/test_platform_search.py::test_an_index_without_any_image_is_no_image"
    ),
    "ImageFormatUnsupportedError": (
        "unit/activities/image/test_platform_search.py::"
        "test_the_kinds_of_layers_are_those_of_images"
    ),
    "DockerRefusedError": (
        "integration/test_odd_images.py::test_what_docker_will_always_refuse_is_not_tried_again"
    ),
    "TargetUnusableError": (
        "integration/test_artifacts.py::test_a_pull_to_where_nothing_can_be_written_is_wrong_usage"
    ),
    "MachineUnfitError": (
        "integration/test_artifacts.py::test_a_run_on_another_machine_than_it_was_made_for"
    ),
    "FilesystemDamagedError": f"{HERE}::test_a_damaged_file_system_is_told_with_what_e2fsck_says",
    "FilesystemToolError": f"{HERE}::test_a_tool_that_fails_is_named",
    "KernelMissingError": (
        "integration/test_microvm.py::test_what_the_host_lacks_is_named_before_any_work"
    ),
    "FirecrackerMissingError": (
        "integration/test_microvm.py::test_what_the_host_lacks_is_named_before_any_work"
    ),
    "AgentMissingError": ("integration/test_rootfs.py::test_a_missing_agent_fails_before_any_work"),
    "EgressMissingError": (
        "unit/activities/step/test_vm_requirements.py::test_a_network_takes_programs_and_none_takes_none"
    ),
    "NetworkNameError": "attacks/test_egress.py::test_what_is_named_and_nothing_else",
    "JailUnusableError": (
        "integration/test_confinement.py::test_where_no_jail_can_be_made_the_build_and_the_doctor_say_so"
    ),
    "VmmError": (
        "unit/activities/microvm/test_client.py::test_what_firecracker_refuses_is_in_the_error"
    ),
    "VmmEndedError": (
        "integration/test_microvm.py::test_a_killed_vmm_is_told_and_another_attempt_boots"
    ),
    "GuestDiedError": "integration/test_microvm.py::test_a_kernel_panic_is_told",
    "StartCommandError": (
        "integration/test_microvm.py::test_a_command_that_does_not_exist_fails_at_once"
    ),
    "ReadyTimeoutError": (
        "integration/test_microvm.py::test_a_ready_command_that_hangs_is_bounded_too"
    ),
    "SnapshotNotResumableError": (
        "integration/test_microvm.py::test_a_damaged_snapshot_is_not_resumable_and_not_used_again"
    ),
    "StorageUnavailableError": (
        "integration/test_bucket.py::test_a_bucket_that_cannot_be_reached_is_unavailable"
    ),
    "NameTakenError": (
        "integration/test_names.py::test_a_name_is_one_template_s_and_a_template_has_one_name"
    ),
    "NamesBeyondLimitError": (
        "integration/test_names.py::test_names_tags_and_builds_that_wait_have_limits"
    ),
    "StorageDeniedError": (
        "integration/test_bucket.py::test_a_bucket_that_does_not_exist_is_named_in_seconds"
    ),
    "PreconditionFailedError": (
        "integration/test_bucket.py::test_a_write_that_expects_another_generation_is_refused"
    ),
    "StorageCorruptionError": (
        "integration/test_artifacts.py::test_a_download_that_is_damaged_leaves_no_file"
    ),
    "TemplateAlreadyPublishedError": (
        "integration/test_artifacts.py::test_another_snapshot_does_not_replace_what_is_published"
    ),
    "TemplateNotFoundError": (
        "integration/test_artifacts.py::test_a_template_that_does_not_exist_is_not_found"
    ),
    "TemplateDamagedError": (
        "integration/test_artifacts.py::test_a_damaged_template_is_not_published"
    ),
    "CheckpointLostError": "integration/test_microvm.py::test_a_lost_vm_goes_back_to_the_boot",
    "LeaseLostError": "integration/test_artifacts.py::test_a_fenced_host_publishes_nothing",
    "TemporalUnavailableError": (
        "integration/test_sweep.py::test_when_temporal_is_away_nothing_is_swept"
    ),
    "AddressTakenError": (
        "unit/activities/process/test_health.py::test_an_address_that_is_taken_is_told"
    ),
    "HostAwayError": f"{HERE}::test_a_host_that_is_away_is_named",
    "NoHostError": (
        "workflows/test_build_template.py::test_without_any_host_the_build_fails_and_says_so"
    ),
    "SealedSecretError": ("unit/activities/process/test_sealing.py::test_keys_can_be_rotated"),
    "StepTimeoutError": f"{HERE}::test_a_step_that_takes_too_long_is_told_with_its_limit",
    "InternalFaultError": (
        "unit/activities/process/test_temporal.py::"
        "test_a_mistake_of_ours_says_so_and_is_not_tried_for_ever"
    ),
    "HostTooSmallError": (
        "unit/activities/step/test_vm_requirements.py::test_what_a_host_lacks_is_named"
    ),
    "NoTurnError": (
        "workflows/test_tenant_line.py::test_a_turn_that_does_not_come_is_told_in_the_end"
    ),
    "BuildTooLongError": (
        "workflows/test_tenant_line.py::test_a_build_that_takes_too_long_is_undone_and_says_so"
    ),
    "TemplateTooLargeError": (
        "workflows/test_tenant_line.py::"
        "test_a_template_that_becomes_too_large_is_refused_before_it_boots"
    ),
    "TenantRemovalError": (
        "workflows/test_delete_tenant.py::"
        "test_what_cannot_be_deleted_is_told_and_keeps_nothing_else_from_it"
    ),
    "InputTooLargeError": (
        "workflows/test_build_template.py::test_what_temporal_does_not_take_ends_the_build"
    ),
    "BuildCancelledError": f"{HERE}::test_a_cancelled_build_says_so",
}
NOT_PROVOKED = {
    "HostFaultError": "the base of others",
    "ImageDamagedError": "takes a dockerd that loses an image between its pull and the next call",
    "HostDrainingError": "reaches nobody: the workflow asks for another host",
    "HostRestartingError": "reaches nobody: the workflow waits for the host to come back",
}


def test_each_error_is_provoked_somewhere() -> None:
    types = {error.__name__ for error in reference.error_types()}
    assert PROVOKED.keys() | NOT_PROVOKED.keys() == types
    assert not PROVOKED.keys() & NOT_PROVOKED.keys()


@pytest.mark.parametrize(("error", "place"), PROVOKED.items())
def test_the_named_test_is_there_and_is_about_that_error(error: str, place: str) -> None:
    file, _, name = place.partition("::")
    source = (ROOT / "tests" / file).read_text()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, functions) and n.name == name]
    assert found, f"there is no {place}"
    assert error in str(ast.get_source_segment(source, found[0]))


def require_helpful(error: TemplateManagerError, *named: str) -> None:
    """Its message names what is meant, and it says what to do next."""
    assert all(text in error.message for text in named), error.message
    assert error.hint


def test_a_docker_that_is_away_is_told_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/docker.sock")
    with pytest.raises(DockerUnavailableError) as caught:
        make_docker_client()
    require_helpful(caught.value, "Docker cannot be reached at unix:///no/docker.sock")
    assert caught.value.retryable


def test_another_storage_driver_is_named() -> None:
    told = {"Id": "sha256:0", "Size": 1, "RootFS": {}, "GraphDriver": {"Name": "vfs", "Data": None}}
    with pytest.raises(StorageDriverError) as caught:
        image_layers(InspectedImage.model_validate(told))
    require_helpful(caught.value, "'vfs'")


@pytest.fixture
def filesystem(tmp_path: Path) -> Path:
    image = tmp_path / "rootfs.ext4"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    return image


def test_a_damaged_file_system_is_told_with_what_e2fsck_says(filesystem: Path) -> None:
    check_filesystem(filesystem, go_on)
    with filesystem.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(256 << 10))
    with pytest.raises(FilesystemDamagedError) as caught:
        check_filesystem(filesystem, go_on)
    require_helpful(caught.value, "rootfs.ext4")
    assert caught.value.log_tail


def test_a_tool_that_fails_is_named(filesystem: Path) -> None:
    filesystem.write_bytes(b"no file system")
    with pytest.raises(FilesystemToolError) as caught:
        resize_filesystem(filesystem, 32 << 20, go_on)
    require_helpful(caught.value, "resize2fs")


def test_a_host_that_is_away_is_named(temporal: Client, recording_host: RecordingHost) -> None:
    address = temporal.service_client.config.target_host
    ended = subprocess.run(
        [Path(sys.executable).with_name("template-manager"), "hosts", "resume", "nobody"],
        env={**os.environ, "TEMPORAL_ADDRESS": address, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert "HostAwayError" in ended.stderr or "host nobody does not answer" in ended.stderr
    assert "template-manager hosts" in ended.stderr


async def test_a_step_that_takes_too_long_is_told_with_its_limit(api: Api) -> None:
    forget(api.journal)
    api.journal.hang("pull_image")
    short = OPTIONS.model_copy(update={"pull_timeout_seconds": 1, "retry_attempts": 1})
    asked = config()
    api.ids.append(asked.build_id)
    handle = await start(api.temporal, BuildInput(config=asked, options=short))
    async with asyncio.timeout(30):
        while (status := await handle.query(BuildTemplate.status)).failure is None:
            await asyncio.sleep(0.1)
    assert status.failure.error_type == "StepTimeoutError"
    assert status.failure.message == ("pull_image did not end within its limit (start_to_close)")
    assert "TEMPLATE_MANAGER_BUILD" in status.failure.hint


async def test_a_cancelled_build_says_so(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    await api.client.cancel(build_id)
    status = await api.client.status(build_id)
    assert status.reason.error_type == "BuildCancelledError"
    assert (status.reason.message, status.reason.pipeline_step) == ("cancelled", "build_rootfs")
    assert status.reason.hint


# ---- What the API refuses


async def refused(answer: Awaitable[object]) -> CallError:
    with pytest.raises(CallError) as caught:
        await answer
    assert caught.value.hint
    return caught.value


async def test_a_base_that_is_not_there_or_not_ready_is_named(api: Api) -> None:
    missing = str(uuid.uuid4())
    base = pb.FromTemplateConfig(build_id=missing)
    error = await refused(api.client.create(api.template(from_image=None, from_template=base)))
    assert (error.reason, missing in error.message) == ("BASE_NOT_FOUND", True)

    running = await api.running_until("build_rootfs")
    base = pb.FromTemplateConfig(build_id=running)
    error = await refused(api.client.create(api.template(from_image=None, from_template=base)))
    assert error.reason == "BASE_NOT_READY"
    assert f"template-manager status {running} --watch" in error.hint
    assert error.retry_after_seconds


async def test_files_that_nobody_has_sent_are_named_by_their_step(api: Api) -> None:
    copy = pb.TemplateStep(type="COPY", args=["a", "/a", "", ""], files_hash="a" * 64)
    error = await refused(api.client.create(api.template(steps=[copy])))
    assert error.reason == "FILES_NOT_FOUND"
    assert [violation.field for violation in error.violations] == ["template.steps[0].files_hash"]


async def test_a_failed_build_cannot_be_cancelled_and_says_so(api: Api) -> None:
    api.journal.fail("start_vm", StartCommandError("exit code 1"))
    build_id = (await api.client.create(api.template())).build_id
    await api.ended(build_id)
    error = await refused(api.client.cancel(build_id))
    assert (error.reason, build_id in error.message) == ("BUILD_ALREADY_FAILED", True)


async def test_a_server_without_a_key_says_who_sets_it() -> None:
    login = pb.FromImageRegistry(general=pb.GeneralRegistry(username="me", password="hunter2"))
    asked = pb.TemplateCreateRequest(template=template_of(from_image_registry=login))
    with pytest.raises(ApiError) as caught:
        validate(asked, Settings(), Sealer(SecretStr("")))
    assert caught.value.reason == "NO_SECRET_KEY"
    assert "TEMPLATE_MANAGER_SECRET_KEYS" in caught.value.hint
    assert "hunter2" not in str(caught.value)
