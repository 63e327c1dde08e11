"""The HTTP server around the endpoints: where it listens, TLS, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.client.credentials import ClientCredentials
from api.pem import PemError, read_pem
from api.rest.app import Observe, rest_app
from api.rest.calls import Upstream
from api.rest.requests import RequestLimits

KEEP_ALIVE_SECONDS = 30
MAX_HEAD_BYTES = 32 * 1024


class ListenError(Exception):
    """The server cannot listen there, or not with that certificate."""


@dataclass(frozen=True)
class Listening:
    """Where and how the server listens."""

    address: str
    """`host:port`; port 0 is any that is free."""
    certificate: Path | None = None
    """With its key: it speaks TLS. Both are PEM files."""
    key: Path | None = None
    client_authority: Path | None = None
    """Only clients with a certificate of this authority get in."""
    asks_for_tokens: bool = True
    """Whether it serves only while the gRPC API refuses those that it does not know."""
    most_connections: int = 1000
    drain_seconds: float = 20
    limits: RequestLimits = field(default_factory=RequestLimits)


class RestServer:
    """A server that runs. Made by `running_rest`."""

    def __init__(self, listening: Listening, upstream: Upstream, observe: Observe) -> None:
        """Raises ListenError."""
        self._upstream = upstream
        self._socket = _bound(listening.address)
        self._is_draining = False
        self._ended = asyncio.Event()
        tls = _tls(listening)
        config = uvicorn.Config(
            rest_app(upstream, observe, listening.limits),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            http=_protocol(listening.limits.seconds),
            ssl_context_factory=(lambda *_: tls) if tls else None,
            limit_concurrency=listening.most_connections,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(listening.drain_seconds)),
        )
        self._server = _Server(config)
        host = listening.address.rpartition(":")[0]
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        """Where it listens, with the real port."""

    async def readiness(self) -> str:
        """Tell why no request should be sent here, or ""."""
        return "draining" if self._is_draining else await self._upstream.readiness()

    async def drain(self) -> None:
        """Take no more connections, let running requests end for up to `drain_seconds`, stop."""
        self._is_draining = True
        self._server.should_exit = True
        await self._ended.wait()

    async def stop(self) -> None:
        """Stop at once. Does nothing after `drain`."""
        self._server.force_exit = True
        await self.drain()

    async def serve(self) -> None:
        """Serve until it is drained or stopped."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._ended.set()


class _Protocol(H11Protocol):
    """Gives the head of a request a time to come in, and an answer one to be read: uvicorn would
    wait for both for ever, and has so many connections."""

    seconds = 0.0
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head()
        self._forget_answer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_answer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end()

    def _end(self) -> None:
        """Close it, also where what is still to be sent is not read."""
        self.transport.close()
        self.loop.call_later(self.seconds, self.transport.abort)

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_head()
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self._end)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _forget_answer(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def _protocol(limit_seconds: float) -> type[_Protocol]:
    class Limited(_Protocol):
        seconds = limit_seconds

    return Limited


class _Server(uvicorn.Server):
    """Leaves signals to who runs it: uvicorn would end the process by the signal that it got."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def running_rest(
    listening: Listening, api_address: str, credentials: ClientCredentials, observe: Observe
) -> AsyncIterator[RestServer]:
    """Serve until the block is left. Raises ListenError and CredentialsError."""
    must_know = listening.asks_for_tokens
    upstream = Upstream(api_address, credentials, must_know_callers=must_know)
    try:
        server = RestServer(listening, upstream, observe)
        serving = asyncio.create_task(server.serve())
        try:
            yield server
        finally:
            await server.stop()
            await serving
    finally:
        await upstream.close()


def _bound(address: str) -> socket.socket:
    """Listen already now: who knows the address may connect."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family)
    except (OSError, ValueError, OverflowError) as error:
        raise ListenError(f"cannot listen on {address}: {error}") from error


def _tls(listening: Listening) -> ssl.SSLContext | None:
    if listening.certificate is None or listening.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        for path in (listening.certificate, listening.key):
            read_pem(path)  # says which file is none
        context.load_cert_chain(listening.certificate, listening.key)
        if listening.client_authority is not None:
            context.load_verify_locations(cadata=read_pem(listening.client_authority).decode())
            context.verify_mode = ssl.CERT_REQUIRED
    except (PemError, ssl.SSLError, UnicodeDecodeError) as error:
        raise ListenError(f"TLS: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context
