"""Builds that begin with a host that has what they begin with, if it has a free slot."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from activities.contract.errors import HostDrainingError
from activities.contract.inputs import BuildInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, build_workflow_id, lease_task_queue
from activities.contract.requests import TemplateConfig
from activities.contract.search_attributes import BUILD_ID, IMAGE, TEMPLATE_ID, TENANT
from activities.contract.sources import FromImage, FromTemplate
from api.server.known_hosts import KnownHosts
from api.server.warm_hosts import WarmHosts
from tests.support.recording_host import (
    Journal,
    RecordingHost,
    host_worker,
    running_host,
    running_stack,
)
from tests.support.workflow_runs import OPTIONS, config, start
from workflows.build_template import BuildTemplate

HOLDS = ("hold_host_if_free", "hold_host")


@pytest_asyncio.fixture
async def hosts(client: Client) -> AsyncIterator[list[RecordingHost]]:
    journal = Journal()
    both = [RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal) for _ in range(2)]
    async with running_stack(client, *both):
        yield both


async def host_of(client: Client, asked: TemplateConfig, warm: str | None) -> str:
    """Build it, with the search attributes that the API gives it; return which host did."""
    pairs = [
        SearchAttributePair(TEMPLATE_ID, asked.template_id),
        SearchAttributePair(BUILD_ID, asked.build_id),
        SearchAttributePair(IMAGE, asked.source.described),
        SearchAttributePair(TENANT, asked.tenant),
    ]
    handle = await client.start_workflow(
        BuildTemplate.run,
        BuildInput(config=asked, options=OPTIONS, warm_host=warm),
        id=build_workflow_id(asked.build_id),
        task_queue=WORKFLOW_TASK_QUEUE,
        search_attributes=TypedSearchAttributes(pairs),
    )
    result = await asyncio.wait_for(handle.result(), 60)
    return next(record.host for record in result.timeline if record.host)


@pytest.mark.parametrize("number", [0, 1])
async def test_it_goes_to_the_host_that_it_asks(
    client: Client, hosts: list[RecordingHost], number: int
) -> None:
    warm = hosts[number]
    assert await host_of(client, config(), warm.name) == warm.name
    assert warm.journal.of(*HOLDS) == ["hold_host_if_free"]


async def test_a_host_without_a_free_slot_sends_it_to_the_line(
    client: Client, hosts: list[RecordingHost]
) -> None:
    journal = hosts[0].journal
    journal.fail("hold_host_if_free", HostDrainingError("the host has no free slot"))
    await host_of(client, config(), hosts[0].name)
    assert journal.of(*HOLDS) == ["hold_host_if_free", "hold_host"]


async def test_a_host_of_an_earlier_version_sends_it_to_the_line(
    client: Client, hosts: list[RecordingHost]
) -> None:
    """It does not know the activity."""
    earlier = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal())
    queue = lease_task_queue(earlier.name)
    async with host_worker(client, queue, [earlier.hold_host, earlier.release_host]):
        await host_of(client, config(), earlier.name)
    assert hosts[0].journal.of(*HOLDS) == ["hold_host"]


async def test_the_host_that_built_the_like_of_it_last_is_found(client: Client) -> None:
    tenant, own, image = (f"t-{uuid.uuid4().hex[:8]}" for _ in range(3))
    warm = WarmHosts(client, KnownHosts(client))

    def asked(template: str = own, name: str = image, **changes: object) -> TemplateConfig:
        reference = FromImage(reference=f"registry/{name}:1")
        return config(
            **({"template_id": template, "tenant": tenant, "source": reference} | changes)
        )

    one, two = (RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal()) for _ in range(2))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running_stack(client, one))
        await stack.enter_async_context(running_host(client, two))
        parent = asked()
        assert await host_of(client, parent, one.name) == one.name
        assert await host_of(client, asked("other"), two.name) == two.name
        async with asyncio.timeout(30):  # what is kept of builds lags a little
            while await warm.find(asked("third")) != two.name:
                await asyncio.sleep(0.1)
        assert await warm.find(asked()) == one.name
        on_parent = asked("child", source=FromTemplate(build_id=parent.build_id))
        assert await warm.find(on_parent) == one.name
        assert await warm.find(asked("third", "elsewhere")) is None
        assert await warm.find(asked(tenant="another")) is None
        assert await warm.find(asked(force=True)) is None


@pytest.mark.whole
async def test_where_builds_wait_for_a_host_none_is_asked_first(client: Client) -> None:
    hosts = KnownHosts(client)
    warm = WarmHosts(client, hosts)
    built = config(template_id=f"t-{uuid.uuid4().hex[:8]}")
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal())
    async with running_stack(client, host, slots=1):
        assert await host_of(client, built, host.name) == host.name
        again = built.model_copy(update={"build_id": str(uuid.uuid4())})
        async with asyncio.timeout(30):
            while await warm.find(again) != host.name:
                await asyncio.sleep(0.1)
        started = host.journal.hang("pull_image")
        at_work = [await start(client) for _ in range(3)]
        await asyncio.wait_for(started.wait(), 30)
        async with asyncio.timeout(30):
            while await warm.find(again) is not None:
                await asyncio.sleep(0.1)
        host.journal.hanging.clear()
        for handle in at_work:
            await asyncio.wait_for(handle.result(), 60)
