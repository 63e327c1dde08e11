"""What would run on the host's kernel, or have it read a guest's disk, is refused by default."""

from __future__ import annotations

from pathlib import Path

import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import UnsafeStepsError
from activities.contract.image_steps import Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.inputs import BuildImageInput, ImportTemplateInput
from activities.image.docker_daemon import make_docker_client
from activities.image.docker_steps import DockerImageStepActivities
from activities.store.bucket import Bucket
from tests.support.host_resources import all_resources, assert_nothing_left

pytestmark = pytest.mark.counts_host

SPY = "mknod /d b 7 0; cat /proc/1/environ; wget -O- http://169.254.169.254/"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """One that nobody asks: nothing answers there."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    return Bucket("none")


@pytest.mark.parametrize(
    "step",
    [
        Run(command=SPY),
        Copy(source="/", destination="/etc", files_sha256="0" * 64),
        Workdir(path="/etc/.."),
    ],
    ids=["RUN", "COPY", "WORKDIR"],
)
async def test_a_host_refuses_what_runs_on_its_kernel(
    tmp_path: Path, registry: Registry, bucket: Bucket, step: ImageStep
) -> None:
    host = workbench(tmp_path / "data")
    registry.push("steps", [Layer().busybox().tar()])
    image = await host.pull(f"{registry.address}/steps")
    before = all_resources()
    steps = DockerImageStepActivities(host.settings, host.ledger, bucket, make_docker_client())
    asked = BuildImageInput(scope=host.scope(), base=image, steps=(step,), timeout_seconds=30)
    with pytest.raises(UnsafeStepsError, match="turned off") as error:
        await ActivityEnvironment().run(steps.build_image, asked)
    assert "TEMPLATE_MANAGER_UNSAFE_STEPS_IN_CONTAINERS" in error.value.hint
    assert not error.value.retryable
    assert_nothing_left(before)
    plain = (Env(variables=(("A", "b"),)), User(name="app"))
    asked = BuildImageInput(scope=host.scope(), base=image, steps=plain, timeout_seconds=30)
    built = await ActivityEnvironment().run(steps.build_image, asked)
    assert (built.image_id, built.config.user) == (image.image_id, "app")
    host.remove_images()


async def test_a_host_mounts_no_disk_of_a_guest(tmp_path: Path, bucket: Bucket) -> None:
    host = workbench(tmp_path / "data")
    steps = DockerImageStepActivities(host.settings, host.ledger, bucket, make_docker_client())
    scope = host.scope()
    asked = ImportTemplateInput(scope=scope, build_id=host.scope().build_id)
    with pytest.raises(UnsafeStepsError, match="a disk that a guest has written"):
        await ActivityEnvironment().run(steps.import_template, asked)
    assert not (host.settings.data_dir / "work").exists()
