"""Templates whose disks are made of layers, from upload to pull, on a real emulator of a bucket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from devstack.stack import Stack
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import DiskKey
from activities.contract.errors import CheckpointLostError, TemplateManagerError
from activities.contract.inputs import ImportTemplateInput
from activities.contract.names import ArtifactName, Step
from activities.contract.results import PublishedTemplate, StoredObject
from activities.disk.sparse_files import sha256_of
from activities.step.layer_disks import layer_of
from activities.store.bucket import Bucket
from activities.store.layers import LayerObjects
from activities.store.log_archive import BucketLogActivities
from activities.store.metadata import read_metadata, wrong_objects
from activities.store.objects import metadata_name
from activities.template.artifacts import remove_objects
from activities.template.base import BucketBaseActivities
from activities.template.layering import LayerMaker, Upload
from tests.support.layered_builds import (
    BLOCK,
    LayeredBuild,
    build_on,
    metadata_of,
    publish_at_once,
    pulls_the_same,
    stored_of,
)
from tests.support.step_checks import go_on

pytestmark = pytest.mark.counts_nothing

ROOTFS = ArtifactName.ROOTFS


def is_read_by_e2b(bucket: Bucket, build: LayeredBuild) -> bool:
    return read_as_e2b(bucket, build.held.scope.build_id) == build.disk


def read_as_e2b(bucket: Bucket, build_id: str) -> bytes:
    """Read a disk as E2B's orchestrator does: by the header and the objects that it names."""
    found = bucket.read_object(f"{build_id}/rootfs.ext4.header")
    assert found is not None
    header = found[0]
    version, block, size, generation, own, base = struct.unpack_from("<QQQQ16s16s", header)
    assert (version, block, own) == (3, BLOCK, uuid.UUID(build_id).bytes)
    disk, owners = bytearray(), set[bytes]()
    for at in range(64, len(header), 40):
        offset, length, owner, where = struct.unpack_from("<QQ16sQ", header, at)
        assert offset == len(disk) and length % block == 0
        if owner == bytes(16):
            disk += bytes(length)
            continue
        owners.add(owner)
        data = bucket.read_object(f"{uuid.UUID(bytes=owner)}/rootfs.ext4")
        assert data is not None
        disk += data[0][where : where + length]
    assert len(disk) == size
    assert len(owners - {own}) <= generation and (generation == 0) == (base == own)
    return bytes(disk)


async def test_a_template_has_only_what_no_layer_has(empty_bucket: Bucket, tmp_path: Path) -> None:
    build = build_on(tmp_path / "h1", empty_bucket, tenant="acme")
    build.makes("base", "base", 400).makes("step 1", 1, 30, "acme").makes("step 2", 2, 20, "acme")
    await build.publish(build.boots())
    made, build_id = metadata_of(empty_bucket, build), build.held.scope.build_id
    assert [layer.layer_id for layer in made.layers] == [layer_of(key) for key in build.chain]
    assert made.artifacts[ROOTFS].sent_bytes <= 5 * BLOCK
    assert made.artifacts[ROOTFS].size_bytes == len(build.disk)
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")
    assert is_read_by_e2b(empty_bucket, build)
    told = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert [each["layer_id"] for each in told["artifacts"][ROOTFS]["layers"]] == [
        layer_of(key) for key in build.chain
    ]
    for key, owner in zip(build.chain, ("", "acme", "acme"), strict=True):
        record = LayerObjects(empty_bucket).read(layer_of(key))
        assert record is not None and record.owner == owner
        assert read_as_e2b(empty_bucket, record.layer_id)
        blobs = list(empty_bucket._bucket.list_blobs(prefix=f"{record.layer_id}/rootfs.ext4"))
        assert {(blob.metadata or {}).get("tenant", "") for blob in blobs} == {owner}
    assert empty_bucket.list_objects(f"{build_id}/.parts/") == []


async def test_a_second_template_of_an_image_sends_what_is_different(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    first = build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 400)
    await first.publish(first.boots("one"))
    second = build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 400)
    snapshot = second.boots("two", 20)
    storage.traffic(clear=True)
    uploads = await second.upload(snapshot)
    assert storage.traffic()["operations"]["upload"]["bytes_in"] < 40 * BLOCK
    await second.publish(snapshot, uploads)
    both = [metadata_of(empty_bucket, each).artifacts[ROOTFS] for each in (first, second)]
    assert stored_of(both) < stored_of(both[:1]) + 21 * BLOCK
    for build in (first, second):
        assert pulls_the_same(empty_bucket, build, tmp_path / build.held.scope.build_id)


async def test_two_hosts_make_one_base_at_once(empty_bucket: Bucket, tmp_path: Path) -> None:
    """Their bytes differ. Whoever comes second, or is in the way, has a template all the same."""
    builds = [build_on(tmp_path / host, empty_bucket).makes("base", host, 400) for host in "ab"]
    for host, build in zip("ab", builds, strict=True):
        build.makes("step", f"step {host}", 20)
    await publish_at_once(empty_bucket, builds, tmp_path / "out")
    for build in builds:
        assert is_read_by_e2b(empty_bucket, build)


