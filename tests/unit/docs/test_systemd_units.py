"""The units in docs/systemd, as systemd itself reads them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from api.cli.main import app

UNITS = sorted((Path(__file__).parents[3] / "docs" / "systemd").glob("*.service"))


class _Unit(configparser.RawConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit(path: Path) -> _Unit:
    parsed = _Unit(strict=False)
    parsed.read(path)
    return parsed


def test_each_process_has_one() -> None:
    assert {path.stem for path in UNITS} == {
        "template-manager-api",
        "template-manager-host",
        "template-manager-rest",
        "template-manager-worker",
    }


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd: `make setup-tests` installs it"
)
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_understands_it(path: Path, tmp_path: Path) -> None:
    # Its own paths are not on this machine.
    text = path.read_text().replace("/opt/template-manager/.venv/bin/template-manager", "/bin/true")
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if path.name in line]
    assert [line for line in ours if "docker.service" not in line] == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_it_runs_a_command_that_exists(path: Path) -> None:
    commands = {name for name, _ in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined] # it is a group
    words = unit(path)["Service"]["ExecStart"].split()
    assert words[0].endswith("/template-manager")
    assert words[1] in commands
    assert path.stem.endswith(words[1])


def test_a_hosts_vms_outlive_its_worker() -> None:
    host = next(path for path in UNITS if path.stem.endswith("host"))
    assert unit(host)["Service"]["KillMode"] == "process"
