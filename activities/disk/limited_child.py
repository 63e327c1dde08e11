"""Programs that read what a tenant has made: as nobody, with limits, and never for longer.

Whatever such a program is made to do by what it reads, it has a user, a network, a pid namespace,
cgroups and limits of its own, and an environment without anything of ours. The tools are
util-linux's. It ends with all that it started when the block is left, when its deadline passes, and
when the thread or process that started it dies: the first process of its pid namespace gets SIGKILL
then.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from activities.contract.units import MIB
from activities.disk.cgroups import Limits
from activities.disk.child_cgroups import child_cgroups, joining
from activities.disk.programs import child_environment

POLL_SECONDS = 0.1
READ_BYTES = 64 * 1024
KEPT_BYTES = 64 * 1024
# What a child's cgroup may have besides its memory: pages of the files that it reads and writes,
# which the kernel takes back; and what stands between us and the child itself.
PAGES_MB = 256
PROCESSES = 4
# Of nobody on this machine, ours and others': RLIMIT_NPROC counts them together.
NOBODYS_PROCESSES = 4096
# Else glibc reserves 64 MiB of addresses for each thread, which RLIMIT_AS counts: on a host with 32
# processors e2fsck's threads had none left for their stacks.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
# setpriv(1) and capabilities(7): what looking into files and directories of any owner takes, and
# what making any of them takes. Nothing that reaches beyond files.
READS_ANY = ("dac_read_search",)
MAKES_ANY = ("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "mknod", "setfcap")


@dataclass(frozen=True)
class ChildLimits:
    """What one child may take."""

    seconds: float
    memory_mb: int = 1024
    threads: int = 0
    """How many it may start. Without any it can start no process either."""
    file_bytes: int = 1 << 44
    """How long a file may become that it writes."""
    open_files: int = 256


class ChildTimeoutError(Exception):
    """A child was killed because it took too long."""


@dataclass(frozen=True)
class ChildEnd:
    """How a child has ended."""

    code: int
    output: bytes
    errors: bytes
    """The last KEPT_BYTES of its standard error."""

    @property
    def last_lines(self) -> list[str]:
        """Return the end of what it said on standard error, for people."""
        return self.errors.decode(errors="replace").strip().splitlines()[-20:]


@contextmanager
def limited_child(
    command: Sequence[str | Path],
    limits: ChildLimits,
    *,
    capabilities: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    stdin: IO[bytes] | int | None = subprocess.DEVNULL,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    pipe_bytes: int = -1,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as nobody, and end it when the block is left.

    The caller's mounts are the child's: start it in the thread that made them, and stay there.
    """
    with child_cgroups(Limits(limits.memory_mb + PAGES_MB, PROCESSES + limits.threads)) as cgroups:
        process = subprocess.Popen(
            _wrapped(command, limits, capabilities, cgroups),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            start_new_session=True,
            env={**child_environment(), **ONE_ARENA, **(environment or {})},
            pass_fds=pass_fds,
            pipesize=pipe_bytes,
        )
        try:
            yield process
        finally:
            while process.poll() is None:
                _kill(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)


def run_limited(
    command: Sequence[str | Path],
    limits: ChildLimits,
    check: Callable[[], None],
    *,
    capabilities: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    max_output_bytes: int = MIB,
) -> ChildEnd:
    """Run a command to its end, with its output. `check` is called often, and ends it by raising.

    Of an output beyond `max_output_bytes` the end is kept. Raises ChildTimeoutError.
    """
    deadline = time.monotonic() + limits.seconds
    with limited_child(
        command,
        limits,
        capabilities=capabilities,
        environment=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        output, errors = _Tail(max_output_bytes), _Tail(KEPT_BYTES)
        with selectors.DefaultSelector() as selector, child.stdout, child.stderr:
            selector.register(child.stdout, selectors.EVENT_READ, output)
            selector.register(child.stderr, selectors.EVENT_READ, errors)
            while selector.get_map():
                _require_time(deadline, limits, command)
                check()
                _read_ready(selector)
        wait_for(child, limits, deadline, check)
        return ChildEnd(child.returncode, bytes(output.content), bytes(errors.content))


def wait_for(
    child: subprocess.Popen[bytes],
    limits: ChildLimits,
    deadline: float,
    check: Callable[[], None],
) -> None:
    """Wait for its end; `check` is called often. Raises ChildTimeoutError after the deadline.

    The deadline is of the monotonic clock, in seconds.
    """
    if child.poll() is not None:
        return
    # Popen.wait with a timeout looks 20 times a second; a pidfd tells of the end at once.
    pidfd = os.pidfd_open(child.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            while child.poll() is None:
                _require_time(deadline, limits, [])
                check()
                selector.select(POLL_SECONDS)
    finally:
        os.close(pidfd)


def _kill(unshare: int) -> None:
    """Kill the first process of the pid namespace, and so all in it; `unshare` waits for its end.

    Killed first itself, unshare(1) would be waited for, and not the one that keeps mounts busy.
    """
    with contextlib.suppress(OSError):
        inside = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        for process in map(int, inside):
            os.kill(process, signal.SIGKILL)
        if inside:
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(unshare, signal.SIGKILL)


class _Tail:
    """The last bytes of a stream."""

    def __init__(self, limit_bytes: int) -> None:
        self.content = bytearray()
        self._limit_bytes = limit_bytes

    def add(self, part: bytes) -> None:
        self.content += part
        del self.content[: -self._limit_bytes]


def _read_ready(selector: selectors.BaseSelector) -> None:
    for key, _ in selector.select(POLL_SECONDS):
        tail: _Tail = key.data
        part = os.read(key.fd, READ_BYTES)
        if part:
            tail.add(part)
        else:
            selector.unregister(key.fileobj)


def _require_time(deadline: float, limits: ChildLimits, command: Sequence[str | Path]) -> None:
    if time.monotonic() > deadline:
        what = Path(command[0]).name if command else "it"
        raise ChildTimeoutError(f"{what} did not end within {limits.seconds:g} s")


def _wrapped(
    command: Sequence[str | Path],
    limits: ChildLimits,
    capabilities: Sequence[str],
    cgroups: Sequence[Path],
) -> list[str | Path]:
    kept = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    # Nobody has this one already: with a limit of 1 it can start no other.
    processes = NOBODYS_PROCESSES if limits.threads else 1
    confined: list[str | Path] = [
        *("unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child"),
        *("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"),
        *("--bounding-set", kept, "--inh-caps", kept, "--ambient-caps", kept),
        # The kernel forgets a parent-death signal when the user changes: it is asked for again.
        *("--no-new-privs", "--pdeathsig", "KILL"),
        *("prlimit", f"--as={limits.memory_mb * MIB}", f"--fsize={limits.file_bytes}"),
        *(f"--cpu={int(limits.seconds) + 1}", f"--nofile={limits.open_files}"),
        *(f"--nproc={processes}", "--core=0", "--"),
        *command,
    ]
    return ["setpriv", "--pdeathsig", "KILL", *joining(cgroups, confined)]
