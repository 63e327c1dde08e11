"""The template in the bucket: upload, publish, and undo.

Layout: `<build_id>/rootfs.ext4`, `memfile`, `snapfile`, `rootfs.ext4.header`, `memfile.header`,
`build.log`, and last `metadata.json`; parts of an unfinished upload under `<build_id>/.parts/`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from temporalio import activity

from activities.contract.errors import (
    CheckpointLostError,
    PreconditionFailedError,
    StorageCorruptionError,
    StorageUnavailableError,
    TemplateAlreadyPublishedError,
    TemplateDamagedError,
)
from activities.contract.inputs import (
    DiscardUploadInput,
    PublishTemplateInput,
    UploadArtifactInput,
    UploadArtifactsInput,
)
from activities.contract.interface import ArtifactActivities, UploadUndoActivities
from activities.contract.names import ArtifactName, Step
from activities.contract.results import (
    DiscardedUpload,
    PublishedTemplate,
    StoredObject,
    UploadedArtifact,
)
from activities.contract.scope import BuildScope
from activities.disk.data_dir import DataDir
from activities.disk.locks import locked, remove_lock
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.store.bucket import Bucket, crc32c_of
from activities.store.headers import BLOCK_BYTES
from activities.store.layers import LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.metadata import (
    metadata_of,
    published_template,
    read_metadata,
    wrong_objects,
)
from activities.store.objects import (
    artifact_name,
    build_log_name,
    header_name,
    is_metadata,
    is_used_layer,
    metadata_name,
    parts_prefix,
    template_prefix,
)
from activities.store.stored import TENANT_METADATA
from activities.template.layering import LayerMaker, Stacked, Upload, header_of
from activities.template.sending import FileSender
from activities.template.upload import Below, LeftOut, Scan, compose_tree, scan

T = TypeVar("T")

# A file of which nothing is left out has no header. Of a disk about a hundredth is there twice: it
# is not worth the records.
LEFT_OUT = {
    ArtifactName.ROOTFS: LeftOut.ZEROS,
    ArtifactName.MEMFILE: LeftOut.REPEATS,
    ArtifactName.SNAPFILE: LeftOut.NOTHING,
}
PUBLISH_TRIES = 3


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
        self._data_dir = DataDir(settings.data_dir)
        self._bucket = bucket
        self._ledger = ledger
        self._store = store
        self._leases = leases
        self._sender = FileSender(settings, bucket)
        self._layers = LayerObjects(bucket)
        self.maker = LayerMaker(settings, bucket, store, self._sender)

    @activity.defn(name="upload_artifact")
    async def upload_artifact(self, upload: UploadArtifactInput, /) -> UploadedArtifact:
        """Send an artifact's non-zero blocks, and its header where it has one."""
        attempt = activity.info().attempt
        async with self._running(upload.scope) as running:
            return await running.in_thread(self._upload_alone, upload, attempt, running)

    @activity.defn(name="upload_artifacts")
    async def upload_artifacts(
        self, upload: UploadArtifactsInput, /
    ) -> dict[str, UploadedArtifact]:
        """Send several artifacts one after the other, each as `upload_artifact` does."""
        uploaded: dict[str, UploadedArtifact] = {}
        attempt = activity.info().attempt
        async with self._running(upload.scope) as running:
            for name in upload.names:
                one = UploadArtifactInput(
                    scope=upload.scope, snapshot=upload.snapshot, name=name, chain=upload.chain
                )
                uploaded[name] = await running.in_thread(self._upload_alone, one, attempt, running)
        return uploaded

    @activity.defn(name="publish_template")
    async def publish_template(self, publish: PublishTemplateInput, /) -> PublishedTemplate:
        """Check every object, write `build.log`, and commit by writing `metadata.json`."""
        async with self._running(publish.scope) as running:
            return await running.in_thread(
                self._alone,
                publish.scope,
                "publish",
                running,
                lambda: self._publish(publish, running),
            )

    def _running(self, scope: BuildScope) -> AbstractAsyncContextManager[RunningStep]:
        return running_step(self._settings, self._ledger, scope, Step.UPLOAD)

    def _alone(
        self, scope: BuildScope, what: str, running: RunningStep, work: Callable[[], T]
    ) -> T:
        """Run while no other attempt of this host does the same; the bucket fences other hosts."""
        lock = self._data_dir.lock(f"{Step.UPLOAD}.{scope.build_id}.{what}")
        try:
            with locked(lock, running.check):
                return work()
        finally:
            remove_lock(lock)

    # ---- Upload

    def _upload_alone(
        self, upload: UploadArtifactInput, attempt: int, running: RunningStep
    ) -> UploadedArtifact:
        work = partial(self._upload, upload, attempt, running)
        return self._alone(upload.scope, upload.name, running, work)

    def _upload(
        self, upload: UploadArtifactInput, attempt: int, running: RunningStep
    ) -> UploadedArtifact:
        directory = self._store.require(upload.snapshot, upload.scope.build_id)
        path = directory / upload.name
        top = self._stack(upload, attempt, running)
        below, layers = (top.below, top.references) if top else (None, ())
        existing = self._bucket.stat_object(_object_name(upload))
        found = self._scan(path, upload, running, below) if existing else None
        if existing is None or found is None or not _is(existing, found):
            found, existing = self._send(path, upload, running, existing, below)
        self._remove_parts(upload, running)
        objects = {"data": existing}
        if LEFT_OUT[upload.name] is not LeftOut.NOTHING:
            build_id = upload.scope.build_id
            header = header_of(build_id, found.size_bytes, found.extents, layers)
            name = header_name(build_id, upload.name)
            objects["header"] = self._put(upload.scope, name, header.to_bytes(), running)
        return UploadedArtifact(
            name=upload.name,
            objects=objects,
            size_bytes=found.size_bytes,
            sent_bytes=found.stored_bytes,
            sha256=found.sha256,
            layers=layers,
        )

    def _stack(
        self, upload: UploadArtifactInput, attempt: int, running: RunningStep
    ) -> Stacked | None:
        """Have the disk's chain in the bucket, as far as that can be."""
        if upload.name != ArtifactName.ROOTFS or not upload.chain:
            return None
        require_current = partial(self._require_current, upload.scope, running)
        work = Upload(upload.scope, attempt, running, require_current)
        return self.maker.stack(upload.chain, work)

    def _left_out(self, name: str) -> LeftOut:
        left_out = LEFT_OUT[ArtifactName(name)]
        if left_out is LeftOut.REPEATS and not self._settings.equal_pages_once:
            return LeftOut.ZEROS
        return left_out

    def _scan(
        self, path: Path, upload: UploadArtifactInput, running: RunningStep, below: Below | None
    ) -> Scan:
        running.progress(f"reading {upload.name}")
        found = scan(
            path,
            BLOCK_BYTES,
            lambda _: None,
            running.check,
            left_out=self._left_out(upload.name),
            below=below,
        )
        _require_unchanged(upload, found)
        return found

    def _send(
        self,
        path: Path,
        upload: UploadArtifactInput,
        running: RunningStep,
        outdated: StoredObject | None,
        below: Below | None,
    ) -> tuple[Scan, StoredObject]:
        left_out, prefix = self._left_out(upload.name), _parts_of(upload)
        sent = self._sender.send(path, upload.name, prefix, running, left_out=left_out, below=below)
        _require_unchanged(upload, sent.found)
        stored = self._compose(upload, sent.parts, sent.found, running, outdated)
        return sent.found, stored

    def _compose(
        self,
        upload: UploadArtifactInput,
        parts: list[StoredObject],
        found: Scan,
        running: RunningStep,
        outdated: StoredObject | None,
    ) -> StoredObject:
        name = _object_name(upload)
        prefix = _parts_of(upload)
        self._require_current(upload.scope, running)
        if outdated is not None:  # of an earlier attempt whose undo did not come through
            self._require_unpublished(upload.scope.build_id)
            self._bucket.delete_object(name, outdated.generation)
        try:
            stored = compose_tree(
                self._bucket,
                name,
                parts,
                prefix,
                running.check,
                metadata=_whose(upload.scope),
            )
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
        running.check()
        remove_objects(self._bucket, _parts_of(upload))

    def _put(self, scope: BuildScope, name: str, data: bytes, running: RunningStep) -> StoredObject:
        """Write a small object, replacing what an earlier attempt left there.

        The lease is looked at after the generation that is replaced, so that a host that loses it
        in between cannot replace what its successor wrote.
        """
        existing = self._bucket.stat_object(name)
        wanted = (len(data), crc32c_of(data))
        if existing is not None and (existing.size_bytes, existing.crc32c) == wanted:
            return existing
        self._require_current(scope, running)
        generation = existing.generation if existing else 0
        try:
            return self._bucket.write_object(
                name, data, if_generation_match=generation, metadata=_whose(scope)
            )
        except PreconditionFailedError:  # the first try of this very request, or somebody else
            written = self._bucket.stat_object(name)
            if written is None or (written.size_bytes, written.crc32c) != wanted:
                raise
            return written

    def _require_current(self, scope: BuildScope, running: RunningStep) -> None:
        running.check()
        self._leases.require_current(scope.build_id, scope.lease.number)

    def _require_unpublished(self, build_id: str) -> None:
        if published_template(self._bucket, build_id) is not None:
            raise TemplateAlreadyPublishedError(f"the template {build_id} is already published")

    # ---- Publish

    def _publish(self, publish: PublishTemplateInput, running: RunningStep) -> PublishedTemplate:
        build_id = publish.scope.build_id
        running.progress("publishing metadata.json")
        for _ in range(PUBLISH_TRIES):
            outdated = self._bucket.stat_object(metadata_name(build_id))
            done = published_template(self._bucket, build_id)
            if done is not None and self._keeps_layers(publish.scope):
                return done
            self._require_current(publish.scope, running)
            if outdated is not None:  # it does not fit the objects: no commit, but in its place
                self._bucket.delete_object(outdated.name, outdated.generation)
            self._commit(publish, running)
        raise TemplateDamagedError(f"the template {build_id} is not whole after publishing")

    def _commit(self, publish: PublishTemplateInput, running: RunningStep) -> None:
        build_id = publish.scope.build_id
        running.log.info("publishing metadata.json")
        log_name = build_log_name(build_id)
        log = self._put(publish.scope, log_name, _read(running.log.path), running)
        metadata = metadata_of(publish, log)
        if unusable := self._layers.refer_all(metadata.layers, publish.scope):
            raise CheckpointLostError(
                f"layers {', '.join(unusable)} are no longer there", step=Step.UPLOAD
            )
        if wrong := wrong_objects(self._bucket, metadata):
            raise CheckpointLostError(
                f"{', '.join(wrong)} changed after the upload", step=Step.UPLOAD
            )
        self._require_current(publish.scope, running)
        body = metadata.to_json().encode()
        # Whether it is there, and is ours or a twin's, is read back and not taken from the answer.
        with contextlib.suppress(PreconditionFailedError, StorageCorruptionError):
            self._bucket.write_object(
                metadata_name(build_id),
                body,
                if_generation_match=0,
                metadata=_whose(publish.scope),
            )

    def _keeps_layers(self, scope: BuildScope) -> bool:
        """Name the template's layers once more, and end the use of others; False when one has gone.

        Who ends the use of layers by builds without a template may have looked before it was there,
        and have let go since of what was named before.
        """
        uses = self._layers.uses(scope.build_id)
        metadata = read_metadata(self._bucket, scope.build_id)
        if metadata is None or self._layers.refer_all(metadata.layers, scope):
            return False
        needed = [layer.layer_id for layer in metadata.layers]
        self._layers.release(scope.build_id, uses, keep=needed)
        return True


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
    there = bucket.list_objects(template_prefix(build_id))
    # Looked at after the listing: what a retry has written by then is not in it.
    published = published_template(bucket, build_id)
    if published is not None:
        return DiscardedUpload(published=published)
    uses = [stored for stored in there if is_used_layer(stored.name)]
    keep = parts_prefix(build_id) if discard.keep_parts else None
    ended = [o for o in there if o not in uses and not (keep and o.name.startswith(keep))]
    removed = remove_listed(bucket, template_prefix(build_id), ended)
    LayerObjects(bucket).release(build_id, uses)  # those that are whole stay, as a cache
    return DiscardedUpload(published=None, removed_objects=removed)


