"""Is this machine ready to be a KVM host? Each check says what is wrong and what mends it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    GetSystemInfoRequest,
    ListTaskQueuePartitionsRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError

from activities.contract.errors import (
    FirecrackerMissingError,
    JailUnusableError,
    KernelMissingError,
    TemplateManagerError,
    UnsafeToolsError,
)
from activities.contract.names import SHARED_HOST_TASK_QUEUE
from activities.contract.scope import VmShape
from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from activities.disk.cgroups import CONTROLLERS, host_trees, missing_controllers
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, made_at
from activities.disk.programs import child_environment
from activities.host.passing_vm import passing_vm
from activities.host.tool_versions import holes_of, installed_tools, refusals
from activities.image.docker_daemon import make_docker_client
from activities.microvm.confinement import Held
from activities.microvm.egress import Egress, open_egress
from activities.microvm.guest_kernel import INITRD, judge_kernel
from activities.microvm.launching import JAILER, SECCOMP_FILTER, require_jail_works
from activities.microvm.microvm import jailer_of
from activities.microvm.network import create_network, remove_network
from activities.microvm.resumable import vmm_version
from activities.microvm.trial_boot import boot_kernel
from activities.microvm.vm_names import passing_name
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.process.temporal import missing_search_attributes
from activities.step.vm_requirements import missing_for_egress, require_host
from activities.store.bucket import Bucket
from activities.store.probe import probe_bucket

KVM = Path("/dev/kvm")
MIN_FREE_GIB = 10
# The first server with `matching.enableFairness`.
FAIR_SHARE_SINCE = (1, 29)
GIB = 1024**3
BOOT_MEMORY_MB = 128
BOOT_SECONDS = 60.0
# Program, and the Debian package that has it.
TOOLS = {
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "cp": "coreutils",
    "tar": "tar",
    "mount": "mount",
    "losetup": "mount",
    "setpriv": "util-linux",
    "fallocate": "util-linux",
}

State = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `remedy` is a command or a thing to do; '' when all is well."""

    what: str
    state: State
    told: str
    remedy: str = ""


def check_host(settings: Settings) -> list[Finding]:
    """Check what a KVM host needs on this machine. Blocking; boots a kernel, and removes all of it.

    Without root only that is told: whatever else failed would fail for it.
    """
    if os.geteuid() != 0:
        return [_root(settings)]
    machine: list[Callable[[Settings], Finding]] = [
        _root,
        _kvm,
        _docker,
        _tools,
        _cgroups,
        _versions,
        _busybox,
        _network,
        _egress,
        _kernel,
        _firecracker,
    ]
    rest: list[Callable[[Settings], Finding]] = [_disk, _jail, _secrets, _bucket]
    return [
        *(check(settings) for check in machine),
        *_boot(settings),
        *(check(settings) for check in rest),
    ]


async def check_temporal(client: Client | None, address: str) -> Finding:
    """Check that Temporal answers and knows our search attributes."""
    if client is None:
        return Finding(
            "Temporal",
            "wrong",
            f"{address} cannot be reached",
            "Set TEMPORAL_ADDRESS; start Temporal.",
        )
    missing = await missing_search_attributes(client)
    names = ", ".join(sorted(key.name for key in SEARCH_ATTRIBUTES if key.name in missing))
    if names:
        told = f"{address}: search attributes {names} are missing"
        return Finding("Temporal", "warning", told, "They are made when the first worker starts.")
    return Finding("Temporal", "ok", f"{address}, namespace {client.namespace}")


async def check_fair_share(client: Client) -> Finding:
    """Tell whether the server can serve tenants in turns, and in one line; whether it is told to
    serve them so at all, it does not tell."""
    what = "fair share"
    told = await client.workflow_service.get_system_info(GetSystemInfoRequest())
    version = told.server_version
    if _numbers(version) < FAIR_SHARE_SINCE:
        needed = ".".join(map(str, FAIR_SHARE_SINCE))
        return Finding(
            what,
            "warning",
            f"Temporal {version} takes builds in the order in which they came, whoever's they are",
            f"Temporal {needed} or newer, with the dynamic config of docs/operations.md",
        )
    partitions = await _partitions(client)
    if partitions > 1:
        return Finding(
            what,
            "warning",
            f"the task queue {SHARED_HOST_TASK_QUEUE} has {partitions} partitions, and tenants "
            "have their turns within each: when few builds wait, they are not exact",
            "Set matching.numTaskqueueReadPartitions and …WritePartitions of this queue to 1, as "
            "in docs/operations.md",
        )
    return Finding(what, "ok", f"Temporal {version} has it: see docs/operations.md")


