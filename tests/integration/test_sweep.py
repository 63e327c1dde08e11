"""Orphans of every kind, made for real, on a host and in a bucket."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import psutil
import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import HOST, Workbench, workbench
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import TemporalUnavailableError
from activities.contract.inputs import SweepInput
from activities.contract.names import ArtifactName, Step, VmPurpose
from activities.contract.requests import BuildOptions
from activities.contract.results import SweepReport
from activities.contract.scope import BuildScope, HostLease, VmRef
from activities.disk.data_dir import DataDir
from activities.host.bucket_sweep import BucketSweep
from activities.host.sweep import HostSweep
from activities.image.docker_daemon import make_docker_client
from activities.image.earlier_images import STEP_REPOSITORY
from activities.microvm.microvm import HostMicrovmActivities
from activities.microvm.network import create_network, networks_of
from activities.microvm.vm_process import OWN_PROCESSES, SUPERVISOR, VmProcess
from activities.step.checkpoints import CheckpointStore, fingerprint
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from activities.store.objects import files_name, lease_name, probe_name, stored_name
from tests.support.host_resources import HostResources, all_resources, assert_nothing_left
from tests.support.step_checks import go_on

pytestmark = pytest.mark.counts_host

RUNNING = WorkflowExecutionStatus.RUNNING
FAILED = WorkflowExecutionStatus.FAILED
COMPLETED = WorkflowExecutionStatus.COMPLETED
SHORT = BuildOptions(lease_grace_seconds=0.05, heartbeat_timeout_seconds=0.1)


class Swept:
    """A host whose builds are in the states that the test says."""

    def __init__(self, bench: Workbench, bucket: Bucket) -> None:
        self.bench = bench
        self.leases = LeaseObjects(bucket)
        self.bucket = bucket
        self.states: dict[str, WorkflowExecutionStatus] = {}
        self.temporal_is_away = False

    async def describe(self, build_id: str) -> WorkflowExecutionStatus | None:
        if self.temporal_is_away:
            raise TemporalUnavailableError("away")
        return self.states.get(build_id)

    def build(self, state: WorkflowExecutionStatus | None) -> BuildScope:
        """A build in that state, which this host holds."""
        build_id = str(uuid.uuid4())
        if state is not None:
            self.states[build_id] = state
        number = self.leases.take(build_id, HOST, "workflow", None)
        return self.bench.scope(build_id, number)

    async def sweep(self, dry_run: bool = False, **settings: object) -> SweepReport:
        time.sleep(0.15)  # nothing is young any more
        sweeper = HostSweep(
            self.bench.settings.model_copy(update={"build": SHORT, **settings}),
            self.bench.ledger,
            self.bench.store,
            self.leases,
            make_docker_client(),
            self.describe,
        )
        report: SweepReport = await ActivityEnvironment().run(
            sweeper.sweep_host, SweepInput(dry_run=dry_run)
        )
        assert [item.error for item in report.items if item.error] == []
        return report


@pytest.fixture
def host(tmp_path: Path, empty_bucket: Bucket) -> Iterator[Swept]:
    before = all_resources()
    made = Swept(workbench(tmp_path / "data"), empty_bucket)
    yield made
    for name in networks_of():
        subprocess.run(["ip", "netns", "delete", name], check=False)
    made.bench.remove_images()
    assert_nothing_left(before)


def make_vm(
    host: Swept, scope: BuildScope, *, directory: bool = True, supervisor: Path = SUPERVISOR
) -> int:
    """A VM's netns, directory, supervisor and a process for the VMM; returns its pid."""
    name = f"tm-{scope.build_id}-{scope.lease.number}-boot"
    marks = host.bench.settings.data_dir / "networks"
    marks.mkdir(exist_ok=True)
    (marks / name).touch()
    create_network(name)
    place = host.bench.settings.data_dir / "vms" / name
    place.mkdir(parents=True)
    command = [*OWN_PROCESSES, sys.executable, "-I", "-S", str(supervisor), name, "1000"]
    process = subprocess.Popen([*command, "/bin/sleep", "1000"], cwd=place, start_new_session=True)
    while not (place / "vmm.json").exists():
        time.sleep(0.01)
    if not directory:
        (place / "vmm.json").unlink()
        place.rmdir() if not list(place.iterdir()) else subprocess.run(
            ["rm", "-r", place], check=True
        )
    return process.pid


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def make_files(host: Swept, scope: BuildScope) -> None:
    """A work directory, an unfinished checkpoint with a loop device on it, a log."""
    data = host.bench.settings.data_dir
    work = data / "work" / scope.build_id / f"rootfs.{scope.lease.number}.1"
    work.mkdir(parents=True)
    (work / "half").write_bytes(bytes(100_000))
    step = data / "steps" / "build_rootfs"
    unfinished = step / f"{'a' * 64}.tmp.{scope.build_id}.{scope.lease.number}.1"
    unfinished.mkdir(parents=True)
    (unfinished / "rootfs.ext4").write_bytes(bytes(1 << 20))
    subprocess.run(["losetup", "--find", unfinished / "rootfs.ext4"], check=True)
    (data / "logs").mkdir(exist_ok=True)
    (data / "logs" / f"{scope.build_id}.jsonl").write_text("{}\n")


