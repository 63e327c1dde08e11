"""The files that COPY steps take: tars in the bucket, and where their entries go in an image."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from activities.contract.errors import ImageStepError


@dataclass(frozen=True)
class CopyInstruction:
    """A COPY whose arguments are known. `uid` and `gid` are of the image; `mode` is octal or ''."""

    source: str
    destination: str
    """Absolute, `/` at the end when it must be a directory."""
    uid: int = 0
    gid: int = 0
    mode: str = ""


def lay_out(
    files: Path,
    copy: CopyInstruction,
    target: Path,
    is_directory: Callable[[str], bool],
    check: Callable[[], None],
) -> int:
    """Write a tar whose entries stand where COPY puts them, as Docker defines it.

    A directory's contents go into the destination; a file becomes it, or goes into it when it is
    a directory, ends with `/` or takes several. `is_directory` tells about a path in the image.
    Returns the number of entries. Raises ImageStepError when nothing fits the source.
    """
    with tarfile.open(files) as source, tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as out:
        members = [(_plain(member.name), member) for member in source.getmembers()]
        by_name = dict(members)
        roots = _matching(copy.source, [name for name, _ in members])
        if not roots:
            raise ImageStepError(f"COPY {copy.source}: no such file")
        directories = {name for name, member in members if member.isdir()}
        into = copy.destination.endswith("/") or len(roots) > 1 or is_directory(copy.destination)
        written = 0
        for name, member in members:
            check()
            place = _place(name, roots, directories, copy.destination, into=into)
            if place is None:
                continue
            # A hard link becomes a file of its own: the other name may not be copied.
            found = by_name[_plain(member.linkname)] if member.islnk() else member
            out.addfile(
                _entry(found, place, copy), source.extractfile(found) if found.isreg() else None
            )
            written += 1
    return written


def _plain(name: str) -> str:
    plain = posixpath.normpath(name).lstrip("/")
    if plain.startswith(".."):
        raise ImageStepError(f"the files of a COPY have an entry outside of them: {name}")
    return "" if plain == "." else plain


def _matching(source: str, names: list[str]) -> list[str]:
    """Return the entries that the source means: itself, everything, or what a glob fits."""
    wanted = _plain(source)
    if wanted == "":
        return [""]
    known = set(names) | {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if wanted in known:
        return [wanted]
    pattern = PurePosixPath(wanted)
    return sorted(
        name
        for name in known
        if name != "."
        and len(PurePosixPath(name).parts) == len(pattern.parts)
        and PurePosixPath(name).match(wanted)
    )


def _place(
    name: str, roots: list[str], directories: set[str], destination: str, *, into: bool
) -> str | None:
    for root in roots:
        inside = root in ("", name) or name.startswith(f"{root}/")
        if not inside or (name == "" and root == ""):
            continue
        if root == "" or root in directories or name != root:
            below = name if root == "" else name[len(root) :].lstrip("/")
            return posixpath.join(destination, below) if below else None
        return posixpath.join(destination, posixpath.basename(name)) if into else destination
    return None


def _entry(member: tarfile.TarInfo, place: str, copy: CopyInstruction) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(place.strip("/"))
    entry.type, entry.mode, entry.linkname = member.type, member.mode, member.linkname
    entry.uid, entry.gid, entry.mtime = copy.uid, copy.gid, member.mtime
    entry.pax_headers = {k: v for k, v in member.pax_headers.items() if k.startswith("SCHILY")}
    entry.size = member.size if member.isreg() else 0
    if copy.mode and not member.issym():
        entry.mode = int(copy.mode, 8)
    return entry
