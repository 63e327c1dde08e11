"""The REST API as a process: its server, with health, metrics and signals as the others have."""

from __future__ import annotations

import structlog
from temporalio.runtime import Runtime

from activities.contract.units import KIB
from activities.process.health import health_endpoint
from activities.process.metrics import count_request, runtime_for
from activities.process.ready_file import shown_as_ready
from activities.process.settings import Settings
from api.client.credentials import ClientCredentials
from api.rest.app import Observe
from api.rest.requests import RequestLimits
from api.rest.server import Listening, running_rest
from api.server.server import Signals, first_of, is_loopback, require_private, require_whole_tls

_log = structlog.get_logger(__name__)


async def serve(settings: Settings, *, insecure: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; a second signal stops without draining.

    Starts also while the gRPC API is away, and then says so. Raises BindError, ListenError,
    CredentialsError and AddressTakenError.
    """
    require_whole_tls(settings)
    require_private(settings.rest_address, settings, insecure=insecure)
    signals = Signals()
    rest = running_rest(
        _listening(settings), settings.api_address, ClientCredentials(), _observer(settings)
    )
    async with rest as server, health_endpoint(settings, server.readiness):
        _log.info("serving", address=server.address, api=settings.api_address)
        with shown_as_ready(settings):
            await signals.next()
        _log.info("draining")
        await first_of(server.drain(), signals.next())
    _log.info("stopped")


def _listening(settings: Settings) -> Listening:
    is_open = is_loopback(settings.rest_address) or settings.no_authentication
    return Listening(
        settings.rest_address,
        certificate=settings.tls_cert,
        key=settings.tls_key,
        client_authority=settings.tls_client_ca,
        asks_for_tokens=not is_open,
        most_connections=settings.calls_at_once,
        drain_seconds=settings.drain_seconds,
        limits=RequestLimits(settings.max_request_kb * KIB, settings.request_seconds),
    )


def _observer(settings: Settings) -> Observe:
    runtime = runtime_for(settings)
    if runtime is None:
        return lambda method, path, status, seconds: None
    return _counting(runtime)


def _counting(runtime: Runtime) -> Observe:
    """Return what counts requests. Prometheus is served as long as somebody has the runtime."""

    def observe(method: str, path: str, status: int, seconds: float) -> None:
        count_request(runtime.metric_meter, method, path, status, seconds)

    return observe
