"""Templates as bases: the disk of one, brought to this host as blocks.

A guest has written it. Nothing here reads more of it than its bytes: whatever is done to it is done
by VMs.
"""

from __future__ import annotations

from temporalio import activity

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint, RootfsFacts
from activities.contract.errors import TemplateNotFoundError
from activities.contract.inputs import ImportTemplateInput
from activities.contract.interface import TemplateBaseActivities
from activities.contract.names import ArtifactName, Step
from activities.contract.results import ImageConfig, PulledImage, TemplateBase
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.image.config_size import require_small_config
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore, fingerprint
from activities.step.layer_disks import require_size
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.vm_requirements import require_parts
from activities.store.bucket import Bucket
from activities.store.download import pull_artifact
from activities.store.metadata import TemplateMetadata, read_metadata
from activities.template.layering import LayerMaker
from activities.template.sending import FileSender


class BucketBaseActivities(TemplateBaseActivities):
    """Takes templates out of the bucket. See `interface` for the contract."""

    def __init__(
        self, settings: Settings, ledger: LeaseLedger, store: CheckpointStore, bucket: Bucket
    ) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store
        self._bucket = bucket
        self._room = Room((settings.data_dir,), settings.min_free_disk_mb * MIB)
        self._maker = LayerMaker(settings, bucket, store, FileSender(settings, bucket))

    @activity.defn(name="import_template")
    async def import_template(self, take: ImportTemplateInput, /) -> PulledImage:
        """Bring the disk of a published template to the host."""
        attempt = activity.info().attempt
        async with running_step(self._settings, self._ledger, take.scope, Step.PULL) as step:
            return await step.in_thread(self._take, step, take, attempt)

    def _take(self, step: RunningStep, take: ImportTemplateInput, attempt: int) -> PulledImage:
        if take.shape is not None:
            require_parts(self._settings, take.shape, step.log)
        metadata = read_metadata(self._bucket, take.build_id)
        if metadata is None or metadata.config.tenant != take.scope.tenant:
            raise TemplateNotFoundError(f"there is no template {take.build_id} to start from")
        size_bytes = metadata.artifacts[ArtifactName.ROOTFS].size_bytes
        require_size(self._settings, f"template {take.build_id}", size_bytes)
        disk = self._disk(step, take, metadata, attempt)
        key = DiskKey(owner=take.scope.tenant, fingerprint=disk.fingerprint)
        self._maker.copy_of_template(key, disk.facts, metadata, take.scope)
        return _as_image(metadata, disk.model_copy(update={"chain": (key,)}))

    def _disk(
        self, step: RunningStep, take: ImportTemplateInput, metadata: TemplateMetadata, attempt: int
    ) -> RootfsCheckpoint:
        scope, artifact = take.scope, metadata.artifacts[ArtifactName.ROOTFS]
        key = fingerprint(Step.ROOTFS, template=artifact.sha256, tenant=scope.tenant)
        with self._store.making(Step.ROOTFS, key, scope, attempt, step.check) as place:
            found = self._store.find(RootfsCheckpoint, key, scope.build_id, step.check)
            if found is not None:
                step.log.info(f"the disk of template {take.build_id} is on the host already")
                return found
            self._room.require(
                f"take the disk of template {take.build_id}",
                min(artifact.size_bytes, sum(stored.size_bytes for stored in artifact.stored)),
            )
            step.log.info(f"taking the disk of template {take.build_id}")

            def tell(_: str, done: int, total: int) -> None:
                step.check()
                step.progress("downloading the disk", done, total, "bytes")

            pull_artifact(self._bucket, artifact, place / ArtifactName.ROOTFS, tell)
            made = RootfsCheckpoint(
                fingerprint=key,
                host=self._settings.host,
                facts=RootfsFacts(size_mb=artifact.size_bytes // MIB),
            )
            names, hashes = (ArtifactName.ROOTFS,), {ArtifactName.ROOTFS: artifact.sha256}
            return self._store.publish(
                place, made, scope, names=names, check=step.check, hashes=hashes
            )


def _as_image(metadata: TemplateMetadata, disk: RootfsCheckpoint) -> PulledImage:
    digest = f"sha256:{metadata.artifacts[ArtifactName.ROOTFS].sha256}"
    config = _config_of(metadata)
    require_small_config(config, f"template {metadata.build_id}")
    return PulledImage(
        reference=f"template-manager/template@{digest}",
        digest=digest,
        image_id="",
        architecture=metadata.image.architecture,
        size_bytes=metadata.artifacts[ArtifactName.ROOTFS].size_bytes,
        layer_count=0,
        config=config,
        tenant=metadata.config.tenant,
        base=TemplateBase(disk=disk, commands=metadata.commands),
    )


def _config_of(metadata: TemplateMetadata) -> ImageConfig:
    """Return the config of its image, with the variables that its request gave."""
    config, own = metadata.image.config, metadata.config.env
    told = (variable for variable in config.env if variable.partition("=")[0] not in own)
    env = (*told, *(f"{name}={value}" for name, value in own.items()))
    return config.model_copy(update={"env": env})
