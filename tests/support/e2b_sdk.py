"""E2B's real SDK, unpatched, as its users run it: a program of its own with two variables set."""

from __future__ import annotations

import asyncio
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from devstack.environment import REPOSITORY

from tests.support.real_stack import Product

VERSIONS = ("2.45", "2.63")
PRELUDE = """
import asyncio, json, sys, traceback
from e2b import AsyncTemplate, Template
from e2b.exceptions import BuildException
SMALL = dict(cpu_count=1, memory_mb=256)

def tell(**facts):
    print(json.dumps(facts, default=str))

def line_of(error):
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.line for frame in frames if frame.filename == __file__][-1]

"""
# One process of 25 with 2.63 ends by SIGABRT, without a word, once all is done, when its
# interpreter is being taken down. These programs end before that.
ENDING = """
sys.stdout.flush()
import os
os._exit(0)
"""


@dataclass(frozen=True)
class Sdk:
    """The SDK of one version, and the service that it is to use."""

    version: str
    url: str
    key: str

    async def run(self, place: Path, program: str, seconds: float = 900) -> list[dict[str, Any]]:
        """Run a program in a directory; returns what it has told, an entry a call of `tell`."""
        path = place / f"program-{self.version}.py"
        path.write_text(PRELUDE + textwrap.dedent(program) + ENDING)
        process = await asyncio.create_subprocess_exec(
            _python(self.version),
            path,
            env={"E2B_API_URL": self.url, "E2B_API_KEY": self.key},
            cwd=place,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, (process.returncode, err.decode(), out.decode())
        return [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]


def sdk_of(product: Product, version: str) -> Sdk:
    """Return the SDK with a stack that has a REST API and no token file: every key will do."""
    address = product.stack.variables["TEMPLATE_MANAGER_REST_ADDRESS"]
    return Sdk(version, f"http://{address}", "e2b_0")


def _python(version: str) -> Path:
    python = REPOSITORY / ".e2b" / version / "bin" / "python"
    if not python.exists():
        pytest.fail(f"E2B's SDK {version} is not here: `make setup-tests` installs it")
    return python
