"""What holds a VMM, as the kernel tells it: by `/proc/<pid>` of the real process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from devstack.environment import FIRECRACKER_VERSION, environment
from devstack.given_firecracker import KERNEL_VERSION
from devstack.registry import Layer, Registry

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.errors import JailUnusableError
from activities.contract.names import ArtifactName
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.disk.data_dir import DataDir
from activities.microvm.client import FirecrackerClient
from activities.microvm.launching import SECCOMP_FILTER
from activities.microvm.microvm import HostMicrovmActivities
from activities.microvm.resumable import vmm_version
from activities.microvm.vm_process import VmProcess, leftover_supervisors, leftover_vms
from tests.support.command_line import cli
from tests.support.host_resources import vm_cgroups
from tests.support.real_firecracker import (
    FILTERED,
    JAILED,
    STAND_IN,
    UNJAILED,
    RealFirecracker,
    config_for,
    host_of,
    on_both,
    on_real,
)
from tests.support.seccomp_filters import LETS_ALL_THROUGH, NO_MOUNT, filter_file
from tests.support.small_disk import small_disk
from tests.support.vm_host import VmHost, run, until, vm_host

pytestmark = pytest.mark.counts_host

CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapAmb")
CONTROLLERS = ("cpu", "memory", "pids")
# A VMM's own directory, which is root's; its few devices, as which it can make none; its processes.
WRITABLE = {"/fc-vm", "/dev", "/proc"}
# Its own files there are told elsewhere; other VMs' networks come by themselves, and are no files.
NOT_WRITTEN = ("/fc-vm/", "/run/netns/")


class Vmm:
    """A VMM as its `/proc` shows it."""

    def __init__(self, pid: int) -> None:
        self.proc = Path("/proc") / str(pid)
        lines = (self.proc / "status").read_text().splitlines()
        pairs = (line.partition(":") for line in lines)
        self.status = {name: text.split() for name, _, text in pairs}

    def namespace(self, kind: str) -> str:
        return str((self.proc / "ns" / kind).readlink())

    def mounts(self) -> dict[str, list[str]]:
        """Mount points with their options."""
        lines = (self.proc / "mountinfo").read_text().splitlines()
        return {line.split()[4]: line.split()[5].split(",") for line in lines}

    def of_threads(self, name: str) -> set[str]:
        """Each thread's value; a filter is a thread's own."""
        found = (task.read_text().splitlines() for task in self.proc.glob("task/*/status"))
        return {line.split()[1] for lines in found for line in lines if line.startswith(f"{name}:")}

    def cgroups(self) -> dict[str, str]:
        lines = (self.proc / "cgroup").read_text().splitlines()
        found = {}
        for line in lines:
            _, names, path = line.split(":", 2)
            found.update(dict.fromkeys(names.split(","), path))
        return found

    def require_confined(self, name: str) -> int:
        """Require what holds for every VMM and what it starts; returns its user."""
        [uid] = set(self.status["Uid"])
        assert 30_000 <= int(uid) < 31_000
        assert set(self.status["Gid"]) == {uid}
        assert self.status["Groups"] == []
        held = {kind: int(self.status[kind][0], 16) for kind in CAPABILITIES}
        assert held == dict.fromkeys(CAPABILITIES, 0)
        assert self.status["NoNewPrivs"] == ["1"]
        # What Python sets for itself goes on to the stand-in's QEMU.
        assert (self.proc / "environ").read_bytes() in (b"", b"LC_CTYPE=C.UTF-8\0")
        for kind in ("mnt", "net", "pid"):
            assert self.namespace(kind) != str(Path(f"/proc/self/ns/{kind}").readlink())
        assert (self.proc / "ns" / "net").samefile(f"/run/netns/{name}")
        self.require_it_makes_no_files()
        groups = self.cgroups()
        for controller in CONTROLLERS:
            path = groups.get(controller, groups.get("", ""))
            assert path.endswith(f"/template-manager/{name}"), groups
        return int(uid)

    def require_it_makes_no_files(self) -> None:
        """Neither where its socket is nor in its jail; nothing of the host is writable."""
        found = [self.proc / "root" / "fc-vm" / "run", self.proc / "root" / "fc-vm"]
        is_jailed = not (self.proc / "root" / "etc").exists()
        if is_jailed:
            found += [Path(top) for top, _, _ in os.walk(self.proc / "root")]
        assert {path.stat().st_uid for path in found} == {0}
        assert not [path for path in found if path.stat().st_mode & 0o022]
        if not is_jailed:
            writable = {path for path, options in self.mounts().items() if "rw" in options}
            assert {path for path in writable if not path.startswith(NOT_WRITTEN)} == WRITABLE
        assert re.search(r"Max core file size +0 +0 ", (self.proc / "limits").read_text())


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with host_of(STAND_IN, tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def image(host: VmHost, registry: Registry) -> PulledImage:
    return await pulled(host, registry)


def processes(host: VmHost, vm: VmRef) -> list[int]:
    """The VMM and what it has started."""
    pid = json.loads((host.process(vm).directory / "vmm.json").read_text())["vmm"][0]
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


@contextmanager
def left_as_they_are(files: Iterable[Path]) -> Iterator[None]:
    """Require that files which others use are neither given away, nor opened to all, nor linked."""
    before = [owned(path.stat()) for path in files]
    yield
    assert [owned(path.stat()) for path in files] == before


def owned(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_ctime_ns)


def kernel_of(host: VmHost) -> Path:
    return host.settings.kernel_path(host.shape.kernel_version)


def files_of(host: VmHost, snapshot: SnapshotCheckpoint) -> list[Path]:
    directory = host.bench.store.path(snapshot.step, snapshot.fingerprint)
    return [directory / name for name in ArtifactName]


async def test_every_vmm_is_held_by_the_kernel(host: VmHost, image: PulledImage) -> None:
    users = set()
    for _ in range(2):
        with left_as_they_are([kernel_of(host)]):
            vm, _ = await host.boot(image)
        pids = processes(host, vm)
        found = {Vmm(pid).require_confined(vm.name) for pid in pids}
        assert len(found) == 1  # what it starts is held as well
        users |= found
        vmm = Vmm(pids[0])
        require_its_own_world(vmm, host)
        assert int(vmm.status["CapBnd"][0], 16) == 0
        assert vmm.status["Umask"] == ["0077"]
        assert vmm.of_threads("Seccomp") == {"0"}
        assert (vmm.proc / "environ").read_bytes() == b""
        require_limits(host, vm)
    assert len(users) == 2


def require_its_own_world(vmm: Vmm, host: VmHost) -> None:
    """The files of its VM, a few devices; nothing of it on the host."""
    assert str((vmm.proc / "cwd").readlink()) == "/fc-vm"
    mounts = vmm.mounts()
    assert {"nosuid", "nodev", "noexec"} <= {*mounts["/fc-vm"]}
    for shared in ("/fc-vm/vmm", "/fc-vm/kernel/vmlinux.bin"):
        assert "ro" in mounts[shared]
    devices = vmm.proc / "root" / "dev"
    found = {str(path.relative_to(devices)) for path in devices.rglob("*") if not path.is_dir()}
    assert found == {"null", "zero", "full", "random", "urandom", "kvm", "net/tun"}
    hidden = vmm.proc / "root" / str(host.settings.data_dir.resolve()).lstrip("/")
    assert list(hidden.iterdir()) == []
    own = Path("/proc/self/mountinfo").read_text()
    assert "/fc-vm" not in own
    assert str(host.settings.data_dir) not in own


def require_limits(host: VmHost, vm: VmRef) -> None:
    """Of one vCPU: its memory and what the VMM takes, another CPU, a hundred more processes."""
    memory = str((host.shape.memory_mb + host.settings.vm_overhead_mb) << 20)
    limits = {
        "memory.limit_in_bytes": memory,
        "memory.memsw.limit_in_bytes": memory,  # with what is swapped out
        "cpu.cfs_quota_us": "200000",
        "pids.max": "101",
    }
    found = [Path(group) / each for group in vm_cgroups() for each in limits if vm.name in group]
    assert {path.name: path.read_text().strip() for path in found if path.exists()} == limits


async def test_a_snapshot_is_only_read_by_who_resumes_it(host: VmHost, image: PulledImage) -> None:
    """And what a VMM has written is not its own any more when others use it."""
    vm, rootfs = await host.boot(image)
    snapshot = await host.snapshot(vm, rootfs)
    assert (snapshot.facts.jailer, snapshot.facts.seccomp) == ("none", "none")
    files = files_of(host, snapshot)
    assert {(path.owner(), path.group()) for path in files} == {("root", "root")}
    with left_as_they_are(files):
        await host.verify(vm, snapshot)


async def test_a_snapshot_that_only_root_may_read_resumes(host: VmHost, image: PulledImage) -> None:
    """As somebody pulled it whose umask is strict. It is neither opened to all nor given away."""
    vm, rootfs = await host.boot(image)
    snapshot = await host.snapshot(vm, rootfs)
    files = files_of(host, snapshot)
    for path in files:
        path.chmod(0o600)
    with left_as_they_are(files):
        assert (await host.verify(vm, snapshot)).resume_ms > 0


@pytest.mark.parametrize("kind", on_real(JAILED, UNJAILED, FILTERED))
async def test_real_firecracker_is_held_as_well(
    tmp_path: Path, registry: Registry, kind: str
) -> None:
    """From its start over boot and snapshot to a resume."""
    real = RealFirecracker.given()
    async with host_of(kind, tmp_path) as host:
        if kind == FILTERED:
            put_filter(host.settings.firecracker_path(host.shape.firecracker_version), real)
        with left_as_they_are([kernel_of(host)]):
            vm, rootfs, pid = await started(host, registry)
        assert processes(host, vm) == [pid]
        vmm = Vmm(pid)
        vmm.require_confined(vm.name)
        require_limits(host, vm)
        assert (vmm.proc / "environ").read_bytes() == b""
        assert vmm.status["Umask"] == ["0077"]
        assert vmm.of_threads("Seccomp") == {"2"}
        assert vmm.of_threads("Seccomp_filters") == {"1"}
        if kind == UNJAILED:
            require_its_own_world(vmm, host)
        else:
            require_jail(vmm, host, {"/fc-vm/seccomp.bpf"} if kind == FILTERED else set())
        await host.wait(vm)
        snapshot = await host.snapshot(vm, rootfs)
        is_filtered = kind == FILTERED or has_own_filter(real)
        assert snapshot.facts.seccomp == ("filter" if is_filtered else "none")
        jailer = "none" if kind == UNJAILED else vmm_version(real.binary)
        assert snapshot.facts.jailer == jailer
        with left_as_they_are(files_of(host, snapshot)):
            assert (await host.verify(vm, snapshot)).resume_ms > 0


@pytest.mark.parametrize("kind", on_both(JAILED, UNJAILED))
async def test_a_held_vmm_is_adopted_told_swept_and_counted(
    tmp_path: Path, registry: Registry, kind: str
) -> None:
    async with host_of(kind, tmp_path) as host, host_of(kind, tmp_path / "other") as other:
        vm, rootfs, pid = await started(host, registry)
        foreign, _, foreign_pid = await started(other, registry)
        # Users are the machine's, not a worker's.
        uids = {
            Vmm(pid).require_confined(vm.name),
            Vmm(foreign_pid).require_confined(foreign.name),
        }
        assert len(uids) == 2

        # The worker is started again.
        host.vms = HostMicrovmActivities(host.settings, host.bench.ledger, host.bench.store)
        await host.start(vm, rootfs)
        assert "taking it up again" in host.bench.log_of(vm.scope)
        assert processes(host, vm)[0] == pid

        # The jailer leaves its child behind, whose exit status somebody must have.
        process = host.process(vm)
        os.kill(pid, signal.SIGKILL)
        await until(process.has_ended)
        assert process.exit_reason() == "signal 9"
        await run(host.vms.kill_vm, vm)
        require_nothing_left(host, vm, pid)

        # Killed workers leave VMs, with their directories and without.
        for with_directory in (True, False):
            vm, _, pid = await started(host, registry)
            if not with_directory:
                shutil.rmtree(host.process(vm).directory)
            data_dir = DataDir(host.settings.data_dir)
            found = [*leftover_vms(data_dir), *leftover_supervisors(data_dir)]
            assert [(each.kind, each.name) for each in found] == [
                ("VM" if with_directory else "process", vm.name)
            ]
            found[0].remove()
            require_nothing_left(host, vm, pid)
        assert processes(other, foreign)[0] == foreign_pid  # nobody else's
        await host.remove_all()  # or `other` finds its networks at its end


@pytest.mark.parametrize("kind", on_real(JAILED, FILTERED, UNJAILED))
async def test_the_doctor_says_what_holds_real_firecracker(tmp_path: Path, kind: str) -> None:
    real = RealFirecracker.given()
    kernels, versions = real.install(tmp_path, jailed=kind != UNJAILED)
    if kind == FILTERED:
        put_filter(versions / FIRECRACKER_VERSION / "firecracker", real)
    env = {
        "TEMPLATE_MANAGER_DATA_DIR": str(tmp_path / "data"),
        "TEMPLATE_MANAGER_KERNELS_DIR": str(kernels),
        "TEMPLATE_MANAGER_DEFAULT_KERNEL_VERSION": KERNEL_VERSION,
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(versions),
        "TEMPLATE_MANAGER_DEFAULT_FIRECRACKER_VERSION": FIRECRACKER_VERSION,
    }
    found = await diagnosed(env)
    assert found["guest"]["state"] == "ok", found["guest"]
    assert found["jail"]["state"] == "ok"
    jailer = found["jailer"]
    if kind == UNJAILED:
        assert (jailer["state"], jailer["told"]) == (
            "warning",
            "Firecracker runs without its jailer",
        )
        assert "install -D jailer" in jailer["remedy"]
    else:
        told = f"Firecracker runs in its jailer {vmm_version(real.binary)}"
        assert (jailer["state"], jailer["told"]) == ("ok", told)
    is_filtered = kind == FILTERED or has_own_filter(real)
    assert found["seccomp"]["state"] == ("ok" if is_filtered else "warning")


@pytest.mark.parametrize("kind", on_both(JAILED, UNJAILED))
async def test_a_snapshot_of_before_these_paths_resumes(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its disk is a name alone, and it has no metadata service."""
    inside = VmProcess.inside

    def inside_before(vm: VmProcess, name: str) -> str:
        return name if name == ArtifactName.ROOTFS else inside(vm, name)

    async with host_of(kind, tmp_path) as host:
        vm = host.vm()
        rootfs = await host.rootfs(await pulled(host, registry), vm)
        with monkeypatch.context() as before:
            before.setattr(VmProcess, "inside", inside_before)
            before.setattr(FirecrackerClient, "metadata_service", lambda client: None)
            await host.start(vm, rootfs)
        with host.process(vm).client() as client:
            config: Any = client._call("GET", "/vm/config")
            assert config["drives"][0]["path_on_host"] == "rootfs.ext4"
            assert config["mmds-config"] is None
        await host.wait(vm)
        snapshot = await host.snapshot(vm, rootfs)
        assert (await host.verify(vm, snapshot)).resume_ms > 0


