"""Deletes, undos and sweeps take the layers that nobody needs, and no other."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from devstack.stack import Stack
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import LeaseLostError
from activities.contract.inputs import DiscardUploadInput, SweepInput
from activities.contract.names import ArtifactName
from activities.contract.references import TemplateReference
from activities.contract.results import DeletedTemplate, SweepReport
from activities.contract.scope import BuildScope
from activities.host.bucket_sweep import BucketSweep
from activities.process.clock import utc_now
from activities.store import bucket as bucket_module
from activities.store import layers as layers_module
from activities.store.bucket import Bucket
from activities.store.layer_leftovers import leftover_layers
from activities.store.layers import EVERYBODY, LayerObjects, LayerRecord
from activities.store.lease_numbers import LeaseObjects
from activities.store.log_archive import BucketLogActivities
from activities.store.names import TenantNames
from activities.store.objects import (
    artifact_name,
    layer_record_name,
    metadata_name,
    reference_name,
    used_layers_prefix,
)
from activities.store.stored import TenantStored, count_stored, templates_of
from activities.template.artifacts import discard_upload
from activities.template.deletion import BucketDeletionActivities
from api.server.template_bucket import TemplateBucket
from tests.support.example_template import metadata
from tests.support.layered_bucket import (
    InterruptedBucket,
    delete,
    deleting,
    id_of,
    input_of,
    is_there,
    make_chain,
    make_layer,
    release,
    scope_of,
    sweep,
    write_layer,
)

pytestmark = pytest.mark.counts_nothing

RUNNING = WorkflowExecutionStatus.RUNNING


@pytest.fixture
def layers(empty_bucket: Bucket) -> LayerObjects:
    return LayerObjects(empty_bucket)


@pytest.fixture
def deletion(empty_bucket: Bucket) -> BucketDeletionActivities:
    return deleting(empty_bucket)


def publish(bucket: Bucket, scope: BuildScope) -> None:
    """Write what the sweep takes for a template."""
    for name in (artifact_name(scope.build_id, ArtifactName.ROOTFS), metadata_name(scope.build_id)):
        bucket.write_object(name, b"x", metadata={"tenant": scope.tenant})


async def end_delete(
    deletion: BucketDeletionActivities, deleted: DeletedTemplate, scope: BuildScope
) -> None:
    await ActivityEnvironment().run(deletion.remove_late_arrivals, deleted, scope.build_id)


def names_of(bucket: Bucket) -> list[str]:
    return [stored.name for stored in bucket.list_objects("")]


# ---- Deletes and undos


async def test_a_delete_takes_the_layers_that_no_other_template_needs(
    deletion: BucketDeletionActivities, layers: LayerObjects, empty_bucket: Bucket
) -> None:
    parent, child = scope_of(), scope_of()
    base, step = make_chain(empty_bucket, parent, "base", "step")
    publish(empty_bucket, parent)
    layers.refer(base.layer_id, child)
    own = make_layer(empty_bucket, child, "own", (base.reference,))
    publish(empty_bucket, child)

    deleted = await delete(deletion, parent)
    assert layers.read(step.layer_id) is None
    assert [is_there(empty_bucket, record) for record in (base, own)] == [True, True]
    await end_delete(deletion, deleted, parent)
    assert not any(parent.build_id in name for name in names_of(empty_bucket))
    await end_delete(deletion, await delete(deletion, child), child)
    assert names_of(empty_bucket) == []


async def test_what_a_frozen_host_names_after_the_delete_is_let_go(
    deletion: BucketDeletionActivities, layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    deleted = await delete(deletion, scope)
    make_layer(empty_bucket, scope, "base")
    layers.claim(id_of("unfinished"), scope)
    await end_delete(deletion, deleted, scope)
    assert names_of(empty_bucket) == []


async def test_a_new_build_of_the_same_id_keeps_its_layers(
    deletion: BucketDeletionActivities, layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    deleted = await delete(deletion, scope)
    await delete(deletion, scope)  # a later tombstone: what comes now is not of the first
    made = make_layer(empty_bucket, scope, "base")
    await end_delete(deletion, deleted, scope)
    assert not layers.collect(made.layer_id)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_delete_that_was_held_up_takes_nothing_from_a_new_build_of_the_id(
    layers: LayerObjects, empty_bucket: Bucket, pytestconfig: pytest.Config, has_ended: bool
) -> None:
    """Its attempt has timed out, and a later one has ended, when its thread goes on."""
    stride = 1 if pytestconfig.getoption("--whole") else 4
    scope, ended = scope_of(), 0
    names = TenantNames(empty_bucket, scope.tenant)
    leases = LeaseObjects(empty_bucket)
    number_of_lease, is_outdated = 0, False

    def require_awaited() -> None:
        if is_outdated:
            raise LeaseLostError("another attempt deletes it")

    def build() -> LayerRecord:
        made = layers.refer(id_of("base"), scope) or make_layer(empty_bucket, scope, "base")
        told = metadata(scope.build_id, tenant=scope.tenant).to_json().encode()
        empty_bucket.write_object(metadata_name(scope.build_id), told)
        names.assign("web", scope.build_id, ["stable"], asked=utc_now())
        return made

    def delete_and_build() -> None:
        nonlocal number_of_lease, is_outdated
        deleted = deleting(empty_bucket)._delete_objects(input_of(scope), require_awaited)
        is_outdated = True
        assert deleted.tombstone_generation is not None
        leases.unbury(scope.build_id, deleted.tombstone_generation)
        number_of_lease = leases.take(scope.build_id, "h1", "w", None)
        build()
        if has_ended:
            leases.release(scope.build_id, number_of_lease)

    for number in (*range(4), *range(4, 80, stride)):
        is_outdated = False
        empty_bucket.delete_objects(empty_bucket.list_objects(""))
        build()
        held_up = InterruptedBucket(empty_bucket.name, number, delete_and_build)
        with contextlib.suppress(LeaseLostError):
            deleting(held_up)._delete_objects(input_of(scope), require_awaited)
            ended += 1
        if not held_up.was_interrupted:
            assert ended
            return
        made = layers.read(id_of("base"))
        assert made is not None
        assert is_there(empty_bucket, made)
        assert not layers.collect(made.layer_id)
        assert empty_bucket.stat_object(metadata_name(scope.build_id)) is not None
        assert names.resolve(TemplateReference("", "web", "stable")) == scope.build_id
        assert has_ended or leases.is_current(scope.build_id, number_of_lease)
    raise AssertionError("it never ends")


@contextlib.contextmanager
def needed_by(storage: Stack, bucket: Bucket, layer_id: str, others: int) -> Iterator[Path]:
    """Have so many builds more refer to a layer, written where the emulator keeps its objects.

    By its API that takes longer than any test may. Yields the directory of the references.
    """
    name = reference_name(layer_id, str(uuid.uuid4()))
    bucket.write_object(name, b"")
    first = storage.environment.state_dir / "gcs" / bucket.name / name
    for _ in range(others - 1):
        os.link(first, first.with_name(str(uuid.uuid4())))
    try:
        yield first.parent
    finally:
        shutil.rmtree(first.parent)


async def requests_of_a_delete(
    deletion: BucketDeletionActivities, bucket: Bucket, storage: Stack, others: int
) -> dict[str, int]:
    scope = scope_of()
    chain = make_chain(bucket, scope_of(), *(f"{others} {name}" for name in ("base", "step")))
    for record in chain:
        LayerObjects(bucket).refer(record.layer_id, scope)
    publish(bucket, scope)
    with needed_by(storage, bucket, chain[0].layer_id, others) as references:
        storage.traffic(clear=True)
        await delete(deletion, scope)
        sums = storage.traffic()["operations"]
        # All others, the build that has made it, and the layer above.
        assert len(list(references.iterdir())) == others + 2
    return {name: int(each["requests"]) for name, each in sums.items()}


@pytest.mark.timeout(3600)  # the emulator reads each object's file to list whichever of them
async def test_a_delete_costs_the_same_whoever_else_needs_its_layers(
    deletion: BucketDeletionActivities,
    empty_bucket: Bucket,
    storage: Stack,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    monkeypatch.setattr(bucket_module, "TIMEOUT", (5, 600))
    many = 10_000 if pytestconfig.getoption("--whole") else 60
    few = await requests_of_a_delete(deletion, empty_bucket, storage, 10)
    assert await requests_of_a_delete(deletion, empty_bucket, storage, many) == few
    assert sum(few.values()) < 40


def test_a_failed_build_keeps_no_layer_and_leaves_those_that_are_whole(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    made = make_layer(empty_bucket, scope, "base")
    claim = layers.claim(id_of("unfinished"), scope)
    assert claim is not None
    write_layer(empty_bucket, claim, "unfinished")
    discard_upload(empty_bucket, DiscardUploadInput(scope=scope, keep_parts=True))
    assert names_of(empty_bucket) == sorted(
        name for name in names_of(empty_bucket) if name.startswith(f"{made.layer_id}/")
    )
    assert is_there(empty_bucket, made)
    assert layers.collect(made.layer_id)


@pytest.mark.parametrize("ending", ["discard", "archive"])
def test_an_end_that_was_held_up_takes_nothing_from_the_retry_that_published(
    layers: LayerObjects, empty_bucket: Bucket, ending: str
) -> None:
    """Its activity has timed out; its thread goes on when the retry has published."""
    scope = scope_of()
    made = make_layer(empty_bucket, scope, "base")

    def retry() -> None:
        layers.refer(made.layer_id, scope)
        publish(empty_bucket, scope)

    for number in range(1, 40):
        empty_bucket.delete_objects(empty_bucket.list_objects(scope.build_id))
        layers.refer(made.layer_id, scope)
        held_up = InterruptedBucket(empty_bucket.name, number, retry)
        if ending == "discard":
            discard_upload(held_up, DiscardUploadInput(scope=scope, keep_parts=True))
        else:
            BucketLogActivities(held_up)._let_go(scope.build_id)
        if not held_up.was_interrupted:
            return
        assert empty_bucket.stat_object(metadata_name(scope.build_id)) is not None
        assert not layers.collect(made.layer_id)
        assert is_there(empty_bucket, made)
    raise AssertionError("it never ends")


# ---- The sweep


def what(report: SweepReport) -> list[tuple[str, str]]:
    return sorted((item.kind, item.name) for item in report.items)


async def test_the_sweep_takes_old_layers_that_nobody_needs(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    template, build, gone = scope_of(), scope_of(), scope_of()
    used = make_layer(empty_bucket, template, "used")
    publish(empty_bucket, template)
    named = make_layer(empty_bucket, build, "named")
    low, high = make_chain(empty_bucket, gone, "low", "high")
    running = {build.build_id}
    assert what(await sweep(empty_bucket, running=running, dry_run=True)) == [
        ("used layer", gone.build_id)
    ]
    await sweep(empty_bucket, running=running)
    assert empty_bucket.list_objects(used_layers_prefix(gone.build_id)) == []
    assert await sweep(empty_bucket, running=running) == SweepReport()  # they are not old
    report = await sweep(empty_bucket, running=running, hours=0)
    assert what(report) == [("layer", high.layer_id)]  # and the one below with it
    assert report.bytes == sum(stored.size_bytes for stored in high.objects.values())
    assert [layers.read(each.layer_id) for each in (low, high)] == [None, None]
    assert [is_there(empty_bucket, each) for each in (used, named)] == [True, True]
    assert await sweep(empty_bucket, running=running, hours=0) == SweepReport()


async def test_the_sweep_takes_what_is_half_written_unless_its_build_runs(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    build, gone = scope_of(), scope_of()
    for name, scope in (("running", build), ("gone", gone)):
        claim = layers.claim(id_of(name), scope)
        assert claim is not None
        write_layer(empty_bucket, claim, name)
    late = artifact_name(id_of("late"), ArtifactName.ROOTFS)
    empty_bucket.write_object(late, b"of a host that was frozen")
    report = await sweep(empty_bucket, running={build.build_id})
    assert what(report) == sorted(
        [
            ("used layer", gone.build_id),
            ("layer", id_of("gone")),
            ("layer", id_of("late")),
        ]
    )
    left = names_of(empty_bucket)
    assert any(name.startswith(id_of("running")) for name in left)
    assert not any(name.startswith((id_of("gone"), id_of("late"))) for name in left)


async def test_a_template_that_is_published_while_the_sweep_looks_keeps_its_layers(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    scope = scope_of()
    made = make_layer(empty_bucket, scope, "base")

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        publish(empty_bucket, scope)
        return WorkflowExecutionStatus.COMPLETED

    sweeper = BucketSweep(
        empty_bucket,
        describe,
        late_arrival_seconds=0.0,
        most_files_bytes=8,
        layer_max_age_hours=0,
    )
    for _ in range(2):
        await ActivityEnvironment().run(sweeper.sweep_bucket, SweepInput())
    assert is_there(empty_bucket, made)
    assert not layers.collect(made.layer_id)


async def test_nothing_young_is_swept(empty_bucket: Bucket) -> None:
    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        return None

    make_layer(empty_bucket, scope_of(), "base")
    empty_bucket.write_object(artifact_name(id_of("late"), ArtifactName.ROOTFS), b"x")
    sweeper = BucketSweep(
        empty_bucket, describe, late_arrival_seconds=600, most_files_bytes=8, layer_max_age_hours=1
    )
    swept = await ActivityEnvironment().run(sweeper.sweep_bucket, SweepInput())
    assert swept == SweepReport()


async def test_a_template_of_before_whose_id_is_like_a_layers_stays(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    """Ids of version 8 were allowed once. Its objects, and what it needs, are no left-overs."""
    scope = scope_of("11111111-2222-8333-8444-555555555555")
    made = make_layer(empty_bucket, scope, "base")
    publish(empty_bucket, scope)
    before = names_of(empty_bucket)
    for _ in range(2):
        assert await sweep(empty_bucket, hours=0) == SweepReport()
    assert names_of(empty_bucket) == [".stored.json", *before]
    assert not layers.collect(made.layer_id)
    assert templates_of(empty_bucket, "acme") == {scope.build_id}


async def test_a_layer_that_was_used_of_late_is_not_old(
    layers: LayerObjects, empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it go with an old one above it."""
    monkeypatch.setattr(layers_module, "NOTED_EVERY", timedelta(0))
    maker, user = scope_of(), scope_of()
    base, step = make_chain(empty_bucket, maker, "base", "step")
    other = make_layer(empty_bucket, maker, "other")
    release(layers, maker.build_id)
    since = time.time()
    for record in (base, other):
        layers.refer(record.layer_id, user)
    release(layers, user.build_id)
    for leftover in leftover_layers(empty_bucket, since):
        leftover.remove()
    found = [layers.read(each.layer_id) for each in (base, step, other)]
    assert [each is not None for each in found] == [True, False, True]
    assert found[0] is not None
    assert found[0].reference == base.reference
    for _ in range(2):
        for leftover in leftover_layers(empty_bucket, time.time()):
            leftover.remove()
    assert names_of(empty_bucket) == []


