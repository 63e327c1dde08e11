"""Disks of a build that go up as layers while others are made of them, on a real emulator."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import pytest
from devstack.stack import Stack
from temporalio.client import WorkflowExecutionStatus
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import DiskKey
from activities.contract.errors import TemplateManagerError
from activities.contract.inputs import DiscardUploadInput, SendLayersInput, SweepInput
from activities.contract.names import Step
from activities.contract.requests import BuildOptions
from activities.contract.results import SweepReport
from activities.disk.sparse_files import sha256_of
from activities.host.sweep import HostSweep
from activities.image.docker_daemon import make_docker_client
from activities.step.build_log import read_entries
from activities.step.layer_disks import layer_of
from activities.store.bucket import Bucket
from activities.store.layer_leftovers import collect_all_of
from activities.store.layers import LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.metadata import read_metadata
from activities.store.objects import LEASES, STORED
from activities.store.stored import TenantStored, read_stored
from activities.template import ahead
from activities.template.artifacts import discard_upload
from tests.support.held_layers import POINTS, held_at
from tests.support.layered_bucket import delete, deleting, is_there, make_layer, sweep
from tests.support.layered_builds import (
    BLOCK,
    LayeredBuild,
    build_on,
    disk_named,
    publish_at_once,
    pulls_the_same,
    require_whole,
)
from tests.support.step_checks import go_on

pytestmark = pytest.mark.counts_nothing

NAMES = ("base", "step 1", "step 2")
CHAIN = tuple(map(disk_named, NAMES))
SHORT = BuildOptions(lease_grace_seconds=0.0)


def sending(
    build: LayeredBuild, environment: ActivityEnvironment, chain: Sequence[DiskKey] = CHAIN
) -> asyncio.Task[int]:
    """Begin to send these disks, whether they are there or not."""
    asked = SendLayersInput(scope=build.held.scope, chain=tuple(chain))
    return asyncio.create_task(environment.run(build.layer_activities().send_layers, asked))


async def sending_held_at(
    build: LayeredBuild, monkeypatch: pytest.MonkeyPatch, point: str
) -> tuple[asyncio.Task[int], Event]:
    """Have all disks of a build made and sent, held at a point until the event is set."""
    for name in NAMES:
        build.makes(name, name, 50)
    reached, released = held_at(monkeypatch, point)
    work = sending(build, ActivityEnvironment())
    await until(reached.is_set)
    return work, released


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(is_so):
            await asyncio.sleep(0.1)


def is_whole(bucket: Bucket, key: DiskKey) -> bool:
    return LayerObjects(bucket).read(layer_of(key)) is not None


def left_of(bucket: Bucket, build: LayeredBuild) -> list[str]:
    """Return what is named after a build in the bucket, without its lease."""
    build_id = build.held.scope.build_id
    names = (stored.name for stored in bucket.list_objects(""))
    return [name for name in names if build_id in name and not name.startswith(".leases/")]


def require_nothing_left(bucket: Bucket) -> None:
    """Require that a bucket has nothing but leases and what sweeps count."""
    left = [stored.name for stored in bucket.list_objects("")]
    assert [name for name in left if not name.startswith((LEASES, STORED))] == []


async def test_a_disk_goes_up_while_the_next_step_is_at_work(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    """And again, by another attempt, nothing; the upload sends what the boot has written."""
    build = build_on(tmp_path / "h1", empty_bucket)
    held = build.held
    work = sending(build, ActivityEnvironment())
    for name, after in zip(NAMES, (*NAMES[1:], None), strict=True):
        build.makes(name, name, 300 if name == "base" else 20)
        if after is None:
            break
        key = disk_named(after).fingerprint
        with held.store.making(Step.ROOTFS, key, held.scope, 1, go_on):  # the next step
            await until(lambda: is_whole(empty_bucket, build.chain[-1]))
    assert await work == 3
    storage.traffic(clear=True)
    assert await sending(build, ActivityEnvironment()) == 3
    assert storage.traffic()["operations"]["upload"]["bytes_in"] < 4 * BLOCK
    await build.publish(build.boots())
    made = read_metadata(empty_bucket, held.scope.build_id)
    assert made is not None
    assert [layer.layer_id for layer in made.layers] == [layer_of(key) for key in build.chain]
    assert made.artifacts["rootfs.ext4"].sent_bytes <= 5 * BLOCK


async def test_where_no_disk_comes_any_more_it_ends(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "IDLE_SECONDS", 1.0)
    build = build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 100)
    assert await sending(build, ActivityEnvironment()) == 1
    assert is_whole(empty_bucket, build.chain[0])


@pytest.mark.parametrize("operation", ["upload", "compose"])
async def test_what_was_cut_off_is_gone_on_with(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack, operation: str
) -> None:
    build = build_on(tmp_path / "h1", empty_bucket)
    for name in NAMES:
        build.makes(name, name, 50)
    rule = {"kind": "status", "status": 403, "operation": operation, "skip": 1, "count": None}
    with storage.faults(rule), pytest.raises(TemplateManagerError):
        await sending(build, ActivityEnvironment())
    assert await sending(build, ActivityEnvironment()) == 3
    assert [is_whole(empty_bucket, key) for key in build.chain] == [True] * 3
    assert empty_bucket.list_objects(f"{build.held.scope.build_id}/.parts/") == []


async def test_steps_keep_their_disks_where_another_host_was_first(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    """The bytes of a base differ from host to host: the upload takes the bucket's, no step does."""
    first = build_on(tmp_path / "a", empty_bucket).makes("base", "a", 100)
    await first.publish(first.boots())
    second = build_on(tmp_path / "b", empty_bucket)
    for name in NAMES:
        second.makes(name, f"{name} of b", 50)
    own = sha256_of(second.path(0), go_on)
    assert await sending(second, ActivityEnvironment()) == 0
    assert sha256_of(second.path(0), go_on) == own
    log = read_entries(tmp_path / "b" / "logs" / f"{second.held.scope.build_id}.jsonl")
    assert "is another build's" in log[-1].message
    await second.publish(second.boots())
    assert [is_whole(empty_bucket, key) for key in second.chain] == [True] * 3


