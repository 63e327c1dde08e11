"""Whether a process' system calls are filtered, seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from activities.contract.checkpoints import Seccomp
from activities.contract.errors import JailUnusableError
from activities.microvm.confinement import Held, held, is_filter
from activities.microvm.launching import require_jail_works
from tests.support.seccomp_filters import LETS_ALL_THROUGH, NO_MOUNT

# Puts itself behind a filter, and lives until its input ends.
FILTERED = """
import ctypes, sys
program = bytes.fromhex(sys.argv[1])
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if program:
    assert libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program))) == 0
print("ready", flush=True)
sys.stdin.read()
"""
# Its threads come and go, as a VMM's that wait for a disk do.
RESTLESS = """
import sys, threading
def restless():
    while True:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
for _ in range(3):
    threading.Thread(target=restless, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
MAY_LOOK = os.geteuid() == 0 and "Seccomp:\t0" in Path("/proc/self/status").read_text()


@contextmanager
def filtered(program: bytes) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-S", "-c", FILTERED, program.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    assert process.returncode == 0  # it went on after it was looked at


@pytest.mark.skipif(not MAY_LOOK, reason="takes root, and no filter before our own calls")
@pytest.mark.parametrize(
    ("program", "told"), [(b"", "none"), (LETS_ALL_THROUGH, "none"), (NO_MOUNT, "filter")]
)
def test_a_filter_counts_that_stops_something(program: bytes, told: Seccomp) -> None:
    with filtered(program) as process:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Seccomp:\t{2 if program else 0}\n" in status
        assert held(process.pid, "") == Held("none", told)
        assert held(process.pid, "") == Held("none", told)  # and it lets go of it


@pytest.mark.skipif(not MAY_LOOK, reason="takes root, and no filter before our own calls")
def test_threads_that_end_meanwhile_do_not_count() -> None:
    command = [sys.executable, "-I", "-S", "-c", RESTLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert {held(process.pid, "").seccomp for _ in range(50)} == {"none"}
        process.kill()


def test_a_program_that_knows_no_call_is_no_filter() -> None:
    assert is_filter(NO_MOUNT)
    assert not is_filter(LETS_ALL_THROUGH)
    assert not is_filter(b"")


def test_what_cannot_be_told_is_not_known(tmp_path: Path) -> None:
    assert held(2**22 + 1, None) == Held("", "")
    jailer = tmp_path / "jailer"
    assert held(2**22 + 1, str(jailer)) == Held("", "")
    jailer.write_text("#!/bin/sh\necho Jailer v1.16.1\necho a line of its log\n")
    jailer.chmod(0o755)
    assert held(2**22 + 1, str(jailer)) == Held("1.16.1", "")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (os.ST_NODEV, "mounted with nodev"),
        (os.ST_NOEXEC | os.ST_NOSUID, "mounted with noexec"),
        (os.ST_NODEV | os.ST_NOEXEC, "mounted with nodev and noexec"),
    ],
)
def test_where_no_jail_can_be_made_the_mount_is_named(
    flags: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = [*real[:8], flags, real[9]]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(JailUnusableError, match=f"of {tmp_path} is {told}"):
        require_jail_works(tmp_path / "vms")


def test_other_options_do_not_keep_the_jailer_from_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = [*real[:8], os.ST_NOSUID, real[9]]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    require_jail_works(tmp_path)
