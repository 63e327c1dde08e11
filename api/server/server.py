"""The API process: a gRPC server that says how it is, and leaves without dropping a call."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from temporalio.client import Client
from temporalio.runtime import Runtime

from activities.contract.units import KIB
from activities.process.health import health_endpoint
from activities.process.metrics import runtime_for
from activities.process.ready_file import shown_as_ready
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.process.temporal import connect
from activities.process.tenants_file import TenantsFile, TenantsFileError
from activities.process.tracing import is_tracing
from api.pb import info_service_pb2 as info_pb
from api.pb import info_service_pb2_grpc as info_grpc
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from api.pem import PemError
from api.server.access import Access, CallsAtOnce, RateLimit, TokenFileError, Tokens
from api.server.ending import BuildEnder
from api.server.finding import BuildFinder
from api.server.info import InfoService, ServiceStatus
from api.server.interceptor import OPEN_SERVICES, SERVICE, SERVICES, CallInterceptor
from api.server.known_hosts import KnownHosts
from api.server.listing import BuildListing
from api.server.logs import BuildLogs
from api.server.naming import TemplateNaming
from api.server.required_agent import RequiredAgent
from api.server.service import TemplateService
from api.server.starting import BuildStarter
from api.server.template_bucket import TemplateBucket
from api.server.temporal_health import TemporalHealth
from api.server.tenant_room import TenantRoom
from api.server.tenant_use import TenantUses, show_uses
from api.server.tls import server_credentials
from api.server.waiting import WaitingLine
from api.server.warm_hosts import WarmHosts

KEEPALIVE_MS = 30_000
# E2B's control planes ping every 10 s, also while they ask nothing.
MIN_PING_MS = 5_000
# While draining: so long no call may be running before the server stops.
IDLE_SECONDS = 0.5
OPTIONS = (
    (
        "grpc.so_reuseport",
        0,
    ),  # a second process on the same port must fail, not take half the calls
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
    ("grpc.keepalive_permit_without_calls", 1),
)

_log = structlog.get_logger(__name__)


class BindError(Exception):
    """The API cannot, or may not, listen there."""


class ApiServer:
    """A running API server. Made by `running_server`."""

    def __init__(self, client: Client, settings: Settings) -> None:
        bucket = TemplateBucket(settings.bucket)
        self._settings = settings
        self._temporal = TemporalHealth(client)
        tenants = _tenants(settings)
        at_once = CallsAtOnce(settings.calls_at_once)
        self._interceptor = CallInterceptor(_access(settings, tenants), at_once)
        self._health = health.aio.HealthServicer()
        interceptors = [*_tracing_interceptors(), self._interceptor]
        limit = ("grpc.max_receive_message_length", settings.max_request_kb * KIB)
        self._server = grpc.aio.server(interceptors=interceptors, options=(*OPTIONS, limit))
        self.logs = BuildLogs(client, bucket)
        self.uses = TenantUses(client, bucket, tenants)
        finder = BuildFinder(client, bucket)
        hosts = KnownHosts(client)
        line = WaitingLine(client, hosts)
        status = ServiceStatus(self._own_status)
        ender = BuildEnder(client, settings, finder)
        naming = TemplateNaming(bucket)
        self.service = TemplateService(
            settings,
            finder=finder,
            starter=BuildStarter(
                client,
                bucket,
                settings,
                finder=finder,
                ender=ender,
                room=TenantRoom(client, bucket, tenants),
                naming=naming,
                warm=WarmHosts(client, hosts),
            ),
            ender=ender,
            listing=BuildListing(client, line, Sealer(settings.secret_keys)),
            line=line,
            logs=self.logs,
            naming=naming,
            agent=RequiredAgent(settings, hosts),
            bucket=bucket,
            temporal=self._temporal,
            status=status,
        )
        self.address = ""
        """Where it listens, with the real port when the settings say port 0."""
        pb_grpc.add_TemplateServiceServicer_to_server(self.service, self._server)
        info_grpc.add_InfoServiceServicer_to_server(InfoService(status, hosts), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, *OPEN_SERVICES), self._server)

    async def start(self) -> None:
        """Listen. Raises BindError when the address is taken."""
        host, _, port = self._settings.api_address.rpartition(":")
        await self._set_serving(False)
        try:
            bound = self._bind(f"{host}:{port}")
        except PemError as error:
            raise BindError(str(error)) from None
        except RuntimeError as error:
            raise BindError(f"cannot listen on {host}:{port}: {error}") from error
        self.address = f"{host}:{bound}"
        await self._server.start()

    def _bind(self, address: str) -> int:
        settings = self._settings
        if settings.tls_cert is None or settings.tls_key is None:
            return self._server.add_insecure_port(address)
        credentials = server_credentials(
            settings.tls_cert, settings.tls_key, settings.tls_client_ca
        )
        return self._server.add_secure_port(address, credentials)

    async def watch_temporal(self) -> None:
        """Let the health service follow Temporal's, for ever."""
        watching = asyncio.create_task(self._temporal.watch())
        try:
            while True:
                await self._temporal.changed.wait()
                self._temporal.changed.clear()
                await self._set_serving(self._temporal.is_serving)
        finally:
            watching.cancel()

    async def readiness(self) -> str:
        """Tell why no call should be sent here, or ""."""
        if self.service.is_draining:
            return "draining"
        return "" if self._temporal.is_serving else "Temporal does not answer"

    def _own_status(self) -> info_pb.ServiceInfoStatus:
        if self.service.is_draining:
            return info_pb.ServiceDraining
        serving = self._temporal.is_serving
        return info_pb.ServiceHealthy if serving else info_pb.ServiceUnhealthy

    async def drain(self) -> None:
        """Say Draining, let running calls end for up to `drain_seconds`, then stop."""
        _log.info("draining", calls=self._interceptor.running)
        self.service.drain()
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_idle(), self._settings.drain_seconds)
        await self._server.stop(grace=0)

    async def stop(self) -> None:
        """Stop at once. Does nothing after `drain`."""
        await self._server.stop(grace=0)

    async def _until_idle(self) -> None:
        idle = 0.0
        while idle < IDLE_SECONDS:
            await asyncio.sleep(IDLE_SECONDS / 5)
            idle = idle + IDLE_SECONDS / 5 if self._interceptor.running == 0 else 0.0

    async def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", pb.DESCRIPTOR.services_by_name[SERVICE].full_name):
            await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)


