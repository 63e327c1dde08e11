"""How a VMM is started: as whom, with which files, within which limits, in a jail or without one.

What is decided here stands in the VM's `launch.json`, by which `vm_launcher` does it, and whoever
removes the VM finds what was made for it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from activities.contract.errors import JailUnusableError
from activities.contract.names import ArtifactName
from activities.contract.units import MIB
from activities.disk.cgroups import (
    Limits,
    Tree,
    cgroup_of,
    host_trees,
    make_cgroups,
    missing_controllers,
    remove_cgroup,
)
from activities.disk.host_tools import require_program
from activities.disk.sparse_files import copy_private
from activities.microvm import vm_launcher
from activities.microvm.egress import LIMITS as EGRESS_LIMITS
from activities.microvm.egress import Egress, nft_command, resolver_file
from activities.microvm.egress import command as egress_command
from activities.microvm.vm_supervisor import EGRESS_DENY, EGRESS_PLAN

INSIDE = "/fc-vm"
"""Where the VMM has the VM's files: a path that is frozen into snapshots."""
OWN = "run"
SOCKET = "api.sock"
PLAN = "launch.json"
DEVICES = tuple(vm_launcher.DEVICES)
EGRESS_DEVICES = ("null", "urandom", "net/tun")
PROGRAM = "vmm"
LOG_PIPE = "vmm.log.pipe"
JAILER = "jailer"
"""Its program, beside Firecracker's."""
JAIL = "jail"
SECCOMP_FILTER = "seccomp.bpf"
DATA = ("nosuid", "nodev", "noexec")
CONSOLE_BYTES_EVER = 4 << 30
"""What a guest may ever say: given back as it is read, but a file's end for the kernel."""
# The jailer makes devices in the jail, and copies Firecracker there.
UNFIT = {"nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
# What the jailer does before it gives all of it up.
JAILERS_CAPABILITIES = (
    "chown",
    "dac_override",
    "fowner",
    "mknod",
    "setgid",
    "setuid",
    "sys_admin",
    "sys_chroot",
)

_Mount = tuple[str, str, tuple[str, ...]]
"""Source, target, and flags of a bind mount."""


@dataclass(frozen=True)
class Launch:
    """What a VMM is started with."""

    vmm: Path
    limits: Limits
    users: range
    """The user numbers that VMs may have."""
    console_bytes: int = 16 * MIB
    """What is kept of the guest's console, of its own lines and of ours each."""
    jailer: Path | None = None
    hidden: tuple[Path, ...] = ()
    """Directories that a VMM without a jail must not see."""
    own: tuple[str, ...] = ()
    """Names of files that the VMM may write to; those that are not there are made."""
    shared: Mapping[str, Path] = field(default_factory=dict)
    """Files that it may only read, by their names in its directory."""
    egress: Egress | None = None
    """What its guest may reach; None is nothing."""


class Confinement(NamedTuple):
    """What holds a VMM: whether it is jailed, and why its limits do not hold ('' if they do)."""

    is_jailed: bool
    unlimited: str


class Launching:
    """The start of one VMM, in the VM's directory and as a user."""

    def __init__(self, directory: Path, files: Path, launch: Launch, uid: int) -> None:
        self._directory = directory
        self._files = files
        self._launch = launch
        self._uid = uid
        self._id = _short_id(directory.name)

    def prepare(self, check: Callable[[], None]) -> Confinement:
        """Give the VMM what it needs and write `launch.json`.

        Raises OSError, HostFaultError; JailUnusableError before anything is made.
        """
        if self._launch.jailer:
            require_jail_works(self._directory)
        mounts = self._mounts(check)
        trees = host_trees()
        plan = {
            "user": self._uid,
            "cgroups": [str(cgroup_of(tree, self._directory.name)) for tree in trees],
            "jailer": str(self._launch.jailer or ""),
            "root": str(self._root or ""),
            "mounts": mounts,
            "devices": DEVICES,
            "hidden": self._hidden(),
            "alone": {},
            "directory": INSIDE,
            "command": self._command(),
            "pid_file": f"{self._root}/{self._program.name}.pid" if self._root else "",
        }
        # Before the cgroups are made: whoever removes the VM finds them.
        _write(self._directory / PLAN, plan)
        unlimited = _limit(self._directory.name, self._launch.limits, trees)
        if self._launch.egress:
            unlimited = prepare_egress(self._directory, self._hidden()) or unlimited
        return Confinement(self._root is not None, unlimited)

    def _hidden(self) -> list[str]:
        return [str(path) for path in self._launch.hidden if path.is_dir()]

    @property
    def _program(self) -> Path:
        return self._launch.vmm.resolve()

    @property
    def _root(self) -> Path | None:
        """The jail's root directory as the jailer makes it; None without a jailer."""
        if self._launch.jailer is None:
            return None
        return self._directory.resolve() / JAIL / self._program.name / self._id / "root"

    def close(self) -> None:
        """Take from the VMM the directories that are its own: it makes no more files.

        It has its socket then, and its jail; no guest has said a word yet.
        """
        own = self._files / OWN
        jail = os.walk(self._root) if self._root else ()
        for path in (own / SOCKET, own, *(Path(directory) for directory, _, _ in jail)):
            os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
            path.chmod(0o755)

    # ---- Files

    def _mounts(self, check: Callable[[], None]) -> list[_Mount]:
        """Give the VMM its files, and list what is shown to it where."""
        for name in self._launch.own:
            give(self._files / name, self._uid)
        os.mkfifo(self._directory / LOG_PIPE, 0o600)
        os.link(self._directory / LOG_PIPE, self._files / LOG_PIPE)
        os.chown(self._files / LOG_PIPE, self._uid, self._uid)
        _make_directory(self._files / OWN)
        os.chown(self._files / OWN, self._uid, self._uid)
        shared = [self._show(name, source, check) for name, source in self._all_shared().items()]
        mounts = [(str(self._files.resolve()), self._place(""), DATA), *shared]
        return [mount for mount in mounts if mount is not None] + self._show_program()

    def _all_shared(self) -> dict[str, Path]:
        filter_ = self._launch.vmm.with_name(SECCOMP_FILTER)
        own = {SECCOMP_FILTER: filter_} if filter_.exists() else {}
        return {**self._launch.shared, **own}

    def _show(self, name: str, source: Path, check: Callable[[], None]) -> _Mount | None:
        """Show a file that others use, too: it is neither given away nor opened to all."""
        target = self._files / name
        _make_directory(target.parent)
        if source.stat().st_mode & stat.S_IROTH:
            target.touch()
            return str(source.resolve()), self._place(name), ("ro", *DATA)
        copy_private(source, target, check)
        os.chown(target, self._uid, self._uid)
        return None

    def _show_program(self) -> list[_Mount]:
        """Show the directory of a VMM that is not jailed: its own may be closed to others."""
        if self._root:
            _make_directory(self._root / INSIDE.lstrip("/"))
            # A snapshot of an earlier version has the disk's name alone.
            (self._root / ArtifactName.ROOTFS).symlink_to(f"{INSIDE}/{ArtifactName.ROOTFS}")
            return []
        _make_directory(self._files / PROGRAM)
        return [(str(self._program.parent), self._place(PROGRAM), ("ro", "nosuid", "nodev"))]

    def _place(self, name: str) -> str:
        """Return where the launcher finds one of the VM's files, in the jail or without."""
        return f"{self._root or ''}{INSIDE}/{name}".rstrip("/")

    # ---- Command

    def _command(self) -> list[str]:
        run = [require_program("prlimit", "util-linux"), f"--fsize={self._file_bytes()}"]
        run += ["--core=0", "--", *(self._jailed() if self._launch.jailer else self._unjailed())]
        run += ["--api-sock", f"{INSIDE}/{OWN}/{SOCKET}", "--level", "Error"]
        run += ["--log-path", f"{INSIDE}/{LOG_PIPE}"]
        if (self._files / SECCOMP_FILTER).exists():
            run += ["--seccomp-filter", f"{INSIDE}/{SECCOMP_FILTER}"]
        return run

    def _file_bytes(self) -> int:
        """Return how large a file of the VMM's may become: the largest that it has or is to write,
        with what its console takes."""
        sizes = ((self._files / name).stat().st_size for name in self._launch.own)
        return max(self._launch.limits.memory_mb * MIB, *sizes, 0) + CONSOLE_BYTES_EVER

    def _unjailed(self) -> list[str]:
        become = [f"--reuid={self._uid}", f"--regid={self._uid}", "--clear-groups"]
        become += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        program = f"{INSIDE}/{PROGRAM}/{self._program.name}"
        return [_setpriv(), *become, "--", program, "--id", self._id]

    def _jailed(self) -> list[str]:
        allowed = ",".join(["-all", *(f"+{name}" for name in JAILERS_CAPABILITIES)])
        become = ["--no-new-privs", f"--bounding-set={allowed}"]
        jailer = [str(self._launch.jailer), "--id", self._id, "--exec-file", str(self._program)]
        jailer += ["--uid", str(self._uid), "--gid", str(self._uid)]
        jailer += ["--chroot-base-dir", str(self._directory.resolve() / JAIL)]
        jailer += ["--netns", f"/run/netns/{self._directory.name}", "--new-pid-ns"]
        return [_setpriv(), *become, "--", *jailer, "--"]


def give(path: Path, uid: int) -> None:
    """Give a file to a VMM's user; it is made if it is not there."""
    path.touch()
    path.chmod(0o600)
    os.chown(path, uid, uid)


def prepare_egress(directory: Path, hidden: Sequence[str]) -> str:
    """Write a VM's `egress.json`, and make the cgroups that it names.

    Returns what is wrong with these, '' if nothing is. Raises OSError, HostFaultError.
    """
    name, trees, resolver = egress_name(directory.name), host_trees(), resolver_file()
    etc = {"resolv.conf": resolver.read_text(errors="replace")} if resolver else {}
    plan = {
        "user": 0,
        "cgroups": [str(cgroup_of(tree, name)) for tree in trees],
        "root": "",
        "mounts": (),
        "devices": EGRESS_DEVICES,
        "hidden": hidden,
        "alone": {"/etc": etc, "/run": {}},
        "directory": "/",
        "command": egress_command(),
        EGRESS_DENY: nft_command(),
    }
    _write(directory / EGRESS_PLAN, plan)
    return _limit(name, EGRESS_LIMITS, trees)


def require_jail_works(directory: Path) -> None:
    """Check that the jailer can make a jail in a directory. Raises JailUnusableError."""
    flags = os.statvfs(directory).f_flag
    unfit = [name for name, flag in UNFIT.items() if flags & flag]
    if unfit:
        raise JailUnusableError(
            f"Firecracker's jailer cannot work in {directory}: the file system of "
            f"{_mount_point(directory)} is mounted with {' and '.join(unfit)}"
        )


def _mount_point(directory: Path) -> Path:
    path = directory.resolve()
    return next(each for each in (path, *path.parents) if each.is_mount())


def egress_name(name: str) -> str:
    """Return the name of the cgroup of what leads a VM's guest out."""
    return f"{name}.egress"


def read_plan(directory: Path, name: str = PLAN) -> dict[str, object]:
    """Return what a VM was started by; nothing of one that an earlier version has started."""
    try:
        plan = json.loads((directory / name).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def cgroups_of(directory: Path) -> list[Path]:
    """Return the cgroups that were made for a VM, or were about to be."""
    found = (read_plan(directory, name).get("cgroups") for name in (PLAN, EGRESS_PLAN))
    return [Path(path) for paths in found if isinstance(paths, list) for path in paths]


def remove_cgroups_by_name(name: str) -> None:
    """Remove the cgroups of a VM that has no directory any more."""
    for tree in host_trees():
        for own in (name, egress_name(name)):
            remove_cgroup(cgroup_of(tree, own))


def _limit(name: str, limits: Limits, trees: list[Tree]) -> str:
    """Make a VM's cgroups; returns what is wrong with them, '' if nothing is."""
    try:
        make_cgroups(name, limits, trees)
    except OSError as error:
        return f"no cgroup can be made: {error}"
    return missing_controllers(trees)


def _write(path: Path, plan: Mapping[str, object]) -> None:
    path.write_text(json.dumps(plan))


def _setpriv() -> str:
    return require_program("setpriv", "util-linux")


def _make_directory(path: Path) -> None:
    """Have a directory that a VMM may enter, whatever our umask is."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755)


def _short_id(name: str) -> str:
    # Firecracker takes ids of up to 64 characters of [A-Za-z0-9-].
    return name[-60:].lstrip("-")