def test_the_use_of_a_layer_is_noted_once_in_a_while(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    """However many builds end, `layer.json` is not written by each."""
    made = make_layer(empty_bucket, scope_of(), "base")
    name = layer_record_name(made.layer_id)
    before = empty_bucket.read_object(name)
    assert before is not None
    for _ in range(3):
        user = scope_of()
        layers.refer(made.layer_id, user)
        release(layers, user.build_id)
    assert empty_bucket.read_object(name) == before
    long_ago = made.model_copy(update={"created": made.created - timedelta(days=2)})
    empty_bucket.write_object(
        name, long_ago.model_dump_json().encode(), if_generation_match=before[1]
    )
    generations = set()
    for _ in range(3):
        user = scope_of()
        layers.refer(made.layer_id, user)
        release(layers, user.build_id)
        stored = empty_bucket.stat_object(name)
        generations.add(stored and stored.generation)
    assert len(generations) == 1
    found = layers.read(made.layer_id)
    assert found is not None
    assert found.last_used > made.created


# ---- Whose they are


def test_a_layer_counts_to_its_tenant_once_and_everybodys_to_nobody(
    layers: LayerObjects, empty_bucket: Bucket
) -> None:
    own = make_layer(empty_bucket, scope_of(tenant="acme"), "own")
    make_layer(empty_bucket, scope_of(tenant="acme"), "everybody's", owner=EVERYBODY)
    for tenant in ("acme", "acme", "beta"):
        layers.refer(id_of("everybody's", EVERYBODY), scope_of(tenant=tenant))
    for _ in range(2):
        layers.refer(own.layer_id, scope_of(tenant="acme"))
    size = sum(o.size_bytes for o in empty_bucket.list_objects(f"{own.layer_id}/"))
    counted: dict[str, Any] = count_stored(empty_bucket).tenants
    assert counted == {"acme": TenantStored(templates=0, bytes=size)}


async def test_the_id_of_a_layer_is_no_build(layers: LayerObjects, empty_bucket: Bucket) -> None:
    """So the delete of a build cannot be asked for it, by whomever."""
    scope = scope_of()
    made = make_layer(empty_bucket, scope, "base")
    reading = TemplateBucket(empty_bucket.name)
    assert not await reading.has_objects(made.layer_id)
    assert await reading.has_objects(scope.build_id)
    assert templates_of(empty_bucket, "acme") == {scope.build_id}
    assert templates_of(empty_bucket, "default") == set()
    assert time.time() > made.created.timestamp()
