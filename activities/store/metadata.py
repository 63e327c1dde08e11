"""`metadata.json`: the commit mark of a template, and everything that a consumer needs.

It is written last, with `if_generation_match=0`. No metadata, no template; and it is valid only
while every object that it names is there with the generation, size and CRC32C that it gives.
"""

from __future__ import annotations

import json
import operator
from datetime import datetime

from pydantic import Field, ValidationError, field_validator

from activities.contract.checkpoints import RootfsFacts, SnapshotFacts
from activities.contract.errors import TemplateDamagedError
from activities.contract.inputs import PublishTemplateInput
from activities.contract.model import Model
from activities.contract.names import ArtifactName, BuildId, ImageDigest, TemplateId
from activities.contract.network_policy import NO_NETWORK, NetworkPolicy
from activities.contract.requests import Commands, TemplateConfig
from activities.contract.results import (
    ImageConfig,
    LayerReference,
    PublishedTemplate,
    StoredObject,
    UploadedArtifact,
    Verification,
)
from activities.contract.sources import FromTemplate
from activities.contract.status import StepRecord
from activities.contract.units import MIB
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.e2b_metadata import (
    E2bKeys,
    TemplateKeys,
    base_keys,
    context_of,
    prefetch_of,
    start_of,
)
from activities.store.objects import metadata_name, template_prefix

FORMAT_VERSION = 1


class ImageMetadata(Model):
    """The image that the template was made of."""

    name: str
    digest: ImageDigest
    architecture: str
    size_bytes: int
    config: ImageConfig


class VmmMetadata(Model):
    """What took the snapshot, and so what can resume it."""

    name: str
    version: str
    kernel_version: str
    cpu_model: str
    vcpu_count: int
    memory_mb: int
    snapshot_format: str = Field(default="", exclude_if=operator.not_)
    """'' in templates of before it was told: then only the same version resumes them."""
    architecture: str = Field(default="", exclude_if=operator.not_)


class TemplateMetadata(Model):
    """The content of `metadata.json`."""

    format_version: int = FORMAT_VERSION
    template_id: TemplateId
    build_id: BuildId
    created: datetime
    config: TemplateConfig
    """The request; its registry credentials are left out."""
    image: ImageMetadata
    vmm: VmmMetadata
    rootfs_size_mb: int
    agent_version: str = ""
    artifacts: dict[str, UploadedArtifact]
    build_log: StoredObject
    rootfs_facts: RootfsFacts
    """Among them what was added to the image's file system."""
    snapshot_facts: SnapshotFacts
    verification: Verification
    timeline: tuple[StepRecord, ...]
    network: NetworkPolicy = Field(
        default=NO_NETWORK, exclude_if=lambda network: network == NO_NETWORK
    )
    """What its guest could reach until it was snapshotted."""
    inherited: Commands | None = Field(default=None, exclude_if=lambda commands: commands is None)
    """What it runs, where its base has had a say in that."""

    @field_validator("artifacts")
    @classmethod
    def _has_all(cls, artifacts: dict[str, UploadedArtifact]) -> dict[str, UploadedArtifact]:
        for name in ArtifactName:
            if name not in artifacts or "data" not in artifacts[name].objects:
                raise ValueError(f"there is no {name}")
            if any("data" not in layer.objects for layer in artifacts[name].layers):
                raise ValueError(f"{name} has a layer without data")
        return artifacts

    @property
    def layers(self) -> tuple[LayerReference, ...]:
        """The layers that have blocks of its disk, the lowest first."""
        return self.artifacts[ArtifactName.ROOTFS].layers

    @property
    def commands(self) -> Commands:
        """What it runs."""
        return (self.inherited or self.config.commands_on(None)).meant_by(self.config.meaning)

    def to_json(self) -> str:
        """Return the object's content: ours, and what E2B's orchestrator reads beside it."""
        keys = self.model_dump(mode="json") | self._e2b_keys().model_dump(mode="json")
        return json.dumps(keys, indent=2)

    def _e2b_keys(self) -> E2bKeys:
        config, image = self.config, self.image.config
        context = context_of(image, config.env)
        base = config.source if isinstance(config.source, FromTemplate) else None
        return E2bKeys(
            template=TemplateKeys(
                build_id=self.build_id,
                kernel_version=config.kernel_version,
                firecracker_version=config.firecracker_version,
            ),
            context=context,
            start=start_of(self.commands, image, context),
            from_image=None if base else config.source.described,
            from_template=base_keys(base) if base else None,
            prefetch=prefetch_of(self.verification.prefetch),
        )

    def objects(self) -> list[StoredObject]:
        """Return every object of the template but this one."""
        parts = [stored for artifact in self.artifacts.values() for stored in artifact.stored]
        return [*parts, self.build_log]

    def published(self, bucket_name: str, stored: StoredObject) -> PublishedTemplate:
        """Return the short form that travels through the workflow."""
        return PublishedTemplate(
            bucket=bucket_name,
            prefix=template_prefix(self.build_id),
            metadata=stored,
            artifacts=self.artifacts,
        )


