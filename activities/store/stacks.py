"""Where in the bucket the bytes of an artifact lie: in its own data, and in those of its layers."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from activities.contract.errors import TemplateDamagedError
from activities.contract.results import StoredObject, UploadedArtifact
from activities.contract.units import MIB
from activities.store.bucket import Bucket
from activities.store.headers import Extent, Header, HeaderError, parse_header

RANGE_BYTES = 8 * MIB
# To read so much that is not wanted is quicker than one request more.
GAP_BYTES = MIB // 4


@dataclass(frozen=True)
class StoredRange:
    """A range of an object that one request fetches, and where its bytes belong."""

    stored: StoredObject
    start: int
    length: int
    extents: tuple[Extent, ...]
    """What of it is wanted; each within the range."""


def read_header(bucket: Bucket, stored: StoredObject) -> Header:
    """Return a header in the bucket. Raises TemplateDamagedError when it is none."""
    try:
        return parse_header(bucket.read_range(stored, 0, stored.size_bytes))
    except HeaderError as error:
        raise TemplateDamagedError(f"{stored.name} is not a header: {error}") from error


def stored_ranges(bucket: Bucket, artifact: UploadedArtifact) -> list[StoredRange]:
    """Return all that is to be fetched to have an artifact's file again; the rest are zeros.

    Raises TemplateDamagedError when its header leads to what the artifact has not.
    """
    of_build: defaultdict[uuid.UUID | None, list[Extent]] = defaultdict(list)
    for extent in _extents(bucket, artifact):
        of_build[extent.build_id].append(extent)
    objects: dict[uuid.UUID | None, StoredObject] = {
        uuid.UUID(layer.layer_id): layer.objects["data"] for layer in artifact.layers
    }
    objects[None] = artifact.objects["data"]
    if unknown := of_build.keys() - objects.keys():
        raise TemplateDamagedError(
            f"the header of {artifact.name} names blocks of other builds: "
            f"{', '.join(map(str, unknown))}"
        )
    return [
        found
        for build_id, extents in of_build.items()
        for found in _ranges(objects[build_id], extents)
    ]


def _extents(bucket: Bucket, artifact: UploadedArtifact) -> list[Extent]:
    """Return what of a file is stored somewhere."""
    stored = artifact.objects.get("header")
    if stored is None:
        return [Extent(0, artifact.size_bytes, 0)] if artifact.size_bytes else []
    header = read_header(bucket, stored)
    if header.size != artifact.size_bytes:
        raise TemplateDamagedError(
            f"{stored.name} is of {header.size} bytes, not of {artifact.size_bytes}"
        )
    return [extent for extent in header.extents if extent.storage_offset is not None]


def _ranges(stored: StoredObject, extents: Sequence[Extent]) -> Iterator[StoredRange]:
    """Yield ranges of one object, none longer than RANGE_BYTES, in which all extents lie."""
    # Before it is cut: a header that lies would give pieces without an end.
    if any(_where(extent) + extent.length > stored.size_bytes for extent in extents):
        raise TemplateDamagedError(f"{stored.name} ends before a block that is said to be in it")
    start = end = 0
    wanted: list[Extent] = []
    pieces = (piece for extent in extents for piece in _cut(extent))
    for piece in sorted(pieces, key=_where):
        begin = _where(piece)
        if wanted and (begin > end + GAP_BYTES or begin + piece.length > start + RANGE_BYTES):
            yield StoredRange(stored, start, end - start, tuple(wanted))
            wanted = []
        if not wanted:
            start = end = begin
        wanted.append(piece)
        end = max(end, begin + piece.length)
    if wanted:
        yield StoredRange(stored, start, end - start, tuple(wanted))


def _cut(extent: Extent) -> Iterator[Extent]:
    for begin in range(extent.offset, extent.offset + extent.length, RANGE_BYTES):
        yield extent.part(begin, begin + RANGE_BYTES)


def _where(extent: Extent) -> int:
    assert extent.storage_offset is not None
    return extent.storage_offset
