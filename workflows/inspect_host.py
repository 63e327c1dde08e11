"""Asking a host about itself: short, so that a host that is away is soon known to be."""

from __future__ import annotations

from temporalio import workflow

from activities.contract.inputs import HostRequest
from activities.contract.interface import HostFactsActivities
from activities.contract.names import INSPECT_HOST_WORKFLOW, step_task_queue
from activities.contract.results import HostFacts
from workflows.calling import call


@workflow.defn(name=INSPECT_HOST_WORKFLOW)
class InspectHost:
    """Tells what a host does; drains it, or lets it take builds again."""

    @workflow.run
    async def run(self, host: str, request: HostRequest) -> HostFacts:
        """Ask the host. Fails within seconds when it is away."""
        return await call(
            HostFactsActivities.tell_host,
            request,
            queue=step_task_queue(host),
            summary=f"ask host {host}",
        )
