"""What the C library keeps of memory that was given back to it.

By itself glibc has an arena for each thread that meets another in it, and once a large buffer was
freed it keeps all that are as large for later ones. In a process with many threads that go
through gigabytes, that is hundreds of MiB which nobody uses.
"""

from __future__ import annotations

import ctypes

# mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ARENAS = 2
LARGE_BYTES = 256 * 1024


def give_memory_back() -> None:
    """Let large buffers go back to the kernel when they are freed, and threads share arenas.

    To be called before there are threads. Does nothing with another C library than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_ARENA_MAX, ARENAS)
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)
