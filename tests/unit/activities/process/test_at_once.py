"""Asking for many things, a few at a time."""

from __future__ import annotations

import asyncio

from activities.process.at_once import ASKED_AT_ONCE, ask_for_each


async def test_answers_come_in_order_and_few_are_asked_at_once() -> None:
    asked = most = 0

    async def ask(number: int) -> int:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await asyncio.sleep(0.001 * (number % 3))
        asked -= 1
        return number * 2

    things = range(3 * ASKED_AT_ONCE)
    assert await ask_for_each(ask, things) == [number * 2 for number in things]
    assert most == ASKED_AT_ONCE
