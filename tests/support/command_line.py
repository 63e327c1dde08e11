"""The command line as a process of its own: what it was told, what it said, how it ended."""

from __future__ import annotations

import asyncio
import json
import os
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
    return await asyncio.create_subprocess_exec(
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


async def cli(*arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Ended:
    process = await started(*arguments, env=env)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 80)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())
