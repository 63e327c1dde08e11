"""The layers of a template's disk: each made in the bucket once, by whichever build comes first.

A layer is never worth a failed build, or waiting for another host: what has no layer is stored in
the next one above, and at last in the template itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint, RootfsFacts
from activities.contract.errors import (
    PreconditionFailedError,
    StorageDeniedError,
    TemplateDamagedError,
)
from activities.contract.names import ArtifactName, Step
from activities.contract.results import LayerReference, StoredObject, UploadedArtifact
from activities.contract.scope import BuildScope
from activities.disk.data_dir import DataDir
from activities.disk.locks import locked, remove_lock
from activities.process.clock import utc_now
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.layer_disks import UNUSABLE, LayerDisks, layer_of
from activities.step.running_step import RunningStep
from activities.store.bucket import Bucket
from activities.store.headers import BLOCK_BYTES, Extent, Header
from activities.store.layers import LayerClaim, LayerObjects, LayerRecord, layer_metadata
from activities.store.metadata import TemplateMetadata
from activities.store.objects import artifact_name, header_name, layer_parts_prefix
from activities.store.stacks import read_header
from activities.template.sending import FileSender
from activities.template.upload import Below, compose_tree

MAX_LAYERS = 100
"""Of a disk; the more there are, the more objects a resume has to read of."""
TEMPLATE_HAS_GONE = (PreconditionFailedError, StorageDeniedError, TemplateDamagedError)
"""What reading of a template fails with that is being deleted."""


@dataclass(frozen=True)
class Stacked:
    """A disk that the bucket has as a layer, and this host with the very same bytes."""

    record: LayerRecord
    below: Below

    @property
    def references(self) -> tuple[LayerReference, ...]:
        """All layers that it is made of, the lowest first."""
        return (*self.record.below, self.record.reference)


@dataclass(frozen=True)
class Upload:
    """One attempt of a build at its upload."""

    scope: BuildScope
    attempt: int
    running: RunningStep
    require_current: Callable[[], None]
    """Raises LeaseLostError when the build is another host's by now."""
    is_ahead: bool = False
    """Whether steps may be at work on the disks of this host: then none is replaced by others'
    bytes."""


@dataclass(frozen=True)
class Written:
    """A disk whose data are in the bucket."""

    facts: RootfsFacts
    size_bytes: int
    sha256: str
    """Of the whole disk."""
    extents: tuple[Extent, ...]
    data: StoredObject


