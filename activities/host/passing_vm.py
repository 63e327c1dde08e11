"""A VM for as long as somebody looks at it: a directory and a network of its own, and no build."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from activities.contract.errors import HostFaultError, MachineUnfitError
from activities.microvm.network import create_network, passing_name, remove_network
from activities.microvm.vm_process import VmProcess


@contextmanager
def passing_vm() -> Iterator[VmProcess]:
    """Have a VM that nothing runs in yet, for a block; nothing of it is left at the end.

    Raises MachineUnfitError when this machine cannot make its network.
    """
    name = passing_name()
    with tempfile.TemporaryDirectory(prefix=name) as parent:
        vm = VmProcess(Path(parent) / name)
        vm.make()
        _make_network(name)
        try:
            yield vm
        finally:
            vm.remove()
            remove_network(name)


def _make_network(name: str) -> None:
    try:
        create_network(name)
    except HostFaultError as error:
        remove_network(name)
        raise MachineUnfitError(
            error.message,
            hint="It takes the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN, and /dev/net/tun.",
        ) from error
