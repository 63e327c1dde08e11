"""Deleting a template for good: objects, the service's own image tag, checkpoints.

A host that was frozen in the middle of an upload may wake up after the delete. The tombstone in
`.leases/` outdates its lease, and after the lease's lifetime plus the longest request, whatever
still arrived is removed once more.
"""

from __future__ import annotations

from datetime import timedelta

import pydantic
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, FailureError

from activities.contract.inputs import DeleteTemplateInput
from activities.contract.interface import CheckpointActivities, DeletionActivities
from activities.contract.names import WORKFLOW_TASK_QUEUE, step_task_queue
from activities.contract.results import DeletedTemplate

ATTEMPT_LIMIT = timedelta(minutes=5)
TOTAL_LIMIT = timedelta(minutes=30)
HOST_LIMIT = timedelta(seconds=60)
RETRY = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=30))


@workflow.defn(name="DeleteTemplate", failure_exception_types=[pydantic.ValidationError])
class DeleteTemplate:
    """Removes one template. Running it twice is fine."""

    def __init__(self) -> None:
        """Nothing is deleted yet."""
        self._deleted: DeletedTemplate | None = None
        self._failed: FailureError | None = None

    @workflow.run
    async def run(self, delete: DeleteTemplateInput) -> DeletedTemplate:
        """Delete, answer `wait_deleted`, and come back for late arrivals."""
        try:
            self._deleted = await self._delete(delete)
        except FailureError as error:
            self._failed = error
            await workflow.wait_condition(workflow.all_handlers_finished)
            raise
        await workflow.sleep(
            delete.late_arrival_seconds, summary="until no frozen host can still upload"
        )
        await workflow.execute_activity_method(
            DeletionActivities.remove_late_arrivals,
            args=[self._deleted, delete.build_id],
            task_queue=WORKFLOW_TASK_QUEUE,
            start_to_close_timeout=ATTEMPT_LIMIT,
            retry_policy=RETRY,
            summary="remove what arrived late",
        )
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self._deleted

    @workflow.update
    async def wait_deleted(self) -> DeletedTemplate:
        """Wait until everything that can be deleted now is deleted."""
        await workflow.wait_condition(lambda: self._deleted is not None or self._failed is not None)
        if self._failed is not None:
            raise self._failed
        assert self._deleted is not None
        return self._deleted

    async def _delete(self, delete: DeleteTemplateInput) -> DeletedTemplate:
        objects = await self._remove(DeletionActivities.delete_objects, delete, "delete objects")
        if delete.host is not None:
            await self._discard_checkpoints(delete.build_id, delete.host)
        if delete.own_image is None:
            return objects
        tag = await self._remove(
            DeletionActivities.delete_image_tag, delete, f"untag {delete.own_image}"
        )
        return objects.model_copy(
            update={"removed_tag": tag.removed_tag, "kept_tag_reason": tag.kept_tag_reason}
        )

    async def _remove(
        self, method: object, delete: DeleteTemplateInput, summary: str
    ) -> DeletedTemplate:
        result: DeletedTemplate = await workflow.execute_activity_method(
            method,  # type: ignore[call-overload] # two methods of one shape
            delete,
            task_queue=WORKFLOW_TASK_QUEUE,
            start_to_close_timeout=ATTEMPT_LIMIT,
            schedule_to_close_timeout=TOTAL_LIMIT,
            retry_policy=RETRY,
            summary=summary,
        )
        return result

    async def _discard_checkpoints(self, build_id: str, host: str) -> None:
        try:
            await workflow.execute_activity_method(
                CheckpointActivities.discard_checkpoints,
                build_id,
                task_queue=step_task_queue(host),
                start_to_close_timeout=HOST_LIMIT,
                schedule_to_close_timeout=HOST_LIMIT,
                summary=f"discard checkpoints on {host}",
            )
        except ActivityError:  # the host is away: its sweep drops what no build owns
            workflow.logger.warning("checkpoints left to the host's sweep", extra={"host": host})
