"""Deleting a template for good: objects, the service's own image tag, checkpoints.

A host that was frozen in the middle of an upload may wake up after the delete. The tombstone in
`.leases/` outdates its lease, and after the lease's lifetime plus the longest request, whatever
still arrived is removed once more.
"""

from __future__ import annotations

import pydantic
from temporalio import workflow
from temporalio.exceptions import ActivityError, FailureError

from activities.contract.inputs import DeleteTemplateInput
from activities.contract.interface import CheckpointActivities, DeletionActivities
from activities.contract.names import WORKFLOW_TASK_QUEUE, step_task_queue
from activities.contract.results import DeletedTemplate
from workflows.calling import call, call_with_two

# A host that is there takes it at once; a client waits for the delete.
HOST_SECONDS = 60.0


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
        await call_with_two(
            DeletionActivities.remove_late_arrivals,
            self._deleted,
            delete.build_id,
            queue=WORKFLOW_TASK_QUEUE,
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
        objects = await call(
            DeletionActivities.delete_objects,
            delete,
            queue=WORKFLOW_TASK_QUEUE,
            summary="delete objects",
        )
        if delete.host is not None:
            await self._discard_checkpoints(delete.build_id, delete.host)
        if delete.own_image is None:
            return objects
        tag = await call(
            DeletionActivities.delete_image_tag,
            delete,
            queue=WORKFLOW_TASK_QUEUE,
            summary=f"untag {delete.own_image}",
        )
        return objects.model_copy(
            update={"removed_tag": tag.removed_tag, "kept_tag_reason": tag.kept_tag_reason}
        )

    async def _discard_checkpoints(self, build_id: str, host: str) -> None:
        try:
            await call(
                CheckpointActivities.discard_checkpoints,
                build_id,
                queue=step_task_queue(host),
                summary=f"discard checkpoints on {host}",
                total_seconds=HOST_SECONDS,
            )
        except ActivityError:  # the host is away: its sweep drops what no build owns
            workflow.logger.warning("checkpoints left to the host's sweep", extra={"host": host})
