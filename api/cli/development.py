"""The commands for developers: up and down, of the whole stack on one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import typer

from api.cli.console import Exit, fail

DEVELOPMENT = "Development"

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
    raise typer.Exit(subprocess.run([sys.executable, str(script), command], check=False).returncode)