class LayerMaker:
    """Makes layers of the disks that this host has. Blocking."""

    def __init__(
        self, settings: Settings, bucket: Bucket, store: CheckpointStore, sender: FileSender
    ) -> None:
        self._data_dir = DataDir(settings.data_dir)
        self._bucket = bucket
        self._store = store
        self._sender = sender
        self._objects = LayerObjects(bucket)
        self._disks = LayerDisks(settings, bucket, store)

    def stack(self, chain: Sequence[DiskKey], upload: Upload) -> Stacked | None:
        """Make layers of those disks of a chain that have none; return the highest, if any.

        The build is a user of all that it returns.
        """
        top, number = self._highest(chain, upload)
        for key in chain[number:]:
            if top is None or len(top.references) < MAX_LAYERS:
                top = self._on_top(key, top, upload) or top
        return top

    def ahead(
        self, chain: Sequence[DiskKey], top: Stacked | None, upload: Upload
    ) -> tuple[Stacked | None, int]:
        """Do so with the next disks of a chain, on top of what was returned for those before.

        Return the highest, and of how many no more is to be made. It stops at one that is here and
        cannot be had now: another build is making it, or has made it of other bytes.
        """
        found, number = self._highest(chain, upload)
        top = found or top
        for key in chain[number:]:
            if not (top and len(top.references) >= MAX_LAYERS) and self._has(key, upload):
                made = self._on_top(key, top, upload)
                if made is None:
                    break
                top = made
            number += 1
        return top, number

    def is_whole(self, key: DiskKey) -> bool:
        """Whether the bucket has that layer."""
        return self._objects.read(layer_of(key)) is not None

    def _has(self, key: DiskKey, upload: Upload) -> bool:
        build_id = upload.scope.build_id
        return self._store.look(RootfsCheckpoint, key.fingerprint, build_id) is not None

    def _highest(self, chain: Sequence[DiskKey], upload: Upload) -> tuple[Stacked | None, int]:
        """Return the highest disk that has a layer, and how many disks of the chain that ends."""
        for number in range(len(chain), 0, -1):
            found = self._find(chain[number - 1], upload)
            if found is not None:
                return found, number
        return None, 0

    # ---- A layer that is there

    def _find(self, key: DiskKey, upload: Upload) -> Stacked | None:
        record = self._disks.find(key, upload.scope)
        if record is None:
            return None
        try:
            local = self._found(record, upload) if upload.is_ahead else self._local(record, upload)
            return self._stacked(record, local) if local else None
        except UNUSABLE as error:
            upload.running.log.warn(f"layer {record.layer_id} is not used: {error}")
            return None

    def _stacked(self, record: LayerRecord, local: RootfsCheckpoint) -> Stacked:
        path, file = self._store.file(local, ArtifactName.ROOTFS), local.files[ArtifactName.ROOTFS]
        header = read_header(self._bucket, record.objects["header"])
        return Stacked(record, Below(path, header, file.mtime_ns))

    def _local(self, record: LayerRecord, upload: Upload) -> RootfsCheckpoint:
        """Return what this host has of a layer; if it has other bytes, it takes these."""
        key, scope, check = record.fingerprint, upload.scope, upload.running.check
        local = self._found(record, upload)
        if local is not None:
            return local
        with self._store.making(Step.ROOTFS, key, scope, upload.attempt, check) as place:
            local = self._found(record, upload)  # another build may have just taken it
            if local is not None:
                return local
            upload.running.log.info(f"the disk of layer {record.layer_id} is taken from the bucket")
            return self._disks.take(record, place, scope, upload.running)

    def _found(self, record: LayerRecord, upload: Upload) -> RootfsCheckpoint | None:
        build_id, check = upload.scope.build_id, upload.running.check
        local = self._store.find(RootfsCheckpoint, record.fingerprint, build_id, check)
        is_it = local is not None and local.files[ArtifactName.ROOTFS].sha256 == record.sha256
        return local if is_it else None

    # ---- A new layer

    def copy_of_template(
        self, key: DiskKey, facts: RootfsFacts, template: TemplateMetadata, scope: BuildScope
    ) -> None:
        """Make a layer of a template's disk: what its layers lack is copied within the bucket.

        It is left out where that cannot be. The build is a user of what is made.
        """
        disk, layer = template.artifacts[ArtifactName.ROOTFS], layer_of(key)
        if "header" not in disk.objects or len(disk.layers) >= MAX_LAYERS:
            return
        claim = self._objects.claim(layer, scope)
        if claim is None:
            return
        try:
            unusable = self._objects.refer_all(disk.layers, scope)
            copied = None if unusable else self._copied(key, facts, disk, claim)
        except TEMPLATE_HAS_GONE:
            copied = None
        if copied is None:
            self._objects.abandon(claim)
        else:
            self._objects.commit(copied, claim)

    def _copied(
        self, key: DiskKey, facts: RootfsFacts, disk: UploadedArtifact, claim: LayerClaim
    ) -> LayerRecord | None:
        own, header = claim.layer_id, read_header(self._bucket, disk.objects["header"])
        if header.block_size != BLOCK_BYTES:
            return None
        of_parent = disk.objects["data"]
        data = self._bucket.copy(
            of_parent,
            artifact_name(own, ArtifactName.ROOTFS),
            if_generation_match=0,
            metadata=layer_metadata(key.owner),
        )
        if (data.size_bytes, data.crc32c) != (of_parent.size_bytes, of_parent.crc32c):
            return None
        found = Written(facts, disk.size_bytes, disk.sha256, header.extents, data)
        return self._recorded(key, found, disk.layers)

    def _on_top(self, key: DiskKey, top: Stacked | None, upload: Upload) -> Stacked | None:
        """Make the layer of a disk on top of another; None when there will be none."""
        build_id = upload.scope.build_id
        local = self._store.look(RootfsCheckpoint, key.fingerprint, build_id)
        if local is None:
            return None
        with self._alone(layer_of(key), upload.running):
            claim = self._objects.claim(layer_of(key), upload.scope)
            if claim is None:  # another build has it, or is about to
                return self._find(key, upload)
            try:
                sent = self._sent(key, local, top, upload)
            except PreconditionFailedError:  # another attempt has taken it over
                sent = None
            if sent is None:
                self._objects.abandon(claim)
                return None
            winner = self._objects.commit(sent, claim)
        if winner is None or winner.objects != sent.objects:
            return self._find(key, upload)
        return self._stacked(winner, local)

    @contextmanager
    def _alone(self, layer: str, running: RunningStep) -> Iterator[None]:
        """Let one build of this host make a layer: the next then has it as soon as by itself."""
        lock = self._data_dir.lock(f"layer.{layer}")
        try:
            with locked(lock, running.check):
                yield
        finally:
            remove_lock(lock)

    def _sent(
        self, key: DiskKey, local: RootfsCheckpoint, top: Stacked | None, upload: Upload
    ) -> LayerRecord | None:
        """Write the objects of a layer; None when its disk is not what it was."""
        path, layer = self._store.file(local, ArtifactName.ROOTFS), layer_of(key)
        prefix = layer_parts_prefix(upload.scope.build_id, layer)
        below, check = top.below if top else None, upload.running.check
        sent = self._sender.send(path, f"layer {layer}", prefix, upload.running, below=below)
        found = sent.found
        upload.require_current()
        name, whose = artifact_name(layer, ArtifactName.ROOTFS), layer_metadata(key.owner)
        data = compose_tree(self._bucket, name, sent.parts, prefix, check, metadata=whose)
        self._bucket.delete_objects(self._bucket.list_objects(prefix))
        if found.sha256 != local.files[ArtifactName.ROOTFS].sha256:
            return None
        if (data.size_bytes, data.crc32c) != (found.stored_bytes, found.stored_crc32c):
            return None
        written = Written(local.facts, found.size_bytes, found.sha256, found.extents, data)
        return self._recorded(key, written, top.references if top else ())

    def _recorded(
        self, key: DiskKey, written: Written, below: tuple[LayerReference, ...]
    ) -> LayerRecord:
        """Write the header of a layer whose data are there; return what is to be told of it."""
        layer = layer_of(key)
        header = header_of(layer, written.size_bytes, written.extents, below)
        stored = self._bucket.write_object(
            header_name(layer, ArtifactName.ROOTFS),
            header.to_bytes(),
            if_generation_match=0,
            metadata=layer_metadata(key.owner),
        )
        return LayerRecord(
            layer_id=layer,
            owner=key.owner,
            step=Step.ROOTFS,
            fingerprint=key.fingerprint,
            created=utc_now(),
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            stored_bytes=written.data.size_bytes,
            objects={"data": written.data, "header": stored},
            below=below,
            facts=written.facts,
        )


def header_of(
    own: str, size_bytes: int, extents: Sequence[Extent], below: Sequence[LayerReference]
) -> Header:
    """Return the header of a disk that is stored under an id, on top of layers, lowest first."""
    return Header(
        block_size=BLOCK_BYTES,
        size=size_bytes,
        build_id=uuid.UUID(own),
        base_build_id=uuid.UUID(below[0].layer_id if below else own),
        extents=tuple(extents),
        generation=len(below),
    )
