"""The side of a tenant's line that is no workflow: beginning it, and looking around for it."""

from __future__ import annotations

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.common import SearchAttributePair, TypedSearchAttributes

from activities.contract.interface import TenantLineActivities
from activities.contract.line import (
    EnteringBuild,
    EnterLineInput,
    LineLook,
    LookAtLineInput,
    TenantLineState,
)
from activities.contract.names import (
    TENANT_LINE_WORKFLOW,
    WORKFLOW_TASK_QUEUE,
    tenant_line_workflow_id,
)
from activities.contract.search_attributes import TENANT
from activities.host.orphans import Describe
from activities.process.at_once import ask_for_each
from activities.process.tenants_file import TenantsFile


class TenantLines(TenantLineActivities):
    """Begins lines and looks around for them. See `interface` for the contract."""

    def __init__(self, client: Client, describe: Describe, tenants: TenantsFile) -> None:
        self._client = client
        self._describe = describe
        self._tenants = tenants

    @activity.defn(name="enter_line")
    async def enter_line(self, enter: EnterLineInput, /) -> None:
        """Signal the build to its tenant's line, with a start if there is none."""
        limits = self._tenants.limits_of(enter.tenant).running
        await self._client.start_workflow(
            TENANT_LINE_WORKFLOW,
            TenantLineState(tenant=enter.tenant, limits=limits),
            id=tenant_line_workflow_id(enter.tenant),
            task_queue=WORKFLOW_TASK_QUEUE,
            start_signal="enter",
            start_signal_args=[EnteringBuild(build=enter.build, limits=limits)],
            search_attributes=TypedSearchAttributes([SearchAttributePair(TENANT, enter.tenant)]),
            static_summary=f"the builds of tenant {enter.tenant}",
        )

    @activity.defn(name="look_at_line")
    async def look_at_line(self, look: LookAtLineInput, /) -> LineLook:
        """Ask Temporal for each of the builds. Raises TemporalUnavailableError."""
        states = await ask_for_each(self._describe, look.running)
        ended = [
            build
            for build, state in zip(look.running, states, strict=True)
            if state is not WorkflowExecutionStatus.RUNNING
        ]
        return LineLook(limits=self._tenants.limits_of(look.tenant).running, ended=tuple(ended))
