"""A user of its own for each VM of the machine, whichever host, or person, runs it.

A user is a number: no account needs to exist. Which are taken is told by locks in one directory of
the machine, which the VM's supervisor holds as long as it lives; the kernel gives them back.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from activities.contract.errors import HostFaultError

LOCKS = Path("/run/template-manager/vm-users")


class VmUser(NamedTuple):
    """A user's number, also that of its group, and the descriptor that holds it."""

    uid: int
    lock: int


@contextmanager
def free_user(users: range, locks: Path = LOCKS) -> Iterator[VmUser]:
    """Hold a user that no VM has. A child that inherits `lock` goes on holding it.

    Raises HostFaultError when all are taken.
    """
    locks.mkdir(parents=True, exist_ok=True, mode=0o700)
    for uid in users:
        lock = os.open(locks / str(uid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _take(lock):
                yield VmUser(uid, lock)
                return
        finally:
            os.close(lock)
    raise HostFaultError(
        f"all {len(users)} users for VMs are taken",
        hint="Give this machine more of them: TEMPLATE_MANAGER_VM_USERS.",
    )


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
