"""What commands show of a build: that it has started, how it goes, how it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from api.cli.console import Exit, err, out, print_json, print_table, read_settings

if TYPE_CHECKING:
    from api.client.client import CreatedBuild, TemplateClient
    from api.pb import template_manager_pb2 as pb


async def show_started(
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
            is_shown = view.end(status)
    except asyncio.CancelledError:
        err.print(
            f"\nThe build goes on. See it again: template-manager logs {build_id} --follow\n"
            f"Stop it: template-manager cancel {build_id}"
        )
        raise
    _show_end(status, as_json, is_shown)


def _show_end(
    status: pb.TemplateBuildStatusResponse,
    as_json: bool,
    is_shown: Callable[[str], bool],
) -> None:
    show_status(status, as_json, is_shown)
    if status.state != "completed":
        raise typer.Exit(Exit.BUILD_FAILED)


def _nothing_shown(line: str) -> bool:
    return False


def show_status(
    status: pb.TemplateBuildStatusResponse,
    as_json: bool,
    is_shown: Callable[[str], bool] = _nothing_shown,
) -> None:
    """Show all about a build as it is now, without the last lines that have been shown."""
    from api.cli.json_output import status_json
    from api.cli.report import build_table, failure_text, workflow_address

    if as_json:
        print_json(status_json(status))
        return
    print_table(out, build_table(status))
    if status.run_id:  # on a line of its own, for it is long and there to be copied
        address = workflow_address(read_settings().web_ui_address, status)
        out.print(f"Web UI: {address}", soft_wrap=True)
    if status.HasField("reason"):
        out.print(failure_text(status, is_shown))


async def watch_build(client: TemplateClient, build_id: str, as_json: bool) -> None:
    """Show a build's status until it ends. Exits with the build's code."""
    from api.cli.live_view import STATUS_SECONDS, view_for

    with view_for(err if as_json else out) as view:
        while (current := await client.status(build_id)).state in ("building", "cancelling"):
            view.status(current)
            await asyncio.sleep(STATUS_SECONDS)
    _show_end(current, as_json, _nothing_shown)