def make_checkpoint(host: Swept, scope: BuildScope, name: str, mebibytes: int = 1) -> Path:
    key = fingerprint(Step.ROOTFS, name=name)
    store = host.bench.store
    with store.making(Step.ROOTFS, key, scope, 1, go_on) as work:
        (work / "rootfs.ext4").write_bytes(os.urandom(mebibytes << 20))
        made = RootfsCheckpoint(fingerprint=key, host=scope.lease.host)
        store.publish(work, made, scope, names=(ArtifactName.ROOTFS,), check=go_on)
    return store.path(Step.ROOTFS, key)


async def make_container(host: Swept, scope: BuildScope, registry: Registry) -> str:
    registry.push("swept", [Layer().busybox().tar()])
    image = await host.bench.pull(f"{registry.address}/swept", scope=scope)
    labels = {
        "template-manager.build-id": scope.build_id,
        "template-manager.lease": str(scope.lease.number),
        "template-manager.data-dir": str(host.bench.settings.data_dir),
    }
    made = host.bench.client.create_container(image.image_id, ["/bin/busybox"], labels=labels)
    return str(made["Id"])


def kinds(report: SweepReport) -> set[str]:
    return {item.kind for item in report.items}


async def test_what_an_ended_build_left_is_removed(host: Swept, registry: Registry) -> None:
    data = host.bench.settings.data_dir
    before = HostResources.count(data)
    scope = host.build(COMPLETED)
    pid = make_vm(host, scope)
    make_files(host, scope)
    await make_container(host, scope, registry)
    kept = make_checkpoint(host, scope, "kept")

    shown = await host.sweep(dry_run=True)
    everything = {
        "VM",
        "netns",
        "container",
        "loop device",
        "unfinished step",
        "work directory",
        "lease",
        "reference",
        "log",
    }
    assert kinds(shown) == everything
    assert shown.bytes > 1 << 20
    assert is_alive(pid)  # a dry run touches nothing

    assert kinds(await host.sweep()) == everything
    assert not is_alive(pid)
    before.assert_unchanged(data)
    assert kept.exists()  # it is the cache, and not too old
    assert await host.sweep() == SweepReport()


async def test_what_a_live_build_owns_is_left_alone(host: Swept, registry: Registry) -> None:
    scope = host.build(RUNNING)
    pid = make_vm(host, scope)
    make_files(host, scope)
    container = await make_container(host, scope, registry)
    make_checkpoint(host, scope, "used")
    swept = await host.sweep(checkpoint_max_mb=0, checkpoint_max_age_hours=0)
    assert kinds(swept) <= {"image", "layer mark"}  # a cache that all builds of this machine share
    assert is_alive(pid)
    assert host.bench.client.inspect_container(container)
    del host.states[scope.build_id]
    await host.sweep()


async def test_another_hosts_things_on_this_machine_are_left_alone(
    host: Swept, tmp_path: Path
) -> None:
    """Two hosts of one machine, perhaps of different services, see each other's netns."""
    other = Swept(workbench(tmp_path / "other"), host.bucket)
    pid = make_vm(other, other.build(COMPLETED))
    assert await host.sweep() == SweepReport()
    assert is_alive(pid)
    await other.sweep()


async def test_what_an_earlier_lease_made_is_removed(host: Swept) -> None:
    old = host.build(RUNNING)
    pid = make_vm(host, old)
    number = host.leases.take(old.build_id, "another-host", "workflow", None)
    new = BuildScope(
        build_id=old.build_id, template_id="web", lease=HostLease(host=HOST, number=number)
    )
    kept = make_vm(host, new)
    assert {"VM", "netns", "lease"} == kinds(await host.sweep())
    assert not is_alive(pid)
    assert is_alive(kept)
    del host.states[old.build_id]
    await host.sweep()


