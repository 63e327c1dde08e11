"""The environment of the programs that a host starts: made for them, not inherited.

This process's own has the keys that open registry passwords, tokens, and whatever else an operator
sets for it; no program needs any of it, and one that works on an image's files must not have it.
"""

from __future__ import annotations

import os
import shutil

from activities.contract.errors import HostFaultError


def child_environment() -> dict[str, str]:
    """Return what a program gets: where programs are, and that it speaks plain English."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def require_program(name: str, package: str) -> str:
    """Return where a program is. Raises HostFaultError with Debian's package when it is nowhere."""
    found = shutil.which(name)
    if found is None:
        raise HostFaultError(f"this host has no {name}", hint=f"apt-get install {package}")
    return found
