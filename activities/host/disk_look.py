"""A shell on a disk that a failed step has left, to look at it: in a VM, on a copy of the disk."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import (
    GuestDiedError,
    MachineUnfitError,
    TemplateDamagedError,
    TemplateNotFoundError,
)
from activities.contract.guest_network import GUEST_ADDRESS
from activities.contract.names import ArtifactName, canonical_build_id
from activities.contract.scope import VmShape
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.disk.programs import child_environment
from activities.disk.room import Room
from activities.disk.sparse_files import allocated_bytes, copy_private
from activities.disk.tree_content import BLOCK
from activities.host.local_run import POLL_SECONDS, require_rights, stop_signal
from activities.host.passing_vm import passing_vm
from activities.image.containers import DEFAULT_PATH
from activities.instructions.step_drive import DRIVE, StepFiles, make_drive
from activities.microvm.console import PREFIX, ConsoleReader
from activities.microvm.network import in_network
from activities.microvm.step_vm import BOOT_SECONDS, start_step_vm
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore, FailedStep
from activities.step.vm_requirements import require_host

PORT = 22023
CONNECT_SECONDS = 30.0
MEMORY_MB = 512


@dataclass(frozen=True)
class DiskToLookAt:
    """A disk, and how it is booted."""

    path: Path
    failed: FailedStep
    settings: Settings

    def look(self, tell: Callable[[str], None]) -> None:
        """Boot a copy of it and be the terminal of a shell there, until it ends. Blocking.

        `tell` hears what goes on. Nothing stays. Raises GuestDiedError when the guest does not come
        up, TemplateDamagedError when it cannot use the disk, MachineUnfitError, HostDiskFullError,
        VmmError.
        """
        firecracker = require_host(self.settings, self.failed.shape)
        with stop_signal() as stopped, passing_vm(DataDir(self.settings.data_dir)) as vm:
            self._prepare(vm)
            tell("booting a copy of the disk")
            start_step_vm(vm, self.settings, firecracker, self.failed.shape, lambda: None)
            _await_shell(vm, stopped)
            if not stopped.is_set():
                _be_its_terminal(vm, self.settings.busybox_path, stopped)

    def _prepare(self, vm: VmProcess) -> None:
        room = Room((self.settings.data_dir,), self.settings.min_free_disk_mb * MIB)
        room.require("copy the disk", allocated_bytes(self.path))
        copy_private(self.path, vm.files / ArtifactName.ROOTFS, lambda: None)
        place = vm.directory / "drive"
        place.mkdir()
        files = StepFiles("shell", self._values())
        drive = make_drive(place, self.settings, files, room, lambda: None)
        drive.rename(vm.files / DRIVE)
        shutil.rmtree(place)

    def _values(self) -> dict[str, str]:
        failed = self.failed
        variables = {"PATH": DEFAULT_PATH, **failed.variables}
        user = f"; its user was {failed.user}" if failed.user else ""
        return {
            "image.user": "",
            "workdir": "/",
            "env": "".join(f"{name}={value}\0" for name, value in variables.items()),
            **({"home-is-given": ""} if "HOME" in variables else {}),
            "port": f"{PORT}\n",
            "shell.directory": failed.working_dir,
            "shell.greeting": f"{failed.what}{user}\r\n" if failed.what else "",
        }


def disk_to_look_at(disk: str, settings: Settings) -> DiskToLookAt:
    """Find a disk by the id of the build whose step failed, or by its path.

    Raises TemplateNotFoundError, TemplateDamagedError, MachineUnfitError.
    """
    require_rights("looking at a disk")
    if shutil.which("nsenter") is None:
        raise MachineUnfitError("there is no nsenter", hint="Install Debian's package util-linux.")
    try:
        build_id = canonical_build_id(disk)
    except ValueError:
        return DiskToLookAt(_require_disk(Path(disk)), _nothing_known(settings), settings)
    kept = CheckpointStore(DataDir(settings.data_dir), settings.host).failed(build_id)
    if kept is None:
        raise TemplateNotFoundError(
            f"no disk of a failed step of build {build_id} is on this host",
            hint="It is kept on the host that the failed build names, if it was begun with "
            "--keep-failed, until it is deleted or as old as checkpoints may be.",
        )
    path, failed = kept
    return DiskToLookAt(_require_disk(path), failed, settings)


def _require_disk(path: Path) -> Path:
    if not path.is_file():
        raise TemplateNotFoundError(
            f"{path} is neither a build's id nor the file of a disk",
            hint="Name the build whose step failed, or a rootfs.ext4.",
        )
    size = path.stat().st_size
    if size == 0 or size % BLOCK:
        raise TemplateDamagedError(f"{path} is no disk: it has {size} bytes", hint="Name another.")
    return path.resolve()


def _nothing_known(settings: Settings) -> FailedStep:
    shape = VmShape(
        memory_mb=MEMORY_MB,
        vcpu_count=1,
        kernel_version=settings.default_kernel_version,
        firecracker_version=settings.default_firecracker_version,
    )
    return FailedStep(what="", user="", working_dir="/", variables={}, shape=shape)


def _await_shell(vm: VmProcess, stopped: threading.Event) -> None:
    """Wait until the guest says that a shell is to be had."""
    console, deadline = ConsoleReader(vm.console), time.monotonic() + BOOT_SECONDS
    while not stopped.wait(POLL_SECONDS):
        ended = vm.has_ended()  # before reading: what it said last is then read
        for line in console.lines():
            kind, _, text = line.removeprefix(PREFIX).partition(" ")
            if line.startswith(PREFIX) and kind == "start":
                return
            if line.startswith(PREFIX) and kind == "refused":
                raise TemplateDamagedError(f"the guest cannot use the disk: {text}", hint="")
        if ended or time.monotonic() > deadline:
            why = "has ended" if ended else f"was not up within {BOOT_SECONDS:g} s"
            raise GuestDiedError(f"the guest {why}", log_tail=vm.tail())


def _be_its_terminal(vm: VmProcess, busybox: Path, stopped: threading.Event) -> None:
    in_network(vm.name, lambda: _connect(vm, stopped))
    command = ["nsenter", f"--net=/run/netns/{vm.name}", str(busybox)]
    command += ["telnet", GUEST_ADDRESS, str(PORT)]
    with subprocess.Popen(command, env=child_environment()) as terminal:
        while terminal.poll() is None and not stopped.wait(POLL_SECONDS):
            pass
        terminal.terminate()


def _connect(vm: VmProcess, stopped: threading.Event) -> None:
    """Wait until somebody listens there."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while not stopped.wait(POLL_SECONDS):
        try:
            socket.create_connection((GUEST_ADDRESS, PORT), 1).close()
        except OSError as error:
            if vm.has_ended() or time.monotonic() > deadline:
                raise GuestDiedError(
                    f"the guest's shell does not answer: {error}", log_tail=vm.tail()
                ) from error
        else:
            return
