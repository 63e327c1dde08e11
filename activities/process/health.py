"""Liveness and readiness of a process over HTTP, for Kubernetes, Docker and load balancers.

`/livez` answers 200 while the event loop runs; `/readyz` while the process can also do its work;
else 503 with the reason as text. The API has `grpc.health.v1` besides, which says the same.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from temporalio.client import Client
from temporalio.service import RPCError

from activities.contract.errors import AddressTakenError
from activities.process.settings import Settings

LIVE_PATH = "/livez"
READY_PATH = "/readyz"
ANSWER_SECONDS = 5.0
TEMPORAL_LIMIT = timedelta(seconds=3)

Readiness = Callable[[], Awaitable[str]]
"""Returns why the process cannot work, or ""."""


@asynccontextmanager
async def health_endpoint(settings: Settings, readiness: Readiness) -> AsyncIterator[str]:
    """Serve at `health_address`, if it is set, while the block runs. Yields the address.

    Raises AddressTakenError.
    """
    if not settings.health_address:
        yield ""
        return
    server = _serve(settings.health_address, asyncio.get_running_loop(), readiness)
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield "{}:{}".format(*server.server_address[:2])
    finally:
        # Off the loop: a request that is being answered waits for the loop.
        await asyncio.to_thread(server.shutdown)
        server.server_close()


def temporal_readiness(client: Client) -> Readiness:
    """Return a check of whether Temporal answers this client."""

    async def check() -> str:
        with contextlib.suppress(RPCError, RuntimeError):
            if await client.service_client.check_health(timeout=TEMPORAL_LIMIT):
                return ""
        return "Temporal does not answer"

    return check


def _serve(
    address: str, loop: asyncio.AbstractEventLoop, readiness: Readiness
) -> ThreadingHTTPServer:
    async def alive() -> str:
        return ""

    checks = {LIVE_PATH: alive, READY_PATH: readiness}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            check = checks.get(self.path)
            if check is None:
                self._answer(404, f"there is {LIVE_PATH} and {READY_PATH}")
                return
            reason = _ask(loop, check)
            self._answer(503 if reason else 200, reason or "ok")

        def _answer(self, code: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: it is asked every few seconds."""

    host, _, port = address.rpartition(":")
    host = host.strip("[]")

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        return Server((host, int(port)), Handler)
    except (OSError, ValueError, OverflowError) as error:
        raise AddressTakenError(f"cannot listen on {address}: {error}") from error


def _ask(loop: asyncio.AbstractEventLoop, check: Readiness) -> str:
    """Ask on the loop: one that hangs does not answer, which is an answer."""

    async def answer() -> str:
        return await check()

    asked = asyncio.run_coroutine_threadsafe(answer(), loop)
    try:
        return asked.result(ANSWER_SECONDS)
    except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
        asked.cancel()
        return "the process hangs"