def remove_objects(bucket: Bucket, prefix: str) -> int:
    """Delete what is there now, see `remove_listed`."""
    return remove_listed(bucket, prefix, bucket.list_objects(prefix))


def remove_listed(bucket: Bucket, prefix: str, objects: Sequence[StoredObject]) -> int:
    """Delete exactly these objects of a prefix, `metadata.json` first: without it there is no
    template. Blocking.

    Returns how many of them were there; raises StorageUnavailableError when some would not go.
    """
    first = [stored for stored in objects if is_metadata(stored.name)]
    removed = bucket.delete_objects(first)
    removed += bucket.delete_objects(stored for stored in objects if stored not in first)
    left = set(bucket.list_objects(prefix) if objects else ()).intersection(objects)
    if left:
        raise StorageUnavailableError(f"{len(left)} objects under {prefix} would not go")
    return removed


def _whose(scope: BuildScope) -> dict[str, str]:
    """Return the custom metadata of a template's objects, for those who see no `metadata.json`."""
    return {TENANT_METADATA: scope.tenant}


def _is(stored: StoredObject, found: Scan) -> bool:
    return (stored.size_bytes, stored.crc32c) == (found.stored_bytes, found.stored_crc32c)


def _object_name(upload: UploadArtifactInput) -> str:
    return artifact_name(upload.scope.build_id, upload.name)


def _parts_of(upload: UploadArtifactInput) -> str:
    return parts_prefix(upload.scope.build_id, upload.name)


def _require_unchanged(upload: UploadArtifactInput, found: Scan) -> None:
    if found.sha256 != upload.snapshot.files[upload.name].sha256:
        raise CheckpointLostError(
            f"{upload.name} has changed on the host's disk since it was made",
            step=upload.snapshot.step,
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
