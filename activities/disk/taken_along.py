"""Programs of this host that are taken along to where their libraries are not."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from activities.disk.host_tools import require_program
from activities.disk.programs import child_environment

LOADER = "ld.so"
# As ldd says it: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or the loader's path alone.
LINKED = re.compile(r"(?:(?P<name>\S+) => )?(?P<path>/\S+) \(0x[0-9a-f]+\)")


@cache
def with_libraries(name: str, package: str) -> dict[str, Path]:
    """Return a program, what it is linked with and its loader, by the names to give them elsewhere.

    Started by its own loader (`ld.so --library-path DIR PROGRAM`) it needs no library of the place
    where it is. Raises HostFaultError when the host has none; `package` is Debian's.
    """
    program = require_program(name, package)
    told = subprocess.run(
        ["ldd", program], capture_output=True, text=True, check=True, env=child_environment()
    )
    files = {name: Path(program).resolve()}
    for line in told.stdout.splitlines():
        found = LINKED.fullmatch(line.strip())
        if found and found["name"]:
            files[found["name"]] = Path(found["path"]).resolve()
        elif found:
            files[LOADER] = Path(found["path"]).resolve()
    return files
