"""A tenant's own line: its builds get their turns here, before they wait for a host.

One workflow for each tenant whose running builds are limited: Temporal keeps who runs and who
waits, and no process. A build enters by `enter_line` and leaves by a signal; whatever is said twice
is fine. Builds that end without a word (terminated ones) are looked for once in a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError

from activities.contract.interface import TenantLineActivities
from activities.contract.line import (
    EnteringBuild,
    LinedBuild,
    LookAtLineInput,
    RunningLimits,
    TenantLineState,
)
from activities.contract.names import (
    TENANT_LINE_WORKFLOW,
    WORKFLOW_TASK_QUEUE,
    build_workflow_id,
)
from workflows.calling import call

# While nobody waits: how often ended builds are looked for, and when an empty line ends.
QUIET_FACTOR = 10
# As many signals as Temporal lets a workflow wait for; one more fails its task, again and again.
TOLD_AT_ONCE = 2_000


@workflow.defn(name=TENANT_LINE_WORKFLOW)
class TenantLine:
    """Gives a tenant's builds their turns: in the order in which they came, batch ones last."""

    @workflow.init
    def __init__(self, state: TenantLineState) -> None:
        """Go on with what an earlier run has carried over."""
        self._begun = state
        self._limits = state.limits
        self._running = {build.build_id: build for build in state.running}
        self._waiting = {build.build_id: build for build in state.waiting}
        self._to_tell: set[str] = set()
        self._changed = bool(state.waiting)

    @workflow.run
    async def run(self, state: TenantLineState) -> None:
        """Give turns until nobody has needed any for a while."""
        while True:
            if not await self._until_something_changes():
                await self._look()
                if not self._running and not self._waiting:
                    return
            await self._give_turns()
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(self.state())

    @workflow.signal
    def enter(self, entering: EnteringBuild) -> None:
        """Take a build into the line. One whose turn it is already is told so again."""
        build, self._limits = entering.build, entering.limits
        if build.build_id in self._running:
            self._to_tell.add(build.build_id)
        else:
            self._waiting[build.build_id] = build
        self._changed = True

    @workflow.signal
    def leave(self, build_id: str) -> None:
        """Let the turn of a build go to the next one."""
        self._drop([build_id])
        self._changed = True

    @workflow.query
    def state(self) -> TenantLineState:
        """Tell who runs and who waits."""
        return self._begun.model_copy(
            update={
                "limits": self._limits,
                "running": tuple(self._running.values()),
                "waiting": tuple(sorted(self._waiting.values(), key=_place)),
            }
        )

    async def _until_something_changes(self) -> bool:
        seconds = self._begun.look_seconds * (1 if self._waiting else QUIET_FACTOR)
        try:
            await workflow.wait_condition(
                lambda: self._changed, timeout=seconds, timeout_summary="until the next look"
            )
        except TimeoutError:
            return False
        self._changed = False
        return True

    async def _give_turns(self) -> None:
        """Tell all those whose turn it is; the turn of one that has gone is another's at once."""
        while told := self._next_ones():
            answers = await asyncio.gather(*map(_tell, told))
            self._drop(build for build, is_there in zip(told, answers, strict=True) if not is_there)

    def _next_ones(self) -> list[str]:
        for build in sorted(self._waiting.values(), key=_place):
            if not self._has_room_for(build):
                break  # a smaller one behind it would make it wait for ever
            self._running[build.build_id] = self._waiting.pop(build.build_id)
            self._to_tell.add(build.build_id)
        told = sorted(self._to_tell)[:TOLD_AT_ONCE]
        self._to_tell.difference_update(told)
        return told

    def _has_room_for(self, build: LinedBuild) -> bool:
        return fits([*self._running.values(), build], self._limits)

    def _drop(self, build_ids: Iterable[str]) -> None:
        for build_id in build_ids:
            self._running.pop(build_id, None)
            self._waiting.pop(build_id, None)

    async def _look(self) -> None:
        running = tuple(self._running)
        try:
            seen = await call(
                TenantLineActivities.look_at_line,
                LookAtLineInput(tenant=self._begun.tenant, running=running),
                queue=WORKFLOW_TASK_QUEUE,
                summary=f"look whether {len(running)} builds still run",
            )
        except ActivityError:  # the next look comes
            return
        self._limits = seen.limits
        self._drop(seen.ended)


def fits(builds: Iterable[LinedBuild], limits: RunningLimits) -> bool:
    """Whether these builds may run at the same time."""
    together = list(builds)
    uses = (
        (len(together), limits.builds),
        (sum(build.vcpu_count for build in together), limits.vcpus),
        (sum(build.memory_mb for build in together), limits.memory_mb),
    )
    return all(limit is None or used <= limit for used, limit in uses)


def _place(build: LinedBuild) -> tuple[object, ...]:
    return build.is_batch, build.since, build.build_id


async def _tell(build_id: str) -> bool:
    """Tell a build that it is its turn; False when it runs no more."""
    build = workflow.get_external_workflow_handle(build_workflow_id(build_id))
    try:
        await build.signal("turn_granted")
    except FailureError:
        return False
    return True
