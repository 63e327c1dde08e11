"""`template-manager`: the command line.

Commands load what they start only when they start it, so that `--help` is quick.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from api.cli.console import (
    AsJson,
    Exit,
    err,
    fail,
    out,
    print_json,
    read_settings,
    run_call,
    run_to_end,
    template_errors,
    transfer_bars,
)
from api.cli.operators import doctor, health, hosts, replay, sweep, token

if TYPE_CHECKING:
    from activities.process.settings import Settings
    from api.client.client import CreatedBuild, TemplateClient
    from api.pb import template_manager_pb2 as pb


EXIT_CODES = (
    "Exit codes: 0 success; 1 the build failed or was cancelled, or the template is damaged; "
    "2 wrong usage or a request that cannot be granted; 3 the API, or what it needs, is "
    "unavailable: try again."
)

app = typer.Typer(
    name="template-manager",
    help="Builds Firecracker VM templates from container images.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
T = TypeVar("T")

ApiAddress = Annotated[
    str,
    typer.Option(
        "--api-address",
        envvar="TEMPLATE_MANAGER_API_ADDRESS",
        help="Where the API listens.",
        metavar="HOST:PORT",
    ),
]
BuildIdArgument = Annotated[str, typer.Argument(metavar="BUILD_ID", help="The build's UUID.")]
DEFAULT_API_ADDRESS = "127.0.0.1:5008"
EXAMPLE_BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"
BUILDS = "Builds and templates"
PROCESSES = "Processes"
OPERATIONS = "Operations"
DEVELOPMENT = "Development"


def main() -> None:
    """Run the command line. gRPC's own chatter about connections is left out."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        app()
    finally:
        _leave_at_once()


def _leave_at_once() -> None:
    """End the process with the code it is about to end with, if Temporal's SDK is in it.

    The SDK's own threads call into Python. One that does so while the interpreter is being taken
    down makes the process end by SIGABRT or SIGSEGV, whatever the command's result was.
    """
    ending = sys.exc_info()[1]
    if "temporalio" not in sys.modules or not isinstance(ending, SystemExit):
        return
    atexit._run_exitfuncs()  # sends the last traces
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(ending.code if isinstance(ending.code, int) else 0)


# ---- Builds


