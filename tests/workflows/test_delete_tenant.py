"""Removing a tenant, on a real Temporal server with recording activities."""

from __future__ import annotations

import asyncio
import uuid

from temporalio.client import Client

from activities.contract.errors import TenantRemovalError
from activities.contract.names import WORKFLOW_TASK_QUEUE, delete_tenant_workflow_id
from activities.contract.tenant_removal import TenantRemoval
from tests.support.recording_host import Journal, RecordingHost, running_stack
from workflows.delete_tenant import MOST_TRIES, DeleteTenant


async def removed(client: Client, journal: Journal) -> TenantRemoval:
    tenant = f"t-{uuid.uuid4().hex[:8]}"
    async with running_stack(client, RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)):
        return await asyncio.wait_for(
            client.execute_workflow(
                DeleteTenant.run,
                TenantRemoval(tenant=tenant),
                id=delete_tenant_workflow_id(tenant),
                task_queue=WORKFLOW_TASK_QUEUE,
            ),
            60,
        )


async def test_it_looks_again_until_nothing_is_found(client: Client) -> None:
    journal = Journal()
    journal.builds = {str(uuid.uuid4()) for _ in range(25)}
    told = await removed(client, journal)
    assert (told.builds, told.objects, told.left) == (25, 2, ())
    names = "find_builds_of_tenant", "delete_objects_of_tenant"
    assert journal.of(*names) == [names[0], names[0], names[1]]


async def test_what_cannot_be_deleted_is_told_and_keeps_nothing_else_from_it(
    client: Client,
) -> None:
    journal = Journal()
    journal.builds = {str(uuid.uuid4()) for _ in range(3)}
    sticky = min(journal.builds)
    journal.sticky_builds = {sticky}
    told = await removed(client, journal)
    assert (told.builds, told.left) == (3, (sticky,))
    assert journal.calls.count("delete_build_of_tenant") == 2 + MOST_TRIES
    journal = Journal()
    journal.builds = {sticky}
    error = TenantRemovalError("the bucket denies it", retry_after_seconds=0.01)
    journal.fail("delete_build_of_tenant", *[error] * 5)
    told = await removed(client, journal)
    assert (told.builds, told.left, told.objects) == (0, (sticky,), 2)
