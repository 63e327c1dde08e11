from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from activities.microvm import vm_supervisor
from activities.microvm.console import ConsoleReader
from activities.microvm.vm_supervisor import (
    DECIDING_BYTES,
    ERROR,
    HEADER,
    LINE_BYTES,
    NLMSG_DONE,
    NLMSG_ERROR,
    ROUTE,
    RTM_NEWROUTE,
    Console,
    Spool,
    local_networks,
)

RUN = "import sys, vm_supervisor as s; sys.exit(s.supervise(sys.argv[2:], int(sys.argv[1])))"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def console_of(place: Path) -> list[str]:
    return [line for line in (place / "console").read_text().split("\n") if line]


def lost(place: Path) -> dict[str, int]:
    path = place / "console.lost"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def test_lines_of_ours_have_room_when_others_have_none(place: Path) -> None:
    console = Console(1000)
    for number in range(1000):
        console.take(b"kernel says %d\n" % number)
    console.take(b"\n@tm@ out served\n\n@tm@ ready 1\n")
    console.tell()
    told = console_of(place)
    assert told[:2] == ["kernel says 0", "kernel says 1"]
    assert told[-2:] == ["@tm@ out served", "@tm@ ready 1"]
    assert lost(place) == {"lines": 1000 - len(told) + 2, "writes": 0}
    assert (place / "console").stat().st_size < 1100


def test_what_decides_has_room_when_the_start_command_has_none(place: Path) -> None:
    console = Console(1000)
    console.take(b"@tm@ out endless\n" * 500)
    deciding = [
        *("@tm@ start-exit 3", "@tm@ failed it ended", "@tm@ ready-attempt 4 1"),
        *("@tm@ exit 1 memory", "@tm@ refused why", "@tm@ done "),
    ]
    console.take("\r\n".join([*deciding, ""]).encode())
    assert console_of(place)[-6:] == deciding


def test_a_hostile_guest_fills_no_disk(place: Path) -> None:
    console = Console(10_000)
    for kind in (b"ready", b"out", b"nothing", b""):
        console.take((b"@tm@ " + kind + b" x" * 200 + b"\n") * 10_000)
    console.take(b"y" * 100 * LINE_BYTES)
    console.take(b"")
    assert (place / "console").stat().st_size < 2 * 10_000 + DECIDING_BYTES
    console.tell()
    assert lost(place)["lines"] > 30_000


def test_an_endless_line_does_not_swallow_what_follows(place: Path) -> None:
    console = Console(4 * LINE_BYTES)
    for _ in range(20):
        console.take(b"x" * LINE_BYTES)
        console.take(b"@tm@ ready 0")  # wherever it is cut, this is no line
    assert not any(line.startswith("@tm@") for line in console_of(place))
    console.take(b"\n@tm@ ready 1\n")
    assert ConsoleReader(place / "console").lines()[-1] == "@tm@ ready 1"
    assert (place / "console").stat().st_size < 3 * LINE_BYTES


def test_pieces_of_a_line_are_put_together(place: Path) -> None:
    console = Console(1000)
    for piece in (b"@t", b"m@ rea", b"dy 1\nrest"):
        console.take(piece)
    assert (place / "console").read_bytes() == b"@tm@ ready 1\n"
    console.take(b"")  # the end
    assert (place / "console").read_bytes() == b"@tm@ ready 1\nrest\n"


