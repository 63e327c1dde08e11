"""The files that COPY steps take: tars in the bucket, named by their tenant and SHA-256."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import (
    FilesMissingError,
    FilesTooLargeError,
    StorageCorruptionError,
)
from activities.contract.units import MIB
from activities.disk.leftovers import Leftover
from activities.store.bucket import Bucket, Crc32c
from activities.store.objects import FILES, ObjectKind, files_name

KEPT_SECONDS = 30 * 24 * 3600.0
"""So long after its upload a tar stays in the bucket."""
RANGE_BYTES = 8 * MIB


def fetch_files(
    bucket: Bucket,
    sha256: str,
    target: Path,
    check: Callable[[], None],
    *,
    tenant: str,
    most_bytes: int,
) -> None:
    """Download a tenant's tar of at most `most_bytes` and check it. Blocking.

    One that is not what its name says is removed, so that the right one can be uploaded: clients
    put them there. Raises FilesMissingError, FilesTooLargeError, StorageCorruptionError.
    """
    name = files_name(sha256, tenant)
    stored = bucket.stat_object(name)
    if stored is None:
        raise FilesMissingError(f"there is no {name} in bucket {bucket.name}")
    if stored.size_bytes > most_bytes:
        raise FilesTooLargeError(
            f"{stored.name} has {stored.size_bytes} bytes; at most {most_bytes} are taken"
        )
    digest, checksum = hashlib.sha256(), Crc32c()
    with target.open("wb") as file:
        for start in range(0, stored.size_bytes, RANGE_BYTES):
            check()
            length = min(RANGE_BYTES, stored.size_bytes - start)
            data = bucket.read_range(stored, start, length)
            digest.update(data)
            checksum.update(data)
            file.write(data)
    if checksum.value() != stored.crc32c:
        raise StorageCorruptionError(f"{stored.name} did not arrive as it is stored")
    if digest.hexdigest() != sha256:
        bucket.delete_object(stored.name, stored.generation)
        raise FilesMissingError(f"{stored.name} was not what its name says, and has been removed")


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


def begin_files_upload(bucket: Bucket, sha256: str, tenant: str) -> FilesUpload:
    """Return the address for one PUT of a tenant's tar. Blocking.

    A tar that the sweep would take before long is to be uploaded again, which keeps it. There is an
    address in any case: a client may want to send it again.
    """
    generation, is_present, name = 0, False, files_name(sha256, tenant)
    for stored, written in bucket.list_dated(prefix=name):
        is_present = time.time() - written < KEPT_SECONDS / 2
        generation = stored.generation
    url = bucket.begin_upload(name, if_generation_match=generation)
    return FilesUpload(url, is_present)
