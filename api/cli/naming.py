"""The commands about names of templates and their tags: tag and names."""

from __future__ import annotations

from typing import Annotated

import typer

from api.cli import completion
from api.cli.builds import ApiAddress
from api.cli.completion import DEFAULT_API_ADDRESS
from api.cli.console import (
    BUILDS,
    EXAMPLE_BUILD,
    AsJson,
    Exit,
    err,
    fail,
    out,
    print_json,
    run_call,
)

app = typer.Typer()


@app.command(
    rich_help_panel=BUILDS,
    epilog=f"Example: template-manager tag {EXAMPLE_BUILD} web:stable; to promote, "
    "template-manager tag web:candidate web:stable; and back again, "
    "template-manager tag --roll-back web:stable",
)
def tag(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUILD] NAME:TAG",
            help="The build, by its UUID or a tag that it has; and what is to stand for it.",
            autocompletion=completion.builds("completed"),
        ),
    ],
    *,
    roll_back: Annotated[
        bool, typer.Option("--roll-back", help="Let it stand for the build before, again.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the tag away, or all tags with the NAME.")
    ] = False,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """Let a name's tag stand for a published build. NAME alone is its tag default.

    It may then be written wherever a build's id is taken.
    """
    from api.pb import template_manager_pb2 as pb

    if len(words) != (1 if roll_back or remove else 2) or (roll_back and remove):
        told = "give NAME:TAG with --roll-back or --remove, else BUILD and NAME:TAG"
        fail(told, "See template-manager tag --help.", Exit.USAGE, as_json=as_json)
    name, has_tag, tag_name = words[-1].partition(":")
    tags = [tag_name] if has_tag else []

    async def change() -> None:
        from api.cli.json_output import name_json
        from api.client.client import TemplateClient

        async with TemplateClient(api_address) as client:
            if remove:
                left = await client.remove_tags(name, tags)
            else:
                request = pb.TemplateTagsAssignRequest(
                    name=name,
                    tags=tags,
                    build_id="" if roll_back else words[0],
                    roll_back=roll_back,
                )
                left = await client.assign_tags(request)
        if as_json:
            print_json(name_json(left))
        elif remove:
            out.print(f"{words[-1]} is gone")
        else:
            wanted = tag_name or "default"
            builds = [each.build_id for each in left.tags if each.tag == wanted]
            out.print(f"{left.name}:{wanted} is {builds[0]}", soft_wrap=True)

    run_call(change, as_json)


@app.command(rich_help_panel=BUILDS, epilog="Example: template-manager names --json")
def names(
    *,
    tenant: Annotated[
        str, typer.Option(metavar="TENANT", help="Only names of this tenant; for operators.")
    ] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="How many to show.")] = 100,
    as_json: AsJson = False,
    api_address: ApiAddress = DEFAULT_API_ADDRESS,
) -> None:
    """List the names of templates, each tag with its build.

    In a pipe there is a line a tag, with a tab between values: tag, build, template, since, tenant.
    """
    from api.pb import template_manager_pb2 as pb

    async def show() -> None:
        from api.cli.columns import print_rows
        from api.cli.json_output import name_json
        from api.cli.report import NAME_COLUMNS, name_rows
        from api.client.client import TemplateClient
        from api.client.paging import rows_of_pages

        request = pb.TemplateNameListRequest(tenant=tenant)
        async with TemplateClient(api_address) as client:
            rows = rows_of_pages(client.names, request, lambda page: page.names, limit)
            found = [name async for name in rows]
        if as_json:
            print_json({"names": [name_json(each) for each in found]})
        elif found:
            print_rows(out, NAME_COLUMNS, name_rows(found))
        else:
            err.print("no names")

    run_call(show, as_json)
