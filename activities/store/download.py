"""Getting a template back out of the bucket, byte for byte."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from activities.contract.results import StoredObject, UploadedArtifact
from activities.contract.units import MIB
from activities.disk.room import NO_ROOM
from activities.disk.sparse_files import copy_extent, sha256_of, sync_directory
from activities.store.bucket import Bucket
from activities.store.headers import Extent
from activities.store.metadata import TemplateMetadata, read_metadata, wrong_objects
from activities.store.objects import METADATA
from activities.store.stacks import StoredRange, stored_ranges

WORKERS = 4

ProgressCallback = Callable[[str, int, int], None]
"""Called with an artifact's name, the bytes that have come and their total."""


@dataclass(frozen=True)
class DiskHere:
    """A disk on this host that has the bytes of some layers, each block in its place."""

    path: Path
    layers: frozenset[StoredObject]
    """The data of these."""


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
        ranges = {name: stored_ranges(bucket, metadata.artifacts[name]) for name in ArtifactName}
        _require_room(directory, [wanted for some in ranges.values() for wanted in some])
        with contextlib.ExitStack() as stack:
            parts = {
                name: stack.enter_context(_part(directory / name))
                for name in (*ArtifactName, METADATA)
            }
            for name in ArtifactName:
                _fetch(bucket, metadata.artifacts[name], ranges[name], parts[name], progress)
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


def _require_room(directory: Path, ranges: Sequence[StoredRange]) -> None:
    needed = sum(extent.length for wanted in ranges for extent in wanted.extents)
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


def pull_artifact(
    bucket: Bucket,
    artifact: UploadedArtifact,
    target: Path,
    progress: ProgressCallback,
    here: DiskHere | None = None,
) -> None:
    """Write one file of a template, or the disk of a layer, to `target`.

    What a disk that is here has of it is copied, not fetched; unless the whole is not what it
    should be then. Blocking; raises as `pull_template`. What `progress` raises ends it.
    """
    with _written_to(target.parent), _part(target) as temporary:
        ranges = stored_ranges(bucket, artifact)
        _require_room(target.parent, ranges)
        try:
            _fetch(bucket, artifact, ranges, temporary, progress, here=here)
        except StorageCorruptionError:
            if here is None:
                raise
            _fetch(bucket, artifact, ranges, temporary, progress)
        temporary.replace(target)


def _fetch(
    bucket: Bucket,
    artifact: UploadedArtifact,
    ranges: Sequence[StoredRange],
    target: Path,
    progress: ProgressCallback,
    *,
    here: DiskHere | None = None,
) -> None:
    has = here.layers if here else ()
    to_copy = [extent for each in ranges if each.stored in has for extent in each.extents]
    ranges = [each for each in ranges if each.stored not in has]
    name, size_bytes = artifact.name, _bytes_of(ranges)
    with target.open("wb") as file:
        file.truncate(artifact.size_bytes)
        if here is not None:
            _copy(here.path, to_copy, file.fileno(), lambda: progress(name, 0, size_bytes))
        _fill(bucket, name, ranges, file.fileno(), progress)
        os.fsync(file.fileno())
    sha256 = sha256_of(target, lambda: progress(name, size_bytes, size_bytes))
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
    name: str,
    ranges: Sequence[StoredRange],
    descriptor: int,
    progress: ProgressCallback,
) -> None:
    def fetch(wanted: StoredRange) -> int:
        content = memoryview(bucket.read_range(wanted.stored, wanted.start, wanted.length))
        for extent in wanted.extents:
            begin = (extent.storage_offset or 0) - wanted.start
            _write(descriptor, content[begin : begin + extent.length], extent.offset)
        return wanted.length

    done, total = 0, _bytes_of(ranges)
    left = iter(ranges)
    progress(name, 0, total)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
        while batch := list(islice(left, WORKERS * 2)):  # bounded: not all futures at once
            for size_bytes in pool.map(fetch, batch):
                done += size_bytes
                progress(name, done, total)


def _copy(
    source: Path, extents: Sequence[Extent], descriptor: int, check: Callable[[], None]
) -> None:
    """Copy blocks to the same places; what the source does not have any more stays zeros."""
    with contextlib.suppress(OSError), source.open("rb") as file:
        for extent in extents:
            for _ in copy_extent(file.fileno(), descriptor, extent.offset, extent.length, check):
                pass


def _bytes_of(ranges: Sequence[StoredRange]) -> int:
    return sum(wanted.length for wanted in ranges)


def _write(descriptor: int, piece: memoryview, position: int) -> None:
    while piece:
        written = os.pwrite(descriptor, piece, position)
        piece, position = piece[written:], position + written
