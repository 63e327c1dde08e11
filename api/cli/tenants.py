"""The commands about tenants, for operators: what they use, and removing one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from activities.contract.units import MIB
from api.cli.columns import Column, print_rows
from api.cli.console import (
    AsJson,
    Exit,
    err,
    fail,
    out,
    print_json,
    read_settings,
    run_to_end,
    template_errors,
)
from api.cli.help_text import CommandPanels
from api.cli.operators import OPERATIONS

if TYPE_CHECKING:
    from activities.contract.tenant_removal import TenantRemoval
    from activities.process.settings import Settings
    from api.server.tenant_use import TenantUse

TENANT_COLUMNS = (
    Column("tenant"),
    Column("running"),
    Column("waiting"),
    Column("vCPUs", 3),
    Column("memory MiB", 3),
    Column("stored MiB", 2),
    Column("templates", 4),
    Column("waits for", 1),
)
SHOWN_BUILDS = 5

app = typer.Typer()
tenants = typer.Typer(
    cls=CommandPanels,
    help="Show what the tenants use, against their limits.",
    invoke_without_command=True,
)
app.add_typer(tenants, name="tenants", rich_help_panel=OPERATIONS)


@tenants.callback(epilog="Example: template-manager tenants")
def list_tenants(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what each tenant uses, its limits, and which of its builds wait for what.

    Asks Temporal and the bucket; limits are those of the tenants' file of this machine.
    """
    if context.invoked_subcommand is not None:
        return
    with template_errors(as_json), err.status("asking Temporal and the bucket"):
        uses = run_to_end(_uses(read_settings()))
    if as_json:
        print_json({"tenants": {use.tenant: use_json(use) for use in uses}})
    elif uses:
        print_rows(out, TENANT_COLUMNS, [use_row(use) for use in uses])
    else:
        err.print("no tenant has anything")


async def _uses(settings: Settings) -> list[TenantUse]:
    from activities.process.temporal import connect
    from activities.process.tenants_file import TenantsFile
    from api.server.template_bucket import TemplateBucket
    from api.server.tenant_use import TenantUses

    client = await connect("template-manager")
    bucket = TemplateBucket(settings.bucket)
    return await TenantUses(client, bucket, TenantsFile(settings.tenants_file)).all()


class UseJson(TypedDict):
    """What a tenant uses, for programs. Limits that it has not are left out."""

    on_hosts: list[str]
    wait_for_host: list[str]
    wait_for_turn: list[str]
    vcpus: int | None
    memory_mb: int | None
    templates: int | None
    stored_bytes: int | None
    limits: dict[str, float | str]


def use_json(use: TenantUse) -> UseJson:
    """Return a tenant's use for programs."""
    running = use.line.running if use.line else None
    return UseJson(
        on_hosts=list(use.on_hosts),
        wait_for_host=list(use.wait_for_host),
        wait_for_turn=list(use.wait_for_turn),
        vcpus=sum(build.vcpu_count for build in running) if running is not None else None,
        memory_mb=sum(build.memory_mb for build in running) if running is not None else None,
        templates=use.stored.templates if use.stored else None,
        stored_bytes=use.stored.bytes if use.stored else None,
        limits=use.limits.model_dump(exclude_none=True),
    )


def use_row(use: TenantUse) -> Sequence[str]:
    """Return a tenant's use as a row of `TENANT_COLUMNS`."""
    told, limits = use_json(use), use.limits
    stored = told["stored_bytes"]
    return (
        use.tenant,
        _of(use.running, limits.running_builds),
        _of(use.waiting, limits.waiting_builds),
        _of(told["vcpus"], limits.vcpus),
        _of(told["memory_mb"], limits.memory_mb),
        _of(stored // MIB if stored is not None else None, limits.stored_mb),
        _of(told["templates"], None),
        "\n".join([*_waits("a turn", use.wait_for_turn), *_waits("a host", use.wait_for_host)]),
    )


def _of(used: int | None, limit: int | None) -> str:
    shown = "" if used is None else str(used)
    return shown if limit is None else f"{shown or '?'}/{limit}"


def _waits(what: str, builds: Sequence[str]) -> list[str]:
    shown = [f"{what}: {build}" for build in builds[:SHOWN_BUILDS]]
    more = len(builds) - len(shown)
    return [*shown, f"{what}: {more} more"] if more else shown


@tenants.command(epilog="Example: template-manager tenants delete acme --yes")
def delete(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="As `tenants` lists it.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Yes, all of it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove all that is a tenant's: builds, templates, images of ours, logs, files.

    Running builds are cancelled. Take the tenant's lines out of the token file first. It goes on
    in Temporal when this command ends; run it again to wait.
    """
    require_deletable(tenant, yes=yes, as_json=as_json)
    with template_errors(as_json), err.status(f"removing {tenant}"):
        removed = run_to_end(_removed(tenant))
    if as_json:
        print_json(removed.model_dump(mode="json"))
    else:
        out.print(f"{removed.builds} builds, and {removed.objects} files and logs, are removed")
        for build_id in removed.left:
            err.print(f"not removed: build {build_id}")
    if removed.left:
        raise typer.Exit(Exit.BUILD_FAILED)


def require_deletable(tenant: str, *, yes: bool, as_json: bool) -> None:
    """End with wrong usage unless it is a tenant that can be removed, and said to be."""
    from activities.contract.names import DEFAULT_TENANT, TENANT_NAME

    if not TENANT_NAME.fullmatch(tenant) or tenant == DEFAULT_TENANT:
        hint = "Delete builds of the default tenant one by one (template-manager delete)."
        fail(f"{tenant} is no tenant that can be removed", hint, Exit.USAGE, as_json=as_json)
    if not yes:
        hint = f"Run template-manager tenants delete {tenant} --yes"
        fail(f"this removes all that is {tenant}'s", hint, Exit.USAGE, as_json=as_json)


async def _removed(tenant: str) -> TenantRemoval:
    from temporalio.common import WorkflowIDConflictPolicy

    from activities.contract.names import WORKFLOW_TASK_QUEUE, delete_tenant_workflow_id
    from activities.contract.tenant_removal import TenantRemoval
    from activities.process.temporal import connect
    from workflows.delete_tenant import DeleteTenant

    client = await connect("template-manager")
    handle = await client.start_workflow(
        DeleteTenant.run,
        TenantRemoval(tenant=tenant),
        id=delete_tenant_workflow_id(tenant),
        task_queue=WORKFLOW_TASK_QUEUE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        static_summary=f"remove tenant {tenant}",
    )
    return await handle.result()
