"""The commands for operators: doctor, health, hosts, token, sweep, replay."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from activities.contract.units import MIB
from api.cli import completion
from api.cli.columns import Column, print_rows
from api.cli.console import (
    EXAMPLE_BUILD,
    AsJson,
    Exit,
    err,
    fail,
    out,
    print_json,
    read_settings,
    require_address,
    run_to_end,
    template_errors,
)
from api.cli.help_text import CommandPanels

if TYPE_CHECKING:
    from temporalio.client import Client, WorkflowHistory

    from activities.contract.results import HostFacts, SweepReport
    from activities.host.doctor import Finding
    from activities.process.settings import Settings
    from workflows.replay import Verdict

OPERATIONS = "Operations"
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "wrong": ("✗", "red")}
SWEPT_COLUMNS = (
    Column("name"),
    Column("what"),
    Column("build", 2),
    Column("size", 1),
    Column("error"),
)
AWAY_ROW: tuple[str | Text, ...] = (Text("away", style="red"), "", "", "", "", "")
HOST_COLUMNS = (
    Column("host"),
    Column("state"),
    Column("slots"),
    Column("disk free", 1),
    Column("builds", 2),
    Column("checkpoints", 4),
    Column("versions", 3),
)

app = typer.Typer()


@app.command(rich_help_panel=OPERATIONS, epilog="Example: template-manager doctor")
def doctor(as_json: AsJson = False) -> None:
    """Check what a KVM host needs: KVM, Docker, tools, kernel, Firecracker, disk, Temporal, bucket.

    Says for each what is wrong and the command that mends it. Exits with 1 when something is.
    """
    with template_errors(as_json), err.status("looking around"):
        findings = run_to_end(_findings(read_settings()))
    if as_json:
        print_json({"findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            mark, style = MARKS[finding.state]
            out.print(Text.assemble((mark, style), f" {finding.what}: {finding.told}"))
            if finding.remedy:
                out.print(Text(f"  → {finding.remedy}"))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(Exit.BUILD_FAILED)


async def _findings(settings: Settings) -> list[Finding]:
    from activities.contract.errors import TemporalUnavailableError
    from activities.host.doctor import check_fair_share, check_host, check_temporal
    from activities.process.temporal import temporal_address

    findings = await asyncio.to_thread(check_host, settings)
    client: Client | None = None
    with contextlib.suppress(TemporalUnavailableError):
        client = await _connect()
    findings += [await check_temporal(client, temporal_address())]
    return [*findings, await check_fair_share(client)] if client else findings


@app.command(rich_help_panel=OPERATIONS, epilog="Example: template-manager health 127.0.0.1:9465")
def health(
    address: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT",
            envvar="TEMPLATE_MANAGER_HEALTH_ADDRESS",
            callback=require_address,
            help="The health address of an api, worker or host.",
        ),
    ],
    live: Annotated[
        bool, typer.Option("--live", help="Ask only whether it is alive, not whether it can work.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a process whether it can work; exits with 3 when not. For container health checks."""
    import requests

    from activities.process.health import LIVE_PATH, READY_PATH

    try:
        answer = requests.get(f"http://{address}{LIVE_PATH if live else READY_PATH}", timeout=10)
    except (requests.RequestException, ValueError):
        hint = "Start the process with TEMPLATE_MANAGER_HEALTH_ADDRESS set to that address."
        fail(f"nothing answers at {address}", hint, Exit.UNAVAILABLE, as_json=as_json)
    if as_json:
        print_json({"ok": answer.ok, "told": answer.text.strip()})
    else:
        out.print(answer.text.strip())
    raise typer.Exit(Exit.OK if answer.ok else Exit.UNAVAILABLE)


