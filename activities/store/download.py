"""Getting a template back out of the bucket, byte for byte."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from activities.contract.errors import (
    HostDiskFullError,
    StorageCorruptionError,
    TargetUnusableError,
    TemplateDamagedError,
    TemplateNotFoundError,
)
from activities.contract.names import ArtifactName
from activities.contract.results import UploadedArtifact
from activities.contract.units import MIB
from activities.disk.room import NO_ROOM
from activities.disk.sparse_files import sha256_of, sync_directory
from activities.store.bucket import Bucket
from activities.store.headers import Extent, HeaderError, parse_header
from activities.store.metadata import TemplateMetadata, read_metadata, wrong_objects
from activities.store.objects import METADATA

RANGE_BYTES = 8 * MIB
WORKERS = 4

ProgressCallback = Callable[[str, int, int], None]
"""Called with an artifact's name, the bytes that have come and their total."""


def pull_template(
    bucket: Bucket, build_id: str, directory: Path, progress: ProgressCallback
) -> TemplateMetadata:
    """Write `rootfs.ext4`, `memfile`, `snapfile` and `metadata.json` of a template. Blocking.

    All appear by rename when all are whole and have the right SHA-256, `metadata.json` last; else
    what was there stays as it was. Holes stay holes. Raises TemplateNotFoundError,
    TemplateDamagedError, StorageCorruptionError and StorageUnavailableError; TargetUnusableError
    and HostDiskFullError, whenever that can be known before anything is fetched.
    """
    metadata = read_metadata(bucket, build_id)
    if metadata is None:
        raise TemplateNotFoundError(f"there is no template {build_id} in bucket {bucket.name}")
    if wrong := wrong_objects(bucket, metadata):
        raise TemplateDamagedError(f"template {build_id} is damaged: {', '.join(wrong)}")
    with _written_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _require_room(directory, metadata.artifacts.values())
        with contextlib.ExitStack() as stack:
            parts = {
                name: stack.enter_context(_part(directory / name))
                for name in (*ArtifactName, METADATA)
            }
            for name in ArtifactName:
                _fetch(bucket, metadata.artifacts[name], parts[name], progress)
            parts[METADATA].write_text(metadata.to_json())
            _move_in(directory, parts)
    return metadata


def _move_in(directory: Path, parts: Mapping[str, Path]) -> None:
    for name in parts:
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))
    (directory / METADATA).unlink(missing_ok=True)  # of another template, if any
    for name, part in parts.items():
        part.replace(directory / name)
    sync_directory(directory)


def _require_room(directory: Path, artifacts: Iterable[UploadedArtifact]) -> None:
    needed = sum(artifact.objects["data"].size_bytes for artifact in artifacts)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise _disk_full(
            directory, f"{needed / MIB:.0f} MiB are needed, {free / MIB:.0f} MiB are free"
        )


@contextmanager
def _written_to(directory: Path) -> Iterator[None]:
    """Tell what the disk says in words. Raises HostDiskFullError and TargetUnusableError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _disk_full(directory, os.strerror(error.errno)) from error
        where = error.filename or directory
        raise TargetUnusableError(f"cannot write to {where}: {error.strerror or error}") from error


def _disk_full(directory: Path, why: str) -> HostDiskFullError:
    return HostDiskFullError(
        f"the disk of {directory} has no room for the template: {why}",
        hint="Free space there, or name a directory on another disk.",
    )


def pull_rootfs(
    bucket: Bucket, metadata: TemplateMetadata, target: Path, progress: ProgressCallback
) -> None:
    """Write a template's `rootfs.ext4` alone to `target`. Blocking; raises as `pull_template`.

    What `progress` raises ends it.
    """
    artifact = metadata.artifacts[ArtifactName.ROOTFS]
    with _written_to(target.parent), _part(target) as temporary:
        _require_room(target.parent, [artifact])
        _fetch(bucket, artifact, temporary, progress)
        temporary.replace(target)


def _fetch(
    bucket: Bucket, artifact: UploadedArtifact, target: Path, progress: ProgressCallback
) -> None:
    extents = _stored_extents(bucket, artifact)
    with target.open("wb") as file:
        file.truncate(artifact.size_bytes)
        _fill(bucket, artifact, extents, file.fileno(), progress)
        os.fsync(file.fileno())
    size_bytes = artifact.objects["data"].size_bytes
    sha256 = sha256_of(target, lambda: progress(artifact.name, size_bytes, size_bytes))
    if sha256 != artifact.sha256:
        raise StorageCorruptionError(f"{artifact.name} did not arrive as it was built")


@contextmanager
def _part(target: Path) -> Iterator[Path]:
    """Yield a name beside `target` to write to; what is still there at the end is removed."""
    temporary = target.with_name(f".{target.name}.part")
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # it is in the way of what has gone wrong already
            temporary.unlink(missing_ok=True)


def _fill(
    bucket: Bucket,
    artifact: UploadedArtifact,
    extents: list[Extent],
    descriptor: int,
    progress: ProgressCallback,
) -> None:
    data = artifact.objects["data"]
    starts = [extent.storage_offset or 0 for extent in extents]

    def fetch(start: int) -> int:
        content = bucket.read_range(data, start, min(RANGE_BYTES, data.size_bytes - start))
        for extent in extents[bisect_right(starts, start) - 1 :]:
            if not _write_overlap(descriptor, extent, start, content):
                break
        return len(content)

    done = 0
    ranges = iter(range(0, data.size_bytes, RANGE_BYTES))
    progress(artifact.name, 0, data.size_bytes)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
        while batch := list(islice(ranges, WORKERS * 2)):  # bounded: not all futures at once
            for size_bytes in pool.map(fetch, batch):
                done += size_bytes
                progress(artifact.name, done, data.size_bytes)


def _write_overlap(descriptor: int, extent: Extent, start: int, content: bytes) -> bool:
    """Write what of `content` (stored from `start` on) is of this extent; False if nothing is."""
    stored = extent.storage_offset or 0
    begin, end = max(start, stored), min(start + len(content), stored + extent.length)
    if begin >= end:
        return False
    piece = memoryview(content)[begin - start : end - start]
    position = extent.offset + begin - stored
    while piece:
        written = os.pwrite(descriptor, piece, position)
        piece, position = piece[written:], position + written
    return True


def _stored_extents(bucket: Bucket, artifact: UploadedArtifact) -> list[Extent]:
    """Return where the stored bytes belong, in the order in which they are stored."""
    header = artifact.objects.get("header")
    if header is None:
        return [Extent(0, artifact.size_bytes, 0)] if artifact.size_bytes else []
    try:
        parsed = parse_header(bucket.read_range(header, 0, header.size_bytes))
    except HeaderError as error:
        raise TemplateDamagedError(f"{header.name} is not a header: {error}") from error
    stored = [extent for extent in parsed.extents if extent.storage_offset is not None]
    if any(extent.build_id is not None for extent in stored):
        raise TemplateDamagedError(f"{header.name} names blocks of other builds")
    return sorted(stored, key=lambda extent: extent.storage_offset or 0)