async def test_a_layer_that_another_build_makes_is_waited_for(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps are at work; where all disks are there, the upload does not wait for it."""
    monkeypatch.setattr(ahead, "AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(ahead, "TRIES", 1000)
    build, other = (build_on(tmp_path / host, empty_bucket) for host in "ab")
    layers = LayerObjects(empty_bucket)
    claim = layers.claim(layer_of(disk_named("base")), other.held.scope)
    assert claim is not None
    build.makes("base", "base", 50)
    work = sending(build, ActivityEnvironment())
    await until(lambda: len(layers.uses(build.held.scope.build_id)) == 1)  # it has looked
    layers.abandon(claim)
    await until(lambda: is_whole(empty_bucket, build.chain[0]))
    claim = layers.claim(layer_of(disk_named("step 1")), other.held.scope)
    assert claim is not None
    for name in NAMES[1:]:
        build.makes(name, name, 5)
    assert await asyncio.wait_for(work, 60) == 1


async def test_of_a_cancelled_build_nothing_is_left(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    """Layers that are whole stay, as a cache; what was half sent goes, and what names the build."""
    build, environment = build_on(tmp_path / "h1", empty_bucket), ActivityEnvironment()
    build.makes("base", "base", 50)
    work = sending(build, environment)
    await until(lambda: is_whole(empty_bucket, build.chain[0]))
    with storage.faults({"kind": "slow", "operation": "compose", "delay": 2}):
        build.makes("step 1", "step 1", 50)
        await until(lambda: any("/.parts/" in name for name in left_of(empty_bucket, build)))
        environment.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(work, 60)
    discarded = DiscardUploadInput(scope=build.held.scope, keep_parts=False)
    await asyncio.to_thread(discard_upload, empty_bucket, discarded)
    assert left_of(empty_bucket, build) == []
    assert is_whole(empty_bucket, build.chain[0])
    names = [stored.name for stored in empty_bucket.list_objects(f"{layer_of(build.chain[1])}/")]
    assert names == [] or is_whole(empty_bucket, build.chain[1])  # it may have been quicker


# ---- Others, at the same time


async def test_of_two_hosts_that_send_the_same_both_are_right(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    """Each step has left other bytes on either; one host's become layers, none is written twice."""
    builds = [build_on(tmp_path / host, empty_bucket) for host in "ab"]
    for host, build in zip("ab", builds, strict=True):
        for name in NAMES:
            build.makes(name, f"{name} of {host}", 100)
    work = [sending(build, ActivityEnvironment()) for build in builds]
    async with asyncio.timeout(120):
        sent = await asyncio.gather(*work)
    assert sum(sent) == sum(is_whole(empty_bucket, key) for key in builds[0].chain)
    await publish_at_once(empty_bucket, builds, tmp_path / "out")
    for build in builds:
        assert not any("/.parts/" in name for name in left_of(empty_bucket, build))


at_each_point = pytest.mark.parametrize(
    "point",
    [each if each == "header" else pytest.param(each, marks=pytest.mark.whole) for each in POINTS],
)


@at_each_point
async def test_a_delete_and_a_sweep_take_nothing_from_a_build_that_sends(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """The build is at its third layer; a template on the two below is all that was on them."""
    template = build_on(tmp_path / "h1", empty_bucket)
    for name in NAMES[:2]:
        template.makes(name, name, 50)
    await template.publish(template.boots())
    build = build_on(tmp_path / "h1", empty_bucket)
    work, released = await sending_held_at(build, monkeypatch, point)
    await delete(deleting(empty_bucket), template.held.scope)
    await sweep(empty_bucket, running={build.held.scope.build_id}, hours=0)
    released.set()
    assert await work == 3
    assert [is_whole(empty_bucket, key) for key in build.chain] == [True] * 3
    await build.publish(build.boots())
    require_whole(empty_bucket, build, tmp_path / "out")
    await delete(deleting(empty_bucket), build.held.scope)
    require_nothing_left(empty_bucket)


async def sweep_host(build: LayeredBuild) -> SweepReport:
    """Sweep the host of a build that runs: no other does, and the cache may keep nothing."""

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        runs = build_id == build.held.scope.build_id
        return WorkflowExecutionStatus.RUNNING if runs else None

    held = build.held
    sweeper = HostSweep(
        held.settings.model_copy(update={"build": SHORT, "checkpoint_max_mb": 0}),
        held.ledger,
        held.store,
        LeaseObjects(build.bucket),
        make_docker_client(),
        describe,
    )
    report: SweepReport = await ActivityEnvironment().run(sweeper.sweep_host, SweepInput())
    assert [item.error for item in report.items if item.error] == []
    return report


@at_each_point
async def test_its_host_s_sweep_takes_nothing_from_a_build_that_sends(
    empty_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """What only a build had that has gone, it does take; and no lock, however old its file."""
    gone = build_on(tmp_path / "h1", empty_bucket).makes("base", "base", 50)
    gone.makes("of its own", "own", 50)
    build = build_on(tmp_path / "h1", empty_bucket)
    work, released = await sending_held_at(build, monkeypatch, point)
    for lock in (tmp_path / "h1" / "locks").iterdir():
        os.utime(lock, (1, 1))
    report = await sweep_host(build)
    assert [item.name for item in report.items if item.kind == "checkpoint"] == [
        f"{Step.ROOTFS}/{gone.chain[-1].fingerprint}"
    ]
    held_locks = [lock.name for lock in (tmp_path / "h1" / "locks").iterdir()]
    assert f"layer.{layer_of(CHAIN[0])}" in held_locks
    released.set()
    assert await work == 3
    await build.publish(build.boots())
    assert pulls_the_same(empty_bucket, build, tmp_path / "out")


@at_each_point
@pytest.mark.parametrize("base_by", ["another tenant", "the tenant"])
async def test_a_tenant_is_removed_while_a_frozen_host_sends(
    empty_bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    base_by: str,
) -> None:
    """It is at everybody's base, or at a layer of the tenant's own.

    Another tenant's build needs that base, and a layer of the removed one's.
    """
    mine, theirs = (build_on(tmp_path / t, empty_bucket, tenant=t) for t in ("acme", "beta"))
    for build in (mine, theirs):
        tenant = build.held.scope.tenant
        build.makes("base", "base", 50).makes("step", tenant, 20, owner=tenant)
    if base_by == "another tenant":
        await theirs.publish(theirs.boots())
    reached, released = held_at(monkeypatch, point)
    work = sending(mine, ActivityEnvironment(), mine.chain)
    await until(reached.is_set)
    if base_by == "the tenant":
        await theirs.publish(theirs.boots())
    used = make_layer(empty_bucket, mine.held.scope, "beta builds on it", owner="acme")
    assert LayerObjects(empty_bucket).refer(used.layer_id, theirs.held.scope)
    deletion = deleting(empty_bucket)
    deleted = await delete(deletion, mine.held.scope)
    collect_all_of(empty_bucket, "acme")
    released.set()
    with contextlib.suppress(TemplateManagerError):
        await work
    late = ActivityEnvironment().run
    await late(deletion.remove_late_arrivals, deleted, mine.held.scope.build_id)
    for _ in range(2):  # it counts before it removes
        await sweep(empty_bucket, running={theirs.held.scope.build_id})
    assert left_of(empty_bucket, mine) == []
    assert is_there(empty_bucket, used)
    own = sum(stored.size_bytes for stored in empty_bucket.list_objects(f"{used.layer_id}/"))
    counted = read_stored(empty_bucket)
    assert counted is not None
    assert counted.of("acme") == TenantStored(templates=0, bytes=own)
    assert counted.of("beta").templates == 1
    assert empty_bucket.list_objects(f"{layer_of(mine.chain[1])}/") == []
    require_whole(empty_bucket, theirs, tmp_path / "out")
    await delete(deletion, theirs.held.scope)
    require_nothing_left(empty_bucket)
