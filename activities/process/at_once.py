"""Asking for many things, a few at a time: whoever answers serves others, too."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

ASKED_AT_ONCE = 20


async def ask_for_each(ask: Callable[[T], Awaitable[R]], things: Iterable[T]) -> list[R]:
    """Return the answers in the order of the things. The first failure is raised."""
    few = asyncio.Semaphore(ASKED_AT_ONCE)

    async def answer(thing: T) -> R:
        async with few:
            return await ask(thing)

    return await asyncio.gather(*map(answer, things))
