"""What /proc/cpuinfo tells of this machine's first processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def this_processor() -> Mapping[str, str]:
    """Return the fields of this machine's first processor, by the names that the kernel gives."""
    return first_processor(CPUINFO.read_text())


def first_processor(cpuinfo: str) -> dict[str, str]:
    """Return the fields of the first processor of /proc/cpuinfo (proc(5)): `name : value` lines."""
    lines = cpuinfo.partition("\n\n")[0].splitlines()
    fields = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in fields}
