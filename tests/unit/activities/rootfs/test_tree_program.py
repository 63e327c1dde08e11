from __future__ import annotations

import subprocess
import sys

import pytest

from activities.rootfs.tree_children import FILLS, LOOKS, SOURCE, Program

HEAVY = {"pydantic", "temporalio", "google", "asyncio"}


@pytest.mark.parametrize(
    ("program", "heavy"),
    [(LOOKS, HEAVY), (FILLS, {*HEAVY, "dataclasses", "inspect", "hashlib", "subprocess"})],
)
def test_the_programs_for_trees_begin_without_what_takes_long_to_import(
    program: Program, heavy: set[str]
) -> None:
    """Each begins twice in a build, which was as long as copying a small image."""
    told = subprocess.run(
        [sys.executable, "-S", "-B", "-c", f"import sys, {program.module}; print(*sys.modules)"],
        cwd=SOURCE,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert not heavy.intersection(told)
