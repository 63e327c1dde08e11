"""Sweeps, as Temporal's schedules start them."""

from __future__ import annotations

from temporalio import workflow

from activities.contract.inputs import SweepInput
from activities.contract.interface import BucketSweepActivities, HostSweepActivities
from activities.contract.names import (
    SWEEP_BUCKET_WORKFLOW,
    SWEEP_HOST_WORKFLOW,
    WORKFLOW_TASK_QUEUE,
    step_task_queue,
)
from activities.contract.results import SweepReport
from workflows.calling import call


@workflow.defn(name=SWEEP_HOST_WORKFLOW)
class SweepHost:
    """Removes what no live build owns from one host."""

    @workflow.run
    async def run(self, host: str) -> SweepReport:
        """Sweep; the result says what was removed."""
        return await call(
            HostSweepActivities.sweep_host,
            SweepInput(),
            queue=step_task_queue(host),
            summary=f"sweep host {host}",
        )


@workflow.defn(name=SWEEP_BUCKET_WORKFLOW)
class SweepBucket:
    """Removes what no build can use any more from the bucket."""

    @workflow.run
    async def run(self, _: str) -> SweepReport:
        """Sweep; the result says what was removed."""
        return await call(
            BucketSweepActivities.sweep_bucket,
            SweepInput(),
            queue=WORKFLOW_TASK_QUEUE,
            summary="sweep the bucket",
        )
