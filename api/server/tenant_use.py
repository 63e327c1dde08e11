"""What the tenants use now, against their limits, and who waits for what.

Temporal tells of open builds and of the tenants' lines, the bucket what is stored, the tenants'
file what is allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from temporalio.client import Client, WorkflowQueryFailedError
from temporalio.common import MetricMeter
from temporalio.service import RPCError

from activities.contract.errors import TemplateManagerError
from activities.contract.line import LinedBuild, TenantLineState
from activities.contract.names import (
    DEFAULT_TENANT,
    TENANT_LINE,
    TENANT_LINE_WORKFLOW,
    Step,
    build_of_workflow,
    tenant_line_workflow_id,
)
from activities.contract.search_attributes import BUILD_STEP, RUNNING_BUILDS, TENANT
from activities.process.at_once import ask_for_each
from activities.process.metrics import show_tenant
from activities.process.tenants_file import TenantLimits, TenantsFile
from api.server.finding import QUERY_LIMIT, RPC_LIMIT
from api.server.template_bucket import TemplateBucket
from api.server.tenancy import condition_of
from workflows.tenant_line import TenantLine

if TYPE_CHECKING:  # loads Google's client, see TemplateBucket
    from activities.store.stored import TenantStored

RUNNING_LINES = f"WorkflowType='{TENANT_LINE_WORKFLOW}' AND ExecutionStatus='Running'"
SHOW_SECONDS = 15.0
STATES = ("on_host", "waits_for_host", "waits_for_turn")


@dataclass(frozen=True)
class TenantUse:
    """What one tenant uses. Builds are told by their ids."""

    tenant: str
    limits: TenantLimits
    on_hosts: tuple[str, ...]
    wait_for_host: tuple[str, ...]
    """In the line of all tenants."""
    wait_for_turn: tuple[str, ...]
    """In its own line, in the order of their turns."""
    line: TenantLineState | None
    """None when it has none, or no worker tells of it."""
    stored: TenantStored | None
    """None before the bucket has been swept for the first time."""

    @property
    def running(self) -> int:
        """How many builds count against the limit of running ones."""
        return len(self.on_hosts) + len(self.wait_for_host)

    @property
    def waiting(self) -> int:
        """How many builds no host has taken."""
        return len(self.wait_for_host) + len(self.wait_for_turn)


class TenantUses:
    """Tells of all tenants that have something, or are named in the tenants' file."""

    def __init__(self, client: Client, bucket: TemplateBucket, tenants: TenantsFile) -> None:
        self._client = client
        self._bucket = bucket
        self._tenants = tenants

    async def all(self) -> list[TenantUse]:
        """Look at everything. Raises RPCError, StorageUnavailableError and StorageDeniedError."""
        (on_hosts, waiting), lines, stored = await asyncio.gather(
            self._open_builds(), self._lines(), self._bucket.stored()
        )
        kept = stored.tenants if stored else {}
        names = {*self._tenants.named(), *on_hosts, *waiting, *lines, *kept}
        return [
            TenantUse(
                tenant=name,
                limits=self._tenants.limits_of(name),
                on_hosts=tuple(on_hosts[name]),
                wait_for_host=tuple(_not_in_line(waiting[name], lines.get(name))),
                wait_for_turn=_waiting_in(lines.get(name)),
                line=lines.get(name),
                stored=stored.of(name) if stored else None,
            )
            for name in sorted(names)
        ]

    async def _open_builds(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Return the ids of the builds that hosts have, and of those that wait, by tenant."""
        on_hosts: defaultdict[str, list[str]] = defaultdict(list)
        waiting: defaultdict[str, list[str]] = defaultdict(list)
        async for build in self._client.list_workflows(RUNNING_BUILDS, rpc_timeout=RPC_LIMIT):
            attributes = build.typed_search_attributes
            waits = attributes.get(BUILD_STEP) in (None, Step.LEASE)
            group = waiting if waits else on_hosts
            group[attributes.get(TENANT) or DEFAULT_TENANT].append(build_of_workflow(build.id))
        return on_hosts, waiting

    async def _lines(self) -> dict[str, TenantLineState]:
        ids = [
            line.id
            async for line in self._client.list_workflows(RUNNING_LINES, rpc_timeout=RPC_LIMIT)
        ]
        names = [line.removeprefix(TENANT_LINE) for line in ids]
        states = await ask_for_each(partial(line_of, self._client), names)
        return {name: state for name, state in zip(names, states, strict=True) if state is not None}


async def line_of(client: Client, tenant: str) -> TenantLineState | None:
    """Return who has a turn in a tenant's line; None when it has none, or no worker tells."""
    line = client.get_workflow_handle_for(TenantLine.run, tenant_line_workflow_id(tenant))
    try:
        return await line.query(TenantLine.state, rpc_timeout=QUERY_LIMIT)
    except (RPCError, WorkflowQueryFailedError):
        return None


async def still_running(
    client: Client, tenant: str, builds: Iterable[LinedBuild]
) -> list[LinedBuild]:
    """Return those of a tenant's builds that run. Raises RPCError.

    One that has ended without a word is in its line for some time.
    """
    query = f"{RUNNING_BUILDS} AND {condition_of(tenant)}"
    open_builds = {
        build_of_workflow(build.id)
        async for build in client.list_workflows(query, rpc_timeout=RPC_LIMIT)
    }
    return [build for build in builds if build.build_id in open_builds]


async def show_uses(uses: TenantUses, meter: MetricMeter) -> None:
    """Show Prometheus what the tenants use, for ever."""
    shown: set[str] = set()
    while True:
        # What was shown last stays shown while Temporal or the bucket is away.
        with contextlib.suppress(RPCError, RuntimeError, TemplateManagerError):
            now = {use.tenant: use for use in await uses.all()}
            for name in shown - set(now):
                show_tenant(meter, name, builds=dict.fromkeys(STATES, 0), stored_bytes=0, limits={})
            for name, use in now.items():
                _show(meter, name, use)
            shown = set(now)
        await asyncio.sleep(SHOW_SECONDS)


def _show(meter: MetricMeter, name: str, use: TenantUse) -> None:
    groups = (use.on_hosts, use.wait_for_host, use.wait_for_turn)
    show_tenant(
        meter,
        name,
        builds={state: len(builds) for state, builds in zip(STATES, groups, strict=True)},
        stored_bytes=use.stored.bytes if use.stored else None,
        limits=use.limits.numbers,
    )


def _waiting_in(line: TenantLineState | None) -> tuple[str, ...]:
    return tuple(build.build_id for build in line.waiting) if line else ()


def _not_in_line(builds: Iterable[str], line: TenantLineState | None) -> list[str]:
    lined = set(_waiting_in(line))
    return [build for build in builds if build not in lined]
