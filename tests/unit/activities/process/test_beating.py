"""Work that beats while it goes on, and ends when it is told to."""

from __future__ import annotations

import asyncio

import pytest
from temporalio.testing import ActivityEnvironment

from activities.process import beating as module
from activities.process.beating import beating


async def test_it_beats_until_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    beats, done = 0, asyncio.Event()

    def beat(*_: object) -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            done.set()

    async def work() -> str:
        await done.wait()
        return "done"

    environment = ActivityEnvironment()
    environment.on_heartbeat = beat
    assert await asyncio.wait_for(environment.run(beating, work()), 30) == "done"


async def test_a_cancellation_ends_the_work() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    running = asyncio.create_task(ActivityEnvironment().run(beating, work()))
    await asyncio.wait_for(began.wait(), 30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(ended.wait(), 30)
