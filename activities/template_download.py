"""Getting a template back out of the bucket, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from activities.bucket import Bucket
from activities.errors import StorageCorruptionError, TemplateNotFoundError
from activities.headers import Extent, parse_header
from activities.metadata import TemplateMetadata, read_metadata
from activities.models import StoredObject, UploadedArtifact
from activities.sparse_files import sha256_of, sync_directory

RANGE_BYTES = 8 * 1024 * 1024
WORKERS = 4

ProgressCallback = Callable[[str, int, int], None]
"""Called with an artifact's name, the bytes that have come and their total."""


def pull_template(
    bucket: Bucket, build_id: str, directory: Path, progress: ProgressCallback
) -> TemplateMetadata:
    """Write `rootfs.ext4`, `memfile`, `snapfile` and `metadata.json` of a template. Blocking.

    Files appear by rename, whole and with the right SHA-256, or not at all; holes stay holes.
    Raises TemplateNotFoundError, StorageCorruptionError and StorageUnavailableError.
    """
    metadata = read_metadata(bucket, build_id)
    if metadata is None:
        raise TemplateNotFoundError(f"there is no template {build_id} in bucket {bucket.name}")
    directory.mkdir(parents=True, exist_ok=True)
    for artifact in metadata.artifacts.values():
        _pull_artifact(bucket, artifact, directory, progress)
    _write_whole(directory / "metadata.json", metadata.model_dump_json(indent=2).encode())
    sync_directory(directory)
    return metadata


def _pull_artifact(
    bucket: Bucket, artifact: UploadedArtifact, directory: Path, progress: ProgressCallback
) -> None:
    target = directory / artifact.name
    temporary = target.with_name(f".{artifact.name}.part")
    try:
        with temporary.open("wb") as file:
            file.truncate(artifact.size_bytes)
            _fill(bucket, artifact, file.fileno(), progress)
            os.fsync(file.fileno())
        if sha256_of(temporary, lambda: None) != artifact.sha256:
            raise StorageCorruptionError(f"{artifact.name} did not arrive as it was built")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(
    bucket: Bucket, artifact: UploadedArtifact, descriptor: int, progress: ProgressCallback
) -> None:
    data = artifact.objects["data"]
    ranges = _ranges(_stored_extents(bucket, artifact))
    done = 0

    def fetch(piece: Extent) -> int:
        assert piece.storage_offset is not None
        content = bucket.read_range(data, piece.storage_offset, piece.length)
        return os.pwrite(descriptor, content, piece.offset)

    progress(artifact.name, 0, data.size_bytes)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="download") as pool:
        while batch := list(islice(ranges, WORKERS * 2)):  # bounded: not all futures at once
            for written in pool.map(fetch, batch):
                done += written
                progress(artifact.name, done, data.size_bytes)


def _stored_extents(bucket: Bucket, artifact: UploadedArtifact) -> list[Extent]:
    header = artifact.objects.get("header")
    if header is None:
        return [Extent(0, artifact.size_bytes, 0)] if artifact.size_bytes else []
    extents = parse_header(_read_whole(bucket, header)).extents
    return [extent for extent in extents if extent.storage_offset is not None]


def _read_whole(bucket: Bucket, stored: StoredObject) -> bytes:
    return bucket.read_range(stored, 0, stored.size_bytes)


def _ranges(extents: list[Extent]) -> Iterator[Extent]:
    for extent in extents:
        assert extent.storage_offset is not None
        for start in range(0, extent.length, RANGE_BYTES):
            length = min(RANGE_BYTES, extent.length - start)
            yield Extent(extent.offset + start, length, extent.storage_offset + start)


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)
