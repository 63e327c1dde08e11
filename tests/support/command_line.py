"""The command line as a process of its own: what it was told, what it said, how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devstack.environment import REPOSITORY


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


async def started(
    *arguments: str, env: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    # A shell that runs the tests in the background has them, and so it, ignore Ctrl-C.
    return await asyncio.create_subprocess_exec(
        "/usr/bin/env",  # of whatever PATH `env` has
        "--default-signal=INT",
        sys.executable,
        "-m",
        "api.cli.main",
        *arguments,
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "120", "PYTHONFAULTHANDLER": "1", **(env or {})},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def on_terminal(
    *arguments: str, columns: int, env: Mapping[str, str] | None = None, typed: str = ""
) -> tuple[int, str]:
    """Run a command on a terminal of that width; returns its exit code and all that it showed.

    `typed` is what somebody has typed before it reads.
    """
    leader, follower = pty.openpty()
    os.write(leader, typed.encode())
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "api.cli.main",
        *arguments,
        cwd=REPOSITORY,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **(env or {})},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = await asyncio.to_thread(_read_all, leader)
    return await process.wait(), shown.decode(errors="replace")


def _read_all(leader: int) -> bytes:
    said = b""
    with contextlib.suppress(OSError):  # as Linux tells that the other end is closed
        while more := os.read(leader, 4096):
            said += more
    os.close(leader)
    return said


async def cli(*arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Ended:
    process = await started(*arguments, env=env)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 80)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())