async def test_a_vm_whose_directory_is_gone_is_found(host: Swept) -> None:
    scope = host.build(None)
    pid = make_vm(host, scope, directory=False)
    assert "process" in kinds(await host.sweep())
    assert not is_alive(pid)


@pytest.fixture
def old_supervisor() -> Iterator[Path]:
    """The supervisor where versions before had it: their VMs run on when a host is upgraded."""
    # Not in pytest's directory: what has that in its command line is not counted.
    with tempfile.TemporaryDirectory(prefix="version-before-") as before:
        place = Path(before) / "activities" / "vm_supervisor.py"
        place.parent.mkdir()
        yield Path(shutil.copy(SUPERVISOR, place))


async def test_a_vm_of_a_version_before_is_found_without_its_directory(
    host: Swept, old_supervisor: Path
) -> None:
    pid = make_vm(host, host.build(None), directory=False, supervisor=old_supervisor)
    owned = make_vm(host, host.build(RUNNING), directory=False, supervisor=old_supervisor)
    assert "process" in kinds(await host.sweep())
    assert not is_alive(pid)
    assert is_alive(owned)
    host.states.clear()
    assert "process" in kinds(await host.sweep())


async def test_a_vm_of_a_version_before_is_adopted_and_killed(
    host: Swept, old_supervisor: Path
) -> None:
    scope = host.build(RUNNING)
    pid = make_vm(host, scope, supervisor=old_supervisor)
    counted = HostResources.count(host.bench.settings.data_dir).processes
    assert f"{pid} " in " ".join(counted)
    ref = VmRef(scope=scope, purpose=VmPurpose.BOOT)
    vm = VmProcess(DataDir(host.bench.settings.data_dir).vm(ref.name))
    assert vm.is_running()
    assert not vm.has_ended()

    (vm.directory / "vmm.json").unlink()  # it was killed before it could say which pids it has
    vms = HostMicrovmActivities(host.bench.settings, host.bench.ledger, host.bench.store)
    await ActivityEnvironment().run(vms.kill_vm, ref)
    async with asyncio.timeout(20):  # a process that is killed takes a moment to be gone
        while is_alive(pid):
            await asyncio.sleep(0.05)
    assert not vm.directory.exists()
    del host.states[scope.build_id]
    await host.sweep()


async def test_a_person_who_looks_at_a_vm_is_not_taken_for_its_supervisor(host: Swept) -> None:
    scope = host.build(None)
    make_vm(host, scope)
    place = DataDir(host.bench.settings.data_dir).vm(
        VmRef(scope=scope, purpose=VmPurpose.BOOT).name
    )
    looking = subprocess.Popen(["/bin/sleep", "1000"], cwd=place)
    await host.sweep()
    assert is_alive(looking.pid)
    looking.kill()
    looking.wait()


async def test_what_killed_processes_of_any_version_have_left_is_swept(host: Swept) -> None:
    """By the names on disks, not by today's code: an upgraded host finds what it had before."""
    data, build, key = host.bench.settings.data_dir, uuid.uuid4(), "ab" * 32
    left = [
        f"leases/{build}.4711.tmp",
        f"leases/{uuid.uuid4()}",  # empty: the machine lost power
        f"steps/build_rootfs/{key}.tmp.{build}.7.1/rootfs.ext4",
        f"steps/build_rootfs/{key}.tmp.{build}.7.1.old/manifest.json",
        f"steps/boot_and_snapshot/{key}.evicted/memfile",
        f"vms/tm-{build}-7-boot/rootfs.ext4",
        f"networks/tm-{build}-7-verify",
        f"work/{build}/rootfs.7.1/template/init",
        f"work/{build}/base.7.1/rootfs.ext4",
        f"logs/{build}.jsonl",
        f"logs/{build}.streamed",
        f"locks/build_rootfs.{key}",
        "images/tmp4x_k2a",
        ".doctor.4711",
    ]
    kept = [f"steps/build_rootfs/{key}/manifest.json", "draining"]
    for name in left + kept:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    (data / "work" / str(uuid.uuid4())).mkdir()
    os.utime(data / "locks" / f"build_rootfs.{key}", (1, 1))
    assert host.bench.ledger.count() == 1

    await host.sweep()
    assert host.bench.ledger.count() == 0
    assert {path for path in data.rglob("*") if path.is_file()} == {data / name for name in kept}
    assert list((data / "work").iterdir()) == []
    assert await host.sweep() == SweepReport()


