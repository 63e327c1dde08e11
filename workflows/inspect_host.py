"""Asking a host about itself: short, so that a host that is away is soon known to be."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.contract.inputs import HostRequest
from activities.contract.interface import HostFactsActivities
from activities.contract.names import INSPECT_HOST_WORKFLOW, step_task_queue
from activities.contract.results import HostFacts

LIMIT = timedelta(seconds=10)
AWAY = timedelta(seconds=5)


@workflow.defn(name=INSPECT_HOST_WORKFLOW)
class InspectHost:
    """Tells what a host does; drains it, or lets it take builds again."""

    @workflow.run
    async def run(self, host: str, request: HostRequest) -> HostFacts:
        """Ask the host. Fails within seconds when it is away."""
        return await workflow.execute_activity_method(
            HostFactsActivities.tell_host,
            request,
            task_queue=step_task_queue(host),
            schedule_to_start_timeout=AWAY,  # a host that is there takes it at once
            schedule_to_close_timeout=LIMIT,
            retry_policy=RetryPolicy(maximum_attempts=2),
            summary=f"ask host {host}",
        )
