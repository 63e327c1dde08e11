"""How large the memory of an idle guest is in its template, for `make bench`.

Beside it is what that guest itself counts, just before its snapshot: what is in use and for what,
and what its kernel has kept for itself from the beginning.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import images
from devstack.services import ALL_PARTS, Progress
from devstack.stack import APPS, Stack
from rich.console import Console
from rich.table import Table

CLI = str(Path(sys.executable).with_name("template-manager"))
MIB = 1 << 20
MEMORY_MB = 512
MOST_MB = 65
# All of the free memory, as where that is quick: on an emulated CPU it takes 2 s.
CLEARED = "template.memory=cleared"
COUNTED = re.compile(r"\b([A-Z]\w+): +(\d+) kB")
KERNEL = re.compile(r"([0-9a-f]+)-([0-9a-f]+) : (Kernel \w+)")
START = "sleep 10; cat /proc/meminfo; grep Kernel /proc/iomem; touch /run/told; exec sleep infinity"
READY = "test -e /run/told"


def bench_memory(directory: Path, console: Console, say: Progress) -> None:
    """Build a Debian with systemd in which nothing happens; tell what its memory takes."""
    only = [part for part in ALL_PARTS if part != "docker"]
    with Stack(only=only, apps=APPS, env={"TEMPLATE_MANAGER_KERNEL_ARGUMENTS": CLEARED}) as stack:
        image = images.make_and_push("debian", stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
        say("building it")
        build_id = str(uuid.uuid4())
        stack_cli(stack, "build", "--image", image, "--build-id", build_id, "--force", "--follow")
        log = stack_cli(stack, "logs", build_id)
        stack_cli(stack, "pull", build_id, str(directory / "idle"))
    told = json.loads((directory / "idle" / "metadata.json").read_text())
    stored = told["artifacts"]["memfile"]["objects"]["data"]["size_bytes"] / MIB
    not_zero = (directory / "idle" / "memfile").stat().st_blocks * 512 / MIB
    table = Table(title=f"Memory of an idle Debian of {MEMORY_MB} MiB")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    rows = [
        ("stored in the template", stored),
        ("not zero, of that equal to another page", not_zero - stored),
        *counts_of(log),
    ]
    for what, amount in rows:
        table.add_row(what, f"{amount:.1f}")
    console.print(table)
    console.print(f"{stored:.1f} of {MOST_MB} MiB hoped for")


def counts_of(log: str) -> Iterator[tuple[str, float]]:
    """Yield what a guest has counted of its memory, in MiB, as it stands in the build's log."""
    counted = {name: int(kib) / 1024 for name, kib in COUNTED.findall(log)}
    yield "the guest's own count: in use", counted["MemTotal"] - counted["MemFree"]
    for name, what in (
        ("Cached", "page cache"),
        ("Mapped", "  mapped"),
        ("Buffers", "blocks of disks"),
        ("AnonPages", "memory of processes"),
        ("SReclaimable", "slab that can be had back"),
        ("SUnreclaim", "slab that cannot"),
        ("KernelStack", "stacks of the kernel"),
        ("PageTables", "page tables"),
        ("Percpu", "per CPU"),
    ):
        yield f"  {what}", counted[name]
    yield "what its kernel has kept from the beginning", MEMORY_MB - counted["MemTotal"]
    for begin, end, what in KERNEL.findall(log):
        yield f"  {what}", (int(end, 16) + 1 - int(begin, 16)) / MIB


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