@app.command(
    rich_help_panel=BUILDS,
    epilog="Example: template-manager build --image 127.0.0.1:5000/web:1 --memory 512 --vcpu 1 "
    "--start-command 'httpd -f -p 8080' --ready-command 'wget -q -O- http://127.0.0.1:8080' "
    "--follow",
)
def build(
    *,
    image: Annotated[
        str,
        typer.Option(help="The container image; without it, the service's own for the ids."),
    ] = "",
    dockerfile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A directory with a Dockerfile: its steps, on top of its FROM."
        ),
    ] = None,
    build_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For the Dockerfile's ARGs. May be repeated."),
    ] = None,
    from_template: Annotated[
        str, typer.Option(metavar="BUILD_ID", help="Start from a template instead of an image.")
    ] = "",
    start_command: Annotated[
        str,
        typer.Option(help="What runs in the guest; 'image' is the image's ENTRYPOINT and CMD."),
    ] = "",
    ready_command: Annotated[str, typer.Option(help="Succeeds when the guest is ready.")] = "",
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory, even, 128 to 32768.")] = 512,
    vcpu: Annotated[int, typer.Option(metavar="N", help="vCPUs: 1, or even, up to 32.")] = 1,
    disk: Annotated[int, typer.Option(metavar="MIB", help="Free disk space to add.")] = 512,
    template_id: Annotated[
        str, typer.Option(help="The template's name; by default made of the image's.")
    ] = "",
    build_id: Annotated[str, typer.Option(help="A UUID; by default a new one.")] = "",
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Environment of both commands. May be repeated."),
    ] = None,
    kernel: Annotated[str, typer.Option(help="Guest kernel; by default the server's.")] = "",
    firecracker: Annotated[
        str, typer.Option(help="Firecracker version; by default the server's.")
    ] = "",
    ready_timeout: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="Limit until ready; 0 is the server's.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Use no checkpoint.")] = False,
    registry_user: Annotated[str, typer.Option(help="User of the image's registry.")] = "",
    registry_password_stdin: Annotated[
        bool,
        typer.Option(
            "--registry-password-stdin",
            help="Read the password from standard input. "
            "Else: a file, or TEMPLATE_MANAGER_REGISTRY_PASSWORD.",
        ),
    ] = False,
    registry_password_file: Annotated[
        Path | None, typer.Option(help="A file that holds the password.")
    ] = None,
    google_key_file: Annotated[
        Path | None, typer.Option(help="A Google service account's key in JSON.")
    ] = None,
    google_default: Annotated[
        bool, typer.Option("--google-default", help="Use the KVM host's Google credentials.")
    ] = False,
    aws_region: Annotated[
        str, typer.Option(help="Log in to ECR there; AWS_ACCESS_KEY_ID and its secret are read.")
    ] = "",
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--no-follow", help="Show the build until it ends; the default on a terminal."
        ),
    ] = None,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Build a template, and show how it goes.

    Without --follow it prints the build's id and returns: the build goes on by itself.
    """
    from api.cli.build_request import (
        OptionError,
        RegistryOptions,
        environment_of,
        new_build_id,
        registry_of,
        template_id_of,
    )
    from api.cli.dockerfile import Translated, translate
    from api.pb import template_manager_pb2 as pb

    registry = RegistryOptions(
        user=registry_user,
        password_stdin=registry_password_stdin,
        password_file=registry_password_file,
        google_key_file=google_key_file,
        google_default=google_default,
        aws_region=aws_region,
    )
    with tempfile.TemporaryDirectory(prefix="template-manager-") as tars:
        try:
            if sum(map(bool, (image, dockerfile, from_template))) > 1:
                raise OptionError("give one of --image, --dockerfile and --from-template")
            steps = Translated(image=image)
            if dockerfile is not None:
                steps = translate(dockerfile, environment_of(build_arg or ()), Path(tars))
            template = pb.TemplateConfig(
                template_id=template_id or template_id_of(steps.image or "template"),
                build_id=build_id or new_build_id(),
                from_image=steps.image or None,
                from_template=(
                    pb.FromTemplateConfig(build_id=from_template) if from_template else None
                ),
                steps=steps.steps,
                from_image_registry=registry_of(registry),
                memory_mb=memory,
                vcpu_count=vcpu,
                disk_size_mb=disk,
                kernel_version=kernel,
                firecracker_version=firecracker,
                start_command=start_command or steps.start_command,
                ready_command=ready_command,
                ready_timeout_seconds=ready_timeout,
                env=environment_of(env or ()),
                force=force,
            )
        except (OptionError, ValueError) as error:  # ValueError: too large for the wire
            fail(str(error), "See template-manager build --help.", Exit.USAGE, as_json=as_json)

        async def start() -> None:
            from api.client.client import TemplateClient

            async with TemplateClient(api_address) as client:
                for sha256, tar in steps.files.items():
                    await _send_files(client, template.template_id, tar, sha256)
                await _show_started(client, await client.create(template), follow, as_json)

        run_call(start, as_json)


async def _send_files(client: TemplateClient, template_id: str, tar: Path, sha256: str) -> None:
    """Put the files of a COPY into the bucket, at an address that the API gives."""
    from api.client.files_upload import upload_files

    size_bytes = tar.stat().st_size
    with transfer_bars() as show:
        sent = await upload_files(
            client,
            template_id,
            tar,
            sha256,
            lambda done: show("sending files", done, size_bytes),
        )
        if not sent:
            show("files are there", size_bytes, size_bytes)
    tar.unlink()


async def _show_started(
    client: TemplateClient, created: CreatedBuild, follow: bool | None, as_json: bool
) -> None:
    """Follow the build, by default on a terminal; else say which it is."""
    if out.is_terminal if follow is None else follow:
        err.print(f"build {created.build_id}")
        await _follow(client, created.build_id, as_json)
    elif as_json:
        print_json(vars(created))
    else:
        out.print(created.build_id)
        err.print(f"→ template-manager logs {created.build_id} --follow")


async def _follow(client: TemplateClient, build_id: str, as_json: bool) -> None:
    """Show a build to its end, then all about it. Exits with the build's code."""
    from api.cli.live_view import follow, view_for

    try:
        with view_for(err if as_json else out) as view:
            status = await follow(client, build_id, view)
    except asyncio.CancelledError:
        err.print(
            f"\nThe build goes on. See it again: template-manager logs {build_id} --follow\n"
            f"Stop it: template-manager cancel {build_id}"
        )
        raise
    _show_end(build_id, status, as_json)


