"""A template in the bucket whose disk is any file."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from activities.contract.names import ArtifactName
from activities.contract.results import UploadedArtifact
from activities.store.bucket import Bucket
from activities.store.metadata import TemplateMetadata
from activities.store.objects import metadata_name
from tests.support.example_template import metadata


def publish_base(bucket: Bucket, disk: bytes, **config: Any) -> TemplateMetadata:
    """Publish a template of such a request with that disk; returns its metadata."""
    build_id = str(uuid.uuid4())
    stored = bucket.write_object(f"{build_id}/{ArtifactName.ROOTFS}", disk)
    rootfs = UploadedArtifact(
        name=ArtifactName.ROOTFS,
        objects={"data": stored},
        size_bytes=len(disk),
        sent_bytes=len(disk),
        sha256=hashlib.sha256(disk).hexdigest(),
    )
    made = metadata(build_id, **config)
    artifacts = {**made.artifacts, ArtifactName.ROOTFS: rootfs}
    return write_metadata(bucket, made.model_copy(update={"artifacts": artifacts}))


def write_metadata(bucket: Bucket, made: TemplateMetadata) -> TemplateMetadata:
    """Write a template's metadata as it is."""
    bucket.write_object(metadata_name(made.build_id), made.model_dump_json().encode())
    return made
