"""Does a guest kernel run here at all? That /dev/kvm opens does not say so."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from activities.contract.errors import GuestDiedError, VmmEndedError
from activities.contract.scope import VmShape
from activities.microvm.confinement import Held
from activities.microvm.console import ConsoleReader
from activities.microvm.microvm import KERNEL, KERNEL_FILES, kernel_files, launch_of
from activities.microvm.vm_process import VmProcess
from activities.process.settings import Settings

POLL_SECONDS = 0.05
# The first line comes before the console's driver, and what follows it does not matter.
ARGUMENTS = "console=ttyS0 earlyprintk=ttyS0 reboot=k panic=1 pci=off"
HINT = "See what a guest kernel needs (docs/operations.md), and dmesg for what KVM says."


class TrialBoot(NamedTuple):
    """After how many seconds a kernel said its first line, and what holds its VMM."""

    seconds: float
    held: Held


def boot_kernel(
    vm: VmProcess, settings: Settings, firecracker: Path, shape: VmShape, seconds: float
) -> TrialBoot:
    """Boot a kernel without a disk, until it says its first line.

    That takes the VMM, KVM and the kernel's console, and no more. The VM is left as it is then.
    `firecracker` is what `require_host` tells of the shape. Raises VmmError, and GuestDiedError
    when it says nothing in time.
    """
    files = kernel_files(settings.kernel_path(shape.kernel_version))
    vm.start(replace(launch_of(settings, firecracker, shape), shared=files), lambda: None)
    with vm.client() as client:
        client.boot_source(vm.inside(f"{KERNEL}/{KERNEL_FILES[0]}"), ARGUMENTS)
        client.machine_config(shape.vcpu_count, shape.memory_mb)
        client.start()
    held = vm.held()  # now: a kernel without a disk soon ends
    began = time.monotonic()
    console = ConsoleReader(vm.console)
    while True:
        ended = vm.has_ended()  # before reading: what it said last is then read
        if console.lines():
            return TrialBoot(time.monotonic() - began, held)
        if ended:
            raise _ended(vm)
        if time.monotonic() - began > seconds:
            raise GuestDiedError(
                f"the guest kernel has not said a word within {seconds:.0f} s", hint=HINT
            )
        time.sleep(POLL_SECONDS)


def _ended(vm: VmProcess) -> VmmEndedError:
    told = vm.log_tail() or ["it says nothing"]
    return VmmEndedError(
        f"Firecracker ended ({vm.exit_reason()}) before the guest kernel said a word: {told[-1]}",
        hint=HINT,
    )