@app.command(
    rich_help_panel=OPERATIONS,
    epilog="Example: template-manager token ci --right build --image 'registry.example/ci/*'",
)
def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; audit lines say it.")],
    *,
    right: Annotated[
        str,
        typer.Option(
            metavar="RIGHT",
            help="read, build or admin; operator is admin in all tenants.",
            autocompletion=completion.one_of(completion.RIGHTS),
        ),
    ] = "build",
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Images that it may build from, as a shell pattern. May be repeated.",
        ),
    ] = None,
    tenant: Annotated[
        str,
        typer.Option(metavar="TENANT", help="Whose builds it sees and makes.", show_default=True),
    ] = "default",
    certificate: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Make no token, but the line for client certificates with this common or "
            "alternative name.",
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Make a bearer token: prints it once, and the line for the API's token file."""
    import secrets

    from activities.contract.names import DEFAULT_TENANT
    from api.server.access import CERTIFICATE, TokenFileError, hash_token, parse_tokens

    # E2B's SDK takes no other form for an API key.
    made = "" if certificate else f"e2b_{secrets.token_hex(32)}"
    key = f"{CERTIFICATE}{certificate}" if certificate else hash_token(made)
    options = [",".join(image or ()), f"tenant={tenant}" if tenant != DEFAULT_TENANT else ""]
    line = " ".join(filter(None, [name, key, right, *options]))
    try:
        parse_tokens(line)
    except TokenFileError as error:
        fail(str(error), "See template-manager token --help.", Exit.USAGE, as_json=as_json)
    if as_json:
        print_json({"token": made, "line": line})
        return
    if made:
        out.print(f"token: {made}", soft_wrap=True)
    out.print(f"line:  {line}", soft_wrap=True)
    clients = "; clients set TEMPLATE_MANAGER_TOKEN" if made else ""
    err.print(f"→ add the line to the API's token file{clients}")


