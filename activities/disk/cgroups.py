"""Cgroups: how much processor and memory, and how many processes, a VMM or a child may take.

Version 1 (a tree for each controller): `template-manager/<name>` below the cgroup that this process
is in. Version 2 (one tree): `template-manager/<name>` below the root, since a cgroup with processes
in it, as ours is, cannot pass controllers on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import HostFaultError
from activities.contract.units import MIB

PARENT = "template-manager"
CONTROLLERS = ("cpu", "memory", "pids")
VERSIONS = {"cgroup": 1, "cgroup2": 2}
PERIOD_US = 100_000
BUSY_SECONDS = 10.0
# Not there where the kernel counts no swap.
OF_SWAP = frozenset({"memory.memsw.limit_in_bytes", "memory.swap.max"})


@dataclass(frozen=True)
class Limits:
    """What the processes of a cgroup may take together."""

    memory_mb: int
    processes: int
    cpus: int | None = None
    """None is no limit."""

    def values(self, version: int) -> dict[str, dict[str, str]]:
        """Return what is written to which file, by controller and in order."""
        return {
            "cpu": self._cpu(version),
            "memory": self._memory(version),
            "pids": {"pids.max": str(self.processes)},
        }

    def _memory(self, version: int) -> dict[str, str]:
        """Limit memory, and memory with swap to as much: what is swapped out is no way around."""
        limit = str(self.memory_mb * MIB)
        if version == 1:
            return {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
        return {"memory.max": limit, "memory.swap.max": "0"}

    def _cpu(self, version: int) -> dict[str, str]:
        if self.cpus is None:
            return {}
        quota = self.cpus * PERIOD_US
        if version == 1:
            return {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(quota)}
        return {"cpu.max": f"{quota} {PERIOD_US}"}


@dataclass(frozen=True)
class Tree:
    """A mounted hierarchy: below which directory our cgroups are, and what it controls."""

    version: int
    directory: Path
    controllers: tuple[str, ...]


def trees(mountinfo: str, own: str) -> list[Tree]:
    """Find the hierarchies with our controllers in `/proc/self/mountinfo` and `/proc/self/cgroup`.

    A controller is in one hierarchy, which may be mounted more than once.
    """
    found: dict[str, Tree] = {}
    for root, point, kind, options in _mounts(mountinfo):
        version = VERSIONS.get(kind, 0)
        have = _controllers_of_version_2(point) if version == 2 else options
        names = tuple(name for name in CONTROLLERS if name in have and name not in found)
        if version and names:
            group = "/" if version == 2 else _own_group(own, names[0])
            tree = Tree(version, Path(os.path.normpath(Path(point) / _below(group, root))), names)
            found.update(dict.fromkeys(names, tree))
    return list(dict.fromkeys(found.values()))


def host_trees() -> list[Tree]:
    """Return this machine's hierarchies, as this process sees them."""
    mountinfo = Path("/proc/self/mountinfo").read_text(errors="replace")
    return trees(mountinfo, Path("/proc/self/cgroup").read_text())


def missing_controllers(found: list[Tree]) -> str:
    """Say which of our controllers a machine lacks, '' when it has them all."""
    missing = {*CONTROLLERS} - {controller for tree in found for controller in tree.controllers}
    return f"this machine has no cgroups for {', '.join(sorted(missing))}" if missing else ""


def cgroup_of(tree: Tree, name: str) -> Path:
    """Return where the cgroup of that name is, or would be."""
    return tree.directory / PARENT / name


def make_cgroups(name: str, limits: Limits, found: list[Tree]) -> list[Path]:
    """Make the cgroups of that name with their limits; returns their directories. Raises OSError.

    What was made before something failed is removed.
    """
    made: list[Path] = []
    try:
        for tree in found:
            values = limits.values(tree.version)
            wanted = [pair for c in tree.controllers for pair in values[c].items()]
            directory = cgroup_of(tree, name)
            if not wanted:
                continue
            _make(tree, directory)
            made.append(directory)
            for file, value in wanted:
                if file not in OF_SWAP or (directory / file).exists():
                    (directory / file).write_text(value)
    except OSError:
        for directory in made:
            remove_cgroup(directory)
        raise
    return made


def remove_cgroup(directory: Path) -> None:
    """Remove a cgroup whose processes are ending. Raises HostFaultError when one stays."""
    deadline = time.monotonic() + BUSY_SECONDS
    while directory.exists():
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostFaultError(f"cannot remove the cgroup {directory}: {error}") from error
            time.sleep(0.02)


def kill_cgroup(directory: Path) -> None:
    """Kill what is in a cgroup and remove it. Raises HostFaultError when it stays."""
    with contextlib.suppress(FileNotFoundError):
        for process in map(int, (directory / "cgroup.procs").read_text().split()):
            if process:  # 0 is one that this process cannot see
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    remove_cgroup(directory)


def _make(tree: Tree, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if tree.version == 1:
        return
    enabled = " ".join(f"+{controller}" for controller in tree.controllers)
    for above in (tree.directory, directory.parent):
        (above / "cgroup.subtree_control").write_text(enabled)


def _mounts(mountinfo: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield root, mount point, type and super options of each mount (proc(5))."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) > 4 and len(rest) > 2:
            yield fields[3], fields[4], rest[0], rest[2].split(",")


def _controllers_of_version_2(point: str) -> list[str]:
    try:
        return Path(point, "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _own_group(own: str, controller: str) -> str:
    """Return our cgroup of a controller of version 1 (cgroups(7))."""
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    return "/"


def _below(group: str, root: str) -> str:
    """Say where a cgroup is below a mount that shows the tree from `root` on."""
    relative = os.path.relpath(group, root)
    return "." if relative.startswith("..") else relative