def put_filter(firecracker: Path, real: RealFirecracker) -> None:
    firecracker.with_name(SECCOMP_FILTER).write_bytes(filter_file(NO_MOUNT, real.version))


def has_own_filter(real: RealFirecracker) -> bool:
    """A build for gnu has none: it installs one that lets all through."""
    return LETS_ALL_THROUGH not in real.binary.read_bytes()


async def diagnosed(env: dict[str, str]) -> dict[str, dict[str, str]]:
    """The doctor's findings, by what they are about."""
    findings = json.loads((await cli("doctor", "--json", env=env)).out)["findings"]
    return {finding["what"]: finding for finding in findings}


async def started(host: VmHost, registry: Registry) -> tuple[VmRef, RootfsCheckpoint, int]:
    """A VM whose guest may boot as long as it likes, and its VMM's pid."""
    vm = host.vm()
    rootfs = await host.rootfs(await pulled(host, registry), vm)
    await host.start(vm, rootfs)
    return vm, rootfs, processes(host, vm)[0]


async def pulled(host: VmHost, registry: Registry) -> PulledImage:
    layer = Layer().directory("bin").busybox().directory("srv").tar()
    registry.push("confined", [layer], config=config_for(host))
    return await host.bench.pull(f"{registry.address}/confined")


def require_nothing_left(host: VmHost, vm: VmRef, pid: int) -> None:
    """Neither process, nor cgroup, nor the jail, nor a mount."""
    assert not psutil.pid_exists(pid)
    assert not [group for group in vm_cgroups() if vm.name in group]
    assert not host.process(vm).directory.exists()
    assert str(host.settings.data_dir) not in Path("/proc/self/mountinfo").read_text()


