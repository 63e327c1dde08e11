"""The environment of the programs that a host starts: made for them, not inherited.

This process's own has the keys that open registry passwords, tokens, and whatever else an operator
sets for it; no program needs any of it, and one that works on an image's files must not have it.
"""

from __future__ import annotations

import os


def child_environment() -> dict[str, str]:
    """Return what a program gets: where programs are, and that it speaks plain English."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
