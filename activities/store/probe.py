"""Seeing whether the bucket can be written to."""

from __future__ import annotations

from collections.abc import Iterator

from activities.disk.leftovers import Leftover
from activities.store.bucket import Bucket
from activities.store.objects import PROBES, ObjectKind, probe_name


def probe_bucket(bucket: Bucket) -> None:
    """Write an object and delete it. Raises StorageUnavailableError and StorageDeniedError."""
    written = bucket.write_object(probe_name(), b"x")
    bucket.delete_object(written.name, written.generation)


def leftover_probes(bucket: Bucket) -> Iterator[Leftover]:
    """Yield what was written by whoever was killed before the deletion."""
    yield from bucket.leftovers(ObjectKind.PROBE, prefix=PROBES)