def require_jail(vmm: Vmm, host: VmHost, more: set[str]) -> None:
    """A root directory of its own, in the data directory, and nothing beside the VM's files."""
    root = vmm.proc / "root"
    assert {path.name for path in root.iterdir()} == {
        "dev",
        "fc-vm",
        host.settings.firecracker_path(host.shape.firecracker_version).resolve().name,
        host.settings.firecracker_path(host.shape.firecracker_version).resolve().name + ".pid",
        "rootfs.ext4",
        "run",
    }
    assert vmm.status["NSpid"][-1] == "1"
    mounts = vmm.mounts()
    assert {"nosuid", "nodev", "noexec"} <= {*mounts["/fc-vm"]}
    assert "ro" in mounts["/fc-vm/kernel/vmlinux.bin"]
    assert set(mounts) == {"/", "/fc-vm", "/fc-vm/kernel/vmlinux.bin", *more}
    assert str(host.settings.data_dir) not in Path("/proc/self/mountinfo").read_text()


async def test_where_no_jail_can_be_made_the_build_and_the_doctor_say_so(
    tmp_path: Path, registry: Registry
) -> None:
    versions = tmp_path / "versions"
    binary = versions / FIRECRACKER_VERSION / "firecracker"
    binary.parent.mkdir(parents=True)
    binary.symlink_to(environment().firecracker.resolve())
    binary.with_name("jailer").touch()  # it is not even started
    registry.push("jailed", [Layer().directory("bin").busybox().tar()])
    with small_disk(tmp_path, 500) as data:
        async with vm_host(data, firecracker_dir=versions) as host:
            image = await host.bench.pull(f"{registry.address}/jailed")
            vm = host.vm()
            rootfs = await host.rootfs(image, vm)
            subprocess.run(["mount", "-o", "remount,nodev,noexec", data], check=True)
            told = f"the file system of {data} is mounted with nodev and noexec"
            with pytest.raises(JailUnusableError, match=re.escape(told)):
                await host.start(vm, rootfs)
            env = {
                "TEMPLATE_MANAGER_DATA_DIR": str(data),
                "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(versions),
                "TEMPLATE_MANAGER_DEFAULT_FIRECRACKER_VERSION": FIRECRACKER_VERSION,
            }
            jail = (await diagnosed(env))["jail"]
            assert jail["state"] == "wrong"
            assert told in jail["told"]
            assert "mount -o remount,dev,exec" in jail["remedy"]
