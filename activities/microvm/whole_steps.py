"""What a whole step does about its VM besides its work: see `HostLease.whole_steps`.

A step that fails leaves both the VM and its network to the undos, activities of their own.
"""

from __future__ import annotations

from activities.contract.errors import HostFaultError
from activities.contract.scope import VmRef
from activities.disk.data_dir import DataDir
from activities.microvm.network import make_network, remove_networks_until
from activities.microvm.vm_process import remove_vms_until
from activities.step.running_step import RunningStep


def make_network_if_whole(vm: VmRef, data_dir: DataDir) -> None:
    """Make the VM's network; one that is there is completed. Raises HostFaultError."""
    if vm.scope.lease.whole_steps:
        make_network(vm, data_dir)


def remove_vm_if_whole(vm: VmRef, data_dir: DataDir, running: RunningStep) -> None:
    """Remove the VM and its network, as their undos do. What will not go fails no build."""
    if not vm.scope.lease.whole_steps:
        return
    try:
        remove_vms_until(vm, data_dir)
        remove_networks_until(vm, data_dir)
    except (HostFaultError, OSError) as error:
        running.log.warn(f"could not remove {vm.name}: {error}; left to the host's sweep")
