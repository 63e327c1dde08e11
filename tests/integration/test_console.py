"""A guest that talks while nobody can listen, as Firecracker plays it: it never waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from activities.contract.names import Step
from activities.microvm import vm_supervisor
from activities.microvm.console import ConsoleReader, GuestReadiness
from activities.step.build_log import BuildLog, read_entries

pytestmark = pytest.mark.counts_host

LINES = 100_000
STOPPED_SECONDS = 10
SUPERVISE = "import sys, vm_supervisor as s; s.supervise(sys.argv[2:], int(sys.argv[1]))"
# Its standard output does not wait for the reader; what the pipe does not take is lost.
VMM = """
import os, sys, time
os.set_blocking(1, False)
log = open("vmm.log.pipe", "wb", buffering=0)
def say(text):
    try:
        os.write(1, b"\\n@tm@ " + text + b"\\n")
    except BlockingIOError:
        log.write(b"Failed the write to serial: Resource temporarily unavailable\\n")
say(b"start added")
while not os.path.exists("go"):
    time.sleep(0.01)
for number in range(int(sys.argv[1])):
    say(b"out line %d of a start command that says a lot" % number)
    os.write(1, b"[  1.0] the kernel says %d\\n" % number) if number % 10 == 0 else None
say(b"ready 1")
open("said", "w").close()
"""


@contextmanager
def supervised(place: Path, console_bytes: int, lines: int) -> Iterator[subprocess.Popen[bytes]]:
    """Have such a VMM supervised for a block; it waits for a file `go`."""
    (place / "vmm.py").write_text(VMM)
    os.mkfifo(place / "vmm.log.pipe", 0o600)
    library = {**os.environ, "PYTHONPATH": str(Path(vm_supervisor.__file__).parent)}
    vmm = [sys.executable, "vmm.py", str(lines)]
    command = [sys.executable, "-c", SUPERVISE, str(console_bytes), *vmm]
    process = subprocess.Popen(command, cwd=place, env=library)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def until(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path.name
        time.sleep(0.02)


def heard(place: Path) -> tuple[GuestReadiness, ConsoleReader]:
    reader = ConsoleReader(place / "console")
    guest = GuestReadiness(BuildLog(place / "build.log", Step.BOOT))
    position = -1
    while position != reader.position:
        position = reader.position
        for line in reader.lines():
            guest.hear(line)
    return guest, reader


async def test_no_line_of_ours_is_lost_while_the_supervisor_stands_still(tmp_path: Path) -> None:
    with supervised(tmp_path, 16 << 20, LINES) as supervisor:
        until(tmp_path / "vmm.json")
        supervisor.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        (tmp_path / "go").touch()
        until(tmp_path / "said")
        time.sleep(max(0.0, stopped + STOPPED_SECONDS - time.monotonic()))
        supervisor.send_signal(signal.SIGCONT)
        assert supervisor.wait(120) == 0
    console = (tmp_path / "console").read_text()
    assert console.count("\n@tm@ out line ") == LINES
    guest, reader = heard(tmp_path)
    assert guest.ready
    assert str(reader.lost()) == ""
    assert len(guest.tail) and guest.tail[-1].startswith(f"line {LINES - 1} ")


async def test_what_there_is_no_room_for_is_counted_and_ready_is_heard(tmp_path: Path) -> None:
    with supervised(tmp_path, 100_000, 20_000) as supervisor:
        (tmp_path / "go").touch()
        assert supervisor.wait(120) == 0
    guest, reader = heard(tmp_path)
    assert guest.ready
    told = len([each for each in read_entries(tmp_path / "build.log") if "line " in each.message])
    kernel = (tmp_path / "console").read_text().count("the kernel says")
    lost = reader.lost()
    assert lost.writes == 0
    assert lost.lines == 20_000 - told + 2_000 - kernel
    assert f"{lost.lines} lines of the guest's console are left out" in str(lost)
