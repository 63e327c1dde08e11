"""The files of a COPY, as a client of the API packs them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import uuid
from collections.abc import Mapping
from pathlib import Path

from activities.store.bucket import Bucket
from activities.store.objects import files_name


def tar_of_files(root: Path, names: list[str], target: Path) -> str:
    """Write a tar of files below `root`, the same for the same files; returns its SHA-256.

    `names` are relative to `root`. Owners are left out: COPY decides them.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as out:
        for name in sorted(names):
            out.add(root / name, arcname=name, recursive=False, filter=_without_owner)
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_as_e2b(bucket: Bucket, place: Path, contents: Mapping[str, str]) -> str:
    """Upload files as E2B's SDKs pack them, by gzip and with directories; returns the SHA-256."""
    root = place / uuid.uuid4().hex
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        out.add(root, arcname=".")
    sha256 = hashlib.sha256(packed.getvalue()).hexdigest()
    bucket.write_object(files_name(sha256), packed.getvalue())
    return sha256


def uploaded_files(bucket: Bucket, place: Path, contents: Mapping[str, str | bytes]) -> str:
    """Upload files of these names (`__` is a slash) and contents; returns their tar's SHA-256."""
    root = place / uuid.uuid4().hex
    names = []
    for name, content in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        names.append(str(path.relative_to(root)))
    sha256 = tar_of_files(root, names, place / "files.tar")
    bucket.write_object(files_name(sha256), (place / "files.tar").read_bytes())
    return sha256


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
