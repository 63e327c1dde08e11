"""Getting a template back out of the bucket, byte for byte."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
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
from activities.store.metadata import TemplateMetadata, read_metadata, wrong_objects
from activities.store.objects import METADATA
from activities.store.partial_file import PartialFile, partial_file
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
    what was there stays as it was. Holes stay holes. What has come when the user ends it, it dies
    or the bucket is out of reach is kept beside the files: the next pull of the same template to
    the same directory goes on with it. Raises TemplateNotFoundError, TemplateDamagedError,
    StorageCorruptionError and StorageUnavailableError; TargetUnusableError and HostDiskFullError,
    whenever that can be known before anything is fetched.
    """
    metadata = read_metadata(bucket, build_id)
    if metadata is None:
        raise TemplateNotFoundError(
            f"there is no template {build_id} in bucket {bucket.name}",
            hint="Check the bucket, and with template-manager status that the build is completed.",
        )
    if wrong := wrong_objects(bucket, metadata):
        raise TemplateDamagedError(f"template {build_id} is damaged: {', '.join(wrong)}")
    with _written_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        wanted = {name: _Wanted.of(bucket, metadata.artifacts[name]) for name in ArtifactName}
        with contextlib.ExitStack() as stack:
            parts = {
                name: stack.enter_context(wanted[name].part(directory / name))
                for name in ArtifactName
            }
            _require_room(
                directory, [each for name in parts for each in wanted[name].left(parts[name])]
            )
            for name in ArtifactName:
                wanted[name].fetch(parts[name], progress)
            _move_in(directory, {name: parts[name].path for name in parts}, metadata)
    return metadata


def _move_in(directory: Path, parts: Mapping[str, Path], metadata: TemplateMetadata) -> None:
    for name in (*parts, METADATA):
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))
    draft = directory / f".{METADATA}.part"
    draft.unlink(missing_ok=True)  # whatever it is: nothing is written through a link or a pipe
    try:
        with draft.open("x") as file:
            file.write(metadata.to_json())
        (directory / METADATA).unlink(missing_ok=True)  # of another template, if any
        for name, part in parts.items():
            part.replace(directory / name)
        draft.replace(directory / METADATA)
    finally:
        draft.unlink(missing_ok=True)
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
    with _written_to(target.parent):
        wanted = _Wanted.of(bucket, artifact)
        with wanted.part(target) as part:
            _require_room(target.parent, wanted.left(part))
            wanted.fetch(part, progress, here)
            part.path.replace(target)


@dataclass(frozen=True)
class _Wanted:
    """A file, and all that is to be fetched to have it."""

    bucket: Bucket
    artifact: UploadedArtifact
    ranges: tuple[StoredRange, ...]

    @classmethod
    def of(cls, bucket: Bucket, artifact: UploadedArtifact) -> _Wanted:
        """Raises TemplateDamagedError."""
        return cls(bucket, artifact, tuple(stored_ranges(bucket, artifact)))

    def part(self, target: Path) -> AbstractContextManager[PartialFile]:
        """Have what becomes `target`, with what has come of the same file before."""
        told = [
            self.artifact.sha256,
            *((r.stored.name, r.stored.generation, r.start, r.length) for r in self.ranges),
        ]
        what = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        return partial_file(target, what, self.artifact.size_bytes)

    def left(self, part: PartialFile) -> list[StoredRange]:
        """Return what has not come yet."""
        return [wanted for number, wanted in enumerate(self.ranges) if number not in part.done]

    def fetch(
        self, part: PartialFile, progress: ProgressCallback, here: DiskHere | None = None
    ) -> None:
        """Fill the file. Raises StorageCorruptionError when it is not what it should be."""
        if part.done or here is not None:
            self._fill(part, progress, here)
            if self._is_right(part, progress):
                return
            part.start_anew()
        self._fill(part, progress, None)
        if not self._is_right(part, progress):
            raise StorageCorruptionError(f"{self.artifact.name} did not arrive as it was built")

    def _is_right(self, part: PartialFile, progress: ProgressCallback) -> bool:
        total = _bytes_of(self.ranges)
        told = sha256_of(part.path, lambda: progress(self.artifact.name, total, total))
        return told == self.artifact.sha256

    def _fill(self, part: PartialFile, progress: ProgressCallback, here: DiskHere | None) -> None:
        def fetch(number: int) -> int:
            wanted = self.ranges[number]
            content = memoryview(self.bucket.read_range(wanted.stored, wanted.start, wanted.length))
            for extent in wanted.extents:
                begin = (extent.storage_offset or 0) - wanted.start
                _write(part.descriptor, content[begin : begin + extent.length], extent.offset)
            return number

        total = _bytes_of(self.ranges)
        if here is not None:
            self._copy(part, here, lambda: progress(self.artifact.name, 0, total))
        done = _bytes_of([self.ranges[number] for number in part.done])
        left = iter([number for number in range(len(self.ranges)) if number not in part.done])
        progress(self.artifact.name, done, total)
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="download")
        try:
            while batch := list(islice(left, WORKERS * 2)):  # bounded: not all futures at once
                for number in pool.map(fetch, batch):
                    part.came(number)
                    done += self.ranges[number].length
                    progress(self.artifact.name, done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(part.descriptor)

    def _copy(self, part: PartialFile, here: DiskHere, check: Callable[[], None]) -> None:
        """Copy blocks to the same places; what the disk here does not have any more stays zeros."""
        with contextlib.suppress(OSError), here.path.open("rb") as file:
            for number, wanted in enumerate(self.ranges):
                if wanted.stored not in here.layers:
                    continue
                for extent in wanted.extents:
                    begin, length = extent.offset, extent.length
                    for _ in copy_extent(file.fileno(), part.descriptor, begin, length, check):
                        pass
                part.came(number)


def _bytes_of(ranges: Sequence[StoredRange]) -> int:
    return sum(wanted.length for wanted in ranges)


def _write(descriptor: int, piece: memoryview, position: int) -> None:
    while piece:
        written = os.pwrite(descriptor, piece, position)
        piece, position = piece[written:], position + written
