"""The commands about builds: build, status, logs, list, retry, cancel, delete."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text
from typer.core import TyperCommand

from api.cli import completion
from api.cli.completion import API_ADDRESS, DEFAULT_API_ADDRESS
from api.cli.console import (
    BUILDS,
    EXAMPLE_BUILD,
    AsJson,
    BuildIdArgument,
    Exit,
    build_id_argument,
    err,
    fail,
    given_path,
    out,
    print_json,
    require_address,
    run_call,
)
from api.cli.image_builders import BuilderName
from api.cli.showing import show_started, show_status, watch_build

if TYPE_CHECKING:
    from typer._click.core import Context  # typer's command is made of it

    from api.cli.dockerfile import DockerfileRecipe
    from api.pb import template_manager_pb2 as pb

ApiAddress = Annotated[
    str,
    typer.Option(
        "--api-address",
        envvar=API_ADDRESS,
        help="Where the API listens.",
        metavar="HOST:PORT",
        callback=require_address,
    ),
]
Follow = Annotated[
    bool | None,
    typer.Option(
        "--follow/--no-follow", help="Show the build until it ends; the default on a terminal."
    ),
]
PASSED_ON = "--"
MAX_CURSOR = 2**64 - 1

app = typer.Typer()


class BuildCommand(TyperCommand):
    """A command that keeps what follows `--` for the image builder, unread."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Take it away before anything is read."""
        at = args.index(PASSED_ON) if PASSED_ON in args else len(args)
        ctx.meta[PASSED_ON] = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Tell of it in the usage."""
        return [*super().collect_usage_pieces(ctx), f"[{PASSED_ON} BUILDER_OPTION...]"]


@app.command(
    cls=BuildCommand,
    rich_help_panel=BUILDS,
    epilog="Example: template-manager build --image 127.0.0.1:5000/web:1 --memory 512 --vcpu 1 "
    "--start-command 'httpd -f -p 8080' --ready-command 'wget -q -O- http://127.0.0.1:8080' "
    "--follow",
)
def build(
    ctx: typer.Context,
    directory: Annotated[
        Path | None, typer.Argument(parser=given_path, metavar="DIR", help="The context of --file.")
    ] = None,
    *,
    image: Annotated[
        str,
        typer.Option(metavar="IMAGE", help="The container image: registry/repository:tag."),
    ] = "",
    own_image: Annotated[
        bool,
        typer.Option(
            "--own-image",
            help="The image that was pushed to the service's registry as "
            "TEMPLATE_ID:BUILD_ID, of these options.",
        ),
    ] = False,
    dockerfile: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="PATH",
            help="A Dockerfile, or the directory that has one: your own builder makes and pushes "
            "its image. What follows -- is passed on to the builder.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            parser=given_path,
            help="The Dockerfile; DIR is the context.",
            metavar="FILE",
        ),
    ] = None,
    builder: Annotated[
        BuilderName | None,
        typer.Option(
            metavar="BUILDER",
            help="docker, buildx, podman or buildah; by default the first that answers.",
        ),
    ] = None,
    build_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="For the Dockerfile's ARGs. May be repeated."),
    ] = None,
    registry: Annotated[
        str,
        typer.Option(
            metavar="REGISTRY",
            help="Where the builder pushes REGISTRY/TEMPLATE_ID:BUILD_ID; by default as the "
            "server says.",
        ),
    ] = "",
    from_template: Annotated[
        str,
        typer.Option(
            metavar="BUILD_ID",
            help="Start from a template (or NAME:TAG) instead of an image.",
            autocompletion=completion.builds("completed"),
        ),
    ] = "",
    start_command: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="What runs in the guest; 'image' is the image's ENTRYPOINT and CMD, the default "
            "of a Dockerfile that has them.",
        ),
    ] = "",
    ready_command: Annotated[
        str, typer.Option(metavar="COMMAND", help="Succeeds when the guest is ready.")
    ] = "",
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory, even, 128 to 32768.")] = 512,
    vcpu: Annotated[int, typer.Option(metavar="N", help="vCPUs: 1, or even, up to 32.")] = 1,
    disk: Annotated[int, typer.Option(metavar="MIB", help="Free disk space to add.")] = 512,
    template_id: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The template's name; by default made of the image's, or DIR's."
        ),
    ] = "",
    build_id: Annotated[
        str, typer.Option(metavar="UUID", help="The build's id; by default a new one.")
    ] = "",
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="A name for the template, which then has an id by it."),
    ] = "",
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TAG",
            help="Of --name: moves to this build when it is published; default by default. "
            "May be repeated.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Environment of both commands. May be repeated."),
    ] = None,
    kernel: Annotated[
        str, typer.Option(metavar="VERSION", help="Guest kernel; by default the server's.")
    ] = "",
    firecracker: Annotated[
        str, typer.Option(metavar="VERSION", help="Firecracker; by default the server's.")
    ] = "",
    ready_timeout: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="Limit until ready; 0 is the server's.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Use no checkpoint.")] = False,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Nobody waits for it: let your other builds go before it."),
    ] = False,
    keep_failed: Annotated[
        bool,
        typer.Option(
            "--keep-failed",
            help="Keep the disk of a step that fails on its host, to look at with run --disk.",
        ),
    ] = False,
    network: Annotated[
        str,
        typer.Option(
            metavar="none|internet|LIST",
            help="What steps and start command may reach: LIST is networks and host names, with "
            "commas. By default the server's.",
        ),
    ] = "",
    registry_user: Annotated[
        str, typer.Option(metavar="NAME", help="User of the image's registry.")
    ] = "",
    registry_password_stdin: Annotated[
        bool,
        typer.Option(
            "--registry-password-stdin",
            help="Read the password from standard input. "
            "Else: a file, or TEMPLATE_MANAGER_REGISTRY_PASSWORD.",
        ),
    ] = False,
    registry_password_file: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FILE", help="A file that holds the password."),
    ] = None,
    google_key_file: Annotated[
        Path | None,
        typer.Option(
            parser=given_path, metavar="FILE", help="A Google service account's key in JSON."
        ),
    ] = None,
    google_default: Annotated[
        bool, typer.Option("--google-default", help="Use the KVM host's Google credentials.")
    ] = False,
    aws_region: Annotated[
        str,
        typer.Option(
            metavar="REGION",
            help="Log in to ECR there; AWS_ACCESS_KEY_ID and its secret are read.",
        ),
    ] = "",
    follow: Follow = None,
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
        network_of,
        new_build_id,
        registry_of,
        require_one_source,
        template_id_of,
    )
    from api.cli.dockerfile import DockerfileOptions
    from api.pb import template_manager_pb2 as pb

    login = RegistryOptions(
        user=registry_user,
        password_stdin=registry_password_stdin,
        password_file=registry_password_file,
        google_key_file=google_key_file,
        google_default=google_default,
        aws_region=aws_region,
    )
    options = DockerfileOptions(
        dockerfile=dockerfile,
        file=file,
        directory=directory,
        builder=builder,
        registry=registry,
        build_args=tuple(build_arg or ()),
        passed_on=ctx.meta[PASSED_ON],
    )
    try:
        recipe = options.recipe()
        require_one_source(
            {
                "--image": bool(image),
                "--dockerfile": recipe is not None,
                "--from-template": bool(from_template),
                "--own-image": own_image,
            }
        )
        if own_image and not (template_id and build_id):
            raise OptionError("--own-image needs --template-id and --build-id: its name")
        template = pb.TemplateConfig(
            template_id=template_id
            or (
                recipe.template_id
                if recipe
                else ""
                if name
                else template_id_of(image or "template")
            ),
            build_id=build_id or new_build_id(),
            from_image=image or None,
            from_template=(
                pb.FromTemplateConfig(build_id=from_template) if from_template else None
            ),
            from_image_registry=registry_of(login),
            memory_mb=memory,
            vcpu_count=vcpu,
            disk_size_mb=disk,
            kernel_version=kernel,
            firecracker_version=firecracker,
            start_command=start_command,
            ready_command=ready_command,
            ready_timeout_seconds=ready_timeout,
            env=environment_of(env or ()),
            force=force,
            priority=pb.Batch if batch else pb.Interactive,
            name=name,
            tags=tag,
            keep_failed=keep_failed,
            network=network_of(network),
        )
    except (OptionError, ValueError) as error:  # ValueError: too large for the wire
        fail(str(error), "See template-manager build --help.", Exit.USAGE, as_json=as_json)

    async def start() -> None:
        from api.client.client import TemplateClient

        if recipe is not None:
            await _build_image(api_address, template, recipe, as_json)
        async with TemplateClient(api_address) as client:
            await show_started(client, await client.create(template), follow, as_json)

    run_call(start, as_json)


def _say(line: str) -> None:
    err.print(Text(line), soft_wrap=True)


async def _build_image(
    api_address: str, template: pb.TemplateConfig, recipe: DockerfileRecipe, as_json: bool
) -> None:
    """Have the image of a Dockerfile built and pushed, and let the template be of it."""
    from activities.contract.requests import IMAGE_COMMAND
    from api.cli.image_builders import BuilderError, NoBuilderError

    try:
        pushed = await recipe.build(api_address, template, _say)
    except NoBuilderError as error:
        fail(error.message, error.hint, Exit.UNAVAILABLE, as_json=as_json)
    except BuilderError as error:
        fail(error.message, error.hint, Exit.BUILD_FAILED, as_json=as_json)
    except asyncio.CancelledError:
        _say("interrupted: no build of a template was started")
        raise
    err.print(f"pushed {pushed.reference}", soft_wrap=True)
    template.from_image = pushed.reference
    if pushed.has_command and not template.start_command:
        template.start_command = IMAGE_COMMAND


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
                await watch_build(client, build_id, as_json)
            else:
                show_status(await client.status(build_id), as_json)

    run_call(show, as_json)


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager inspect {EXAMPLE_BUILD} --json"
)
def inspect(
    build_id: Annotated[str, build_id_argument("completed")],
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Show what a template takes in the bucket: layers, with whom they are shared, what is its own.

    And what a delete would free. Layers of public images are everybody's, and count to nobody. In a
    pipe there is a line a layer, with a tab between values: layer, size, whose, delete, builds.
    """

    async def show() -> None:
        from api.cli.columns import print_rows
        from api.cli.json_output import inspect_json
        from api.cli.report import LAYER_COLUMNS, layer_rows, size_text
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            found = await client.inspect(build_id)
        if as_json:
            print_json(inspect_json(found))
        else:
            print_rows(out, LAYER_COLUMNS, layer_rows(found))
            err.print(f"a delete frees {size_text(found.freed_bytes)}")

    run_call(show, as_json)


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
        str,
        typer.Option(
            metavar="LEVEL",
            help="The lowest level to show: debug, info, warn, error.",
            autocompletion=completion.one_of(completion.LEVELS),
        ),
    ] = "debug",
    cursor: Annotated[
        int, typer.Option(metavar="N", min=0, help="Where to start; 0 is the beginning.")
    ] = 0,
    run_id: Annotated[
        str,
        typer.Option(
            metavar="RUN_ID",
            help="The run that the cursor is of: a reset or retry has begun another.",
        ),
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
        from api.cli.json_output import log_json
        from api.cli.report import log_line
        from api.cli.told_once import LogOnce
        from api.client.client import TemplateClient

        once = LogOnce()

        def tell(entries: Sequence[pb.TemplateBuildLogEntry]) -> None:
            for entry in entries:
                out.print(log_line(entry), soft_wrap=True)

        async with TemplateClient(api_address) as client:
            lines = client.logs(
                build_id,
                cursor=min(cursor, MAX_CURSOR),
                run_id=run_id,
                follow=follow,
                level=level.capitalize(),
            )
            async for line in lines:
                if as_json:
                    sys.stdout.write(json.dumps(log_json(line)) + "\n")
                    sys.stdout.flush()
                else:
                    tell(once.take(line.entry))
        tell(once.rest())

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
        typer.Option(
            metavar="STATE",
            help="building, cancelling, completed, failed, cancelled. May be repeated.",
            autocompletion=completion.one_of(completion.STATES),
        ),
    ] = None,
    template_id: Annotated[
        str, typer.Option(metavar="NAME", help="Only builds of this template.")
    ] = "",
    since: Annotated[
        datetime | None,
        typer.Option(
            metavar="TIME",
            help="Only builds started at this time, of this machine's zone, or later: "
            "2026-11-01 or 2026-11-01T09:30:00.",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(metavar="TIME", help="Only builds started before this time."),
    ] = None,
    tenant: Annotated[
        str, typer.Option(metavar="TENANT", help="Only builds of this tenant; for operators.")
    ] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="How many to show.")] = 50,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """List builds, latest first.

    A terminal shows the columns that fit. In a pipe there is a line a build, with a tab between
    whole values: build, state, template, age, step, took, host, started, tenant, names.
    """
    from api.pb import template_manager_pb2 as pb

    request = pb.TemplateBuildListRequest(
        states=state or (), template_id=template_id, tenant=tenant
    )
    if since is not None:
        request.started_after.FromDatetime(since.astimezone())
    if until is not None:
        request.started_before.FromDatetime(until.astimezone())

    async def show() -> None:
        from api.cli.columns import print_rows
        from api.cli.json_output import summary_json
        from api.cli.report import LIST_COLUMNS, list_rows
        from api.client.client import TemplateClient
        from api.client.paging import rows_of_pages

        async with TemplateClient(api_address) as client:
            found = rows_of_pages(client.list_builds, request, lambda page: page.builds, limit)
            builds = [build async for build in found]
        if as_json:
            print_json({"builds": [summary_json(build) for build in builds]})
        elif builds:
            print_rows(out, LIST_COLUMNS, list_rows(builds, datetime.now(UTC)))
        else:
            err.print("no builds")

    run_call(show, as_json)


