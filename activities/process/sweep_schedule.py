"""The Temporal schedules that sweep: one for each host, one for the bucket."""

from __future__ import annotations

from datetime import timedelta

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
)

from activities.contract.names import WORKFLOW_TASK_QUEUE
from activities.process.settings import Settings

CATCH_UP = timedelta(minutes=1)
PREFIX = "sweep-"
BUCKET = "bucket"
"""What the schedule that is no host's sweeps."""


async def schedule_sweep(client: Client, settings: Settings, workflow: str, what: str) -> None:
    """Make or correct the schedule `sweep-<what>`, which runs `workflow` with `what` as input.

    A sweep that is still running is not started again, and missed ones are not made up for.
    Raises RPCError when Temporal is away.
    """
    name = f"{PREFIX}{what}"
    schedule = Schedule(
        action=ScheduleActionStartWorkflow(
            workflow,
            what,
            id=name,
            task_queue=WORKFLOW_TASK_QUEUE,
            execution_timeout=timedelta(hours=1),
            static_summary=f"sweep {what}",
        ),
        spec=ScheduleSpec(
            intervals=[ScheduleIntervalSpec(timedelta(seconds=settings.sweep_interval_seconds))]
        ),
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=CATCH_UP),
    )
    try:
        await client.create_schedule(name, schedule)
    except ScheduleAlreadyRunningError:
        await client.get_schedule_handle(name).update(lambda found: _corrected(found, schedule))


async def swept_hosts(client: Client) -> list[str]:
    """Return the hosts that have a schedule: all that have ever started."""
    names = [
        schedule.id.removeprefix(PREFIX)
        async for schedule in await client.list_schedules()
        if schedule.id.startswith(PREFIX)
    ]
    return sorted(name for name in names if name != BUCKET)


def _corrected(found: ScheduleUpdateInput, schedule: Schedule) -> ScheduleUpdate:
    """Keep what an operator has set: paused, with a note."""
    schedule.state = found.description.schedule.state
    return ScheduleUpdate(schedule=schedule)