async def _partitions(client: Client) -> int:
    """Return in how many parts builds wait for hosts; 1 when the server does not tell."""
    queue = TaskQueue(name=SHARED_HOST_TASK_QUEUE)
    request = ListTaskQueuePartitionsRequest(namespace=client.namespace, task_queue=queue)
    try:
        told = await client.workflow_service.list_task_queue_partitions(request)
    except RPCError:
        return 1
    return len(told.activity_task_queue_partitions)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def leftover_disk_probes(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield what killed doctors have left in the data directory."""
    for path in data_dir.probes():
        remove = partial(path.unlink, missing_ok=True)
        yield Leftover("probe", path.name, remove, made_at=made_at(path))


def _root(settings: Settings) -> Finding:
    if os.geteuid() == 0:
        return Finding("root", "ok", "running as root")
    return Finding(
        "root", "wrong", "not root: no netns, mounts or KVM", "sudo template-manager doctor"
    )


def _kvm(settings: Settings) -> Finding:
    if os.access(KVM, os.R_OK | os.W_OK):
        return Finding("KVM", "ok", str(KVM))
    return Finding(
        "KVM",
        "warning",
        f"{KVM} cannot be opened: Firecracker needs it",
        "modprobe kvm_intel || modprobe kvm_amd; in a VM, turn nested virtualisation on",
    )


def _docker(settings: Settings) -> Finding:
    try:
        client = make_docker_client()
    except TemplateManagerError as error:
        return Finding("Docker", "wrong", error.message, "apt-get install docker.io; start dockerd")
    info = client.info()
    client.close()
    if info["Driver"] != "overlay2":
        return Finding(
            "Docker",
            "wrong",
            f"storage driver {info['Driver']}",
            'set {"storage-driver": "overlay2"} in /etc/docker/daemon.json and restart dockerd',
        )
    return Finding("Docker", "ok", f"{info['ServerVersion']}, overlay2")


def _tools(settings: Settings) -> Finding:
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        packages = " ".join(missing)
        return Finding("tools", "wrong", f"missing: {packages}", f"apt-get install {packages}")
    return Finding("tools", "ok", ", ".join(TOOLS))


def _cgroups(settings: Settings) -> Finding:
    found = host_trees()
    if missing := missing_controllers(found):
        told = f"{missing}: VMs and children that read tenants' files have fewer limits"
        return Finding("cgroups", "warning", told, "mount them, writable for the host")
    return Finding("cgroups", "ok", f"version {found[0].version}: {', '.join(CONTROLLERS)}")


def _versions(settings: Settings) -> Finding:
    what = "versions"
    try:
        client = make_docker_client()
        with contextlib.closing(client):
            tools = installed_tools(settings, client)
    except TemplateManagerError:
        return Finding(what, "warning", "not known: Docker does not answer", "start dockerd")
    found = holes_of(tools)
    told = "; ".join(
        f"{tool.tool} {tool.version} has {hole.cve}: {hole.what}" for tool, hole in found
    )
    if refused := refusals(settings, found):
        return Finding(what, "wrong", "; ".join(refused), UnsafeToolsError.hint)
    if found:
        return Finding(what, "warning", told, "upgrade them when there is a newer one")
    return Finding(what, "ok", ", ".join(f"{tool.tool} {tool.version}" for tool in tools))


def _busybox(settings: Settings) -> Finding:
    path, remedy = settings.busybox_path, "apt-get install busybox-static"
    if not path.exists():
        return Finding("busybox", "wrong", f"not at {path}", remedy)
    told = subprocess.run(
        ["ldd", path], capture_output=True, text=True, check=False, env=child_environment()
    )
    if "not a dynamic executable" not in told.stdout + told.stderr:
        return Finding("busybox", "wrong", f"{path} is not static", remedy)
    return Finding("busybox", "ok", f"{path}, static")


def _network(settings: Settings) -> Finding:
    name = passing_name()
    try:
        create_network(name)
        remove_network(name)
    except (TemplateManagerError, OSError) as error:
        return Finding("network", "wrong", f"no netns with a TAP: {error}", "modprobe tun")
    return Finding("network", "ok", "a netns with a TAP can be made")


def _egress(settings: Settings) -> Finding:
    what = "internet"
    told = "builds that want a network go to other hosts"
    if missing := missing_for_egress():
        packages = " ".join(missing)
        return Finding(
            what, "warning", f"missing: {packages}; {told}", f"apt-get install {packages}"
        )
    name = passing_name()
    try:
        create_network(name)
        try:
            open_egress(name, Egress(denied=()))
        finally:
            remove_network(name)
    except (TemplateManagerError, OSError) as error:
        return Finding(what, "wrong", f"no guest can be led there: {error}", "modprobe nf_tables")
    return Finding(what, "ok", "a guest's way there can be made")


def _kernel(settings: Settings) -> Finding:
    what, path = "guest kernel", settings.kernel_path(settings.default_kernel_version)
    try:
        verdict = judge_kernel(path)
    except OSError:
        return Finding(what, "wrong", f"not at {path}", f"put a vmlinux at {path}")
    if verdict.missing:
        names = ", ".join(f"CONFIG_{name}" for name in verdict.missing)
        remedy = f"build it with these; drivers may be modules with an {INITRD} beside it"
        return Finding(what, "wrong", f"{path} lacks {names}", remedy)
    if verdict.unwanted:
        told = "; ".join(f"no CONFIG_{each}" for each in verdict.unwanted)
        return Finding(what, "warning", f"{path}: {told}", "build it with these")
    has = "has what guests need" if verdict.has_config else "does not tell its configuration"
    return Finding(what, "ok", f"{path}, {has}")


def _firecracker(settings: Settings) -> Finding:
    path = settings.firecracker_path(settings.default_firecracker_version)
    if not os.access(path, os.X_OK):
        remedy = f"install -D firecracker {path}"
        return Finding("Firecracker", "wrong", f"not at {path}", remedy)
    try:
        return Finding("Firecracker", "ok", f"{path}, version {vmm_version(path)}")
    except TemplateManagerError as error:
        return Finding("Firecracker", "wrong", error.message, f"{path} --version")


def _boot(settings: Settings) -> list[Finding]:
    """Boot the default kernel: that /dev/kvm opens does not say that it can run one."""
    what = "guest"
    shape = VmShape(
        memory_mb=BOOT_MEMORY_MB,
        vcpu_count=1,
        kernel_version=settings.default_kernel_version,
        firecracker_version=settings.default_firecracker_version,
    )
    try:
        # Before anything is made that would fail for another reason.
        firecracker = require_host(settings, shape)
        with passing_vm(DataDir(settings.data_dir)) as vm:
            seconds, held = boot_kernel(vm, settings, firecracker, shape, BOOT_SECONDS)
    except (KernelMissingError, FirecrackerMissingError):
        told = "not booted: kernel or Firecracker is missing"
        return [Finding(what, "warning", told, "see above")]
    except TemplateManagerError as error:
        return [Finding(what, "wrong", error.message, error.hint)]
    told = f"the kernel boots: its first line came after {seconds:.1f} s"
    return [Finding(what, "ok", told), *_held(held, settings)]


def _held(held: Held, settings: Settings) -> list[Finding]:
    """Tell what holds the VMM that has just run."""
    return [_jailer(held, settings), _seccomp(held)]


def _jailer(held: Held, settings: Settings) -> Finding:
    what = "jailer"
    if held.jailer != "none":
        return Finding(what, "ok", f"Firecracker runs in its jailer {held.jailer}".rstrip())
    told = "Firecracker runs without its jailer"
    if not settings.use_jailer:
        return Finding(what, "warning", f"{told}, as set", "unset TEMPLATE_MANAGER_USE_JAILER")
    firecracker = settings.firecracker_path(settings.default_firecracker_version)
    remedy = f"install -D jailer {firecracker.with_name(JAILER)}, of the same release"
    return Finding(what, "warning", told, remedy)


def _seccomp(held: Held) -> Finding:
    what = "seccomp"
    if held.seccomp == "filter":
        return Finding(what, "ok", "a filter stands before Firecracker's system calls")
    if not held.seccomp:
        told = "not known: this process may not look at Firecracker's filter"
        return Finding(what, "warning", told, "run doctor outside of a container")
    return Finding(
        what,
        "warning",
        "Firecracker makes any system call: its build has no filter, or one that lets all through",
        f"take a release of it, or put its release's filter beside it as {SECCOMP_FILTER}",
    )


def _disk(settings: Settings) -> Finding:
    directory = settings.data_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        return Finding("disk", "wrong", f"{directory}: {error.strerror}", f"mkdir -p {directory}")
    free = shutil.disk_usage(directory).free / GIB
    told = f"{free:.0f} GiB free in {directory}"
    if free < MIN_FREE_GIB:
        return Finding("disk", "warning", told, "template-manager sweep, or a larger disk")
    return Finding("disk", "ok", told)


def _jail(settings: Settings) -> Finding:
    what, firecracker = "jail", settings.firecracker_path(settings.default_firecracker_version)
    if jailer_of(settings, firecracker) is None:
        return Finding(what, "ok", "not used")
    try:
        require_jail_works(settings.data_dir)
    except JailUnusableError as error:
        return Finding(what, "wrong", error.message, error.hint)
    except OSError as error:
        told = f"{settings.data_dir}: {error.strerror}"
        return Finding(what, "wrong", told, f"mkdir -p {settings.data_dir}")
    return Finding(what, "ok", f"one can be made in {settings.data_dir}")


def _secrets(settings: Settings) -> Finding:
    if Sealer(settings.secret_keys).can_seal:
        return Finding("secret keys", "ok", "registry passwords can be opened")
    return Finding(
        "secret keys",
        "warning",
        "none: no registry passwords in requests",
        'TEMPLATE_MANAGER_SECRET_KEYS="k1:$(openssl rand -base64 32)", the same for api and hosts',
    )


def _bucket(settings: Settings) -> Finding:
    try:
        probe_bucket(Bucket(settings.bucket))
    except TemplateManagerError as error:
        return Finding("bucket", "wrong", error.message, error.hint)
    return Finding("bucket", "ok", f"{settings.bucket}: an object was written and deleted")
