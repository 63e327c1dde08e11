"""The template in the bucket: upload, publish, and undo.

Layout: `<build_id>/rootfs.ext4`, `memfile`, `snapfile`, `rootfs.ext4.header`, `memfile.header`,
`build.log`, and last `metadata.json`; parts of an unfinished upload under `<build_id>/.parts/`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from pathlib import Path

from temporalio import activity

from activities.artifact_upload import PartSender, Scan, compose_tree, scan
from activities.bucket import Bucket, PreconditionFailedError, crc32c_of
from activities.checkpoints import CheckpointStore
from activities.errors import LeaseLostError, StorageCorruptionError, TemplateDamagedError
from activities.headers import Header
from activities.interface import ArtifactActivities, UploadUndoActivities
from activities.lease_objects import LeaseObjects
from activities.leases import LeaseLedger
from activities.metadata import (
    metadata_name,
    metadata_of,
    published_template,
    wrong_objects,
)
from activities.models import (
    BuildScope,
    DiscardedUpload,
    DiscardUploadInput,
    PublishedTemplate,
    PublishTemplateInput,
    Step,
    StoredObject,
    UploadArtifactInput,
    UploadedArtifact,
)
from activities.settings import Settings
from activities.step import RunningStep, running_step

MIB = 1024 * 1024
WITHOUT_HEADER = "snapfile"


def parts_prefix(build_id: str, artifact: str = "") -> str:
    """Return where the parts of an unfinished upload are."""
    return f"{build_id}/.parts/" + (f"{artifact}/" if artifact else "")


class BucketArtifactActivities(ArtifactActivities):
    """Uploads and publishes from this host. See `interface` for the contract."""

    def __init__(
        self,
        settings: Settings,
        bucket: Bucket,
        ledger: LeaseLedger,
        store: CheckpointStore,
        leases: LeaseObjects,
    ) -> None:
        self._settings = settings
        self._bucket = bucket
        self._ledger = ledger
        self._store = store
        self._leases = leases

    @activity.defn(name="upload_artifact")
    async def upload_artifact(self, upload: UploadArtifactInput, /) -> UploadedArtifact:
        """Send an artifact's non-zero blocks, and its header where it has one."""
        data_dir = self._settings.data_dir
        async with running_step(data_dir, self._ledger, upload.scope, Step.UPLOAD) as running:
            return await running.in_thread(self._upload, upload, running)

    @activity.defn(name="publish_template")
    async def publish_template(self, publish: PublishTemplateInput, /) -> PublishedTemplate:
        """Check every object, write `build.log`, and commit by writing `metadata.json`."""
        data_dir = self._settings.data_dir
        async with running_step(data_dir, self._ledger, publish.scope, Step.UPLOAD) as running:
            return await running.in_thread(self._publish, publish, running)

    # ---- Upload

    def _upload(self, upload: UploadArtifactInput, running: RunningStep) -> UploadedArtifact:
        directory = self._store.require(upload.snapshot, upload.scope.build_id)
        path = directory / upload.name
        name = f"{upload.scope.build_id}/{upload.name}"
        existing = self._bucket.stat_object(name)
        found = self._scan(path, upload, running) if existing else None
        if found is None or existing is None or not _is(existing, found):
            found, existing, sent = self._send(path, upload, running, existing)
        else:
            sent = 0
        self._require_unchanged(upload, found)
        objects = {"data": existing}
        if upload.name != WITHOUT_HEADER:
            objects["header"] = self._put_header(upload, found, running)
        running.log.info(_summary(upload.name, found, sent))
        return UploadedArtifact(
            name=upload.name,
            objects=objects,
            size_bytes=found.size_bytes,
            sent_bytes=found.stored_bytes,
            sha256=found.sha256,
        )

    @staticmethod
    def _scan(path: Path, upload: UploadArtifactInput, running: RunningStep) -> Scan:
        running.progress(f"reading {upload.name}")
        dense = upload.name == WITHOUT_HEADER
        return scan(path, upload.block_size_bytes, lambda _: None, running.check, dense=dense)

    def _send(
        self,
        path: Path,
        upload: UploadArtifactInput,
        running: RunningStep,
        outdated: StoredObject | None,
    ) -> tuple[Scan, StoredObject, int]:
        total = upload.snapshot.files[upload.name].allocated_bytes
        done = 0

        def sent(size_bytes: int) -> None:
            nonlocal done
            done += size_bytes
            running.progress(f"uploading {upload.name}", done, max(total, done), "bytes")

        sender = PartSender(
            self._bucket,
            parts_prefix(upload.scope.build_id, upload.name),
            chunk_bytes=self._settings.upload_chunk_mb * MIB,
            workers=self._settings.upload_workers,
            check=running.check,
            sent=sent,
        )
        dense = upload.name == WITHOUT_HEADER
        try:
            found = scan(path, upload.block_size_bytes, sender.add, running.check, dense=dense)
            parts = sender.finish()
        finally:
            sender.close()
        stored = self._compose(upload, parts, found, running, outdated)
        self._remove_parts(upload, running)
        return found, stored, sender.sent_bytes

    def _compose(
        self,
        upload: UploadArtifactInput,
        parts: list[StoredObject],
        found: Scan,
        running: RunningStep,
        outdated: StoredObject | None,
    ) -> StoredObject:
        name = f"{upload.scope.build_id}/{upload.name}"
        prefix = parts_prefix(upload.scope.build_id, upload.name)
        self._require_current(upload.scope, running)
        if outdated is not None:  # of an earlier attempt whose undo did not come through
            self._bucket.delete_object(name, outdated.generation)
        try:
            stored = compose_tree(self._bucket, name, parts, prefix, running.check)
        except PreconditionFailedError:
            twin = self._bucket.stat_object(name)
            if twin is None or not _is(twin, found):
                raise
            stored = twin
        if not _is(stored, found):
            self._bucket.delete_object(name, stored.generation)
            raise StorageCorruptionError(f"{name} is not what was sent")
        return stored

    def _remove_parts(self, upload: UploadArtifactInput, running: RunningStep) -> None:
        for part in self._bucket.list_objects(parts_prefix(upload.scope.build_id, upload.name)):
            running.check()
            self._bucket.delete_object(part.name, part.generation)

    def _put_header(
        self, upload: UploadArtifactInput, found: Scan, running: RunningStep
    ) -> StoredObject:
        build_id = uuid.UUID(upload.scope.build_id)
        header = Header(
            block_size=upload.block_size_bytes,
            size=found.size_bytes,
            build_id=build_id,
            base_build_id=build_id,
            extents=found.extents,
        )
        running.check()
        name = f"{upload.scope.build_id}/{upload.name}.header"
        return _put(self._bucket, name, header.to_bytes())

    @staticmethod
    def _require_unchanged(upload: UploadArtifactInput, found: Scan) -> None:
        expected = upload.snapshot.files[upload.name].sha256
        if found.sha256 != expected:
            raise StorageCorruptionError(
                f"{upload.name} has changed on the host's disk since it was made"
            )

    def _require_current(self, scope: BuildScope, running: RunningStep) -> None:
        running.check()
        if not self._leases.is_current(scope.build_id, scope.lease.number):
            raise LeaseLostError(f"build {scope.build_id} has been given to another host")

    # ---- Publish

    def _publish(self, publish: PublishTemplateInput, running: RunningStep) -> PublishedTemplate:
        build_id = publish.scope.build_id
        running.progress("publishing metadata.json")
        done = published_template(self._bucket, build_id)
        if done is not None:
            return done
        self._require_current(publish.scope, running)
        running.log.info("publishing")
        log = _put(self._bucket, f"{build_id}/build.log", _read(running.log.path))
        metadata = metadata_of(publish, log)
        wrong = wrong_objects(self._bucket, metadata)
        if wrong:
            raise StorageCorruptionError(f"not published: {', '.join(wrong)} changed meanwhile")
        self._require_current(publish.scope, running)
        body = metadata.model_dump_json(indent=2).encode()
        with contextlib.suppress(PreconditionFailedError):  # our own first try, or a twin
            self._bucket.write_object(metadata_name(build_id), body, if_generation_match=0)
        published = published_template(self._bucket, build_id)
        if published is None:
            raise TemplateDamagedError(f"the template {build_id} is not whole after publishing")
        return published