@app.command(
    rich_help_panel=BUILDS, epilog=f"Example: template-manager retry {EXAMPLE_BUILD} --follow"
)
def retry(
    build_id: Annotated[str, build_id_argument("failed")],
    follow: Follow = None,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Go on with a failed build where it failed."""

    async def go_on() -> None:
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            await show_started(client, await client.retry(build_id), follow, as_json)

    run_call(go_on, as_json)


@app.command(rich_help_panel=BUILDS, epilog=f"Example: template-manager cancel {EXAMPLE_BUILD}")
def cancel(
    build_id: Annotated[str, build_id_argument("building")],
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Stop a build and undo it; returns when all is undone.

    What it has on a host that does not answer, that host's sweep removes.
    """
    run_call(lambda: _undo(api_address, build_id, "cancelled", as_json), as_json)


@app.command(rich_help_panel=BUILDS, epilog=f"Example: template-manager delete {EXAMPLE_BUILD}")
def delete(
    build_id: BuildIdArgument,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Delete a template: objects, checkpoints, the service's own image tag. Stops a running build.

    It cannot be undone, and says which names went with it. Twice is fine.
    """
    run_call(lambda: _undo(api_address, build_id, "deleted", as_json), as_json)


async def _undo(address: str, build_id: str, outcome: str, as_json: bool) -> None:
    from api.client.client import TemplateClient

    async with TemplateClient(address) as client:
        undo = client.cancel if outcome == "cancelled" else client.delete
        with err.status(f"build {build_id}: undoing"):
            undone = await undo(build_id)
    names = list(undone.names)
    if as_json:
        print_json({"build_id": undone.build_id, "outcome": outcome, "names": names})
    else:
        told = f"{undone.build_id} {outcome}" + (f", with {', '.join(names)}" if names else "")
        out.print(told, soft_wrap=True)
