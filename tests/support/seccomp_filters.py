"""Filters for system calls: as the kernel takes them, and in a file as Firecracker does."""

from __future__ import annotations

import struct

# linux/filter.h, linux/seccomp.h, linux/audit.h; x86-64
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL = 0x7FFF0000, 0
X86_64 = 0xC000003E
MOUNT = 165
THREADS = (b"api", b"vcpu", b"vmm")


def _program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=HBBI", *each) for each in instructions)


# What a Firecracker without its release's filters installs, instruction by instruction.
LETS_ALL_THROUGH = _program(
    (LOAD, 0, 0, 4),
    (EQUAL, 0, 4, X86_64),
    (LOAD, 0, 0, 0),
    (AT_LEAST, 0, 1, 0x40000000),
    (EQUAL, 0, 1, 0xFFFFFFFF),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, KILL),
)
NO_MOUNT = _program(
    (LOAD, 0, 0, 4),
    (EQUAL, 0, 4, X86_64),
    (LOAD, 0, 0, 0),
    (AT_LEAST, 2, 0, 0x40000000),
    (EQUAL, 1, 0, MOUNT),
    (RETURN, 0, 0, ALLOW),
    (RETURN, 0, 0, KILL),
)


def filter_file(program: bytes, version: tuple[int, int]) -> bytes:
    """Return a `--seccomp-filter` with a program of seven instructions for all threads.

    The tool that makes such files comes with a release. They are a map of thread to program, by
    the crate bitcode since 1.14 at the latest and by bincode in 1.13.
    """
    if version >= (1, 14):
        head = b"\x03\x04\x87" + b"".join(THREADS) + b"\x02\x77\x07"
        return head + b"\x00" + program * len(THREADS)
    parts = [
        struct.pack("<Q", len(name)) + name + struct.pack("<Q", len(program) // 8) + program
        for name in THREADS
    ]
    return struct.pack("<Q", len(THREADS)) + b"".join(parts)
