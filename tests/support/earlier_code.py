"""The product as it was at an earlier commit, in a worktree of its own, to be upgraded from."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from devstack.environment import REPOSITORY

UPGRADE_FROM = REPOSITORY / "tests" / "upgrade-from"


@dataclass(frozen=True)
class EarlierCode:
    """A worktree with code that runs on this environment's packages."""

    directory: Path

    @property
    def program(self) -> list[str]:
        """What runs it in the place of `template-manager`, with `variables`."""
        project = tomllib.loads((self.directory / "pyproject.toml").read_text())["project"]
        module = str(project["scripts"]["template-manager"]).partition(":")[0]
        return [sys.executable, "-P", "-m", module]  # -P: not what lies where it is started

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which it is found before the present code."""
        return {"PYTHONPATH": str(self.directory)}


def upgrade_from() -> str:
    """Return the commit from which an upgrade must work."""
    lines = UPGRADE_FROM.read_text().splitlines()
    [commit] = [line for line in lines if line and not line.startswith("#")]
    return commit


@contextmanager
def earlier_code(commit: str) -> Iterator[EarlierCode]:
    """Have the code of a commit for the length of a block.

    In a clone without it the test fails in CI (`CI=true`), and is skipped loudly elsewhere.
    """
    if _git("cat-file", "-e", f"{commit}^{{commit}}", check=False) != 0:
        _say_that_it_is_missing(commit)
    with tempfile.TemporaryDirectory(prefix="template-manager-upgrade-") as place:
        directory = Path(place) / "code"
        _git("worktree", "add", "--quiet", "--detach", str(directory), commit)
        try:
            yield EarlierCode(directory)
        finally:
            _git("worktree", "remove", "--force", str(directory))


def code_of(pid: int) -> Path:
    """Return where a process has the product's code from, by asking in its own environment."""
    asked = subprocess.run(
        [sys.executable, "-P", "-c", "import activities; print(activities.__file__)"],
        env=psutil.Process(pid).environ(),
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(asked.stdout.strip()).parents[1]


def _say_that_it_is_missing(commit: str) -> NoReturn:
    told = (
        f"NO UPGRADE IS TESTED: commit {commit} (see tests/{UPGRADE_FROM.name}) is not in this "
        f"clone. Get it by: git fetch --unshallow, or: git fetch origin {commit}"
    )
    if os.environ.get("CI") == "true":
        pytest.fail(told)
    warnings.warn(told, stacklevel=2)
    pytest.skip(told)


def _git(*arguments: str, check: bool = True) -> int:
    # Whatever hooks somebody has: this worktree is nobody's workplace.
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=check).returncode
