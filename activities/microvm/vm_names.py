"""What the name of a VM, its netns and its directory says: whose it is and by which lease."""

from __future__ import annotations

from collections.abc import Callable

from activities.contract.names import parse_vm_name
from activities.contract.scope import VmRef
from activities.disk.leftovers import Leftover


def is_superseded(name: str, vm: VmRef) -> bool:
    """Whether `name` is that of this VM, or of the same VM under an earlier lease."""
    named = parse_vm_name(name)
    return (
        named is not None
        and (named.build_id, named.purpose) == (vm.scope.build_id, vm.purpose)
        and named.lease_number <= vm.scope.lease.number
    )


def leftover_of_vm(
    kind: str, name: str, remove: Callable[[], object], made_at: float, size_bytes: int = 0
) -> list[Leftover]:
    """Return what has the name of a VM; nothing when it has another."""
    named = parse_vm_name(name)
    if named is None:
        return []
    build_id, number = named.build_id, named.lease_number
    return [Leftover(kind, name, remove, build_id, number, made_at, size_bytes)]
