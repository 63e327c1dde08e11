"""Where a step works before it has something to keep: `<data>/work/<build_id>/<what>.<lease>.<n>`.

The lease number in a name is what the clean-up and the sweep go by.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from activities.contract.scope import BuildScope
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, disk_bytes, entries, made_at
from activities.disk.mounts import mounts_under, unmount


def work_directory(data_dir: DataDir, scope: BuildScope, what: str, which: str) -> Path:
    """Name one directory of a build; `which` tells attempts or contents apart."""
    return data_dir.work_of(scope.build_id) / f"{what}.{scope.lease.number}.{which}"


def lease_of_work_directory(directory: Path) -> int | None:
    """Return the lease number in a name that `work_directory` has made; None for another name."""
    parts = directory.name.split(".")
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else None


def remove_work_directory(directory: Path) -> None:
    """Remove it, and its build's when that was the last."""
    shutil.rmtree(directory, ignore_errors=True)
    remove_if_empty(directory.parent)


def remove_if_empty(directory: Path) -> None:
    """Remove a directory unless something is in it."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def leftover_work(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the work directories of this host."""
    for build in entries(data_dir.work):
        if not entries(build):
            remove = partial(remove_if_empty, build)
            yield Leftover("work directory", build.name, remove, made_at=made_at(build))
        for path in entries(build):
            yield Leftover(
                "work directory",
                f"{build.name}/{path.name}",
                partial(_unmount_and_remove, path),
                build.name,
                lease_of_work_directory(path) or 0,
                made_at(path),
                disk_bytes(path),
            )


@contextmanager
def working_in(data_dir: DataDir, scope: BuildScope, what: str, which: str) -> Iterator[Path]:
    """Have such a directory for the length of a block."""
    directory = work_directory(data_dir, scope, what, which)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        remove_work_directory(directory)


def _unmount_and_remove(directory: Path) -> None:
    for point in mounts_under(directory):
        unmount(point)
    remove_work_directory(directory)
