"""Layers in a bucket, as builds make them: small ones, by the real protocol."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Collection

from pydantic import SecretStr
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsFacts
from activities.contract.inputs import DeleteTemplateInput, SweepInput
from activities.contract.names import ArtifactName, Step
from activities.contract.results import (
    DeletedTemplate,
    LayerReference,
    StoredObject,
    SweepReport,
)
from activities.contract.scope import BuildScope, HostLease
from activities.host.bucket_sweep import BucketSweep
from activities.process.attempts import IsAwaited
from activities.process.clock import utc_now
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.store.bucket import Bucket
from activities.store.layers import LayerClaim, LayerObjects, LayerRecord, layer_id, layer_metadata
from activities.store.objects import artifact_name, header_name
from activities.template.deletion import BucketDeletionActivities


def scope_of(build_id: str = "", tenant: str = "acme") -> BuildScope:
    """Return what a build, by default a new one, works under."""
    return BuildScope(
        build_id=build_id or str(uuid.uuid4()),
        template_id="web",
        lease=HostLease(host="h1", number=1),
        tenant=tenant,
    )


def fingerprint_of(name: str) -> str:
    """Return the fingerprint of a checkpoint that is told from others by a name."""
    return hashlib.sha256(name.encode()).hexdigest()


def id_of(name: str, owner: str = "acme") -> str:
    """Return the id of the layer of that checkpoint."""
    return layer_id(owner, Step.ROOTFS, fingerprint_of(name))


def write_layer(
    bucket: Bucket,
    claim: LayerClaim,
    name: str,
    below: tuple[LayerReference, ...] = (),
    owner: str = "acme",
    content: bytes = b"blocks",
) -> LayerRecord:
    """Write data and header of a layer; returns the record to commit."""
    names = {
        "data": artifact_name(claim.layer_id, ArtifactName.ROOTFS),
        "header": header_name(claim.layer_id, ArtifactName.ROOTFS),
    }
    objects: dict[str, StoredObject] = {
        kind: bucket.write_object(
            each, content + kind.encode(), if_generation_match=0, metadata=layer_metadata(owner)
        )
        for kind, each in names.items()
    }
    return LayerRecord(
        layer_id=claim.layer_id,
        owner=owner,
        step=Step.ROOTFS,
        fingerprint=fingerprint_of(name),
        created=utc_now(),
        size_bytes=4096,
        sha256=hashlib.sha256(content).hexdigest(),
        stored_bytes=objects["data"].size_bytes,
        objects=objects,
        below=below,
        facts=RootfsFacts(size_mb=1),
    )


def make_layer(
    bucket: Bucket,
    scope: BuildScope,
    name: str,
    below: tuple[LayerReference, ...] = (),
    owner: str = "acme",
) -> LayerRecord:
    """Make a layer whole; the build refers to it then."""
    layers = LayerObjects(bucket)
    claim = layers.claim(id_of(name, owner), scope)
    assert claim is not None
    made = layers.commit(write_layer(bucket, claim, name, below, owner), claim)
    assert made is not None
    return made


def make_chain(
    bucket: Bucket, scope: BuildScope, *names: str, owner: str = "acme"
) -> list[LayerRecord]:
    """Make layers one on the other, lowest first."""
    made: list[LayerRecord] = []
    for name in names:
        below = tuple(record.reference for record in made)
        made.append(make_layer(bucket, scope, name, below, owner))
    return made


def release(layers: LayerObjects, build_id: str, *, collect: bool = False) -> list[str]:
    """End a build's use of all its layers, as undos do it or, to `collect`, deletes."""
    return layers.release(build_id, layers.uses(build_id), collect=collect)


def is_there(bucket: Bucket, record: LayerRecord) -> bool:
    """Whether every object of a layer is what its record says."""
    return all(bucket.stat_object(each.name) == each for each in record.objects.values())


def only_attempt() -> IsAwaited:
    """Return what tells of an attempt that it is the last."""

    async def is_awaited() -> bool:
        return True

    return is_awaited


async def delete(deletion: BucketDeletionActivities, scope: BuildScope) -> DeletedTemplate:
    """Delete the objects of a build."""
    return await ActivityEnvironment().run(deletion.delete_objects, input_of(scope))


def deleting(bucket: Bucket) -> BucketDeletionActivities:
    """Return what deletes from a bucket, and from no registry, in the only attempt there is."""
    return BucketDeletionActivities(bucket, Sealer(SecretStr("")), Settings(), only_attempt)


def input_of(scope: BuildScope) -> DeleteTemplateInput:
    """Return what a delete of a build is asked for by."""
    return DeleteTemplateInput(template_id="web", build_id=scope.build_id, tenant=scope.tenant)


async def sweep(
    bucket: Bucket, *, running: Collection[str] = (), hours: float = 1, dry_run: bool = False
) -> SweepReport:
    """Sweep a bucket while those builds run; layers that nobody needs go after so many hours."""

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        return WorkflowExecutionStatus.RUNNING if build_id in running else None

    sweeper = BucketSweep(
        bucket, describe, late_arrival_seconds=0.0, most_files_bytes=8, layer_max_age_hours=hours
    )
    return await ActivityEnvironment().run(sweeper.sweep_bucket, SweepInput(dry_run=dry_run))


class InterruptedBucket(Bucket):
    """A bucket of whose requests one is held up: before that, something else happens."""

    def __init__(self, name: str, number: int, meanwhile: Callable[[], object]) -> None:
        super().__init__(name)
        self._left = number
        self._meanwhile = meanwhile
        self.was_interrupted = False

    def __getattribute__(self, name: str) -> object:
        if name in _REQUESTS:
            self._count()
        return super().__getattribute__(name)

    def _count(self) -> None:
        self._left -= 1
        if self._left == -1:
            self.was_interrupted = True
            self._meanwhile()


_REQUESTS = frozenset(
    {"read_object", "write_object", "stat_object", "delete_object", "list_objects", "has_any"}
)
