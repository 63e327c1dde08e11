"""The files that COPY steps take: tars in the bucket, named by their tenant and SHA-256.

A client that knows its files by a key of its own, within a scope, sends them to an object of that
name. The first request that takes them has its content put under its SHA-256, and leaves an empty
object there which says that: steps know files by nothing but the bytes that are really there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import (
    FilesMissingError,
    FilesTooLargeError,
    PreconditionFailedError,
    StorageCorruptionError,
    StorageDeniedError,
    StorageUnavailableError,
)
from activities.contract.results import StoredObject
from activities.contract.units import MIB
from activities.disk.leftovers import Leftover
from activities.disk.room import Room
from activities.store.bucket import Bucket, Crc32c
from activities.store.objects import (
    FILES,
    ObjectKind,
    SentFiles,
    files_name,
    sent_files_name,
)

KEPT_SECONDS = 30 * 24 * 3600.0
"""So long after its upload a tar stays in the bucket."""
RANGE_BYTES = 8 * MIB
SHA256_METADATA = "sha256"
"""In the custom metadata of a sent object whose content lies under that SHA-256."""
TRIES = 3


def fetch_files(
    bucket: Bucket,
    sha256: str,
    target: Path,
    check: Callable[[], None],
    *,
    tenant: str,
    most_bytes: int,
    room: Room,
) -> None:
    """Download a tenant's tar of at most `most_bytes`, where there is room, and check it. Blocking.

    One that is not what its name says is removed, so that the right one can be uploaded: clients
    put them there. Raises FilesMissingError, FilesTooLargeError, HostDiskFullError,
    StorageCorruptionError.
    """
    name = files_name(sha256, tenant)
    stored = bucket.stat_object(name)
    if stored is None:
        raise FilesMissingError(f"there is no {name} in bucket {bucket.name}")
    if stored.size_bytes > most_bytes:
        raise FilesTooLargeError(
            f"{stored.name} has {stored.size_bytes} bytes; at most {most_bytes} are taken"
        )
    what = f"fetch {stored.name}"
    room.require(what, stored.size_bytes)

    def go_on() -> None:
        check()
        room.require(what)  # others write there, too

    with target.open("wb") as file:
        read_sha256 = _sha256_of(bucket, stored, file.write, go_on)
    if read_sha256 != sha256:
        bucket.delete_object(stored.name, stored.generation)
        raise FilesMissingError(f"{stored.name} was not what its name says, and has been removed")


def _sha256_of(
    bucket: Bucket,
    stored: StoredObject,
    take: Callable[[bytes], object],
    check: Callable[[], None],
) -> str:
    """Read an object to its end and return its SHA-256. Raises StorageCorruptionError."""
    digest, checksum = hashlib.sha256(), Crc32c()
    for start in range(0, stored.size_bytes, RANGE_BYTES):
        check()
        data = bucket.read_range(stored, start, min(RANGE_BYTES, stored.size_bytes - start))
        digest.update(data)
        checksum.update(data)
        take(data)
    if checksum.value() != stored.crc32c:
        raise StorageCorruptionError(f"{stored.name} did not arrive as it is stored")
    return digest.hexdigest()


@dataclass(frozen=True)
class FilesContent:
    """The tar that a client's name for it stands for."""

    size_bytes: int
    sha256: str
    """'' when it is larger than what is taken: then nobody has read it."""


def content_of(
    bucket: Bucket,
    sent: SentFiles,
    tenant: str,
    *,
    most_bytes: int,
    check: Callable[[], None] = lambda: None,
) -> FilesContent | None:
    """Return the tar that a tenant has sent, None when there is none. Blocking.

    One that was sent within a scope is read the first time, if it has at most `most_bytes`;
    `check` is called often meanwhile, and ends it by raising.

    Raises StorageUnavailableError, StorageDeniedError and StorageCorruptionError.
    """
    for _ in range(TRIES):
        found = _sent(bucket, sent, tenant)
        if found is None or not found.is_raw or found.size_bytes > most_bytes:
            break
        try:
            _put_under_its_sha256(bucket, found.sent, tenant, check)
        except PreconditionFailedError:  # sent again, or read by another call: look again
            continue
    else:
        raise StorageUnavailableError("files of a COPY are being sent again and again")
    if found is None:
        return None
    return FilesContent(found.size_bytes, "" if found.is_raw else found.sha256)


def _put_under_its_sha256(
    bucket: Bucket, sent: StoredObject, tenant: str, check: Callable[[], None]
) -> None:
    try:
        sha256 = _sha256_of(bucket, sent, lambda _: None, check)
    except (StorageCorruptionError, StorageDeniedError):
        now = bucket.stat_object(sent.name)
        if now is not None and now.generation == sent.generation:
            raise
        raise PreconditionFailedError(f"{sent.name} was replaced while it was read") from None
    name = files_name(sha256, tenant)
    there = bucket.stat_object(name)
    if there is None or not _is_young(bucket, name):
        # In the place of one that the sweep would take before long.
        bucket.copy(sent, name, if_generation_match=there.generation if there else 0)
    said = {SHA256_METADATA: sha256}
    bucket.write_object(sent.name, b"", if_generation_match=sent.generation, metadata=said)


@dataclass(frozen=True)
class _Sent:
    """What is there under a client's name."""

    sent: StoredObject
    content: StoredObject
    sha256: str
    """What its name, or the object of that name, says."""

    @property
    def is_raw(self) -> bool:
        """Whether nobody has looked yet what it is."""
        return not self.sha256

    @property
    def size_bytes(self) -> int:
        return self.content.size_bytes


def _sent(bucket: Bucket, sent: SentFiles, tenant: str) -> _Sent | None:
    for stored, metadata in bucket.list_with_metadata(sent_files_name(sent, tenant)):
        if not sent.scope:
            return _Sent(stored, stored, sent.hash)
        sha256 = metadata.get(SHA256_METADATA, "")
        content = bucket.stat_object(files_name(sha256, tenant)) if sha256 else stored
        return _Sent(stored, content, sha256) if content else None
    return None


def _is_young(bucket: Bucket, name: str) -> bool:
    """Whether the sweep leaves an object there for long enough to build with it."""
    dated = bucket.list_dated(prefix=name)
    return any(time.time() - written < KEPT_SECONDS / 2 for _, written in dated)


def leftover_files(bucket: Bucket, most_bytes: int) -> Iterator[Leftover]:
    """Yield the tars that have been kept long enough: they are removed whatever they were for.

    Those of more than `most_bytes` at once: no build takes them, and whoever has an address for an
    upload can send as much as they like.

    Raises StorageUnavailableError and StorageDeniedError.
    """
    for tar in bucket.leftovers(ObjectKind.FILES, prefix=FILES):
        if time.time() - tar.made_at > KEPT_SECONDS or tar.bytes > most_bytes:
            yield tar


@dataclass(frozen=True)
class FilesUpload:
    """Where to PUT a tar, and whether it is there for long enough without that."""

    url: str
    is_present: bool


def begin_files_upload(bucket: Bucket, sent: SentFiles, tenant: str) -> FilesUpload:
    """Return the address for one PUT of a tenant's tar. Blocking.

    A tar that the sweep would take before long is to be uploaded again, which keeps it. There is an
    address in any case: a client may want to send it again.
    """
    name = sent_files_name(sent, tenant)
    there = bucket.stat_object(name)
    found = _sent(bucket, sent, tenant)
    is_present = found is not None and _is_young(bucket, found.content.name)
    url = bucket.begin_upload(name, if_generation_match=there.generation if there else 0)
    return FilesUpload(url, is_present)