def test_a_full_disk_does_not_stop_the_reading(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(1000)
    console.take(b"before\n")
    write, room = os.write, 4

    def write_what_fits(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        fits, room = data[:room], max(0, room - len(data))
        return write(descriptor, fits)

    monkeypatch.setattr(os, "write", write_what_fits)
    console.take(b"torn line\nand another\n")
    console.take(b"nothing of this\n")
    room = 1000
    console.take(b"@tm@ ready 1\n")
    console.tell()
    assert console_of(place) == ["before", "torn", "@tm@ ready 1"]
    assert lost(place) == {"lines": 3, "writes": 0}


def supervise(place: Path, program: str, console_bytes: int = 10_000) -> int:
    """Let the supervisor run a program in the place of a VMM, to its end."""
    script = place / "vmm.py"
    script.write_text(textwrap.dedent(program))
    command = [sys.executable, "-c", RUN, str(console_bytes), sys.executable, str(script)]
    library = {**os.environ, "PYTHONPATH": str(Path(vm_supervisor.__file__).parent)}
    return subprocess.run(command, cwd=place, env=library, timeout=60, check=False).returncode


def test_the_vmms_own_log_is_apart(place: Path) -> None:
    os.mkfifo(place / "vmm.log.pipe", 0o600)
    program = """
        import sys
        print("guest speaks", flush=True)
        with open("vmm.log.pipe", "wb", buffering=0) as log:
            log.write(b"Failed the write to serial: would block\\n" * 3)
            log.write(b"KVM_EXIT_INTERNAL_ERROR\\n")
        print("panicked", file=sys.stderr, flush=True)
        sys.exit(7)
    """
    assert supervise(place, program) == 7
    assert console_of(place) == ["guest speaks"]
    assert (place / "vmm.log").read_text().splitlines()[-2:] == [
        "KVM_EXIT_INTERNAL_ERROR",
        "panicked",
    ]
    assert lost(place) == {"lines": 0, "writes": 3}


def test_of_a_long_log_the_end_is_kept(place: Path) -> None:
    os.mkfifo(place / "vmm.log.pipe", 0o600)
    program = """
        with open("vmm.log.pipe", "wb") as log:
            for number in range(200_000):
                log.write(b"line %d\\n" % number)
    """
    assert supervise(place, program) == 0
    log = place / "vmm.log"
    assert log.read_text().endswith("line 199999\n")
    assert log.stat().st_size <= vm_supervisor.LOG_BYTES


def test_without_the_pipe_all_is_in_the_console(place: Path) -> None:
    """As a worker of the version before starts it."""
    assert supervise(place, "import sys; print('to stderr', file=sys.stderr)") == 0
    assert console_of(place) == ["to stderr"]


def test_what_has_been_read_takes_no_memory() -> None:
    spool = Spool()
    for number in range(20):
        os.write(spool.descriptor, bytes([number]) * (1 << 20))
        assert os.fstat(spool.descriptor).st_blocks * 512 <= 2 << 20
        taken = b"".join(iter(spool.take, b""))
        assert taken == bytes([number]) * (1 << 20)
    os.write(spool.descriptor, b"the end")
    assert spool.take() == b"the end"
    assert os.fstat(spool.descriptor).st_blocks * 512 <= 8192


LOCAL, UNICAST = 2, 1
ALL_OF_IT, LATER = 0, 16
"""How an answer is marked: as one that is whole, and one that changed while it was told."""


def message(kind: int, content: bytes, flags: int = ALL_OF_IT) -> bytes:
    return HEADER.pack(HEADER.size + len(content), kind, flags, 0, 0) + content


def route(address: str, bits: int, kind: int) -> bytes:
    head = ROUTE.pack(socket.AF_INET, bits, 0, 0, 255, 0, 0, kind, 0)
    destination = struct.pack("=HH4s", 8, 1, socket.inet_aton(address))
    priority = struct.pack("=HHI", 8, 6, 0)
    return message(RTM_NEWROUTE, head + priority + (destination if bits else b""))


def test_local_routes_are_the_hosts_own() -> None:
    told = [
        route("203.0.113.2", 32, LOCAL),
        route("198.51.100.0", 24, LOCAL),
        route("192.0.2.0", 24, UNICAST),
        route("0.0.0.0", 0, LOCAL),  # of who takes marked packets, whatever their address
    ]
    own = {"203.0.113.2/32", "198.51.100.0/24"}
    assert local_networks(b"".join(told)) == (own, False, False)
    assert local_networks(message(NLMSG_DONE, bytes(4))) == (set(), True, False)
    assert local_networks(message(NLMSG_DONE, bytes(4), LATER)) == (set(), True, True)
    with pytest.raises(OSError, match="cannot be denied to the guest: Operation not permitted"):
        local_networks(message(NLMSG_ERROR, ERROR.pack(-errno.EPERM)))
