"""A VM as a directory with processes: start, find again, watch, kill.

`<data>/vms/<name>/` has the supervisor's files, and in `fc-vm/` those that the VMM sees as
`/fc-vm`: disk, kernel, snapshot, socket. The VMM may write to those that are its own, and makes one
alone, its socket in `fc-vm/run/`, before a guest runs: a name that we open again is what we have
made it, and what a VMM writes is bounded by how large each of its own may be. Which processes they
are is on disk by pid and start time, so a foreign process that got the same pid later is never
taken for a VM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

from activities.contract.errors import HostDiskFullError, VmmError
from activities.contract.results import UsedBlocks
from activities.contract.scope import VmRef
from activities.contract.text import readable
from activities.disk.cgroups import remove_cgroup
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, disk_bytes, entries, made_at
from activities.disk.room import NO_ROOM_TOLD
from activities.microvm.client import FirecrackerClient
from activities.microvm.confinement import Held, held
from activities.microvm.egress import open_egress
from activities.microvm.launching import (
    INSIDE,
    OWN,
    PLAN,
    SOCKET,
    Confinement,
    Launch,
    Launching,
    cgroups_of,
    give,
    read_plan,
    remove_cgroups_by_name,
)
from activities.microvm.network import give_tap
from activities.microvm.used_memory import used_blocks
from activities.microvm.vm_names import is_left_by_passing, is_superseded, leftover_of_vm
from activities.microvm.vm_supervisor import start_ticks
from activities.microvm.vm_users import free_user

SUPERVISOR = Path(__file__).with_name("vm_supervisor.py")
LOG_TAIL_BYTES = 4000
TAIL_LINES = 10
FILES = "fc-vm"
# The supervisor is the first of a pid namespace of its own: whatever ends it, the kernel ends the
# VMM and all that it has started; and what its parent leaves (the jailer does) becomes its child.
OWN_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--")
LAUNCHER = Path(__file__).with_name("vm_launcher.py")
KILL_SECONDS = 10.0
POLL_SECONDS = 0.02


class VmProcess:
    """One VM of this host, running or not."""

    def __init__(self, directory: Path) -> None:
        """The directory has the VM's name, which is also that of its netns."""
        self.name = directory.name
        self.directory = directory
        self.console = directory / "console"
        self.log = directory / "vmm.log"

    @property
    def files(self) -> Path:
        """Where the VMM's files are; those of a VM that an earlier version made lie in the open."""
        files = self.directory / FILES
        return files if files.exists() else self.directory

    def inside(self, name: str) -> str:
        """Return the path at which the VMM has one of its files."""
        return f"{INSIDE}/{name}" if self.files.name == FILES else name

    def make(self) -> None:
        """Make its directory."""
        (self.directory / FILES).mkdir(parents=True)
        self.files.chmod(0o755)

    def start(self, launch: Launch, check: Callable[[], None]) -> Confinement:
        """Start the VMM in the VM's netns and wait until it answers; returns what confines it.

        Raises VmmError, HostFaultError, HostDiskFullError.
        """
        with free_user(launch.users) as user:
            give_tap(self.name, user.uid)
            if launch.egress:
                open_egress(self.name, launch.egress)
            launching = Launching(self.directory, self.files, launch, user.uid)
            confinement = launching.prepare(check)
            self._supervise(user.lock, launch.console_bytes)
        with self.client() as client:
            client.wait_until_up(lambda: self._require_no_exit(check))
        while not self._pids():  # the jailer's child may answer before its pid is known
            self._require_no_exit(check)
            time.sleep(POLL_SECONDS)
        launching.close()
        return confinement

    def give(self, *names: str) -> None:
        """Have files of these names that its VMM may write to; one that an earlier version has
        started makes them itself."""
        user = read_plan(self.directory).get("user")
        if isinstance(user, int):
            for name in names:
                give(self.files / name, user)

    def _supervise(self, lock: int, console_bytes: int) -> None:
        python = [sys.executable, "-I", "-S"]
        with (self.directory / "supervisor.log").open("wb") as log:
            subprocess.Popen(
                [
                    *OWN_PROCESSES,
                    *(*python, str(SUPERVISOR), self.name, str(console_bytes)),
                    *(*python, str(LAUNCHER), PLAN),
                ],
                cwd=self.directory,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def take_back(self, name: str) -> Path:
        """Return one of the files of a VMM that has ended; it is root's now, and may be shared."""
        path = self.files / name
        os.chown(path, os.geteuid(), os.getegid())
        path.chmod(0o644)
        return path

    def client(self) -> FirecrackerClient:
        """Return a client of its API."""
        is_old = self.files == self.directory
        return FirecrackerClient((self.files if is_old else self.files / OWN) / SOCKET)

    def is_running(self) -> bool:
        """Whether its VMM is alive."""
        found = self._pids().get("vmm")
        return found is not None and _is_alive(*found)

    def has_ended(self) -> bool:
        """Whether its VMM is gone and all that it said is in the console's file."""
        return not any(_is_alive(*found) for found in self._pids().values())

    def held(self) -> Held:
        """Return what holds its VMM, which must have booted: it filters its calls only then."""
        vmm, _ = self._pids()["vmm"]
        jailer = read_plan(self.directory).get("jailer")  # an earlier version did not write it
        return held(vmm, jailer if isinstance(jailer, str) else None)

    def used_memory(self, memory: Path, check: Callable[[], None]) -> tuple[UsedBlocks, ...]:
        """Return what its guest has used of the memory file that it was resumed from."""
        vmm, _ = self._pids()["vmm"]
        return used_blocks(vmm, memory, check)

    def exit_reason(self) -> str:
        """Say how the VMM ended."""
        try:
            status = json.loads((self.directory / "exit.json").read_text())
        except (FileNotFoundError, ValueError):
            return "it was killed together with its supervisor"
        if status["code"] is None:
            return str(status["error"])
        code = int(status["code"])
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Kill VMM and supervisor and wait until both are gone. Raises VmmError if one stays."""
        found = self._pids()
        for role in ("vmm", "supervisor"):
            if role in found:
                _kill(*found[role])
        for pid in self._strays():
            _kill(pid, _ticks(pid))
        for directory in cgroups_of(self.directory):
            remove_cgroup(directory)

    def remove(self) -> None:
        """Kill it and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _pids(self) -> dict[str, tuple[int, int]]:
        try:
            found = json.loads((self.directory / "vmm.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return {role: (int(pid), int(ticks)) for role, (pid, ticks) in found.items()}

    def _strays(self) -> list[int]:
        """Find a supervisor that has not written its pids yet."""
        supervisors = _supervisors(self.directory.parent)
        return [found.pid for found in supervisors if found.vm == self.name]

    def _require_no_exit(self, check: Callable[[], None]) -> None:
        check()
        if (self.directory / "exit.json").exists():
            told = self.log_tail() or ["it says nothing"]
            # The jailer copies Firecracker into the jail.
            kind = HostDiskFullError if NO_ROOM_TOLD in told[-1] else VmmError
            raise kind(f"the VMM ended at once: {self.exit_reason()}: {told[-1]}", log_tail=told)

    def log_tail(self) -> list[str]:
        """Return the last lines that the VMM has logged; a panic of its own is among them."""
        return _last_lines(self.log)

    def tail(self) -> list[str]:
        """Return the last lines of its console, then those that the VMM has logged."""
        return [*_last_lines(self.console)[-TAIL_LINES:], *self.log_tail()[-TAIL_LINES:]]


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [readable(line) for line in text.splitlines() if line.strip()]


def remove_vms_until(vm: VmRef, data_dir: DataDir) -> None:
    """Kill and remove this VM, and the same VM of earlier leases."""
    if not data_dir.vms.is_dir():
        return
    for directory in data_dir.vms.iterdir():
        if is_superseded(directory.name, vm):
            VmProcess(directory).remove()


def leftover_vms(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the VMs of this host that have a directory."""
    for path in entries(data_dir.vms):
        remove = VmProcess(path).remove
        yield from leftover_of_vm("VM", path.name, remove, made_at(path), disk_bytes(path))
    yield from passing_vms(data_dir)


def passing_vms(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the VMs of `run` and `doctor` whose process has ended."""
    for path in entries(data_dir.vms):
        if is_left_by_passing(path.name):
            yield Leftover("VM", path.name, VmProcess(path).remove, bytes=disk_bytes(path))


def leftover_supervisors(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the VMs whose directory is gone, by their supervisors."""
    for found in _supervisors(data_dir.vms):
        if not data_dir.vm(found.vm).exists():
            remove = partial(_remove_stray, found, _ticks(found.pid))
            yield from leftover_of_vm("process", found.vm, remove, found.started_at)


def _remove_stray(found: _Supervisor, ticks: int) -> None:
    _kill(found.pid, ticks)  # its VMM dies with it
    remove_cgroups_by_name(found.vm)


class _Supervisor(NamedTuple):
    """A running supervisor; `started_at` is wall clock seconds."""

    pid: int
    vm: str
    started_at: float


def _supervisors(vms: Path) -> Iterator[_Supervisor]:
    """Yield the supervisors of VMs in a directory.

    The file name of the program counts, not its path: an earlier version had it elsewhere, and
    what that has started goes on. The working directory tells whose VM it is, also when gone.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has just ended
            name = _supervised_by(process.cmdline())
            if name and process.cwd().removesuffix(" (deleted)") == str(vms.resolve() / name):
                yield _Supervisor(process.pid, name, process.create_time())


def _supervised_by(command: Sequence[str]) -> str:
    """Return the VM of a supervisor's command line; '' when it is of another program."""
    if command and Path(command[0]).name == OWN_PROCESSES[0]:  # it ends with what it has started
        return ""
    for program, name in pairwise(command):
        if Path(program).name == SUPERVISOR.name:
            return name
    return ""


def _ticks(pid: int) -> int:
    try:
        return start_ticks(pid)
    except (OSError, ValueError):
        return -1


def _is_alive(pid: int, ticks: int) -> bool:
    if _ticks(pid) != ticks:
        return False
    status = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
    return status.split()[0] not in ("Z", "X")


def _kill(pid: int, ticks: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _ticks(pid) != ticks:  # looked at after the pidfd is held: it cannot change any more
            return
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _wait_gone(pid, ticks)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _wait_gone(pid: int, ticks: int) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while _alive_or_false(pid, ticks):
        if time.monotonic() > deadline:
            raise VmmError(f"process {pid} does not die")
        time.sleep(POLL_SECONDS)
    # Reap it if it is ours: a worker starts supervisors but never waits for them.
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def _alive_or_false(pid: int, ticks: int) -> bool:
    try:
        return _is_alive(pid, ticks)
    except OSError:
        return False
