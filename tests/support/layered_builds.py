"""Builds on hosts of their own, whose disks are changed from step to step, as VMs would do it."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import (
    DiskKey,
    RootfsCheckpoint,
    RootfsFacts,
    SnapshotCheckpoint,
)
from activities.contract.inputs import PublishTemplateInput, UploadArtifactsInput
from activities.contract.names import ArtifactName, Step
from activities.contract.results import PublishedTemplate, UploadedArtifact, Verification
from activities.step.checkpoints import fingerprint
from activities.store.bucket import Bucket
from activities.store.download import pull_template
from activities.store.lease_numbers import LeaseObjects
from activities.store.metadata import TemplateMetadata, read_metadata, wrong_objects
from activities.template.ahead import BucketLayerActivities
from activities.template.artifacts import BucketArtifactActivities
from tests.support.example_template import pulled_image, template_config
from tests.support.held_build import HeldBuild, hold
from tests.support.step_checks import go_on

BLOCK = 4096
BLOCKS = 600


@dataclass
class LayeredBuild:
    """A build on a host."""

    held: HeldBuild
    bucket: Bucket
    chain: tuple[DiskKey, ...] = ()
    disk: bytes = b""

    @property
    def host(self) -> str:
        return self.held.settings.host

    def makes(self, name: str, seed: object, blocks: int, owner: str = "") -> LayeredBuild:
        """Have the host make the disk of that name, by writing some blocks that `seed` decides."""
        key = disk_named(name, owner)
        self.disk = changed(self.disk, seed, blocks)
        self.keeps(key.fingerprint)
        self.chain = (*self.chain, key)
        return self

    def keeps(self, key: str) -> None:
        """Have the host keep the disk as it is now as the checkpoint of that fingerprint."""
        scope, store = self.held.scope, self.held.store
        with store.making(Step.ROOTFS, key, scope, 1, go_on) as place:
            (place / ArtifactName.ROOTFS).write_bytes(self.disk)
            made = RootfsCheckpoint(
                fingerprint=key, host=self.host, facts=RootfsFacts(files=len(self.disk))
            )
            store.publish(place, made, scope, names=(ArtifactName.ROOTFS,), check=go_on)

    def path(self, number: int) -> Path:
        """Return where the host has a disk of the chain."""
        return self.held.store.path(Step.ROOTFS, self.chain[number].fingerprint) / "rootfs.ext4"

    def boots(self, seed: object = "boot", blocks: int = 5) -> SnapshotCheckpoint:
        """Have the host boot the disk, which writes some blocks."""
        self.disk = changed(self.disk, seed, blocks)
        key = fingerprint(Step.BOOT, test=str(seed))
        with self.held.store.making(Step.BOOT, key, self.held.scope, 1, go_on) as place:
            (place / ArtifactName.ROOTFS).write_bytes(self.disk)
            (place / ArtifactName.MEMFILE).write_bytes(changed(b"", seed, 3))
            (place / ArtifactName.SNAPFILE).write_bytes(b"state")
            made = SnapshotCheckpoint(fingerprint=key, host=self.host)
            return self.held.store.publish(
                place, made, self.held.scope, names=tuple(ArtifactName), check=go_on
            )

    def activities(self) -> BucketArtifactActivities:
        held = self.held
        return BucketArtifactActivities(
            held.settings, self.bucket, held.ledger, held.store, LeaseObjects(self.bucket)
        )

    def layer_activities(self) -> BucketLayerActivities:
        held, leases = self.held, LeaseObjects(self.bucket)
        maker = self.activities().maker
        return BucketLayerActivities(held.settings, held.ledger, held.store, leases, maker)

    async def upload(self, snapshot: SnapshotCheckpoint) -> dict[str, UploadedArtifact]:
        sent = UploadArtifactsInput(
            scope=self.held.scope, snapshot=snapshot, names=tuple(ArtifactName), chain=self.chain
        )
        return await ActivityEnvironment().run(self.activities().upload_artifacts, sent)

    async def publish(
        self, snapshot: SnapshotCheckpoint, uploads: dict[str, UploadedArtifact] | None = None
    ) -> PublishedTemplate:
        uploads = uploads or await self.upload(snapshot)
        scope = self.held.scope
        asked = PublishTemplateInput(
            scope=scope,
            config=template_config(build_id=scope.build_id, tenant=scope.tenant),
            image=pulled_image(),
            rootfs=RootfsCheckpoint(fingerprint="f" * 64, host=self.host),
            snapshot=snapshot,
            verification=Verification(
                resume_ms=1, load_ms=1, clock_skew_ms=0, seconds_since_snapshot=1
            ),
            uploads=uploads,
            timeline=(),
        )
        return await ActivityEnvironment().run(self.activities().publish_template, asked)


def disk_named(name: str, owner: str = "") -> DiskKey:
    return DiskKey(owner=owner, fingerprint=fingerprint(Step.ROOTFS, test=name))


def build_on(host: Path, bucket: Bucket, tenant: str = "default") -> LayeredBuild:
    """Let a host that has that data directory hold a new build."""
    build_id = str(uuid.uuid4())
    number = LeaseObjects(bucket).take(build_id, "h1", "workflow", None)
    held = hold(host, number, build_id)
    scope = held.scope.model_copy(update={"tenant": tenant})
    return LayeredBuild(replace(held, scope=scope), bucket)


def changed(disk: bytes, seed: object, blocks: int) -> bytes:
    """Return a disk with so many other blocks, and others that are zeros now."""
    chance, content = random.Random(str(seed)), bytearray(disk or bytes(BLOCKS * BLOCK))
    places = range(len(content) // BLOCK)
    for place in chance.sample(places, blocks):
        content[place * BLOCK : (place + 1) * BLOCK] = chance.randbytes(BLOCK)
    for place in chance.sample(places, blocks // 10):
        content[place * BLOCK : (place + 1) * BLOCK] = bytes(BLOCK)
    return bytes(content)


def stored_of(uploads: Sequence[UploadedArtifact]) -> int:
    """Return how many bytes of disks are stored for these, layers once."""
    objects = {stored.name: stored for each in uploads for stored in each.stored}
    return sum(s.size_bytes for name, s in objects.items() if name.endswith("rootfs.ext4"))


def pulls_the_same(bucket: Bucket, build: LayeredBuild, target: Path) -> bool:
    """Whether a pull gives the disk of a build; without the bytes, of which a test would tell."""
    pull_template(bucket, build.held.scope.build_id, target, lambda *_: None)
    return (target / ArtifactName.ROOTFS).read_bytes() == build.disk


def metadata_of(bucket: Bucket, build: LayeredBuild) -> TemplateMetadata:
    """Return what is published of a build."""
    found = read_metadata(bucket, build.held.scope.build_id)
    assert found is not None
    return found


def require_whole(bucket: Bucket, build: LayeredBuild, target: Path) -> None:
    """Require that a build's template has all its objects, and is pulled as it was built."""
    assert wrong_objects(bucket, metadata_of(bucket, build)) == []
    assert pulls_the_same(bucket, build, target)


async def publish_at_once(bucket: Bucket, builds: Sequence[LayeredBuild], place: Path) -> None:
    """Boot and publish builds at the same time, and require that each is pulled as it was built."""
    snapshots = [build.boots() for build in builds]
    each = zip(builds, snapshots, strict=True)
    await asyncio.gather(*(build.publish(snapshot) for build, snapshot in each))
    for build in builds:
        require_whole(bucket, build, place / build.held.scope.build_id)
