"""A build that waits for a host says what for: its place, the hosts, their slots, and why."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.stack import Stack
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.contract.names import SWEEP_HOST_WORKFLOW, step_task_queue
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.host.facts import KvmHostFactsActivities, set_draining
from activities.process.sweep_schedule import schedule_sweep
from activities.process.temporal import register_search_attributes
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.store.bucket import Bucket
from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb
from api.server import known_hosts
from api.server.server import running_server
from tests.support.command_line import cli
from tests.support.recording_host import host_worker, workflow_worker
from tests.support.running_api import serving, settings_for, template_of
from tests.support.temporal_server import start_temporal

pytestmark = pytest.mark.counts_nothing


@pytest_asyncio.fixture
async def temporal() -> AsyncIterator[Client]:
    """A Temporal that no host has ever come to."""
    async with await start_temporal() as environment:
        await register_search_attributes(environment.client)
        yield environment.client


@pytest_asyncio.fixture
async def client(
    temporal: Client, storage: Stack, empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TemplateClient]:
    """The API, which asks the hosts anew each time."""
    monkeypatch.setattr(known_hosts, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(known_hosts, "ANSWER_SECONDS", 10.0)
    async with (
        running_server(temporal, settings_for(storage)) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        yield client


async def created(client: TemplateClient) -> str:
    return (await client.create(template_of())).build_id


async def told(
    client: TemplateClient, build_id: str, right: Callable[[pb.WaitingForHost], bool]
) -> pb.WaitingForHost:
    """Look until what it waits for is as it should be; visibility and polls lag a little."""
    async with asyncio.timeout(40):
        while True:
            status = await client.status(build_id)
            if status.HasField("waiting") and right(status.waiting):
                return status.waiting
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def host(temporal: Client, storage: Stack, directory: Path, name: str) -> AsyncIterator[None]:
    """A host that tells its facts, and takes no build."""
    settings = settings_for(storage, host=name, host_slots=2, data_dir=directory / name)
    data_dir = DataDir(settings.data_dir)
    data_dir.draining_mark.parent.mkdir(parents=True, exist_ok=True)
    ledger = LeaseLedger(data_dir)
    facts = KvmHostFactsActivities(
        settings, ledger, Admission(ledger, 2, Room((), 0)), CheckpointStore(data_dir, name)
    )
    await schedule_sweep(temporal, settings, SWEEP_HOST_WORKFLOW, name)
    own = await Client.connect(
        temporal.service_client.config.target_host, data_converter=pydantic_data_converter
    )
    async with host_worker(own, step_task_queue(name), [facts.tell_host]):
        yield


async def test_without_any_worker_it_says_so(client: TemplateClient) -> None:
    waits = await told(client, await created(client), lambda w: w.why == pb.NoWorker)
    assert "template-manager worker" in waits.message
    assert not waits.HasField("hosts")


async def test_the_place_in_the_line_and_the_hosts_are_told(
    client: TemplateClient, temporal: Client, storage: Stack, tmp_path: Path
) -> None:
    async with workflow_worker(temporal, []):
        builds = [await created(client) for _ in range(3)]
        waits = await told(client, builds[2], lambda w: w.builds_before == 2)
        assert (waits.why, waits.hosts.hosts) == (pb.NoHosts, 0)
        assert "template-manager host" in waits.message
        assert (await told(client, builds[0], lambda _: True)).builds_before == 0
        async with host(temporal, storage, tmp_path, "kvm-1"):
            waits = await told(client, builds[0], lambda w: w.hosts.hosts == 1)
            assert (waits.why, waits.hosts.slots, waits.hosts.free_slots) == (pb.SlotIsFree, 2, 2)
            set_draining(DataDir(tmp_path / "kvm-1"), True)
            waits = await told(client, builds[0], lambda w: w.hosts.draining == 1)
            assert (waits.why, waits.hosts.free_slots) == (pb.AllDraining, 0)
            await listed_and_shown(client, builds)


async def listed_and_shown(client: TemplateClient, builds: list[str]) -> None:
    """List and status say it to people, and to programs."""
    page = await client.list_builds(pb.TemplateBuildListRequest())
    assert [build.builds_before for build in page.builds] == [2, 1, 0]
    at = ("--api-address", client.address)
    shown = " ".join((await cli("status", builds[2], *at)).out.split())
    assert "2 builds are before it · 1 host, 2 slots: 0 free" in shown
    assert "all hosts are draining" in shown
    waits = (await cli("status", builds[2], "--json", *at)).json["waiting"]
    assert (waits["why"], waits["builds_before"]) == ("AllDraining", 2)
    assert waits["hosts"]["slots"] == 2
    assert "2 before it" in (await cli("list", *at)).out


async def test_an_outage_of_the_hosts_costs_a_status_little_time(
    client: TemplateClient, temporal: Client, storage: Stack, tmp_path: Path
) -> None:
    async with workflow_worker(temporal, []):
        build_id = await created(client)
        async with host(temporal, storage, tmp_path, "kvm-2"):
            await told(client, build_id, lambda w: w.hosts.hosts == 1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await client.status(build_id)
        assert loop.time() - began < timedelta(seconds=15).total_seconds()
