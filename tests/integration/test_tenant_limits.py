"""What a tenant's limits refuse and let wait: the API over a real Temporal and bucket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import requests
from pydantic import SecretStr

from activities.contract.inputs import BuildInput, StartVmInput
from activities.contract.names import (
    DEFAULT_TENANT,
    ArtifactName,
    build_workflow_id,
    tenant_line_workflow_id,
)
from activities.contract.network_policy import INTERNET, NO_NETWORK, NetworkPolicy
from activities.contract.units import MIB
from activities.process.metrics import runtime_for
from activities.process.settings import Settings
from activities.process.tenants_file import TenantsFile
from activities.store.bucket import Bucket
from activities.store.objects import archived_log_name, artifact_name, metadata_name
from activities.store.stored import TenantStored, count_stored
from api.client.client import CallError, TemplateClient
from api.client.credentials import ClientCredentials
from api.pb import template_manager_pb2 as pb
from api.server.access import hash_token
from api.server.server import BindError, running_server
from api.server.template_bucket import TemplateBucket
from api.server.tenant_use import TenantUses, show_uses
from tests.support.command_line import cli
from tests.support.example_template import metadata
from tests.support.running_api import Api, template_of

pytestmark = pytest.mark.counts_nothing

IMAGE = "127.0.0.1:5000/demo/web:1"
"""Of the service's registry, and not pushed for a build: for all to build from."""


@dataclass
class LimitedTenant:
    """A new tenant, its client, and the file that limits it."""

    api: Api
    name: str
    client: TemplateClient
    file: Path

    def limit(self, **limits: float | str) -> None:
        lines = [f"{name} = {json.dumps(value)}" for name, value in limits.items()]
        self.file.write_text("\n".join([f"[tenants.{self.name}]", *lines, ""]))

    async def create(self, **changes: Any) -> str:
        return (await self.client.create(self.template(**changes))).build_id

    def template(self, **changes: Any) -> pb.TemplateConfig:
        return self.api.template(from_image=IMAGE, **changes)

    async def refused(self, **changes: Any) -> CallError:
        with pytest.raises(CallError) as caught:
            await self.client.create(template_of(from_image=IMAGE, **changes))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason == "TENANT_LIMIT"
        return caught.value

    async def waiting(self, build_id: str) -> pb.WaitingForHost:
        """Look until the build says what it waits for."""
        async with asyncio.timeout(40):
            while True:
                status = await self.client.status(build_id)
                if status.HasField("waiting"):
                    return status.waiting
                await asyncio.sleep(0.1)

    async def seen(self, count: int) -> None:
        """Wait until Temporal's list has so many builds: it lags a little."""
        async with asyncio.timeout(40):
            while (
                len((await self.client.list_builds(pb.TemplateBuildListRequest())).builds) < count
            ):
                await asyncio.sleep(0.1)


@pytest_asyncio.fixture
async def tenant(api: Api, tenants_file: Path, tmp_path: Path) -> AsyncIterator[LimitedTenant]:
    name, tokens = f"t-{uuid.uuid4().hex[:8]}", tmp_path / "tokens"
    tokens.write_text(f"me {hash_token('me')} admin tenant={name}\n")
    changes = {"tokens_file": tokens, "tenants_file": tenants_file}
    async with (
        running_server(api.temporal, api.settings.model_copy(update=changes)) as server,
        TemplateClient(server.address, ClientCredentials(token=SecretStr("me"))) as client,
    ):
        yield LimitedTenant(api, name, client, tenants_file)
    tenants_file.write_text("")


def numbers(error: CallError) -> tuple[str, ...]:
    return tuple(error.metadata[name] for name in ("limit", "allowed", "used"))


async def test_what_no_end_of_another_build_makes_room_for(tenant: LimitedTenant) -> None:
    tenant.limit(vcpus=2, memory_mb=1024, template_mb=1500)
    for changes, told in (
        ({"vcpu_count": 4}, ("vcpus", "2", "4")),
        ({"memory_mb": 2048}, ("memory_mb", "1024", "2048")),
        ({"memory_mb": 1024, "disk_size_mb": 512}, ("template_mb", "1500", "1536")),
    ):
        error = await tenant.refused(**changes)
        assert numbers(error) == told
        assert not error.retry_after_seconds
    build_id = await tenant.create()
    assert (await tenant.api.ended(build_id)).state == "completed"


async def test_what_running_builds_leave_no_room_for_is_refused_until_they_end(
    tenant: LimitedTenant,
) -> None:
    tenant.limit(vcpus=2)
    started = tenant.api.journal.hang("pull_image")
    running = await tenant.create(vcpu_count=2)
    await asyncio.wait_for(started.wait(), 40)
    await tenant.seen(1)
    error = await tenant.refused()
    assert (*numbers(error), error.metadata["asked"]) == ("vcpus", "2", "2", "1")
    assert error.retry_after_seconds
    tenant.limit(memory_mb=1000)
    error = await tenant.refused(memory_mb=512)
    assert (*numbers(error), error.metadata["asked"]) == ("memory_mb", "1000", "512", "512")
    assert "512 are in use, and 512 more are asked for, of 1000" in error.message
    await tenant.api.temporal.get_workflow_handle(build_workflow_id(running)).terminate()
    await until_taken(tenant)  # at once, although its line does not know yet that it has ended


