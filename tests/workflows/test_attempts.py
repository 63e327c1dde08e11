"""An attempt that Temporal has given up on can find that out, on a real Temporal server."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.process.attempts import this_attempt


@workflow.defn
class Asking:
    @workflow.run
    async def run(self) -> None:
        await workflow.execute_activity(
            "ask",
            start_to_close_timeout=timedelta(seconds=3),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=10)),
        )


async def test_an_attempt_is_awaited_until_it_has_timed_out(client: Client) -> None:
    told: defaultdict[int, list[bool]] = defaultdict(list)
    later_began, first_ended = asyncio.Event(), asyncio.Event()

    @activity.defn
    async def ask() -> None:
        attempt, is_awaited = activity.info().attempt, this_attempt()
        told[attempt].append(await is_awaited())
        if attempt > 1:
            later_began.set()
            await first_ended.wait()
            return
        await later_began.wait()
        told[attempt].append(await is_awaited())
        first_ended.set()

    queue = str(uuid.uuid4())
    runner = UnsandboxedWorkflowRunner()
    async with Worker(
        client, task_queue=queue, workflows=[Asking], activities=[ask], workflow_runner=runner
    ):
        running = client.execute_workflow("Asking", id=queue, task_queue=queue)
        await asyncio.wait_for(running, 60)
    assert told[1] == [True, False]
    assert told[2] == [True]
