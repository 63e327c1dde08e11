"""Tenants that wait for a host are served in turns, by Temporal's own matching.

The holds are real: the workflow's, the activity, the host's slots, the leases in the bucket.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

import pytest
from devstack.services import FAIR_SHARE
from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner

from activities.contract.inputs import BuildInput
from activities.contract.names import SHARED_HOST_TASK_QUEUE, lease_task_queue
from activities.contract.scope import HostLease
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.host.hold import KvmHostActivities
from activities.host.worker import tuner_for
from activities.process.temporal import make_worker
from activities.step.ledger import LeaseLedger
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from tests.support.temporal_server import start_temporal
from tests.support.workflow_runs import OPTIONS, config
from workflows.host_hold import HostHold

pytestmark = pytest.mark.counts_nothing

SLOTS = 4
PATIENT = OPTIONS.model_copy(update={"lease_wait_seconds": 600, "heartbeat_timeout_seconds": 30})
QUEUE = "holds-of-a-test"


@workflow.defn(name="HoldsOnce")
class HoldsOnce:
    """What a build does until a host holds it; then it gives the host back."""

    @workflow.init
    def __init__(self, build: BuildInput) -> None:
        self._hold = HostHold(
            build.config,
            PATIENT,
            lambda *_: None,
            preferred_host=None,
            weight=build.fairness_weight,
        )

    @workflow.run
    async def run(self, build: BuildInput) -> datetime:
        self._hold.start()
        await workflow.wait_condition(lambda: self._hold.lease is not None)
        held = workflow.now()
        await self._hold.release()
        return held

    @workflow.signal
    def lease_granted(self, lease: HostLease) -> None:
        self._hold.granted(lease)


@asynccontextmanager
async def running_host(client: Client, bucket: Bucket, data_dir: Path) -> AsyncIterator[Admission]:
    """A host that holds builds, as soon as it is opened."""
    ledger = LeaseLedger(DataDir(data_dir))
    admission = Admission(ledger, SLOTS, Room((), 0))
    hold = KvmHostActivities("h1", ledger, LeaseObjects(bucket), admission)
    async with AsyncExitStack() as stack:
        for worker in (
            make_worker(client, lease_task_queue("h1"), [hold.hold_host, hold.release_host]),
            make_worker(
                client, SHARED_HOST_TASK_QUEUE, [hold.hold_host], tuner=tuner_for(admission)
            ),
            make_worker(
                client,
                QUEUE,
                [],
                workflows=[HoldsOnce],
                workflow_runner=UnsandboxedWorkflowRunner(),
            ),
        ):
            await stack.enter_async_context(worker)
        yield admission


async def waiting(
    client: Client, tenant: str, count: int, weight: float = 1
) -> list[asyncio.Task[datetime]]:
    """Let so many builds of a tenant wait for a host; beta's are batch builds, which must not have
    them wait for all of acme's."""
    handles = [
        await client.start_workflow(
            HoldsOnce.run,
            BuildInput(
                config=config(tenant=tenant, is_batch=tenant == "beta"), fairness_weight=weight
            ),
            id=f"{tenant}-{uuid.uuid4()}",
            task_queue=QUEUE,
        )
        for _ in range(count)
    ]
    for handle in handles:
        while not (await handle.describe()).raw_description.pending_activities:  # its own state
            await asyncio.sleep(0.05)
    return [asyncio.create_task(handle.result()) for handle in handles]


async def held_in_order(host: Admission, **waiting: list[asyncio.Task[datetime]]) -> list[str]:
    """Open the host; return the tenants in the order in which their builds were held."""
    host.open = True
    async with asyncio.timeout(600):
        held = [(await task, tenant) for tenant, tasks in waiting.items() for task in tasks]
    return [tenant for _, tenant in sorted(held)]


@pytest.mark.parametrize(
    ("many", "times"), [(60, 1), pytest.param(200, 5, marks=pytest.mark.whole)]
)
async def test_a_tenant_with_few_builds_does_not_wait_for_one_with_many(
    empty_bucket: Bucket, tmp_path: Path, many: int, times: int
) -> None:
    async with await start_temporal(config=FAIR_SHARE) as server:
        for number in range(times):
            async with running_host(server.client, empty_bucket, tmp_path / str(number)) as host:
                first = await waiting(server.client, "acme", many)
                late = await waiting(server.client, "beta", SLOTS)
                order = await held_in_order(host, acme=first, beta=late)
            places = [place for place, tenant in enumerate(order, 1) if tenant == "beta"]
            print(f"{many} builds of acme wait, then beta's {SLOTS}: they are held at {places}")
            assert places[-1] <= 24


async def test_a_tenant_gets_hosts_as_often_as_its_weight_says(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    async with (
        await start_temporal(config=FAIR_SHARE) as server,
        running_host(server.client, empty_bucket, tmp_path) as host,
    ):
        light = await waiting(server.client, "acme", 20)
        heavy = await waiting(server.client, "beta", 20, weight=3)
        order = await held_in_order(host, acme=light, beta=heavy)
    print("held in this order:", " ".join(order))
    assert 14 <= order[:24].count("beta") <= 20  # 18 is three of four
