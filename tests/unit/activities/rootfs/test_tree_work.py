from __future__ import annotations

import subprocess
import sys

from activities.rootfs.tree_children import SOURCE

TOLD = "import sys, activities.rootfs.tree_work; print(*sys.modules)"


def test_the_program_that_looks_at_trees_begins_without_what_takes_long_to_import() -> None:
    """It begins twice in each build, which was as long as copying a small image."""
    told = subprocess.run(
        [sys.executable, "-B", "-c", TOLD],
        cwd=SOURCE,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert not {"pydantic", "temporalio", "google", "asyncio"}.intersection(told)
