"""Resuming a pulled template on this machine, to look at it."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from activities.contract.errors import TemplateDamagedError, TemplateNotFoundError, VmmError
from activities.contract.guest_network import GUEST_ADDRESS
from activities.contract.names import ArtifactName
from activities.contract.scope import VmShape
from activities.microvm.microvm import cpu_model, require_host, resume, vmm_version
from activities.microvm.network import create_network, passing_name, remove_network
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings
from activities.store.metadata import TemplateMetadata
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


def run_template(directory: Path, settings: Settings, show: Callable[[LocalRun], None]) -> None:
    """Resume the template in `directory`, tell `show`, and wait until it ends or Ctrl-C. Blocking.

    Works on a private copy of the disk and leaves nothing behind. Raises TemplateNotFoundError,
    VmmError when this machine cannot resume it, and SnapshotNotResumableError.
    """
    metadata = _read(directory)
    shape = VmShape(
        memory_mb=metadata.vmm.memory_mb,
        vcpu_count=metadata.vmm.vcpu_count,
        kernel_version=metadata.config.kernel_version,
        firecracker_version=metadata.config.firecracker_version,
    )
    firecracker = require_host(settings, shape)
    _require_same_machine(metadata, firecracker)
    with _vm() as vm, _stop_signal() as stopped:
        resumed = resume(vm, directory.resolve(), firecracker, lambda: None)
        show(LocalRun(vm.name, GUEST_ADDRESS, resumed.answer_ms))
        while vm.is_running() and not stopped.wait(POLL_SECONDS):
            pass


def _read(directory: Path) -> TemplateMetadata:
    try:
        metadata = TemplateMetadata.model_validate_json((directory / METADATA).read_text())
    except FileNotFoundError:
        raise TemplateNotFoundError(f"{directory} has no {METADATA}: pull it first") from None
    except ValidationError as error:
        raise TemplateDamagedError(f"{directory}/{METADATA} cannot be read") from error
    missing = [name for name in ArtifactName if not (directory / name).is_file()]
    if missing:
        raise TemplateNotFoundError(f"{directory} has no {missing[0]}: pull it again")
    return metadata


def _require_same_machine(metadata: TemplateMetadata, firecracker: Path) -> None:
    """Refuse early what would fail obscurely: another VMM version or CPU model."""
    here, there = vmm_version(firecracker), metadata.vmm.version
    if here != there:
        raise VmmError(f"the template was made by Firecracker {there}; {firecracker} is {here}")
    if metadata.vmm.cpu_model != cpu_model():
        raise VmmError(
            f"the template was made on a {metadata.vmm.cpu_model}; this is a {cpu_model()}"
        )


@contextmanager
def _vm() -> Iterator[VmProcess]:
    name = passing_name()
    with tempfile.TemporaryDirectory(prefix=name) as parent:
        vm = VmProcess(Path(parent) / name)
        vm.directory.mkdir()
        create_network(name)
        try:
            yield vm
        finally:
            vm.remove()
            remove_network(name)


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    stopped = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
