"""The health endpoint over real HTTP."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import requests

from activities.contract.errors import AddressTakenError
from activities.process import health
from activities.process.health import health_endpoint
from activities.process.settings import Settings

ANYWHERE = Settings(health_address="127.0.0.1:0")


async def answer(address: str, path: str) -> tuple[int, str]:
    """Ask from a thread: the loop must be free to answer."""
    got = await asyncio.to_thread(requests.get, f"http://{address}{path}", timeout=10)
    return got.status_code, got.text.strip()


async def test_a_process_that_can_work_is_live_and_ready() -> None:
    async def fine() -> str:
        return ""

    async with health_endpoint(ANYWHERE, fine) as address:
        assert await answer(address, "/livez") == (200, "ok")
        assert await answer(address, "/readyz") == (200, "ok")
        assert (await answer(address, "/"))[0] == 404
    with pytest.raises(requests.ConnectionError):
        await answer(address, "/livez")


async def test_one_that_cannot_work_says_why_and_is_live() -> None:
    async def away() -> str:
        return "Temporal does not answer"

    async with health_endpoint(ANYWHERE, away) as address:
        assert await answer(address, "/readyz") == (503, "Temporal does not answer")
        assert await answer(address, "/livez") == (200, "ok")


async def test_a_loop_that_hangs_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fine() -> str:
        return ""

    monkeypatch.setattr(health, "ANSWER_SECONDS", 0.2)
    async with health_endpoint(ANYWHERE, fine) as address:
        asking = asyncio.create_task(answer(address, "/livez"))
        await asyncio.sleep(0)
        time.sleep(1)  # this is what a hanging loop does
        assert await asking == (503, "the process hangs")


async def test_an_address_that_is_taken_is_told() -> None:
    async def fine() -> str:
        return ""

    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(health_address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(AddressTakenError, match="cannot listen on 127"):
            async with health_endpoint(settings, fine):
                pass


async def test_nothing_listens_unless_asked() -> None:
    async def fine() -> str:
        return ""

    async with health_endpoint(Settings(), fine) as address:
        assert address == ""


async def test_ipv6() -> None:
    async def fine() -> str:
        return ""

    async with health_endpoint(Settings(health_address="[::1]:0"), fine) as address:
        port = address.rpartition(":")[2]
        assert await answer(f"[::1]:{port}", "/livez") == (200, "ok")
