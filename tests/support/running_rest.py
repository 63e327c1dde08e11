"""A running REST API over a running gRPC API, for tests."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from api.client.credentials import ClientCredentials
from api.rest.server import Listening, RestServer, running_rest

KEY = "e2b_0123456789abcdef"
IMAGE = "127.0.0.1:5000/web:1"


class Rest:
    """A REST API, and a client of it."""

    def __init__(self, server: RestServer, session: aiohttp.ClientSession, scheme: str) -> None:
        self.server = server
        self.url = f"{scheme}://{server.address}"
        self.seen: list[tuple[str, str, int]] = []
        """Method, path and status of each request, as the server tells them."""
        self._session = session

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Return status and JSON of an answer; None where there is no body."""
        options = {"headers": {"X-API-KEY": KEY}} | options
        async with self._session.request(method, self.url + path, **options) as answer:
            text = await answer.text()
            return answer.status, await answer.json(content_type=None) if text else None

    async def build(self, name: str = "web", **start: Any) -> tuple[str, int]:
        """Ask for a build and start it; returns its id and the status of the start."""
        _, asked = await self.ask("POST", "/v3/templates", json={"name": name, "memoryMB": 256})
        path = f"/v2/templates/{name}/builds/{asked['buildID']}"
        status, _ = await self.ask("POST", path, json={"fromImage": IMAGE} | start)
        return asked["buildID"], status


@contextlib.asynccontextmanager
async def rest_of(
    api_address: str,
    listening: Listening,
    credentials: ClientCredentials | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Rest]:
    """Serve in front of a gRPC API until the block is left; `tls` is the client's."""
    seen: list[tuple[str, str, int]] = []
    async with (
        running_rest(
            listening,
            api_address,
            credentials or ClientCredentials(),
            lambda method, path, status, seconds: seen.append((method, path, status)),
        ) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls or True)) as session,
    ):
        running = Rest(server, session, "https" if tls else "http")
        running.seen = seen
        yield running