class BucketUploadUndoActivities(UploadUndoActivities):
    """Undoes an upload, from anywhere. See `interface` for the contract."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @activity.defn(name="discard_upload")
    async def discard_upload(self, discard: DiscardUploadInput, /) -> DiscardedUpload:
        """Remove what was uploaded, unless it is published."""
        return await asyncio.to_thread(discard_upload, self._bucket, discard)


def discard_upload(bucket: Bucket, discard: DiscardUploadInput) -> DiscardedUpload:
    """Remove what was uploaded, unless a valid `metadata.json` says it is published. Blocking.

    With `keep_parts` the parts stay, so that a retry sends only what is missing.
    """
    build_id = discard.scope.build_id
    published = published_template(bucket, build_id)
    if published is not None:
        return DiscardedUpload(published=published)
    removed = 0
    for stored in metadata_first(bucket.list_objects(f"{build_id}/")):
        if discard.keep_parts and stored.name.startswith(parts_prefix(build_id)):
            continue
        removed += bucket.delete_object(stored.name, stored.generation)
    return DiscardedUpload(published=None, removed_objects=removed)


def metadata_first(objects: list[StoredObject]) -> list[StoredObject]:
    """Order objects for removal: a template without metadata is none, so that goes first."""
    return sorted(objects, key=lambda stored: not stored.name.endswith("/metadata.json"))


def _put(bucket: Bucket, name: str, data: bytes) -> StoredObject:
    """Write a small object, replacing what an earlier attempt left there."""
    existing = bucket.stat_object(name)
    if existing is not None and (existing.size_bytes, existing.crc32c) == (
        len(data),
        crc32c_of(data),
    ):
        return existing
    generation = existing.generation if existing else 0
    return bucket.write_object(name, data, if_generation_match=generation)


def _is(stored: StoredObject, found: Scan) -> bool:
    return (stored.size_bytes, stored.crc32c) == (found.stored_bytes, found.stored_crc32c)


def _summary(name: str, found: Scan, sent_bytes: int) -> str:
    return (
        f"{name}: sent {sent_bytes / MIB:.1f} MiB, {found.stored_bytes / MIB:.1f} MiB stored "
        f"of {found.size_bytes / MIB:.1f} MiB"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
