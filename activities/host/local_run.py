"""Resuming a pulled template on this machine, to look at it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from activities.contract.errors import (
    MachineUnfitError,
    SnapshotNotResumableError,
    TemplateDamagedError,
    TemplateNotFoundError,
)
from activities.contract.guest_network import GUEST_ADDRESS
from activities.contract.names import ArtifactName
from activities.contract.scope import VmShape
from activities.disk.data_dir import DataDir
from activities.disk.sparse_files import sha256_of
from activities.host.passing_vm import passing_directory, passing_vm
from activities.microvm.launching import Launch
from activities.microvm.microvm import Resumed, Tell, launch_of, resume
from activities.microvm.resumable import SnapshotTraits, require_resumable, traits_here
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings
from activities.step.vm_requirements import require_host
from activities.store.bucket import Bucket
from activities.store.download import pull_template
from activities.store.metadata import TemplateMetadata
from activities.store.names import find_build
from activities.store.objects import METADATA

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class LocalRun:
    """A template that runs here."""

    network: str
    """The network namespace that its guest is in."""
    address: str
    resume_ms: float
    """From the load of the snapshot until the guest answered."""


@dataclass(frozen=True)
class LocalTemplate:
    """A template in a directory, that this machine can run."""

    directory: Path
    metadata: TemplateMetadata
    launch: Launch
    data_dir: DataDir
    resume_seconds: float
    """How long the resumed guest may take to answer."""

    def check(self, tell: Tell = lambda name, done, total: None) -> None:
        """Read all of its files: they must be what was built. Blocking.

        `tell` is told a file's name, how many bytes of it are read, and of how many. Raises
        TemplateDamagedError.
        """
        for name in ArtifactName:
            made = self.metadata.artifacts[name]
            told = partial(_tell_size, tell, name, made.size_bytes)
            try:
                found = sha256_of(self.directory / name, lambda: None, told)
            except OSError as error:
                raise _damaged(self.directory, name, f"cannot be read: {error.strerror}") from error
            if found != made.sha256:
                raise _damaged(
                    self.directory, name, "is not what was built (its SHA-256 is another)"
                )

    def run(self, show: Callable[[LocalRun], None]) -> None:
        """Resume it, tell `show`, and wait until it ends or Ctrl-C. Blocking.

        Works on a private copy of the disk and leaves nothing behind. Raises TemplateDamagedError
        when it does not resume since its files are not what was built; else
        SnapshotNotResumableError, MachineUnfitError, HostDiskFullError and VmmError.
        """
        with stop_signal() as stopped, passing_vm(self.data_dir) as vm:
            resumed = self._resume(vm)
            show(LocalRun(vm.name, GUEST_ADDRESS, resumed.answer_ms))
            while vm.is_running() and not stopped.wait(POLL_SECONDS):
                pass

    def _resume(self, vm: VmProcess) -> Resumed:
        """Resume; if that fails, find out whether the files are to blame."""
        try:
            return resume(
                vm,
                self.directory.resolve(),
                self.launch,
                lambda: None,
                seconds=self.resume_seconds,
                prefetch=self.metadata.verification.prefetch,
            )
        except SnapshotNotResumableError as error:
            self.check()
            raise SnapshotNotResumableError(
                error.message,
                log_tail=error.log_tail,
                hint="The files are what was built: see whether template-manager doctor finds "
                "something wrong with this machine, or build the template again.",
            ) from error


def local_template(directory: Path, settings: Settings) -> LocalTemplate:
    """Look at the template in `directory`, and whether this machine can resume it.

    Raises TemplateNotFoundError; TemplateDamagedError when it is not whole; MachineUnfitError,
    KernelMissingError and FirecrackerMissingError.
    """
    metadata = _read(directory)
    require_rights("resuming a template")
    shape = VmShape(
        memory_mb=metadata.vmm.memory_mb,
        vcpu_count=metadata.vmm.vcpu_count,
        kernel_version=metadata.config.kernel_version,
        firecracker_version=metadata.config.firecracker_version,
    )
    firecracker = require_host(settings, shape)
    require_resumable(_traits(metadata), traits_here(firecracker), firecracker)
    launch = launch_of(settings, firecracker, shape)
    return LocalTemplate(
        directory, metadata, launch, DataDir(settings.data_dir), settings.resume_seconds
    )


@contextmanager
def fetched_template(what: str, settings: Settings, tell: Tell) -> Iterator[Path]:
    """Have a template of the bucket in a directory for a block: by a build's id or `name:tag`.

    `tell` is told what has come, as by `LocalTemplate.check`, which it needs no more. Raises as
    `pull_template` and `find_build`; MachineUnfitError.
    """
    require_rights("resuming a template")
    bucket = Bucket(settings.bucket)
    build_id = find_build(bucket, what)
    with passing_directory(DataDir(settings.data_dir)) as directory:
        pull_template(bucket, build_id, directory, tell)
        yield directory


def _tell_size(tell: Tell, name: str, total: int, done: int) -> None:
    tell(f"checking {name}", done, total)


def _read(directory: Path) -> TemplateMetadata:
    if not directory.is_dir():
        told = f"{directory} is a file" if directory.exists() else f"there is no {directory}"
        raise TemplateNotFoundError(
            told, hint="Name a directory that template-manager pull filled."
        )
    try:
        metadata = TemplateMetadata.model_validate_json((directory / METADATA).read_bytes())
    except FileNotFoundError:
        raise TemplateNotFoundError(
            f"{directory} has no {METADATA}", hint="Pull a template there: template-manager pull"
        ) from None
    except OSError as error:
        raise TemplateNotFoundError(f"{directory} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise _damaged(directory, METADATA, "cannot be read") from error
    for name in ArtifactName:
        _require_size(directory, name, metadata.artifacts[name].size_bytes)
    return metadata


def _require_size(directory: Path, name: ArtifactName, size_bytes: int) -> None:
    file = directory / name
    if not file.is_file():
        raise _damaged(directory, name, "is not there")
    if file.stat().st_size != size_bytes:
        raise _damaged(directory, name, f"has {file.stat().st_size} bytes, not {size_bytes}")


def _damaged(directory: Path, name: str, how: str) -> TemplateDamagedError:
    return TemplateDamagedError(
        f"the template in {directory} is damaged: {name} {how}",
        hint="Pull it again: template-manager pull",
    )


def require_rights(what: str) -> None:
    """Check that this process may do `what`. Raises MachineUnfitError."""
    if os.geteuid() != 0:
        raise MachineUnfitError(
            f"{what} takes root: its guest gets a network namespace of its own",
            hint="Run it as root.",
        )


def _traits(metadata: TemplateMetadata) -> SnapshotTraits:
    vmm = metadata.vmm
    return SnapshotTraits(vmm.version, vmm.snapshot_format, vmm.architecture, vmm.cpu_model)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Have an event that is set when this process is told to end: by Ctrl-C, SIGTERM or SIGHUP."""
    stopped = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not of nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