@app.command(rich_help_panel=OPERATIONS, epilog="Example: template-manager sweep --dry-run")
def sweep(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show and remove what no live build owns on this host: VMs, netns, containers, files.

    Runs on a KVM host, beside its worker or without it. Hosts do this by themselves at start and
    on a Temporal schedule. What a live build owns is never touched.
    """
    with template_errors(as_json):
        report = run_to_end(_sweep(read_settings(), dry_run))
    if as_json:
        print_json(report.model_dump(mode="json") | {"bytes": report.bytes})
    else:
        _show(report)
    if any(item.error for item in report.items):
        raise typer.Exit(Exit.BUILD_FAILED)


async def _sweep(settings: Settings, dry_run: bool) -> SweepReport:
    from activities.contract.inputs import SweepInput
    from activities.host.orphans import describe_with
    from activities.host.worker import assemble

    with err.status("looking for what no live build owns"):
        host = assemble(settings, describe_with(await _connect()))
        return await host.sweep.sweep(SweepInput(dry_run=dry_run))


def _show(report: SweepReport) -> None:
    from api.cli.report import size_text

    if not report.items:
        out.print("nothing is left over on this host")
        return
    rows = [
        (
            item.name,
            item.kind,
            item.build_id,
            size_text(item.bytes) if item.bytes else "",
            item.error,
        )
        for item in report.items
    ]
    print_rows(out, SWEPT_COLUMNS, rows)
    done = "would be removed" if report.dry_run else "removed"
    removed = sum(1 for item in report.items if not item.error)
    out.print(f"{removed} {done}, {size_text(report.bytes)}")


@app.command(rich_help_panel=OPERATIONS, epilog=f"Example: template-manager replay {EXAMPLE_BUILD}")
def replay(
    what: Annotated[
        str,
        typer.Argument(
            metavar="BUILD_ID|FILE",
            help="A build's UUID or NAME:TAG, or a history that the Web UI downloaded.",
            autocompletion=completion.builds(),
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Run a build's recorded history against this code, without executing anything.

    Says that it fits, or at which event code and history part: then this code must not be deployed
    while that build runs.
    """
    with template_errors(as_json):
        verdict = run_to_end(_replay(what))
    if as_json:
        print_json(
            {
                "fits": verdict.fits,
                "events": verdict.events,
                "event_id": verdict.event_id,
                "difference": verdict.difference,
            }
        )
    elif verdict.fits:
        out.print(f"the history of {verdict.events} events fits this code")
    if verdict.fits:
        return
    if not as_json:
        fail(
            f"history and code part at event {verdict.event_id}: {verdict.difference}",
            "Run that build with the code it was started with, or guard the change by "
            "workflow.patched.",
            Exit.BUILD_FAILED,
            as_json=False,
        )
    raise typer.Exit(Exit.BUILD_FAILED)


async def _replay(what: str) -> Verdict:
    from workflows.replay import replay as run_replay

    return await run_replay(await _history(what))


async def _history(what: str) -> WorkflowHistory:
    from temporalio.service import RPCError

    from activities.contract.errors import TemplateNotFoundError
    from api.cli.replay import history_from_file, history_of_build

    path = Path(what)
    if path.is_file():
        try:
            return history_from_file(path)
        except ValueError as error:
            raise TemplateNotFoundError(
                str(error), hint="Download it from the Web UI, or name a build."
            ) from None
    build_id = await asyncio.to_thread(_build_id_of, what)
    try:
        return await history_of_build(await _connect(), build_id)
    except RPCError as error:
        raise TemplateNotFoundError(
            f"there is no file {what}, and Temporal has no history of a build {what}: "
            f"{error.message}"
        ) from None


def _build_id_of(what: str) -> str:
    """Return the build's id; that of a NAME:TAG is looked up in the bucket. Blocking."""
    from activities.contract.names import canonical_build_id
    from activities.contract.references import stands_for_a_build
    from activities.store.bucket import Bucket
    from activities.store.names import find_build

    with contextlib.suppress(ValueError):
        return canonical_build_id(what)
    return find_build(Bucket(read_settings().bucket), what) if stands_for_a_build(what) else what


hosts = typer.Typer(
    cls=CommandPanels,
    help="Show the KVM hosts, and drain one before maintenance.",
    invoke_without_command=True,
)
HostArgument = Annotated[
    str,
    typer.Argument(metavar="HOST", help="As `hosts` lists it.", autocompletion=completion.hosts),
]
DRAIN_POLL_SECONDS = 2.0

app.add_typer(hosts, name="hosts", rich_help_panel=OPERATIONS)


@hosts.callback(epilog="Example: template-manager hosts")
def list_hosts(context: typer.Context, as_json: AsJson = False) -> None:
    """Show every host: slots, running builds, disk, versions; and drain one before maintenance."""
    if context.invoked_subcommand is not None:
        return
    with template_errors(as_json), err.status("asking the hosts"):
        facts = run_to_end(_all_hosts())
    if as_json:
        plain = {
            name: told.model_dump(mode="json") if told else None for name, told in facts.items()
        }
        print_json({"hosts": plain})
        return
    print_rows(
        out,
        HOST_COLUMNS,
        [(name, *(_host_row(told) if told else AWAY_ROW)) for name, told in facts.items()],
    )


async def _all_hosts() -> dict[str, HostFacts | None]:
    from api.server.hosts import all_hosts

    return await all_hosts(await _connect())


def _host_row(told: HostFacts) -> tuple[str | Text, ...]:
    gib = 1024 * MIB
    state = Text("taking builds", "green")
    if told.draining or told.lacks:
        state = Text("draining" if told.draining else f"full: {told.lacks}", "yellow")
    versions = [*told.firecracker_versions, *told.kernel_versions]
    return (
        state,
        f"{len(told.builds)}/{told.slots}",
        f"{told.disk_free_bytes / gib:.0f} of {told.disk_total_bytes / gib:.0f} GiB",
        "\n".join(f"{build.build_id} {build.template_id}" for build in told.builds),
        f"{told.checkpoint_bytes / gib:.1f} GiB",
        f"{told.version}\n" + "\n".join(versions),
    )


@hosts.command(epilog="Example: template-manager hosts drain kvm-7 --wait")
def drain(
    host: HostArgument,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when its last build has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let a host take no new builds; those that it has go on to their end. Survives a restart."""
    with template_errors(as_json), err.status(f"draining {host}"):
        told = run_to_end(_drained(host, wait))
    if as_json:
        print_json({host: told.model_dump(mode="json")})
        return
    go_on = {0: "it has no builds", 1: "1 build goes on"}
    left = go_on.get(len(told.builds), f"{len(told.builds)} builds go on")
    out.print(f"{host} is draining: {left}")
    err.print(f"→ template-manager hosts resume {host}")


@hosts.command(epilog="Example: template-manager hosts resume kvm-7")
def resume(host: HostArgument, as_json: AsJson = False) -> None:
    """Let a drained host take builds again."""
    with template_errors(as_json):
        told = run_to_end(_told(host, draining=False))
    if as_json:
        print_json({host: told.model_dump(mode="json")})
    else:
        out.print(f"{host} takes builds again")


async def _drained(host: str, wait: bool) -> HostFacts:
    told = await _told(host, draining=True)
    while wait and told.builds:
        await asyncio.sleep(DRAIN_POLL_SECONDS)
        told = await _told(host, draining=None)
    return told


async def _told(host: str, *, draining: bool | None) -> HostFacts:
    from activities.contract.errors import HostAwayError
    from api.server.hosts import ask_host

    told = await ask_host(await _connect(), host, draining)
    if told is None:
        raise HostAwayError(f"host {host} does not answer")
    return told


async def _connect() -> Client:
    from activities.process.temporal import connect

    return await connect("template-manager")
