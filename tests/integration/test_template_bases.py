"""Templates that are built upon: their disks as blocks, and what else is inherited."""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.registry import Registry

from activities.contract.errors import (
    EarlierWorkerError,
    KernelMissingError,
    ProvisioningError,
    RootfsTooLargeError,
    StorageCorruptionError,
    TemplateNotFoundError,
)
from activities.contract.image_steps import Env, Meaning, Run, User, Workdir
from activities.contract.names import ArtifactName
from activities.contract.requests import Commands
from activities.contract.results import ImageConfig
from activities.contract.step_context import config_after
from activities.disk.ext4 import check_filesystem
from activities.store.bucket import Bucket
from tests.support.file_trees import difference
from tests.support.published_base import publish_base, write_metadata
from tests.support.step_checks import go_on
from tests.support.step_host import StepHost, base_of, read
from tests.support.vm_host import vm_host

pytestmark = pytest.mark.counts_host

DISK = random.Random(1).randbytes(1 << 20)


@pytest_asyncio.fixture
async def host(tmp_path: Path, empty_bucket: Bucket) -> AsyncIterator[StepHost]:
    async with vm_host(tmp_path / "data") as made:
        yield StepHost(made, empty_bucket, tmp_path)


async def test_a_template_is_gone_on_from(host: StepHost, registry: Registry) -> None:
    """Files, user, directory and variables are there, also when the template was a guest's."""
    image = await base_of(host, registry, Env=["A=image"])
    steps = (
        Env(variables=(("B", "step"),)),
        Workdir(path="/srv"),
        Run(command="echo parent >file; busybox mknod /etc/hosts.equiv p; busybox chown 1234 ."),
        User(name="web"),
    )
    parent = await host.build(image, *steps, env={"C": "request"})
    vm = host.host.vm()
    await host.host.start(vm, parent)
    await host.host.wait(vm)
    snapshot = await host.host.snapshot(vm, parent)
    disk = host.host.bench.store.file(snapshot, ArtifactName.ROOTFS)
    made = publish_base(host.bucket, disk.read_bytes(), env={"C": "request"})
    config = config_after(image, steps)
    of_image = made.image.model_copy(update={"config": config})
    write_metadata(host.bucket, made.model_copy(update={"image": of_image}))

    taken = await host.take(made.build_id)
    assert taken.base is not None
    assert host.disk(taken.base.disk).read_bytes() == disk.read_bytes()
    plain = await host.build(taken)
    changed = difference(host.tree(parent), host.tree(plain))
    written_at_boot = (
        "//",
        "/dev/",
        "/proc/",
        "/sys/",
        "/run/",
        "/tmp/",
        "/etc/",
        "/var/",
        "/srv/",
    )
    assert [path for path in changed if not f"{path}/".startswith(written_at_boot)] == []
    assert read(host.disk(plain), "/srv/file") == "parent\n"
    assert read(host.disk(plain), "/.template/user").split()[0] == "1234"

    told = 'echo "$A $B $C $(pwd) $(busybox id -u)" >told'
    child = await host.build(
        taken,
        Run(command=told),
        env={"D": "own"},
        start_command="serve",
        start_meaning=Meaning.E2B,
    )
    check_filesystem(host.disk(child), go_on)
    assert read(host.disk(child), "/srv/told") == "image step request /srv 1234\n"
    env = read(host.disk(child), "/.template/env").split("\0")
    assert {"A=image", "B=step", "C=request", "D=own"} <= set(env)
    assert read(host.disk(child), "/.template/start.command") == "serve"
    marks = {name for name in host.tree(child) if name.endswith("login-shell")}
    assert marks == {"/.template/start.login-shell"}


async def test_a_disk_that_is_no_file_system_is_taken_and_harms_its_build_alone(
    host: StepHost,
) -> None:
    """Whatever a guest has made of its disk, only another guest reads it."""
    taken = await host.take(publish_base(host.bucket, DISK).build_id)
    assert taken.base is not None
    assert host.disk(taken.base.disk).read_bytes() == DISK
    with pytest.raises(ProvisioningError, match="the disk is damaged"):
        await host.build(taken)


async def test_what_is_not_on_the_disk_is_taken_from_the_metadata(host: StepHost) -> None:
    asked = {"start_command": "serve", "ready_command": "ask", "env": {"A": "request", "B": "1"}}
    made = publish_base(host.bucket, DISK, **asked)
    taken = await host.take(made.build_id)
    assert taken.base is not None
    own = {"start_meaning": Meaning.DOCKER, "ready_meaning": Meaning.DOCKER}
    assert taken.base.commands == Commands(start="serve", ready="ask", **own)
    assert taken.config == ImageConfig(env=("A=request", "B=1"))  # the image has A=b
    assert (taken.digest, taken.tenant) == (
        f"sha256:{made.artifacts[ArtifactName.ROOTFS].sha256}",
        "default",
    )
    of_e2b = Commands(start="of the base", start_meaning=Meaning.E2B)
    inherited = made.model_copy(update={"inherited": of_e2b})
    write_metadata(host.bucket, inherited)
    again = await host.take(made.build_id)
    assert again.base is not None
    assert again.base.commands == of_e2b.meant_by(Meaning.DOCKER)
    assert (again.base.disk.reused, again.base.disk.fingerprint) == (
        True,
        taken.base.disk.fingerprint,
    )


async def test_what_cannot_be_taken_is_told_before_it_is_fetched(host: StepHost) -> None:
    made = publish_base(host.bucket, DISK)
    with pytest.raises(TemplateNotFoundError):
        await host.take(str(uuid.uuid4()))
    with pytest.raises(TemplateNotFoundError):
        await host.take(made.build_id, tenant="acme")
    with pytest.raises(RootfsTooLargeError, match="has 1 MiB; the limit is 0 MiB"):
        await host.take(made.build_id, max_rootfs_mb=0)
    with pytest.raises(KernelMissingError):
        await host.take(made.build_id, kernels_dir=Path("/nowhere"))


async def test_a_disk_that_is_not_what_was_published_is_not_kept(host: StepHost) -> None:
    made = publish_base(host.bucket, DISK)
    rootfs = made.artifacts[ArtifactName.ROOTFS].model_copy(update={"sha256": "0" * 64})
    artifacts = {**made.artifacts, ArtifactName.ROOTFS: rootfs}
    write_metadata(host.bucket, made.model_copy(update={"artifacts": artifacts}))
    with pytest.raises(StorageCorruptionError):
        await host.take(made.build_id)
    assert host.host.bench.store.all() == []
    assert list(host.host.bench.store.unfinished()) == []


async def test_a_worker_of_an_earlier_version_is_told(host: StepHost) -> None:
    """It knows nothing of disks, and would have the host make a file system of an image."""
    taken = await host.take(publish_base(host.bucket, DISK).build_id)
    known_to_it = taken.model_copy(update={"base": None})
    with pytest.raises(EarlierWorkerError, match="is a template") as error:
        await host.host.rootfs(known_to_it, host.host.vm())
    assert "template-manager retry" in error.value.hint
    assert not error.value.retryable