async def test_a_failed_build_keeps_what_its_retry_needs(host: Swept) -> None:
    scope = host.build(FAILED)
    kept = make_checkpoint(host, scope, "for a retry")
    make_files(host, scope)
    report = await host.sweep()
    assert "reference" not in kinds(report)
    assert "log" not in kinds(report)
    assert {"loop device", "unfinished step", "work directory", "lease"} == kinds(report)
    assert (kept / "refs" / scope.build_id).exists()
    del host.states[scope.build_id]  # retention has ended
    assert {"reference", "log"} == kinds(await host.sweep())


async def test_nothing_young_is_swept(host: Swept) -> None:
    scope = host.build(None)
    make_vm(host, scope)
    sweeper = HostSweep(
        host.bench.settings,
        host.bench.ledger,
        host.bench.store,
        host.leases,
        make_docker_client(),
        host.describe,
    )
    assert await sweeper.sweep(SweepInput()) == SweepReport()
    await host.sweep()


async def test_when_temporal_is_away_nothing_is_swept(host: Swept) -> None:
    scope = host.build(None)
    pid = make_vm(host, scope)
    host.temporal_is_away = True
    with pytest.raises(TemporalUnavailableError):
        await host.sweep()
    assert is_alive(pid)
    host.temporal_is_away = False
    await host.sweep()


async def test_the_oldest_checkpoints_go_when_there_are_too_many(host: Swept) -> None:
    scope = host.build(COMPLETED)
    paths = [make_checkpoint(host, scope, str(number), 2) for number in range(4)]
    for age, path in enumerate(paths):
        os.utime(path, (time.time() - 1000 + age, time.time() - 1000 + age))
    found = host.bench.store.find(RootfsCheckpoint, paths[0].name, scope.build_id, go_on)
    assert found  # used again just now
    report = await host.sweep(checkpoint_max_mb=5)
    evicted = {item.name for item in report.items if item.kind == "checkpoint"}
    assert evicted == {f"build_rootfs/{path.name}" for path in paths[1:3]}
    assert [path.exists() for path in paths] == [True, False, False, True]


async def test_old_checkpoints_go_and_used_ones_stay(host: Swept) -> None:
    ended, running = host.build(COMPLETED), host.build(RUNNING)
    old, used = make_checkpoint(host, ended, "old"), make_checkpoint(host, running, "used")
    for path in (old, used):
        os.utime(path, (1, 1))
    await host.sweep(checkpoint_max_age_hours=1)
    assert not old.exists()
    assert used.exists()


def test_a_checkpoint_that_a_build_comes_to_use_is_not_evicted(tmp_path: Path) -> None:
    store = CheckpointStore(DataDir(tmp_path), HOST)
    path = tmp_path / "steps" / "build_rootfs" / ("a" * 64)
    (path / "refs").mkdir(parents=True)
    (path / "refs" / "known").touch()
    (path / "refs" / "just come").touch()
    assert store.evict(path, ["known"]) is False
    assert path.exists()
    assert store.evict(path, ["known", "just come"]) is True
    assert not path.exists()


async def test_the_bucket_is_swept_of_parts_and_leases(empty_bucket: Bucket) -> None:
    states = {name: str(uuid.uuid4()) for name in ("running", "failed", "completed", "gone")}
    status = {
        states["running"]: RUNNING,
        states["failed"]: FAILED,
        states["completed"]: COMPLETED,
    }

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        return status.get(build_id)

    for build_id in states.values():
        empty_bucket.write_object(f"{build_id}/.parts/memfile/0-abc", b"part")
        empty_bucket.write_object(f"{build_id}/memfile", b"whole")
        empty_bucket.write_object(lease_name(build_id), b"{}")

    sweeper = BucketSweep(
        empty_bucket,
        describe,
        late_arrival_seconds=0.05,
        most_files_bytes=8,
        layer_max_age_hours=1,
    )
    time.sleep(0.2)
    report = await ActivityEnvironment().run(sweeper.sweep_bucket, SweepInput())
    left = {stored.name for stored in empty_bucket.list_objects("")}
    kept = {f"{build_id}/memfile" for build_id in states.values()}
    kept |= {f"{states[name]}/.parts/memfile/0-abc" for name in ("running", "failed")}
    kept |= {lease_name(states["running"]), stored_name()}
    assert left == kept
    assert kinds(report) == {"part", "lease object"}


