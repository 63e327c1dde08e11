"""The files of a COPY, as a client of the API packs them."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path


def tar_of_files(root: Path, names: list[str], target: Path) -> str:
    """Write a tar of files below `root`, the same for the same files; returns its SHA-256.

    `names` are relative to `root`. Owners are left out: COPY decides them.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as out:
        for name in sorted(names):
            out.add(root / name, arcname=name, recursive=False, filter=_without_owner)
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