def _show_end(build_id: str, status: pb.TemplateBuildStatusResponse, as_json: bool) -> None:
    _show_status(build_id, status, as_json)
    if status.state != "completed":
        raise typer.Exit(Exit.BUILD_FAILED)


def _show_status(build_id: str, status: pb.TemplateBuildStatusResponse, as_json: bool) -> None:
    from api.cli.report import build_table, failure_text, status_json, workflow_address

    if as_json:
        print_json(status_json(build_id, status))
        return
    out.print(build_table(build_id, status))
    if status.run_id:  # on a line of its own, for it is long and there to be copied
        address = workflow_address(read_settings().web_ui_address, status)
        out.print(f"Web UI: {address}", soft_wrap=True)
    if status.HasField("reason"):
        out.print(failure_text(status))


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager status {EXAMPLE_BUILD} --json"
)
def status(
    build_id: BuildIdArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Show it until it ends.")] = False,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Show a build: state, step, progress, durations, artifacts; why it failed and what to do.

    The exit code is that of the question, not of the build: 0 also for a failed one, unless
    --watch has waited for its end.
    """

    async def show() -> None:
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            if watch:
                await _watch(client, build_id, as_json)
            else:
                _show_status(build_id, await client.status(build_id), as_json)

    run_call(show, as_json)


async def _watch(client: TemplateClient, build_id: str, as_json: bool) -> None:
    from api.cli.live_view import STATUS_SECONDS, view_for

    with view_for(err if as_json else out) as view:
        while (current := await client.status(build_id)).state in ("building", "cancelling"):
            view.status(current)
            await asyncio.sleep(STATUS_SECONDS)
    _show_end(build_id, current, as_json)


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager logs {EXAMPLE_BUILD} --follow"
)
def logs(
    build_id: BuildIdArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the build ends.")
    ] = False,
    level: Annotated[
        str, typer.Option(help="The lowest level to show: debug, info, warn, error.")
    ] = "debug",
    cursor: Annotated[int, typer.Option(min=0, help="Where to start; 0 is the beginning.")] = 0,
    run_id: Annotated[
        str, typer.Option(help="The run that the cursor is of: a reset or retry has begun another.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, with next_cursor and run_id.")
    ] = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Show a build's log. Works the same for a build that has ended."""
    from api.pb import template_manager_pb2 as pb

    levels = [name.lower() for name, _ in pb.LogLevel.items()]
    if level not in levels:
        fail(f"--level {level}: must be one of {', '.join(levels)}", "", Exit.USAGE, as_json=False)

    async def show() -> None:
        from api.cli.report import log_json, log_line
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            lines = client.logs(
                build_id, cursor=cursor, run_id=run_id, follow=follow, level=level.capitalize()
            )
            async for line in lines:
                if as_json:
                    sys.stdout.write(json.dumps(log_json(line)) + "\n")
                    sys.stdout.flush()
                else:
                    out.print(log_line(line.entry), soft_wrap=True)

    run_call(show, as_json)


@app.command(
    "list",
    rich_help_panel=BUILDS,
    epilog="Example: template-manager list --state failed --since 2026-11-01",
)
def list_builds(
    *,
    state: Annotated[
        list[str] | None,
        typer.Option(help="building, cancelling, completed, failed, cancelled. May be repeated."),
    ] = None,
    template_id: Annotated[str, typer.Option(help="Only builds of this template.")] = "",
    since: Annotated[
        datetime | None,
        typer.Option(help="Only builds started at this time, of this machine's zone, or later."),
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(help="Only builds started before this time.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 50,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """List builds, latest first."""
    from api.pb import template_manager_pb2 as pb

    request = pb.TemplateBuildListRequest(states=state or (), template_id=template_id)
    if since is not None:
        request.started_after.FromDatetime(since.astimezone())
    if until is not None:
        request.started_before.FromDatetime(until.astimezone())

    async def show() -> None:
        from api.cli.report import list_table, summary_json
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            builds = await _listed(client, request, limit)
        if as_json:
            print_json({"builds": [summary_json(build) for build in builds]})
        elif builds:
            out.print(list_table(builds))
        else:
            err.print("no builds")

    run_call(show, as_json)


async def _listed(
    client: TemplateClient, request: pb.TemplateBuildListRequest, limit: int
) -> list[pb.TemplateBuildSummary]:
    builds: list[pb.TemplateBuildSummary] = []
    request.page_size = min(limit, 100)
    while len(builds) < limit:
        page = await client.list_builds(request)
        builds.extend(page.builds)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    return builds[:limit]


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager retry {EXAMPLE_BUILD} --follow"
)
def retry(
    build_id: BuildIdArgument,
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--no-follow", help="Show the build until it ends; the default on a terminal."
        ),
    ] = None,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Go on with a failed build where it failed."""

    async def go_on() -> None:
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            await _show_started(client, await client.retry(build_id), follow, as_json)

    run_call(go_on, as_json)


@app.command(rich_help_panel=BUILDS, epilog=f"Example: template-manager cancel {EXAMPLE_BUILD}")
def cancel(
    build_id: BuildIdArgument,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Stop a build and undo it; returns when all is undone."""
    run_call(lambda: _undo(api_address, build_id, "cancelled", as_json), as_json)


@app.command(rich_help_panel=BUILDS, epilog=f"Example: template-manager delete {EXAMPLE_BUILD}")
def delete(
    build_id: BuildIdArgument,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Delete a template: objects, checkpoints, the service's own image tag. Stops a running build.

    It cannot be undone. Twice is fine.
    """
    run_call(lambda: _undo(api_address, build_id, "deleted", as_json), as_json)


async def _undo(address: str, build_id: str, outcome: str, as_json: bool) -> None:
    from api.client.client import TemplateClient

    async with TemplateClient(address) as client:
        with err.status(f"build {build_id}: undoing"):
            await (client.cancel if outcome == "cancelled" else client.delete)(build_id)
    if as_json:
        print_json({"build_id": build_id, "outcome": outcome})
    else:
        out.print(f"{build_id} {outcome}")


# ---- Templates


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager pull {EXAMPLE_BUILD} ./template"
)
def pull(
    build_id: BuildIdArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    bucket: Annotated[
        str, typer.Option(envvar="TEMPLATE_MANAGER_BUCKET", help="By default the settings' one.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Download rootfs.ext4, memfile and snapfile, byte for byte, straight from the bucket."""
    with template_errors(as_json), transfer_bars() as show:
        from activities.store.bucket import Bucket
        from activities.store.download import pull_template

        metadata = pull_template(
            Bucket(bucket or read_settings().bucket), build_id, directory, show
        )
    sizes = {name: artifact.size_bytes for name, artifact in metadata.artifacts.items()}
    if as_json:
        print_json({"build_id": build_id, "directory": str(directory), "size_bytes": sizes})
    else:
        out.print(f"template {metadata.template_id} is in {directory}")
        err.print(f"→ template-manager run {directory}")


@app.command(rich_help_panel=BUILDS, epilog="Example: template-manager run ./template")
def run(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where `pull` has put it.")],
    as_json: AsJson = False,
) -> None:
    """Resume a template on this machine and say where it answers. Ctrl-C ends it."""
    with template_errors(as_json):
        from activities.host.local_run import LocalRun, run_template

        def show(running: LocalRun) -> None:
            if as_json:
                print_json(vars(running))
                sys.stdout.flush()
                return
            took = f"resumed in {running.resume_ms:.0f} ms"
            out.print(f"{took}; the guest is {running.address} in a network namespace:")
            out.print(f"  ip netns exec {running.network} ping {running.address}")
            out.print("Ctrl-C ends it")

        run_template(directory, read_settings(), show)


# ---- Processes


@app.command(
    rich_help_panel=PROCESSES, epilog="Example: template-manager api --listen 127.0.0.1:5008"
)
def api(
    *,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; by default the settings'.")
    ] = "",
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM); with --tls-key it speaks TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Take only clients with a certificate of this authority.")
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens and their rights; see `token`.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Allow an address that others can reach, without TLS."),
    ] = False,
) -> None:
    """Run the gRPC API. SIGTERM drains it."""
    from api.server.server import BindError, serve

    settings = read_settings()
    given = {
        "api_address": listen,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "tokens_file": tokens_file,
    }
    settings = settings.model_copy(update={name: value for name, value in given.items() if value})
    try:
        _run_process("api", settings, lambda: serve(settings, insecure=insecure))
    except BindError as error:
        fail(str(error), "", Exit.USAGE, as_json=False)


@app.command(rich_help_panel=PROCESSES, epilog="Example: template-manager worker")
def worker() -> None:
    """Run the workflows."""
    from api.cli.workflow_worker import run

    settings = read_settings()
    _run_process("worker", settings, lambda: run(settings))


@app.command(
    rich_help_panel=PROCESSES,
    epilog="Example: TEMPLATE_MANAGER_HOST_SLOTS=4 template-manager host",
)
def host() -> None:
    """Run builds on this KVM host. Needs root, Docker, Firecracker and a guest kernel."""
    from activities.host.worker import run

    settings = read_settings()
    _run_process("host", settings, lambda: run(settings))


def _run_process(
    name: str, settings: Settings, start: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    from activities.process.logging import configure_logging
    from activities.process.tracing import configure_tracing

    configure_logging(settings, name)
    configure_tracing(name)
    with template_errors(as_json=False):
        run_to_end(start())


# ---- Operations


app.command(rich_help_panel=OPERATIONS, epilog="Example: template-manager doctor")(doctor)
app.command(rich_help_panel=OPERATIONS, epilog="Example: template-manager health 127.0.0.1:9465")(
    health
)
app.add_typer(hosts, name="hosts", rich_help_panel=OPERATIONS)

app.command(
    rich_help_panel=OPERATIONS,
    epilog="Example: template-manager token ci --right build --image 'registry.example/ci/*'",
)(token)

app.command(
    rich_help_panel=OPERATIONS,
    epilog="Example: template-manager sweep --dry-run",
)(sweep)
app.command(
    rich_help_panel=OPERATIONS,
    epilog=f"Example: template-manager replay {EXAMPLE_BUILD}",
)(replay)


# ---- Development


@app.command(rich_help_panel=DEVELOPMENT, epilog="Example: template-manager up")
def up() -> None:
    """Start the whole stack on this machine: what stands in for production, and our processes."""
    _services("up")


@app.command(rich_help_panel=DEVELOPMENT, epilog="Example: template-manager down")
def down() -> None:
    """Stop what `up` has started."""
    _services("down")


def _services(command: str) -> NoReturn:
    script = Path(__file__).resolve().parents[2] / "temporal-dev" / "devstack"
    if not script.exists():
        fail(
            f"`{command}` needs a checkout: there is no {script}",
            "Clone the repository, and install it there with `pip install --editable .`.",
            Exit.USAGE,
            as_json=False,
        )
    raise typer.Exit(subprocess.run([sys.executable, str(script), command], check=False).returncode)


if __name__ == "__main__":
    main()