async def test_a_host_takes_the_bytes_of_who_was_first(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    first = build_on(tmp_path / "a", empty_bucket).makes("base", "a", 400)
    await first.publish(first.boots())
    second = build_on(tmp_path / "b", empty_bucket).makes("base", "b", 400)
    hashes = [sha256_of(build.path(0), go_on) for build in (first, second)]
    await second.publish(second.boots())
    assert sha256_of(second.path(0), go_on) == hashes[0] != hashes[1]
    assert metadata_of(empty_bucket, second).layers == metadata_of(empty_bucket, first).layers
    assert pulls_the_same(empty_bucket, second, tmp_path / "out")
    third = build_on(tmp_path / "b", empty_bucket)  # what is made there now is made of these bytes
    third.chain, third.disk = second.chain, second.path(0).read_bytes()
    await third.publish(third.boots("third"))
    assert metadata_of(empty_bucket, third).artifacts[ROOTFS].sent_bytes <= 5 * BLOCK


async def test_builds_of_one_host_share_a_base_that_they_make_at_once(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    builds = [build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 400) for _ in range(3)]
    snapshots = [build.boots(number) for number, build in enumerate(builds)]
    both = zip(builds, snapshots, strict=True)
    await asyncio.gather(*(build.publish(snapshot) for build, snapshot in both))
    first, *others = [metadata_of(empty_bucket, build).layers for build in builds]
    assert [layer.layer_id for layer in first] == [layer_of(builds[0].chain[0])]
    assert others == [first, first]


async def test_a_disk_below_that_is_replaced_meanwhile_is_not_compared_with(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host has room for the bytes of one of those who have made a checkpoint."""
    first = build_on(tmp_path / "h2", empty_bucket, tenant="acme")
    first.makes("base", "base", 400).makes("own", "of h2", 20, "acme")
    await first.publish(first.boots("first"))
    build = build_on(tmp_path / "h1", empty_bucket, tenant="acme")
    build.makes("base", "base", 400).makes("own", "of h1", 20, "acme")
    disk_of_h1 = build.disk
    snapshot, booted = build.boots("second"), build.disk
    stack = LayerMaker.stack

    def stack_and_lose(maker: LayerMaker, chain: Sequence[DiskKey], upload: Upload) -> object:
        found = stack(maker, chain, upload)
        build.disk = disk_of_h1
        build.keeps(chain[-1].fingerprint)  # another build has made it anew
        return found

    with monkeypatch.context() as patched:
        patched.setattr(LayerMaker, "stack", stack_and_lose)
        with pytest.raises(CheckpointLostError) as lost:
            await build.upload(snapshot)
    assert lost.value.step is Step.UPLOAD
    build.disk = booted
    await build.publish(snapshot)
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")


async def test_what_one_tenant_has_made_is_not_taken_for_another(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    """Also where their checkpoints have one fingerprint, and the host has the very bytes."""
    builds = [build_on(tmp_path / "h1", empty_bucket, tenant=tenant) for tenant in ("acme", "beta")]
    for build in builds:
        build.makes("base", "base", 400).makes("step", "step", 20, build.held.scope.tenant)
        await build.publish(build.boots(build.held.scope.tenant))
    of_acme, of_beta = (metadata_of(empty_bucket, build).layers for build in builds)
    assert of_acme[0] == of_beta[0]
    assert of_acme[1].layer_id != of_beta[1].layer_id
    blobs = list(empty_bucket._bucket.list_blobs(prefix=f"{of_beta[1].layer_id}/rootfs.ext4"))
    assert [blob.metadata for blob in blobs] == [{"tenant": "beta"}] * 2


async def test_disks_that_the_host_has_no_more_are_left_out(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    build = build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 400)
    build.makes("step 1", 1, 30).makes("step 2", 2, 20)
    build.path(1).unlink()
    await build.publish(build.boots())
    made = metadata_of(empty_bucket, build)
    wanted = [layer_of(build.chain[0]), layer_of(build.chain[2])]
    assert [layer.layer_id for layer in made.layers] == wanted
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")
    again = build_on(tmp_path / "h2", empty_bucket)  # a host that has none of them
    again.chain, again.disk = build.chain, build.disk
    await again.publish(again.boots("again"))
    assert metadata_of(empty_bucket, again).layers == made.layers
    assert pulls_the_same(empty_bucket, again, tmp_path / "again")


async def test_a_layer_that_is_damaged_is_not_built_upon(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    first = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 400)
    await first.publish(first.boots())
    lost = metadata_of(empty_bucket, first).layers[0].objects["data"]
    empty_bucket.delete_object(lost.name, lost.generation)
    second = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 400)
    await second.publish(second.boots("second"))
    assert metadata_of(empty_bucket, second).layers == ()
    assert pulls_the_same(empty_bucket, second, tmp_path / "out")


async def test_a_layer_that_has_gone_before_publishing_sends_the_build_back(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    build = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 100)
    snapshot = build.boots()
    uploads = await build.upload(snapshot)
    remove_objects(empty_bucket, f"{layer_of(build.chain[0])}/")
    with pytest.raises(CheckpointLostError, match="no longer there"):
        await build.publish(snapshot, uploads)
    await build.publish(snapshot)
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")


@pytest.mark.parametrize("is_taken", [False, True])
async def test_who_looked_before_a_template_was_there_takes_no_layer_from_it(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    """What has ended the use of its layers has seen no `metadata.json`, which comes just then."""
    build = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 100)
    build_id, layer = build.held.scope.build_id, layer_of(build.chain[0])
    snapshot = build.boots()
    uploads = await build.upload(snapshot)
    write, uses = Bucket.write_object, LayerObjects.uses

    def write_late(bucket: Bucket, name: str, data: bytes, **more: Any) -> StoredObject:
        if name == metadata_name(build_id):
            BucketLogActivities(bucket)._let_go(build_id)
        return write(bucket, name, data, **more)

    def use_late(layers: LayerObjects, of: str) -> list[StoredObject]:
        if is_taken:
            layers.collect(layer)  # before it is named once more
        return uses(layers, of)

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "write_object", write_late)
        patched.setattr(LayerObjects, "uses", use_late)
        lost = pytest.raises(CheckpointLostError, match="no longer there")
        with lost if is_taken else contextlib.nullcontext():
            await build.publish(snapshot, uploads)
        assert (read_metadata(empty_bucket, build_id) is None) == is_taken
    if is_taken:
        await build.publish(snapshot)
    assert not LayerObjects(empty_bucket).collect(layer)
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")


async def test_a_layer_that_is_larger_than_a_host_makes_disks_is_not_taken(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    first, second = (
        build_on(tmp_path / host, empty_bucket).makes("base", host, 400) for host in "ab"
    )
    await first.publish(first.boots())
    held = second.held
    small = replace(held, settings=held.settings.model_copy(update={"max_rootfs_mb": 1}))
    second = replace(second, held=small)
    await second.publish(second.boots())
    assert metadata_of(empty_bucket, second).layers == ()
    assert pulls_the_same(empty_bucket, second, tmp_path / "out")


@pytest.mark.parametrize(
    "operation",
    [
        "upload",
        "compose",
        *(pytest.param(each, marks=pytest.mark.whole) for each in ("get", "list", "delete")),
    ],
)
async def test_an_upload_that_was_cut_off_is_gone_on_with(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack, operation: str
) -> None:
    """Wherever it stops, the next attempt ends with a template that is whole."""
    for skip in (1, 6):
        build = build_on(tmp_path / "a", empty_bucket).makes(f"base {skip}", skip, 100)
        build.makes(f"step {skip}", f"step {skip}", 10)
        snapshot = build.boots(skip)
        rule = {"kind": "status", "status": 403, "operation": operation, "skip": skip}
        with storage.faults({**rule, "count": None}):
            try:
                await build.publish(snapshot)
            except TemplateManagerError as error:
                assert not isinstance(error, CheckpointLostError)
        await build.publish(snapshot)
        made = metadata_of(empty_bucket, build)
        assert wrong_objects(empty_bucket, made) == []
        assert pulls_the_same(empty_bucket, build, tmp_path / f"out-{skip}")
        assert empty_bucket.list_objects(f"{build.held.scope.build_id}/.parts/") == []


async def test_twice_at_once_is_once(empty_bucket: Bucket, tmp_path: Path) -> None:
    build = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 200).makes("step", 1, 9)
    snapshot = build.boots()
    published: list[PublishedTemplate] = await asyncio.gather(
        *(build.publish(snapshot) for _ in range(2))
    )
    assert published[0] == published[1]
    assert len(metadata_of(empty_bucket, build).layers) == 2
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")


async def test_a_template_on_a_template_has_its_disk_as_a_layer(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    """It is copied within the bucket, and stays when the parent is deleted."""
    parent = build_on(tmp_path / "a", empty_bucket).makes("base", "base", 400)
    await parent.publish(parent.boots("parent", 60))
    child = build_on(tmp_path / "b", empty_bucket)
    held = child.held
    bases = BucketBaseActivities(held.settings, held.ledger, held.store, empty_bucket)
    storage.traffic(clear=True)
    taken = await ActivityEnvironment().run(
        bases.import_template,
        ImportTemplateInput(scope=held.scope, build_id=parent.held.scope.build_id),
    )
    assert storage.traffic()["operations"]["upload"]["bytes_in"] < 10 * BLOCK
    assert taken.base is not None
    child.chain, child.disk = taken.base.disk.chain, parent.disk
    await child.publish(child.makes("change", "change", 10).boots("child"))
    made = metadata_of(empty_bucket, child)
    assert [layer.layer_id for layer in made.layers] == [
        layer_of(key) for key in (*parent.chain, *child.chain)
    ]
    assert made.artifacts[ROOTFS].sent_bytes <= 5 * BLOCK
    remove_objects(empty_bucket, f"{parent.held.scope.build_id}/")
    assert pulls_the_same(empty_bucket, child, tmp_path / "out")
    assert is_read_by_e2b(empty_bucket, child)
    assert hashlib.sha256(child.disk).hexdigest() == made.artifacts[ROOTFS].sha256
