"""A VM, or its files, for as long as somebody looks at them: a directory and a network, no build.

What a killed one has left goes when the next one comes, and by the sweep of a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from activities.contract.errors import HostFaultError, MachineUnfitError
from activities.disk.data_dir import DataDir, make_closed
from activities.microvm.network import create_network, passing_networks, remove_network
from activities.microvm.vm_names import passing_name
from activities.microvm.vm_process import VmProcess, passing_vms


@contextmanager
def passing_vm(data_dir: DataDir) -> Iterator[VmProcess]:
    """Have a VM that nothing runs in yet, for a block; nothing of it is left at the end.

    Raises MachineUnfitError when this machine cannot make its directory or its network.
    """
    _remove_left(data_dir)
    vm = VmProcess(data_dir.vm(passing_name()))
    try:
        _make_directory(vm, data_dir)
        _make_network(vm.name)
        yield vm
    finally:
        vm.remove()
        remove_network(vm.name)


@contextmanager
def passing_directory(data_dir: DataDir) -> Iterator[Path]:
    """Have an empty directory on the host's disk for a block; it is gone at the end.

    Raises MachineUnfitError when it cannot be made.
    """
    _remove_left(data_dir)
    place = VmProcess(data_dir.vm(passing_name()))
    try:
        _make_directory(place, data_dir)
        yield place.files
    finally:
        place.remove()


def _remove_left(data_dir: DataDir) -> None:
    for left in (*passing_vms(data_dir), *passing_networks()):
        with suppress(HostFaultError, OSError):  # the sweep says why it stays
            left.remove()


def _make_directory(vm: VmProcess, data_dir: DataDir) -> None:
    try:
        make_closed(data_dir.root)
        vm.make()
    except OSError as error:
        raise MachineUnfitError(
            f"cannot make the VM's directory {vm.directory}: {error.strerror}",
            hint="Let TEMPLATE_MANAGER_DATA_DIR name a directory that can be written to.",
        ) from error


def _make_network(name: str) -> None:
    try:
        create_network(name)
    except HostFaultError as error:
        raise MachineUnfitError(
            error.message,
            hint="It takes the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN, and /dev/net/tun.",
        ) from error