def metadata_of(publish: PublishTemplateInput, build_log: StoredObject) -> TemplateMetadata:
    """Gather the metadata of a template that is about to be published."""
    config, snapshot, base = publish.config, publish.snapshot.facts, publish.image.base
    return TemplateMetadata(
        template_id=config.template_id,
        build_id=config.build_id,
        created=utc_now(),
        config=config.without_secrets(),
        image=ImageMetadata(
            name=config.source.described,
            digest=publish.image.digest,
            architecture=publish.image.architecture,
            size_bytes=publish.image.size_bytes,
            config=publish.image.config,
        ),
        vmm=VmmMetadata(
            name=snapshot.vmm_name,
            version=snapshot.vmm_version or config.firecracker_version,
            kernel_version=config.kernel_version,
            cpu_model=snapshot.cpu_model,
            vcpu_count=config.vcpu_count,
            memory_mb=config.memory_mb,
            snapshot_format=snapshot.snapshot_format,
            architecture=snapshot.architecture,
        ),
        rootfs_size_mb=publish.uploads[ArtifactName.ROOTFS].size_bytes // MIB,
        agent_version=publish.rootfs.facts.agent_version,
        artifacts=publish.uploads,
        build_log=build_log,
        rootfs_facts=publish.rootfs.facts,
        snapshot_facts=snapshot,
        verification=publish.verification,
        timeline=publish.timeline,
        network=publish.network,
        inherited=config.commands_on(base.commands) if base else None,
    )


def read_metadata(bucket: Bucket, build_id: str) -> TemplateMetadata | None:
    """Return a template's metadata, or None when there is no such template.

    Raises TemplateDamagedError when the object is not metadata.
    """
    found = bucket.read_object(metadata_name(build_id))
    if found is None:
        return None
    try:
        return TemplateMetadata.model_validate_json(found[0])
    except ValidationError as error:
        raise TemplateDamagedError(f"metadata.json of {build_id} cannot be read") from error


def wrong_objects(bucket: Bucket, metadata: TemplateMetadata) -> list[str]:
    """Return the names of objects that are gone or are not what the metadata says."""
    listed = set(bucket.list_objects(template_prefix(metadata.build_id)))
    of_layers = [stored for layer in metadata.layers for stored in layer.objects.values()]
    there = listed.union(of_layers).difference(bucket.changed_objects(of_layers))
    return [stored.name for stored in metadata.objects() if stored not in there]


def published_template(bucket: Bucket, build_id: str) -> PublishedTemplate | None:
    """Return the template if it exists and is whole: the test for the point of no return."""
    stored = bucket.stat_object(metadata_name(build_id))
    if stored is None:
        return None
    try:
        metadata = read_metadata(bucket, build_id)
    except TemplateDamagedError:
        return None
    if metadata is None or wrong_objects(bucket, metadata):
        return None
    return metadata.published(bucket.name, stored)
