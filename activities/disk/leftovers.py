"""What may be left over from something that has ended. Each room finds its own; the sweep decides.

A room lists everything of a kind, also what a live build is using: it says whose it is, and the
sweep asks whether that build still owns it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from activities.contract.results import SweptItem


@dataclass(frozen=True)
class Leftover:
    """Something that may be nobody's any more, and how to remove it."""

    kind: str
    name: str
    remove: Callable[[], object] = field(repr=False)
    build_id: str = ""
    """Whose it is; '' for what no build owns, which goes as soon as it is not young."""
    number: int | None = None
    """The lease number it was made under; None for what belongs to the build as such."""
    made_at: float = 0.0
    """Wall clock, seconds; 0 for what goes whatever its age."""
    bytes: int = 0

    def item(self, error: str = "") -> SweptItem:
        """Return what a report says of it."""
        return SweptItem(
            kind=self.kind, name=self.name, build_id=self.build_id, bytes=self.bytes, error=error
        )


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory, which need not exist, in order of the names."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def made_at(path: Path) -> float:
    """Return when it was made or last changed, in wall clock seconds; now, if it has just gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def renamed_at(path: Path) -> float:
    """Return when it got its name, or was changed since, in wall clock seconds; now, if gone."""
    try:
        return path.lstat().st_ctime
    except OSError:
        return time.time()


def disk_bytes(path: Path) -> int:
    """Return what a file, or a directory with all that is in it, takes on the disk."""
    total = 0
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            total += entry.lstat().st_blocks * 512
        except OSError:  # it has just gone
            continue
    return total
