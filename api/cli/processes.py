"""The processes of the service: api, rest, worker, host."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.builds import ApiAddress
from api.cli.completion import DEFAULT_API_ADDRESS
from api.cli.console import Exit, fail, given_path, read_settings, run_to_end, template_errors

if TYPE_CHECKING:
    from activities.process.settings import Settings

PROCESSES = "Processes"

app = typer.Typer()

NOBODY_ELSE = 0o077
"""The umask of what holds tenants' files and secrets."""


# Of a server.
Listen = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Where to listen; by default the settings'.")
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        parser=given_path,
        metavar="FILE",
        help="Certificate chain (PEM); with --tls-key it speaks TLS.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(parser=given_path, metavar="FILE", help="The certificate's key (PEM)."),
]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(
        parser=given_path,
        metavar="FILE",
        help="Take only clients with a certificate of this authority.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Allow an address that others can reach, without TLS."),
]


@app.command(
    rich_help_panel=PROCESSES, epilog="Example: template-manager api --listen 127.0.0.1:5008"
)
def api(
    *,
    listen: Listen = "",
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    tokens_file: Annotated[
        Path | None,
        typer.Option(
            parser=given_path, metavar="FILE", help="Bearer tokens and their rights; see `token`."
        ),
    ] = None,
    insecure: Insecure = False,
    no_authentication: Annotated[
        bool,
        typer.Option(
            "--no-authentication",
            help="Let everybody who reaches the address do everything: no tokens, no certificates.",
        ),
    ] = False,
) -> None:
    """Run the gRPC API. SIGTERM drains it."""
    from api.server.server import BindError, serve

    os.umask(NOBODY_ELSE)
    settings = read_settings()
    given = {
        "api_address": listen,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "tokens_file": tokens_file,
        "no_authentication": no_authentication,
    }
    settings = settings.model_copy(update={name: value for name, value in given.items() if value})
    try:
        _run_process("api", settings, lambda: serve(settings, insecure=insecure))
    except BindError as error:
        fail(str(error), "", Exit.USAGE, as_json=False)


@app.command(
    rich_help_panel=PROCESSES, epilog="Example: template-manager rest --listen 127.0.0.1:5009"
)
def rest(
    *,
    listen: Listen = "",
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    insecure: Insecure = False,
    no_authentication: Annotated[
        bool,
        typer.Option(
            "--no-authentication",
            help="Serve an address that others can reach although the gRPC API takes everybody.",
        ),
    ] = False,
) -> None:
    """Run the REST API that E2B's SDKs speak, in front of the gRPC API. SIGTERM drains it.

    It knows nobody: what a request brings as X-API-KEY is its token at the gRPC API.
    """
    from api.cli.rest_process import serve
    from api.client.credentials import CredentialsError
    from api.rest.server import ListenError
    from api.server.server import BindError

    settings = read_settings()
    given = {
        "rest_address": listen,
        "api_address": api_address,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "no_authentication": no_authentication,
    }
    settings = settings.model_copy(update={name: value for name, value in given.items() if value})
    try:
        _run_process("rest", settings, lambda: serve(settings, insecure=insecure))
    except (BindError, ListenError, CredentialsError) as error:
        fail(str(error), "", Exit.USAGE, as_json=False)


@app.command(rich_help_panel=PROCESSES, epilog="Example: template-manager worker")
def worker() -> None:
    """Run the workflows."""
    from activities.process.tenants_file import TenantsFileError
    from api.cli.workflow_worker import run

    settings = read_settings()
    try:
        _run_process("worker", settings, lambda: run(settings))
    except TenantsFileError as error:
        fail(str(error), "", Exit.USAGE, as_json=False)


@app.command(
    rich_help_panel=PROCESSES,
    epilog="Example: TEMPLATE_MANAGER_HOST_SLOTS=4 template-manager host",
)
def host() -> None:
    """Run builds on this KVM host. Needs root, Docker, Firecracker and a guest kernel."""
    from activities.host.worker import run

    os.umask(NOBODY_ELSE)
    settings = read_settings()
    _run_process("host", settings, lambda: run(settings))


def _run_process(
    name: str, settings: Settings, start: Callable[[], Coroutine[None, None, None]]
) -> None:
    from activities.process.logging import configure_logging
    from activities.process.tracing import configure_tracing

    configure_logging(settings, name)
    configure_tracing(name)
    with template_errors(as_json=False):
        run_to_end(start())