@asynccontextmanager
async def running_server(client: Client, settings: Settings) -> AsyncIterator[ApiServer]:
    """Serve until the block is left. Raises BindError."""
    server = ApiServer(client, settings)
    await server.start()
    watching = asyncio.create_task(server.watch_temporal())
    try:
        yield server
    finally:
        watching.cancel()
        await server.stop()


async def serve(settings: Settings, *, insecure: bool = False) -> None:
    """Run the API until SIGTERM or SIGINT; a second signal stops without draining.

    Starts also while Temporal is away, and then says so. Raises BindError and AddressTakenError.
    """
    require_whole_tls(settings)
    require_safe_address(settings, insecure=insecure)
    identity = f"api@{socket.gethostname()}:{os.getpid()}"
    runtime = runtime_for(settings)
    client = await connect(identity, lazy=True, runtime=runtime)
    signals = Signals()
    async with (
        running_server(client, settings) as server,
        health_endpoint(settings, server.readiness),
        _shown(server, runtime),
    ):
        _log.info("serving", address=server.address)
        with shown_as_ready(settings):
            await signals.next()
        await first_of(server.drain(), signals.next())
    _log.info("stopped")


@asynccontextmanager
async def _shown(server: ApiServer, runtime: Runtime | None) -> AsyncIterator[None]:
    """Show Prometheus what the tenants use, until the block is left."""
    if runtime is None:
        yield
        return
    showing = asyncio.create_task(show_uses(server.uses, runtime.metric_meter))
    try:
        yield
    finally:
        showing.cancel()


def require_safe_address(settings: Settings, *, insecure: bool = False) -> None:
    """Raise BindError for an address that others can reach, unless they are kept out.

    They must not hear what is said (TLS, or `insecure`), and must say who they are (tokens,
    certificates of clients, or `no_authentication`).
    """
    address = settings.api_address
    require_private(address, settings, insecure=insecure)
    knows_callers = settings.tokens_file is not None or settings.tls_client_ca is not None
    if not (is_loopback(address) or knows_callers or settings.no_authentication):
        raise BindError(
            f"{address} is not a loopback address, and the API asks nobody who he is: anyone there "
            "could build, read and delete everything. Give --tokens-file (template-manager token "
            "makes one) or --tls-client-ca, listen on 127.0.0.1, or give --no-authentication."
        )


def require_private(address: str, settings: Settings, *, insecure: bool) -> None:
    """Raise BindError where others could hear what is said to a server that listens there."""
    if settings.tls_cert is None and not insecure and not is_loopback(address):
        raise BindError(
            f"{address} is not a loopback address, and the API has no TLS: anyone between could "
            "read tokens. Give --tls-cert and --tls-key, listen on 127.0.0.1, or give --insecure."
        )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `host:port`, as far as that can be told."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or nothing: it may be anything
        return False


def require_whole_tls(settings: Settings) -> None:
    """Raise BindError for a certificate without its key and the like."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise BindError("TLS needs both a certificate (--tls-cert) and its key (--tls-key)")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise BindError("--tls-client-ca needs --tls-cert and --tls-key")


def _tracing_interceptors() -> list[grpc.aio.ServerInterceptor]:
    if not is_tracing():
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    return [aio_server_interceptor()]  # type: ignore[no-untyped-call] # it has no types


def _tenants(settings: Settings) -> TenantsFile:
    """Raises BindError when the tenants' file cannot be read."""
    try:
        return TenantsFile(settings.tenants_file)
    except TenantsFileError as error:
        raise BindError(str(error)) from None


def _access(settings: Settings, tenants: TenantsFile) -> Access:
    """Raises BindError when the token file cannot be read."""
    try:
        tokens = Tokens(settings.tokens_file) if settings.tokens_file else None
    except (OSError, TokenFileError) as error:
        raise BindError(f"token file {settings.tokens_file}: {error}") from None
    return Access(tokens, RateLimit(settings.calls_per_second, settings.calls_burst), tenants)


class Signals:
    """The signals that ask the process to end, in the order in which they come."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived.put_nowait, number)

    async def next(self) -> int:
        """Wait for the next one."""
        return await self._arrived.get()


async def first_of(*work: Coroutine[None, None, int | None]) -> None:
    """Wait for the first of these, and cancel the rest. Raises what the first one raised."""
    tasks = [asyncio.create_task(each) for each in work]
    done, late = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
