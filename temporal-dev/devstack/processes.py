"""Detached processes: start, recognise, wait for and stop them.

A process is known by its pid *and* its start time, both on disk. A pid alone is not proof:
after a crash or a reboot the same number can belong to somebody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.02
LOG_TAIL_LINES = 20

# Popen objects of what this process started. Keeping them lets us reap: a child that ended
# would stay a zombie for as long as its parent (a test session, say) runs.
_children: dict[int, subprocess.Popen[bytes]] = {}


class ServiceError(RuntimeError):
    """Something of the stack could not be started; the message says what to do."""


@dataclass(frozen=True)
class ProcessRecord:
    """What is written to disk about a process that we started."""

    pid: int
    start_ticks: int
    boot_id: str
    fingerprint: str
    argv: list[str]


@dataclass(frozen=True)
class ProcessFiles:
    """Where one process keeps its record, its log and its ready mark."""

    record: Path
    log: Path
    ready: Path

    @classmethod
    def under(cls, state_dir: Path, name: str) -> ProcessFiles:
        """The files of the process `name` in a state directory."""
        run = state_dir / "run"
        return cls(run / f"{name}.json", state_dir / "log" / f"{name}.log", run / f"{name}.ready")


def spawn(
    files: ProcessFiles, argv: Sequence[str], settings: Mapping[str, str], cwd: Path
) -> ProcessRecord:
    """Start a process in a session of its own, with its output appended to its log.

    It inherits our environment, changed by `settings`; those and `argv` are its fingerprint.
    """
    for path in (files.record, files.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.ready.unlink(missing_ok=True)
    with files.log.open("ab") as log:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **settings},
            cwd=cwd,
            start_new_session=True,
        )
    _children[child.pid] = child
    record = ProcessRecord(
        child.pid, start_ticks(child.pid) or 0, boot_id(), fingerprint(argv, settings), list(argv)
    )
    write_atomically(files.record, json.dumps(asdict(record)))
    return record


def running(files: ProcessFiles) -> ProcessRecord | None:
    """The process that these files name, if it is alive."""
    record = read_record(files)
    return record if record is not None and is_alive(record) else None


def read_record(files: ProcessFiles) -> ProcessRecord | None:
    """The record on disk, whether or not its process still lives."""
    try:
        return ProcessRecord(**json.loads(files.record.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def is_alive(record: ProcessRecord) -> bool:
    """Whether this very process (not another one with its pid) runs."""
    _reap(record.pid)
    return record.boot_id == boot_id() and start_ticks(record.pid) == record.start_ticks


def stop(files: ProcessFiles, patience_seconds: float = 10.0) -> bool:
    """End a process with SIGTERM, then SIGKILL, and wait until it is gone."""
    record = running(files)
    if record is not None:
        _signal(record.pid, signal.SIGTERM)
        if not _wait_gone(record, patience_seconds):
            kill(files)
    files.record.unlink(missing_ok=True)
    files.ready.unlink(missing_ok=True)
    return record is not None


def kill(files: ProcessFiles) -> None:
    """SIGKILL: what a crash looks like. The record stays, so that `running` says so."""
    record = running(files)
    if record is None:
        return
    _signal(record.pid, signal.SIGKILL)
    if not _wait_gone(record, 10.0):
        raise ServiceError(f"process {record.pid} ({record.argv[0]}) survives SIGKILL")


def wait_until(ready: Callable[[], bool], files: ProcessFiles, name: str, seconds: float) -> None:
    """Poll `ready` while the process lives; a dead or late one is an error with its log's tail."""
    deadline = time.monotonic() + seconds
    while not ready():
        if running(files) is None:
            raise ServiceError(f"{name} ended before it was ready.\n{log_tail(files)}")
        if time.monotonic() > deadline:
            raise ServiceError(f"{name} is not ready after {seconds:.0f} s.\n{log_tail(files)}")
        time.sleep(POLL_SECONDS)


def log_tail(files: ProcessFiles) -> str:
    """The last lines of a process's log, with the path of the whole."""
    try:
        lines = files.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except FileNotFoundError:
        lines = []
    return "\n".join([*(f"  | {line}" for line in lines), f"The whole log: {files.log}"])


def fingerprint(argv: Sequence[str], settings: Mapping[str, str]) -> str:
    """Tells whether a running process was started with these arguments and settings."""
    text = json.dumps([list(argv), sorted(settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def start_ticks(pid: int) -> int | None:
    """The kernel's start time of a live process; None for a dead one or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold spaces and parentheses: count from the last one.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """Start times count from boot, so they only compare within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a small file so that a reader sees the old or the new one, never half."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    draft.rename(path)


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something accepts connections on a local TCP port."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def port_owner(port: int) -> str | None:
    """Who listens on a TCP port, for an error message; None if nobody does."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and port in connection.laddr[1:]:
            return _describe(connection.pid)
    return None


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process that is not visible from here"
    with contextlib.suppress(psutil.Error):
        return f"pid {pid} ({' '.join(psutil.Process(pid).cmdline())[:120]})"
    return f"pid {pid}"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_gone(record: ProcessRecord, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(record):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _reap(pid: int) -> None:
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
