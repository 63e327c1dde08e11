"""The walls between the rooms are checked: an import that goes through one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")

# Where a line does not belong, and the contract that says so.
VIOLATIONS = {
    "Imports go down: api, workflows, activities": (
        "activities/host/facts.py",
        "import workflows.policies",
    ),
    "The floors of activities": (
        "activities/store/bucket.py",
        "import activities.step.ledger",
    ),
    "The floors of api": ("api/client/client.py", "import api.server.errors_of_no_use"),
    "No circles": ("workflows/policies.py", "import workflows.calling"),
    "Workflows see the contract alone, and do no I/O": (
        "workflows/timeline.py",
        "import activities.process.settings",
    ),
    "VMs know nothing of Docker": (
        "activities/microvm/network.py",
        "import activities.image.docker_daemon",
    ),
    "The API sees contract, process and store": (
        "api/server/wire.py",
        "import activities.template.deletion",
    ),
    "The API never touches Docker": ("api/server/wire.py", "import docker"),
    "No room of api imports Docker": ("api/cli/report.py", "import docker"),
    "A client is only a client": ("api/client/client.py", "import activities.process.settings"),
    "The REST API is a client of the gRPC API like any other": (
        "api/rest/app.py",
        "import activities.process.settings",
    ),
    "The command line starts programs of workflows and hosts, and reads templates": (
        "api/cli/report.py",
        "import activities.image.registry",
    ),
}


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    """Check the walls of the tree in `directory`."""
    return subprocess.run(
        [LINT, "--no-cache", directory / "pyproject.toml"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_import_goes_through_a_wall() -> None:
    checked = lint(REPOSITORY)
    assert checked.returncode == 0, checked.stdout
    assert "0 broken" in checked.stdout


def test_a_deliberate_violation_of_each_wall_is_found(tmp_path: Path) -> None:
    for name in ("activities", "workflows", "api"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "api/server/errors_of_no_use.py").touch()
    for path, line in VIOLATIONS.values():
        module = tmp_path / path
        module.write_text(f"{module.read_text()}\n{line}\n")
    checked = lint(tmp_path)
    found = {name for name in VIOLATIONS if f"{name} BROKEN" in checked.stdout}
    assert found == set(VIOLATIONS), checked.stdout
    assert checked.returncode == 1


def test_no_import_is_excused() -> None:
    assert "ignore_imports" not in (REPOSITORY / "pyproject.toml").read_text()


def test_every_wall_is_attacked() -> None:
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert {contract["name"] for contract in config["contracts"]} == set(VIOLATIONS)
