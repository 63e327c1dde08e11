"""Heartbeats of activities that work for a process, and so have no step that beats for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from temporalio import activity

BEAT_SECONDS = 2.0
T = TypeVar("T")


async def beating(work: Coroutine[None, None, T]) -> T:
    """Wait for work that may take long, heartbeating; a cancellation ends it."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            activity.heartbeat()
            await asyncio.wait([task], timeout=BEAT_SECONDS)
        return task.result()
    finally:
        task.cancel()
