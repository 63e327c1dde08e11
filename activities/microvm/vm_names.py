"""What the name of a VM, its netns and its directory says: whose it is and by which lease."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable

from activities.contract.names import parse_vm_name
from activities.contract.scope import VmRef
from activities.disk.leftovers import Leftover
from activities.microvm.vm_supervisor import start_ticks

# Those of an earlier version do not say when their process has started.
PASSING_NAME = re.compile(r"tm-run-(?P<pid>\d+)(?:-(?P<ticks>\d+))?-[0-9a-f]+")


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


def passing_name() -> str:
    """Name a VM or a network that lasts no longer than this process; it tells which one that is."""
    pid = os.getpid()
    return f"tm-run-{pid}-{start_ticks(pid)}-{uuid.uuid4().hex[:8]}"


def is_left_by_passing(name: str) -> bool:
    """Whether a name is one of `passing_name`, and the process that has made it has ended."""
    found = PASSING_NAME.fullmatch(name)
    if found is None:
        return False
    try:
        ticks = start_ticks(int(found["pid"]))
    except OSError:
        return True
    return found["ticks"] is not None and int(found["ticks"]) != ticks  # the pid is another's now
