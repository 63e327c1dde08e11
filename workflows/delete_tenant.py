"""Removing all that is a tenant's: its builds one by one, as a delete of each does, then the rest.

It looks for builds until none is left, so that it can begin anew at any time, and finds what a
build leaves that was just being started.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pydantic
from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.contract.interface import TenantRemovalActivities
from activities.contract.names import WORKFLOW_TASK_QUEUE
from activities.contract.tenant_removal import (
    DeleteBuildInput,
    FindBuildsInput,
    TenantBuilds,
    TenantRemoval,
)
from workflows.calling import call

AT_ONCE = 10
# Temporal's list lags: one that has just been deleted may still be found.
MOST_TRIES = 5


@workflow.defn(name="DeleteTenant", failure_exception_types=[pydantic.ValidationError])
class DeleteTenant:
    """Removes one tenant. Running it twice is fine."""

    @workflow.init
    def __init__(self, removal: TenantRemoval) -> None:
        """Go on with what an earlier run has removed."""
        self._removal = removal
        self._tries: Counter[str] = Counter(removal.tries)

    @workflow.query
    def removed(self) -> TenantRemoval:
        """Tell what has been removed so far."""
        return self._removal

    @workflow.run
    async def run(self, removal: TenantRemoval) -> TenantRemoval:
        """Remove until nothing is left; return what was removed, and what could not be."""
        while builds := (await self._find()).build_ids:
            for start in range(0, len(builds), AT_ONCE):
                await asyncio.gather(*map(self._delete, builds[start : start + AT_ONCE]))
            if workflow.info().is_continue_as_new_suggested():
                tries = {build_id: self._tries[build_id] for build_id in builds}
                workflow.continue_as_new(self._removal.model_copy(update={"tries": tries}))
        objects = await call(
            TenantRemovalActivities.delete_objects_of_tenant,
            removal.tenant,
            queue=WORKFLOW_TASK_QUEUE,
            summary="delete files and logs",
        )
        return self._removal.model_copy(update={"objects": objects, "tries": {}})

    async def _find(self) -> TenantBuilds:
        return await call(
            TenantRemovalActivities.find_builds_of_tenant,
            FindBuildsInput(tenant=self._removal.tenant, without=self._removal.left),
            queue=WORKFLOW_TASK_QUEUE,
            summary="look for builds",
        )

    async def _delete(self, build_id: str) -> None:
        self._tries[build_id] += 1
        if self._tries[build_id] > MOST_TRIES:
            self._leave(build_id)
            return
        try:
            await call(
                TenantRemovalActivities.delete_build_of_tenant,
                DeleteBuildInput(tenant=self._removal.tenant, build_id=build_id),
                queue=WORKFLOW_TASK_QUEUE,
                summary=f"delete {build_id}",
            )
        except ActivityError:
            self._leave(build_id)
            return
        if self._tries[build_id] == 1:
            builds = self._removal.builds + 1
            self._removal = self._removal.model_copy(update={"builds": builds})

    def _leave(self, build_id: str) -> None:
        left = (*self._removal.left, build_id)
        self._removal = self._removal.model_copy(update={"left": left})
