"""Where the programs are that a host must have.

Apart from `programs`, which children of the worker import at each start: errors take them a quarter
of a second of CPU.
"""

from __future__ import annotations

import shutil

from activities.contract.errors import HostFaultError


def require_program(name: str, package: str) -> str:
    """Return where a program is. Raises HostFaultError with Debian's package when it is nowhere."""
    found = shutil.which(name)
    if found is None:
        raise HostFaultError(f"this host has no {name}", hint=f"apt-get install {package}")
    return found
