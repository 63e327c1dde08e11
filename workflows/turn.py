"""A build's turn among those of its tenant: had before it waits for a host, kept to its end."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.contract.errors import NoTurnError
from activities.contract.inputs import BuildInput
from activities.contract.interface import TenantLineActivities
from activities.contract.line import EnterLineInput, LinedBuild
from activities.contract.names import WORKFLOW_TASK_QUEUE, tenant_line_workflow_id
from workflows.calling import call

# A line that an operator has ended is begun anew by those who still wait in it.
REMIND_SECONDS = 30 * 60.0


class Turn:
    """The turn of one build. One whose tenant has no limit has it always."""

    def __init__(self, build: BuildInput) -> None:
        self._build = build
        self._is_granted = not build.terms.takes_turns
        self._is_in_line = False

    @property
    def is_awaited(self) -> bool:
        """Whether the build waits in its tenant's line."""
        return self._is_in_line and not self._is_granted

    def granted(self) -> None:
        """Obey the line's signal."""
        self._is_granted = True

    async def take(self) -> None:
        """Wait for the turn. Raises NoTurnError when it does not come for too long."""
        since = workflow.now()
        last = since + timedelta(seconds=self._build.options.lease_wait_seconds)
        while not self._is_granted:
            left = (last - workflow.now()).total_seconds()
            if left <= 0:
                raise NoTurnError(
                    f"other builds of tenant {self._build.config.tenant} left it no turn within "
                    f"{self._build.options.lease_wait_seconds:.0f} s"
                ).to_application_error()
            await self._enter(since)
            with contextlib.suppress(asyncio.TimeoutError):
                await workflow.wait_condition(
                    lambda: self._is_granted,
                    timeout=min(left, REMIND_SECONDS),
                    timeout_summary="waiting for a turn",
                )

    async def give_back(self) -> None:
        """Let the next build of the tenant have it."""
        if not self._is_in_line:
            return
        self._is_in_line = False
        line = workflow.get_external_workflow_handle(
            tenant_line_workflow_id(self._build.config.tenant)
        )
        with contextlib.suppress(FailureError):  # a line that is not there keeps nobody waiting
            await line.signal("leave", self._build.config.build_id)

    async def _enter(self, since: datetime) -> None:
        config = self._build.config
        self._is_in_line = True
        await call(
            TenantLineActivities.enter_line,
            EnterLineInput(
                tenant=config.tenant,
                build=LinedBuild(
                    build_id=config.build_id,
                    since=since,
                    vcpu_count=config.vcpu_count,
                    memory_mb=config.memory_mb,
                    is_batch=config.is_batch,
                ),
            ),
            queue=WORKFLOW_TASK_QUEUE,
            summary=f"enter the line of tenant {config.tenant}",
            options=self._build.options,
        )
