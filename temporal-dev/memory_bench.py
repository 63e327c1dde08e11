"""How large the memory of an idle guest is in its template, for `make bench`.

Beside what that guest itself counts, just before its snapshot: what is in use, what of it is page
cache, and what its kernel has kept for itself from the beginning.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import images
from devstack.services import ALL_PARTS, Progress
from devstack.stack import APPS, Stack
from rich.console import Console
from rich.table import Table

CLI = str(Path(sys.executable).with_name("template-manager"))
MEMORY_MB = 512
MOST_MB = 65
COUNTED = re.compile(r"\b(MemTotal|MemFree|Buffers|Cached|Slab): +(\d+) kB")
START = "sleep 10; cat /proc/meminfo; touch /run/told; exec sleep infinity"
READY = "test -e /run/told"


def bench_memory(directory: Path, console: Console, say: Progress) -> None:
    """Build a Debian with systemd in which nothing happens; tell what its memory takes."""
    with Stack(only=[part for part in ALL_PARTS if part != "docker"], apps=APPS) as stack:
        image = images.make_and_push("debian", stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
        say("building it")
        build_id = str(uuid.uuid4())
        stack_cli(stack, "build", "--image", image, "--build-id", build_id, "--force", "--follow")
        counted = mebibytes(stack_cli(stack, "logs", build_id))
        stack_cli(stack, "pull", build_id, str(directory / "idle"))
    stored = (directory / "idle" / "memfile").stat().st_blocks * 512 / (1 << 20)
    table = Table(title=f"Memory of an idle Debian of {MEMORY_MB} MiB")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    for what, amount in (
        ("in the template: what is not zero", stored),
        ("the guest's own count: in use", counted["MemTotal"] - counted["MemFree"]),
        ("  of that page cache", counted["Cached"] + counted["Buffers"]),
        ("  of that slab", counted["Slab"]),
        ("what its kernel has kept from the beginning", MEMORY_MB - counted["MemTotal"]),
    ):
        table.add_row(what, f"{amount:.1f}")
    console.print(table)
    console.print(f"{stored:.1f} of {MOST_MB} MiB hoped for")


def stack_cli(stack: Stack, command: str, *arguments: str) -> str:
    """Run one command of the product; a build gets what an idle guest is. Returns its output."""
    if command == "build":
        size = ("--memory", str(MEMORY_MB), "--vcpu", "1", "--disk", "256")
        arguments = (*arguments, *size, "--start-command", START, "--ready-command", READY)
    done = subprocess.run(
        [CLI, command, *arguments],
        env={**os.environ, **stack.variables},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def mebibytes(log: str) -> dict[str, float]:
    """Return what a log says of /proc/meminfo, in MiB."""
    return {name: int(kib) / 1024 for name, kib in COUNTED.findall(log)}
