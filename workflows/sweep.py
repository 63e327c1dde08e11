"""Sweeps, as Temporal's schedules start them."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.contract.inputs import SweepInput
from activities.contract.interface import BucketSweepActivities, HostSweepActivities
from activities.contract.names import (
    SWEEP_BUCKET_WORKFLOW,
    SWEEP_HOST_WORKFLOW,
    WORKFLOW_TASK_QUEUE,
    step_task_queue,
)
from activities.contract.results import SweepReport

# A host that is away sweeps when it starts; the schedule comes back in any case.
LIMIT = timedelta(minutes=30)
RETRY = RetryPolicy(maximum_attempts=3)


@workflow.defn(name=SWEEP_HOST_WORKFLOW)
class SweepHost:
    """Removes what no live build owns from one host."""

    @workflow.run
    async def run(self, host: str) -> SweepReport:
        """Sweep; the result says what was removed."""
        return await workflow.execute_activity_method(
            HostSweepActivities.sweep_host,
            SweepInput(),
            task_queue=step_task_queue(host),
            start_to_close_timeout=LIMIT,
            schedule_to_close_timeout=LIMIT,
            retry_policy=RETRY,
            summary=f"sweep host {host}",
        )


@workflow.defn(name=SWEEP_BUCKET_WORKFLOW)
class SweepBucket:
    """Removes what no build can use any more from the bucket."""

    @workflow.run
    async def run(self, _: str) -> SweepReport:
        """Sweep; the result says what was removed."""
        return await workflow.execute_activity_method(
            BucketSweepActivities.sweep_bucket,
            SweepInput(),
            task_queue=WORKFLOW_TASK_QUEUE,
            start_to_close_timeout=LIMIT,
            schedule_to_close_timeout=LIMIT,
            retry_policy=RETRY,
            summary="sweep the bucket",
        )