async def until_taken(tenant: LimitedTenant) -> None:
    """Create until it is not refused any more."""
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(CallError):
                await tenant.create(memory_mb=512)
                return
            await asyncio.sleep(0.2)


async def test_a_build_that_waits_for_its_turn_uses_no_machine(tenant: LimitedTenant) -> None:
    tenant.limit(running_builds=1, vcpus=2)
    tenant.api.journal.hang("pull_image")
    builds = []
    for number in range(3):
        builds.append(await tenant.create())
        await tenant.seen(number + 1)
    assert (await tenant.waiting(builds[2])).why == pb.TenantLimit
    tenant.api.journal.hanging.clear()
    for build_id in builds:
        assert (await tenant.api.ended(build_id)).state == "completed"


async def test_a_tenant_s_network(tenant: LimitedTenant) -> None:
    """What is asked for above it is refused by name; where nothing is asked for there is less."""
    internet = pb.TemplateNetwork(access=pb.Internet)
    assert await network_of(tenant) == INTERNET
    tenant.limit(network="none")
    assert await network_of(tenant) == NO_NETWORK
    with pytest.raises(CallError) as caught:
        await tenant.client.create(tenant.template(network=internet))
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert caught.value.reason == "NETWORK_NOT_ALLOWED"
    assert numbers(caught.value) == ("network", "none", "internet")
    tenant.limit()
    assert await network_of(tenant, network=pb.TemplateNetwork(access=pb.NoNetwork)) == NO_NETWORK
    assert await network_of(tenant, network=internet) == INTERNET


async def network_of(tenant: LimitedTenant, **changes: Any) -> NetworkPolicy:
    """Return what the guests of a new build may reach, as its host is told."""
    build_id = await tenant.create(**changes)
    assert (await tenant.api.ended(build_id)).state == "completed"
    history = await tenant.api.temporal.get_workflow_handle(
        build_workflow_id(build_id)
    ).fetch_history()
    scheduled = [event.activity_task_scheduled_event_attributes for event in history.events]
    [boot] = [each.input for each in scheduled if each.activity_type.name == "start_vm"]
    [start] = await tenant.api.temporal.data_converter.decode(boot.payloads, [StartVmInput])
    assert isinstance(start, StartVmInput)
    return start.shape.network


async def started_with(tenant: LimitedTenant, build_id: str) -> BuildInput:
    handle = tenant.api.temporal.get_workflow_handle(build_workflow_id(build_id))
    first = (await handle.fetch_history()).events[0]
    payloads = first.workflow_execution_started_event_attributes.input.payloads
    [build] = await tenant.api.temporal.data_converter.decode(payloads, [BuildInput])
    assert isinstance(build, BuildInput)
    return build


async def test_the_tenant_s_weight_and_the_build_s_priority_reach_the_build(
    tenant: LimitedTenant,
) -> None:
    tenant.limit(fairness_weight=2.5)
    build_id = await tenant.create(priority=pb.Batch)
    await tenant.api.ended(build_id)
    handle = tenant.api.temporal.get_workflow_handle(build_workflow_id(build_id))
    history = await handle.fetch_history()
    build = await started_with(tenant, build_id)
    assert (build.fairness_weight, build.config.is_batch) == (2.5, True)
    weights = [
        event.activity_task_scheduled_event_attributes.priority
        for event in history.events
        if event.activity_task_scheduled_event_attributes.activity_type.name == "hold_host"
    ]
    assert [(p.fairness_key, p.fairness_weight) for p in weights] == [(tenant.name, 2.5)]


async def test_running_builds_wait_and_too_many_waiting_ones_are_refused(
    tenant: LimitedTenant,
) -> None:
    tenant.limit(running_builds=0, waiting_builds=2)
    asked = [tenant.template() for _ in range(2)]
    builds = [(await tenant.client.create(template)).build_id for template in asked]
    waits = await tenant.waiting(builds[1])
    assert waits.why == pb.TenantLimit
    assert "as many builds as it may" in waits.message
    await tenant.seen(2)
    error = await tenant.refused()
    assert numbers(error) == ("waiting_builds", "2", "2")
    assert error.retry_after_seconds
    assert tenant.name in error.message
    again = await tenant.client.create(asked[1])  # the same request is the same build
    assert again.build_id == builds[1]
    use = await used(tenant)
    assert (use["on_hosts"], use["wait_for_host"]) == ([], [])
    assert use["wait_for_turn"] == builds
    limits = {"fairness_weight": 1, "running_builds": 0, "waiting_builds": 2}
    assert use["limits"] == {**limits, "network": "internet"}
    tenant.limit(running_builds=1)
    last = await tenant.create()  # brings the new limits along
    for build_id in (*builds, last):
        assert (await tenant.api.ended(build_id)).state == "completed"
    await tenant.api.temporal.get_workflow_handle(tenant_line_workflow_id(tenant.name)).terminate()


