"""What a build may leave on a host. Counted before and after: equal, or the test fails."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path

import docker
import psutil
from devstack.environment import state_dir
from pyroute2 import netns

from activities.disk.cgroups import PARENT, host_trees
from activities.disk.child_cgroups import NAMES, leftover_child_cgroups
from activities.disk.data_dir import DataDir
from activities.image.containers import BUILD_LABEL, DATA_DIR_LABEL
from activities.image.docker_daemon import make_docker_client
from tests.support import neighbour

VM_PROGRAMS = ("qemu-system", "firecracker", "vm_supervisor", "slirp4netns")
SETTLE_SECONDS = 10.0
NOT_COUNTED = ("/var/lib/docker/", f"{state_dir()}/")
# It has VMs of its own, and runs beside tests that count.
BESIDE = "tests/integration/test_firecracker_api.py"


@dataclass(frozen=True)
class HostResources:
    """Names, not numbers, so that a difference says what was left."""

    processes: frozenset[str]
    networks: frozenset[str]
    mounts: frozenset[str]
    loop_devices: frozenset[str]
    containers: frozenset[str]
    work_directories: frozenset[str]
    cgroups: frozenset[str]

    @classmethod
    def count(cls, data_dir: Path) -> HostResources:
        """Look at the host now. `data_dir` is the data directory of the host under test."""
        return cls(
            processes=frozenset(_vm_processes()),
            networks=frozenset(name for name in netns.listnetns() if name.startswith("tm-")),
            mounts=frozenset(_mounts(data_dir)),
            loop_devices=frozenset(_loop_devices(data_dir)),
            containers=frozenset(_containers()),
            work_directories=frozenset(_work_directories(data_dir)),
            # A child's own comes and goes with it, in tests beside this one, too.
            cgroups=frozenset([*vm_cgroups(), *(left.name for left in leftover_child_cgroups())]),
        )

    def assert_unchanged(self, data_dir: Path) -> None:
        """Wait a little for what is just ending, then compare."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (now := HostResources.count(data_dir)) != self and time.monotonic() < deadline:
            time.sleep(0.2)
        assert now == self, self._difference(now)

    def _difference(self, now: HostResources) -> str:
        names = [field.name for field in fields(self)]
        left = {name: getattr(now, name) - getattr(self, name) for name in names}
        gone = {name: getattr(self, name) - getattr(now, name) for name in names}
        return f"left: {_some(left)}; gone: {_some(gone)}"


def all_resources() -> dict[str, list[str]]:
    """Return all mounts, loop devices and containers of this machine, whosever they are.

    Loop devices are the kernel's, and so those of another mount namespace are listed too: they are
    told by files whose directories are not here.
    """
    mounts = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    loops = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    containers = make_docker_client().containers(all=True)
    return {
        # Docker's own come and go with containers, which are counted; the dev stack's with the
        # images that it makes beside the tests.
        "mounts": sorted(mount for mount in mounts if not mount.startswith(NOT_COUNTED)),
        "loops": sorted(loop for loop in loops if Path(loop).parent.exists()),
        "containers": sorted(container["Id"] for container in containers),
    }


def assert_nothing_left(before: dict[str, list[str]]) -> None:
    """Compare with `all_resources` of before; what tests beside this one have may end meanwhile."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _left_since(before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _left_since(before: dict[str, list[str]]) -> dict[str, list[str]]:
    now = all_resources()
    left = {kind: sorted(set(now[kind]) - set(before[kind])) for kind in now}
    return {kind: names for kind, names in left.items() if names}


def vm_cgroups() -> list[str]:
    """Return the cgroups of VMs that this process can see."""
    found = [tree.directory / PARENT for tree in host_trees()]
    paths = [path for parent in found for path in parent.glob("*/")]
    return [str(path) for path in paths if not path.match(NAMES)]


def _some(found: dict[str, frozenset[str]]) -> dict[str, list[str]]:
    return {name: sorted(values) for name, values in found.items() if values}


def _vm_processes() -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if not any(program in command for program in VM_PROGRAMS) or "pytest" in command:
            continue
        if not _started_by(process).startswith(BESIDE):
            found.append(f"{process.pid} {command[:200]}")
    return found


def _started_by(process: psutil.Process) -> str:
    """Return the test that a process has its environment from, by pytest's own variable."""
    try:
        return process.environ().get("PYTEST_CURRENT_TEST", "")
    except psutil.Error:
        return ""


def _mounts(data_dir: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [point for point in points if point.startswith(str(data_dir))]


def _loop_devices(data_dir: Path) -> list[str]:
    listed = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in listed.stdout.splitlines() if str(data_dir) in line]


def _containers() -> list[str]:
    client = docker.from_env()
    try:
        filters: dict[str, str | list[str] | bool] = {"label": BUILD_LABEL}
        found = client.containers.list(all=True, filters=filters)
        return [str(c.name) for c in found if not _is_of_neighbour(c.labels)]
    finally:
        client.close()


def _is_of_neighbour(labels: dict[str, str]) -> bool:
    """Whether it is of the build beside an attack, which is looked at while that runs."""
    return neighbour.DIRECTORY in Path(labels[DATA_DIR_LABEL]).parts


def _work_directories(data_dir: Path) -> list[str]:
    places = DataDir(data_dir)
    found = [path for place in (places.vms, places.work) for path in place.glob("*")]
    found += places.steps.glob("*/*.tmp.*")
    return [str(path) for path in (*found, *places.leases.glob("*"))]
