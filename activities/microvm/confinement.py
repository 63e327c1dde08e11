"""What holds a VMM that runs: its jailer, and whether a filter stands before its system calls.

`Seccomp: 2` in `/proc/<pid>/status` does not say that. A Firecracker that was built without the
filters of its release (for gnu, as `cargo build` does by default) installs programs that let every
call through; so the programs themselves are read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from activities.contract.checkpoints import Seccomp
from activities.contract.errors import TemplateManagerError
from activities.disk.namespaces import in_own_thread
from activities.microvm.resumable import vmm_version

# linux/ptrace.h, linux/wait.h
PTRACE_DETACH = 17
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_SECCOMP_GET_FILTER = 0x4206, 0x4207, 0x420C
WALL = 0x40000000
STOP_SECONDS = 5.0
POLL_SECONDS = 0.001
# linux/bpf_common.h: a jump by comparison with a constant.
JUMP, CLASS, OPERATION = 0x05, 0x07, 0xF0
COMPARISONS = (0x10, 0x20, 0x30)  # =, >, >=
INSTRUCTION = struct.Struct("=HBBI")
# From here on are x32's calls, and architectures: each program compares with those.
NO_CALL = 0x40000000
# Threads of the kernel in the VMM's name: they make no calls.
OF_THE_KERNEL = ("kvm-", "vhost-", "iou-")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Held(NamedTuple):
    """What holds a VMM. `jailer` is its jailer's version, `none`, or '' where it tells none."""

    jailer: str
    seccomp: Seccomp


def held(vmm: int, jailer: str | None) -> Held:
    """Look at a VMM that runs, or is paused, by its pid; it stands still for a moment.

    `jailer` is the path of the one that it was started with, '' for none; None is not known.
    """
    return Held(_version(jailer), in_own_thread(lambda: _seccomp(vmm), "seccomp"))


def is_filter(program: bytes) -> bool:
    """Whether a BPF program tells one call from another: it compares with the number of one."""
    return any(
        code & CLASS == JUMP and code & OPERATION in COMPARISONS and constant < NO_CALL
        for code, _, _, constant in INSTRUCTION.iter_unpack(program)
    )


def _version(jailer: str | None) -> str:
    if not jailer:
        return "" if jailer is None else "none"
    try:
        return vmm_version(Path(jailer))
    except TemplateManagerError:
        return ""


def _seccomp(vmm: int) -> Seccomp:
    """Look at all threads. They go on when this thread ends, whatever happens in between."""
    try:
        threads = [int(task.name) for task in Path(f"/proc/{vmm}/task").iterdir()]
        found = [_is_filtered(thread) for thread in threads]
    except OSError:  # it has ended, or we are filtered ourselves and may not look
        return ""
    filtered = [each for each in found if each is not None]
    if not filtered:
        return ""
    return "filter" if all(filtered) else "none"


def _is_filtered(thread: int) -> bool | None:
    """Whether a filter stands before a thread's calls; None where it makes none: it is of the
    kernel, or has ended since it was listed. Raises OSError."""
    try:
        if Path(f"/proc/{thread}/comm").read_text().startswith(OF_THE_KERNEL):
            return None
        return any(map(is_filter, _programs(thread)))
    except (ProcessLookupError, FileNotFoundError):
        return None


def _programs(thread: int) -> Iterator[bytes]:
    """Yield the programs that a thread's calls go through. Raises OSError."""
    _ptrace(PTRACE_SEIZE, thread)
    _ptrace(PTRACE_INTERRUPT, thread)
    _wait_stopped(thread)
    try:
        for number in range(_count(thread)):
            length = _ptrace(PTRACE_SECCOMP_GET_FILTER, thread, number)
            program = (ctypes.c_uint64 * length)()
            _ptrace(PTRACE_SECCOMP_GET_FILTER, thread, number, ctypes.addressof(program))
            yield bytes(program)
    finally:
        _ptrace(PTRACE_DETACH, thread)


def _count(thread: int) -> int:
    lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Seccomp_filters:"))


def _wait_stopped(thread: int) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while os.waitpid(thread, WALL | os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"thread {thread} does not stop")
        time.sleep(POLL_SECONDS)


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> int:
    result: int = _libc.ptrace(request, thread, address, data)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request:#x} of thread {thread}: {os.strerror(code)}")
    return result
