"""Deleting a template, on a real Temporal server with recording activities."""

from __future__ import annotations

import asyncio
import uuid

from temporalio.client import Client

from activities.contract.names import delete_workflow_id
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.workflow_runs import delete, delete_of


async def test_delete_answers_when_all_is_gone_and_comes_back_for_late_arrivals(
    client: Client,
) -> None:
    journal = Journal()
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    what = delete_of(host.name, own_image="127.0.0.1:5000/web:1")
    async with running_stack(client, host):
        deleted = await delete(client, what)
        assert (deleted.removed_objects, deleted.removed_tag) == (3, True)
        assert journal.calls == ["delete_objects", "discard_checkpoints", "delete_image_tag"]
        handle = client.get_workflow_handle(delete_workflow_id(what.build_id))
        await asyncio.wait_for(handle.result(), 30)
    assert journal.calls[-1] == "remove_late_arrivals"


async def test_delete_never_touches_an_image_that_is_not_ours(client: Client) -> None:
    journal = Journal()
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    async with running_stack(client, host):
        await delete(client, delete_of(host.name))
    assert "delete_image_tag" not in journal.calls


async def test_two_deletes_at_once_are_one(client: Client) -> None:
    journal = Journal()
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    what = delete_of(host.name)
    async with running_stack(client, host):
        both = await asyncio.gather(delete(client, what), delete(client, what))
    assert both[0] == both[1]
    assert journal.of("delete_objects") == ["delete_objects"]