async def used(tenant: LimitedTenant, *options: str) -> Any:
    """Return what `tenants` says of the tenant, when Temporal's list has it."""
    env = {
        "TEMPORAL_ADDRESS": tenant.api.temporal.service_client.config.target_host,
        "TEMPLATE_MANAGER_BUCKET": tenant.api.settings.bucket,
        "TEMPLATE_MANAGER_TENANTS_FILE": str(tenant.file),
    }
    ended = await cli("tenants", "--json", env=env)
    assert ended.code == 0, ended.err
    row = (await cli("tenants", env=env)).out
    assert tenant.name in row
    return ended.json["tenants"][tenant.name]


async def test_what_is_stored_is_counted_for_each_tenant(
    tenant: LimitedTenant, empty_bucket: Bucket
) -> None:
    def store(size_mb: int, whose: dict[str, str] | None) -> None:
        name = artifact_name(str(uuid.uuid4()), ArtifactName.MEMFILE)
        empty_bucket.write_object(name, bytes(size_mb * MIB), metadata=whose)

    store(2, {"tenant": tenant.name})
    store(1, {"tenant": tenant.name})
    store(5, {"tenant": "another"})
    store(7, None)  # of before there were tenants
    told = metadata(str(uuid.uuid4()), tenant=tenant.name).model_dump_json().encode()
    name = metadata_name(str(uuid.uuid4()))
    empty_bucket.write_object(name, told, metadata={"tenant": tenant.name})
    empty_bucket.write_object(archived_log_name(str(uuid.uuid4()), tenant.name), b"no template")
    tenant.limit(stored_mb=3)
    await tenant.api.ended(await tenant.create())  # nothing has been counted
    counted = await asyncio.to_thread(count_stored, empty_bucket)
    assert counted.of(tenant.name) == TenantStored(templates=1, bytes=3 * MIB + len(told))
    assert counted.of("another").bytes == 5 * MIB
    assert counted.of(DEFAULT_TENANT).bytes == 7 * MIB
    use = await used(tenant)
    assert (use["stored_bytes"], use["templates"]) == (3 * MIB + len(told), 1)
    error = await tenant.refused()
    assert numbers(error) == ("stored_mb", "3", "3")
    assert error.retry_after_seconds
    tenant.limit(stored_mb=4)
    await tenant.api.ended(await tenant.create())


async def test_prometheus_is_shown_what_tenants_use(
    tenant: LimitedTenant,
    empty_bucket: Bucket,
    unused_tcp_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.server.tenant_use.SHOW_SECONDS", 0.2)
    tenant.limit(running_builds=0, stored_mb=7)
    await asyncio.to_thread(count_stored, empty_bucket)
    waiting = await tenant.create()
    await tenant.waiting(waiting)
    settings = Settings(metrics_address=f"127.0.0.1:{unused_tcp_port}")
    runtime = runtime_for(settings)
    assert runtime is not None
    bucket = TemplateBucket(tenant.api.settings.bucket)
    uses = TenantUses(tenant.api.temporal, bucket, TenantsFile(tenant.file))
    showing = asyncio.create_task(show_uses(uses, runtime.metric_meter))
    wanted = {
        ("tenant_builds", "waits_for_turn"): 1,
        ("tenant_builds", "on_host"): 0,
        ("tenant_limit", "running_builds"): 0,
        ("tenant_limit", "stored_mb"): 7,
        ("tenant_limit", "vcpus"): math.inf,
    }
    try:
        async with asyncio.timeout(40):
            while not wanted.items() <= (shown := await scraped(settings, tenant.name)).items():
                await asyncio.sleep(0.2)
    except TimeoutError:
        pytest.fail(f"shown was {shown}")
    finally:
        showing.cancel()


async def scraped(settings: Settings, tenant: str) -> dict[tuple[str, str], float]:
    """Return the values of a tenant's series, by name and by state or limit."""
    url = f"http://{settings.metrics_address}/metrics"
    text = (await asyncio.to_thread(requests.get, url, timeout=10)).text
    lines = [line for line in text.splitlines() if f'tenant="{tenant}"' in line]
    found = {}
    for line in lines:
        name = line.partition("{")[0].removeprefix("template_manager_")
        what = re.search(r'(?:state|limit)="(\w+)"', line)
        found[name, what[1] if what else ""] = float(line.rpartition(" ")[2])
    return found


async def test_a_file_that_makes_no_sense_is_told_at_the_start(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text("[tenants.acme]\nruning_builds = 1\n")
    settings = api.settings.model_copy(update={"tenants_file": path})
    with pytest.raises(BindError, match=r"tenants\.toml.*runing_builds"):
        async with running_server(api.temporal, settings):
            pass
