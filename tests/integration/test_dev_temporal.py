"""The dev stack's Temporal: its transactions wait little for the disk, and a crash loses none."""

from __future__ import annotations

import sqlite3
import uuid

import pytest
from devstack.stack import Stack
from temporalio.client import Client, WorkflowExecutionStatus

pytestmark = pytest.mark.counts_nothing


async def test_a_killed_temporal_goes_on_where_it_was() -> None:
    with Stack(only=("temporal",)) as stack:
        address = stack.variables["TEMPORAL_ADDRESS"]
        client = await Client.connect(address)
        started = await client.start_workflow("Nobodys", id=str(uuid.uuid4()), task_queue="nobodys")
        stack.kill("temporal")
        stack.restart("temporal")
        client = await Client.connect(address)
        found = await client.get_workflow_handle(started.id).describe()
        assert found.status is WorkflowExecutionStatus.RUNNING
        assert found.run_id == started.first_execution_run_id
        database = stack.environment.state_dir / "temporal" / "temporal.db"
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as reader:
            assert reader.execute("pragma journal_mode").fetchall() == [("wal",)]
