from __future__ import annotations

import subprocess
import sys

from devstack.environment import REPOSITORY

# Small things that stay, made among large buffers that go, in many threads: as in a host.
PROGRAM = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from activities.process.allocator import give_memory_back

def resident_mib():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"Pss:\\s+(\\d+)", rollup)[0]) // 1024

def work(number):
    kept = []
    for size_mib in range(1, 17):
        large = [b"x" * (size_mib << 20) for _ in range(4)]
        kept += [b"y" * 2000 for _ in range(100)]
    return kept

if "give" in sys.argv:
    give_memory_back()
before = resident_mib()
with ThreadPoolExecutor(8) as threads:
    kept = list(threads.map(work, range(16)))
    print(resident_mib() - before)
"""


def grown_mib(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_large_buffers_of_many_threads_go_back_to_the_machine() -> None:
    assert grown_mib("give") < 32