async def test_what_is_young_or_not_ours_stays_in_the_bucket(empty_bucket: Bucket) -> None:
    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        return None

    young = [files_name("ab" * 32), f"{uuid.uuid4()}/metadata.json", "web/.parts/x", ".leases/web"]
    for name in [*young, probe_name()]:
        empty_bucket.write_object(name, b"x")
    empty_bucket.write_object(files_name("cd" * 32), b"too large")
    sweeper = BucketSweep(
        empty_bucket,
        describe,
        late_arrival_seconds=0.05,
        most_files_bytes=8,
        layer_max_age_hours=1,
    )
    time.sleep(0.2)
    report = await ActivityEnvironment().run(sweeper.sweep_bucket, SweepInput())
    # A doctor was killed; nobody takes files of nine bytes.
    assert kinds(report) == {"probe", "files"}
    left = [stored.name for stored in empty_bucket.list_objects("")]
    assert left == sorted([*young, stored_name()])


async def test_old_images_of_steps_go(host: Swept, registry: Registry) -> None:
    # An image of its own: other tests' of the same content have other names and uses.
    registry.push("swept-steps", [Layer().busybox().add("of", b"steps").tar()])
    image = await host.bench.pull(f"{registry.address}/swept-steps", scope=host.build(RUNNING))
    client = host.bench.client
    client.tag(image.image_id, STEP_REPOSITORY, "a" * 64)
    assert await host.sweep(checkpoint_max_age_hours=24 * 365 * 3000) == SweepReport()
    [listed] = client.images(name=STEP_REPOSITORY)
    assert kinds(await host.sweep()) == {"image"}, listed  # made at the beginning of time
    assert client.images(name=STEP_REPOSITORY) == []
    assert client.inspect_image(image.image_id)  # type: ignore[no-untyped-call] # untyped upstream


async def test_pulled_images_go_when_no_build_has_used_them_for_long(
    host: Swept, registry: Registry
) -> None:
    client = host.bench.client
    registry.push("swept-pulled", [Layer().busybox().tar()])
    pulled = await host.bench.pull(f"{registry.address}/swept-pulled", scope=host.build(RUNNING))
    registry.push("swept-by-hand", [Layer().busybox().add("by", b"hand").tar()])
    by_hand = f"{registry.address}/swept-by-hand:latest"
    for _ in client.pull(by_hand, stream=True):
        pass
    await host.bench.pull(by_hand, scope=host.build(RUNNING))
    assert await host.sweep() == SweepReport()

    [record] = (host.bench.settings.data_dir / "images").iterdir()
    os.utime(record, (0, 0))
    await host.bench.pull(f"{registry.address}/swept-pulled", scope=host.build(RUNNING))
    assert await host.sweep() == SweepReport()  # a build has used it

    os.utime(record, (0, 0))
    report = await host.sweep()
    assert [(item.kind, item.name) for item in report.items] == [
        ("image", pulled.reference.replace("@sha256:", ":sha256-"))
    ]
    assert report.bytes > 0
    with pytest.raises(docker.errors.NotFound):
        client.inspect_image(pulled.image_id)  # type: ignore[no-untyped-call] # untyped upstream
    assert client.inspect_image(by_hand)  # type: ignore[no-untyped-call] # untyped upstream
    assert await host.sweep() == SweepReport()


async def test_a_pulled_image_that_a_container_of_others_has_is_theirs(
    host: Swept, registry: Registry
) -> None:
    client = host.bench.client
    registry.push("swept-used", [Layer().busybox().tar()])
    pulled = await host.bench.pull(f"{registry.address}/swept-used", scope=host.build(RUNNING))
    container = client.create_container(pulled.image_id, ["/bin/busybox"])
    try:
        [record] = (host.bench.settings.data_dir / "images").iterdir()
        os.utime(record, (0, 0))
        await host.sweep()
        assert client.inspect_image(pulled.image_id)  # type: ignore[no-untyped-call] # untyped upstream
        assert await host.sweep() == SweepReport()
    finally:
        client.remove_container(container["Id"])
