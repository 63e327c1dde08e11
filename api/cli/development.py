"""The commands for developers: up and down, of the whole stack on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import typer

from api.cli.console import Exit, fail

DEVELOPMENT = "Development"
# What the dev stack and the programs that it starts go by; of a developer's shell nothing else.
PASSED_ON = frozenset({"HOME", "LANG", "PATH", "TERM", "TMPDIR", "TZ", "USER"})
PASSED_ON_PREFIXES = (
    "DOCKER_",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LC_",
    "NO_PROXY",
    "OTEL_",
    "STORAGE_",
    "TEMPLATE_MANAGER_",
    "TEMPORAL_",
)

app = typer.Typer()


@app.command(rich_help_panel=DEVELOPMENT, epilog="Example: template-manager up")
def up() -> None:
    """Start the whole stack on this machine: what stands in for production, and our processes."""
    _services("up")


@app.command(rich_help_panel=DEVELOPMENT, epilog="Example: template-manager down")
def down() -> None:
    """Stop what `up` has started."""
    _services("down")


def _services(command: str) -> NoReturn:
    script = Path(__file__).resolve().parents[2] / "temporal-dev" / "devstack"
    if not script.exists():
        fail(
            f"`{command}` needs a checkout: there is no {script}",
            "Clone the repository, and install it there with `pip install --editable .`.",
            Exit.USAGE,
            as_json=False,
        )
    done = subprocess.run(
        [sys.executable, str(script), command], check=False, env=environment_of_stack(os.environ)
    )
    raise typer.Exit(done.returncode)


def environment_of_stack(ours: Mapping[str, str]) -> dict[str, str]:
    """Return what of this process's environment the dev stack gets."""
    return {
        name: value
        for name, value in ours.items()
        if name in PASSED_ON or name.upper().startswith(PASSED_ON_PREFIXES)
    }
