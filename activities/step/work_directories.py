"""Where a step works before it has something to keep: `<data>/work/<build_id>/<what>.<lease>.<n>`.

The lease number in a name is what the clean-up and the sweep go by.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from activities.contract.scope import BuildScope

WORK = "work"


def work_of(data_dir: Path, build_id: str) -> Path:
    """Return the directory of all that a build works on."""
    return data_dir / WORK / build_id


def work_directory(data_dir: Path, scope: BuildScope, what: str, which: str) -> Path:
    """Name one directory of a build; `which` tells attempts or contents apart."""
    return work_of(data_dir, scope.build_id) / f"{what}.{scope.lease.number}.{which}"


def remove_work_directory(directory: Path) -> None:
    """Remove it, and its build's when that was the last."""
    shutil.rmtree(directory, ignore_errors=True)
    remove_if_empty(directory.parent)


def remove_if_empty(directory: Path) -> None:
    """Remove a directory unless something is in it."""
    with contextlib.suppress(OSError):
        directory.rmdir()


@contextmanager
def working_in(data_dir: Path, scope: BuildScope, what: str, which: str) -> Iterator[Path]:
    """Have such a directory for the length of a block."""
    directory = work_directory(data_dir, scope, what, which)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        remove_work_directory(directory)
