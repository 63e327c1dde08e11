"""Disks that lie in the bucket as layers, brought to this host as checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint
from activities.contract.errors import (
    HostDiskFullError,
    RootfsTooLargeError,
    StorageCorruptionError,
    TemplateDamagedError,
)
from activities.contract.names import ArtifactName, Step
from activities.contract.results import UploadedArtifact
from activities.contract.scope import BuildScope
from activities.contract.units import MIB
from activities.disk.room import Room
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.running_step import RunningStep
from activities.store.bucket import Bucket
from activities.store.download import DiskHere, pull_artifact
from activities.store.layers import LayerObjects, LayerRecord, layer_id

UNUSABLE = (
    HostDiskFullError,
    RootfsTooLargeError,
    StorageCorruptionError,
    TemplateDamagedError,
)
"""What a layer fails with that this host cannot use: then another is used, or none."""


def require_size(settings: Settings, whose: str, size_bytes: int) -> None:
    """Raise RootfsTooLargeError for a disk in the bucket that a host does not take."""
    size_mb, most_mb = size_bytes // MIB, settings.max_rootfs_mb
    if size_mb > most_mb:
        raise RootfsTooLargeError(
            f"the disk of {whose} has {size_mb} MiB; the limit is {most_mb} MiB"
        )


class LayerDisks:
    """The layers of a bucket, as the disks of a host. Blocking."""

    def __init__(self, settings: Settings, bucket: Bucket, store: CheckpointStore) -> None:
        self._settings = settings
        self._bucket = bucket
        self._store = store
        self._objects = LayerObjects(bucket)
        self._room = Room((settings.data_dir,), settings.min_free_disk_mb * MIB)

    def find(self, key: DiskKey, scope: BuildScope) -> LayerRecord | None:
        """Return the layer of a disk, and name it and all below it for the build.

        None when it is not whole, or not to be relied on.
        """
        layer = layer_of(key)
        if self._objects.read(layer) is None:  # most often: then nothing is named
            return None
        record = self._objects.refer(layer, scope)
        if record is None or self._objects.refer_all(record.below, scope):
            return None
        if self._bucket.changed_objects(disk_in_bucket(record).stored):
            return None
        return record

    def bring(
        self, chain: Sequence[DiskKey], scope: BuildScope, attempt: int, running: RunningStep
    ) -> RootfsCheckpoint | None:
        """Bring the last disk of a chain to this host, if the bucket has it.

        Of the highest below it that is here, only the difference is fetched. None when it is to be
        made here. Raises StorageUnavailableError and StorageDeniedError.
        """
        key = chain[-1]
        record = self.find(key, scope)
        if record is None:
            return None
        check = running.check
        with self._store.making(Step.ROOTFS, key.fingerprint, scope, attempt, check) as place:
            found = self._store.find(RootfsCheckpoint, key.fingerprint, scope.build_id, check)
            if found is not None:  # another build of the same was quicker
                return found
            try:
                here = self._here(chain[:-1], record, scope)
                taken = self.take(record, place, scope, running, here)
            except UNUSABLE as error:
                running.log.warn(f"layer {record.layer_id} is not used: {error}")
                return None
        running.log.info(f"layer {record.layer_id} is taken from the bucket: nothing is made here")
        return taken.model_copy(update={"reused": True})

    def _here(
        self, chain: Sequence[DiskKey], record: LayerRecord, scope: BuildScope
    ) -> DiskHere | None:
        """Return the highest of these disks that is here, with the bytes of a layer below."""
        below = [layer.layer_id for layer in record.below]
        for key in reversed(chain):
            layer = layer_of(key)
            local = self._store.look(RootfsCheckpoint, key.fingerprint, scope.build_id)
            if local is None or layer not in below:
                continue
            stored = self._objects.read(layer)  # two hosts' bytes of one layer differ
            if stored and stored.sha256 == local.files[ArtifactName.ROOTFS].sha256:
                has = record.below[: below.index(layer) + 1]
                path = self._store.file(local, ArtifactName.ROOTFS)
                return DiskHere(path, frozenset(each.objects["data"] for each in has))
        return None

    def take(
        self,
        record: LayerRecord,
        place: Path,
        scope: BuildScope,
        running: RunningStep,
        here: DiskHere | None = None,
    ) -> RootfsCheckpoint:
        """Bring a disk to this host, as the checkpoint that it was on another one.

        `place` is where the checkpoint is made. Raises HostDiskFullError, RootfsTooLargeError,
        TemplateDamagedError, StorageCorruptionError, StorageUnavailableError and
        StorageDeniedError.
        """
        require_size(self._settings, f"layer {record.layer_id}", record.size_bytes)
        artifact = disk_in_bucket(record)
        most = min(artifact.size_bytes, sum(stored.size_bytes for stored in artifact.stored))
        self._room.require("take a disk out of the bucket", most)

        def tell(_: str, done: int, total: int) -> None:
            running.check()
            running.progress("downloading the disk", done, total, "bytes")

        pull_artifact(self._bucket, artifact, place / ArtifactName.ROOTFS, tell, here)
        made = RootfsCheckpoint(
            fingerprint=record.fingerprint, host=self._settings.host, facts=record.facts
        )
        return self._store.publish(
            place,
            made,
            scope,
            names=(ArtifactName.ROOTFS,),
            check=running.check,
            hashes={ArtifactName.ROOTFS: record.sha256},
        )


def layer_of(key: DiskKey) -> str:
    """Return the id of a disk's layer."""
    return layer_id(key.owner, Step.ROOTFS, key.fingerprint)


def disk_in_bucket(record: LayerRecord) -> UploadedArtifact:
    """Return a layer, and those below it, as what is stored of a template's disk."""
    return UploadedArtifact(
        name=ArtifactName.ROOTFS,
        objects=record.objects,
        size_bytes=record.size_bytes,
        sent_bytes=record.stored_bytes,
        sha256=record.sha256,
        layers=record.below,
    )
