"""Layers that go up beside the steps of a build, and what the build makes of it if they do not."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowFailureError
from temporalio.contrib.workflow_streams import WorkflowStreamClient

from activities.contract.errors import CheckpointLostError, ImageNotFoundError
from activities.contract.image_steps import Run
from activities.contract.inputs import BuildInput
from activities.contract.names import LOG_TOPIC, Step
from activities.contract.status import LogEntry, LogLevel
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.workflow_runs import OPTIONS, Handle, config, start
from workflows.build_template import BuildTemplate

SENDING = "send_layers"
DISCARDS = ("discard_upload keep_parts=True", "discard_upload keep_parts=False")


@pytest_asyncio.fixture
async def host(client: Client) -> AsyncIterator[RecordingHost]:
    recording = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal(), sends_ahead=True)
    async with running_stack(client, recording):
        yield recording


async def with_steps(client: Client) -> Handle:
    asked = config(steps=(Run(command="make"),))
    return await start(client, BuildInput(config=asked, options=OPTIONS))


async def failure_of(handle: Handle) -> None:
    with pytest.raises(WorkflowFailureError):
        await asyncio.wait_for(handle.result(), 60)


async def test_the_build_goes_on_and_its_upload_waits(client: Client, host: RecordingHost) -> None:
    journal = host.journal
    sending, verifying = journal.hang(SENDING), journal.hang("verify_snapshot")
    handle = await with_steps(client)
    await asyncio.wait_for(asyncio.gather(sending.wait(), verifying.wait()), 60)
    assert "snapshot_vm" in journal.calls
    journal.hanging.discard("verify_snapshot")
    async with asyncio.timeout(60):
        while (await handle.query(BuildTemplate.status)).step is not Step.UPLOAD:
            await asyncio.sleep(0.1)
    assert journal.of("upload_artifact rootfs.ext4") == []
    journal.hanging.discard(SENDING)
    await asyncio.wait_for(handle.result(), 60)
    assert journal.of(SENDING, "run_steps").count(SENDING) == 1
    assert journal.of(*DISCARDS) == []


async def test_what_is_sent_is_what_the_steps_leave(client: Client, host: RecordingHost) -> None:
    await asyncio.wait_for((await with_steps(client)).result(), 60)
    told = dict(host.journal.arguments)
    assert told[SENDING].steps == told["run_steps"]
    await asyncio.wait_for((await start(client)).result(), 60)
    told = dict(host.journal.arguments)
    assert (told[SENDING].steps, told[SENDING].chain) == (None, host.chain)
    assert host.journal.of(SENDING) == [SENDING] * 2


async def test_layers_that_cannot_be_sent_cost_a_warning(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail(SENDING, ImageNotFoundError("no such bucket"))
    handle = await with_steps(client)
    await asyncio.wait_for(handle.result(), 60)
    log = WorkflowStreamClient.create(client, handle.id).topic(LOG_TOPIC, type=LogEntry)
    lines = [item.data async for item in log.subscribe()]
    assert [line.message for line in lines if line.level is LogLevel.WARN] == [
        "layers go up with the template, and not before it: no such bucket"
    ]


@pytest.mark.parametrize("step", ["run_steps", "wait_until_ready"])
async def test_a_cancelled_build_sends_nothing_more(
    client: Client, host: RecordingHost, step: str
) -> None:
    journal = host.journal
    both = journal.hang(SENDING), journal.hang(step)
    handle = await with_steps(client)
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in both)), 60)
    await handle.cancel()
    await failure_of(handle)
    ends = journal.of(f"{SENDING} stopped", f"{step} stopped", *DISCARDS)
    assert set(ends[:2]) == {f"{SENDING} stopped", f"{step} stopped"}
    assert ends[2:] == ["discard_upload keep_parts=False"]


async def test_a_step_that_fails_ends_it(client: Client, host: RecordingHost) -> None:
    journal = host.journal
    sending, running = journal.hang(SENDING), journal.hang("run_steps")
    handle = await with_steps(client)
    await asyncio.wait_for(asyncio.gather(sending.wait(), running.wait()), 60)
    journal.fail("wait_until_ready", ImageNotFoundError("it does not start"))
    journal.hanging.discard("run_steps")
    await failure_of(handle)
    assert journal.of(f"{SENDING} stopped", *DISCARDS) == [f"{SENDING} stopped", DISCARDS[0]]


async def test_a_host_of_an_earlier_version_is_not_asked(client: Client) -> None:
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal())
    host.chain = RecordingHost("other", Journal(), sends_ahead=True).chain
    async with running_stack(client, host):
        await asyncio.wait_for((await with_steps(client)).result(), 60)
    assert host.journal.of(SENDING) == []


async def test_a_reset_of_what_is_published_goes_on_when_it_is_undone(
    client: Client, host: RecordingHost
) -> None:
    """Its first run has published; that is no result of a run that has verified nothing yet."""
    await asyncio.wait_for((await start(client)).result(), 60)
    assert host.journal.published is not None
    host.journal.fail("start_vm", CheckpointLostError("rootfs gone", step=Step.ROOTFS))
    handle = await start(client)
    result = await asyncio.wait_for(handle.result(), 60)
    assert host.journal.of(DISCARDS[0]) == [DISCARDS[0]]
    assert host.journal.of("publish_template") == ["publish_template"] * 2
    assert {record.outcome for record in result.timeline} == {"done", "rewound"}
