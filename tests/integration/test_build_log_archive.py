"""A closed build's log: from a real workflow's stream into the bucket, and back."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from temporalio import workflow
from temporalio.contrib.workflow_streams import WorkflowStream
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.contract.inputs import ArchiveLogInput
from activities.contract.interface import LogActivities
from activities.contract.names import LOG_TOPIC, Step
from activities.contract.results import StoredObject
from activities.contract.sources import FromImage
from activities.contract.status import BuildState, LogEntry, LogLevel
from activities.store.bucket import Bucket
from activities.store.log_archive import BucketLogActivities, read_archived_log
from activities.store.objects import archived_log_name, used_layers_prefix
from tests.support.example_template import BUILD, build_status, registry_login, template_config
from tests.support.layered_bucket import make_layer, scope_of
from tests.support.temporal_server import start_temporal

pytestmark = pytest.mark.counts_nothing

LINES = 3000
LINE_CHARS = 1000  # so that it takes several pages


@workflow.defn
class TalkingWorkflow:
    """Fills its stream and archives it, as a build does at its end."""

    @workflow.init
    def __init__(self, archive: ArchiveLogInput) -> None:
        self._stream = WorkflowStream()

    @workflow.run
    async def run(self, archive: ArchiveLogInput) -> StoredObject:
        topic = self._stream.topic(LOG_TOPIC, type=LogEntry)
        for number in range(LINES):
            message = f"{number} ".ljust(LINE_CHARS, "é")
            topic.publish(LogEntry(timestamp=workflow.now(), level=LogLevel.INFO, message=message))
        return await workflow.execute_activity_method(
            LogActivities.archive_log, archive, start_to_close_timeout=timedelta(seconds=60)
        )


async def test_every_line_of_a_long_log_is_archived_without_growing_the_history(
    empty_bucket: Bucket,
) -> None:
    config = template_config(source=FromImage(reference="registry/web:1", login=registry_login()))
    status = build_status(BuildState.COMPLETED, Step.RELEASE, config)
    archive = ArchiveLogInput(build_id=BUILD, final_status=status)
    make_layer(empty_bucket, scope_of(BUILD), "base")
    async with (
        await start_temporal() as environment,
        Worker(
            environment.client,
            task_queue="log",
            workflows=[TalkingWorkflow],
            activities=[BucketLogActivities(empty_bucket).archive_log],
            workflow_runner=UnsandboxedWorkflowRunner(),
        ),
    ):
        handle = await environment.client.start_workflow(
            TalkingWorkflow.run, archive, id="talking", task_queue="log"
        )
        stored = await asyncio.wait_for(handle.result(), 60)
        history = await handle.fetch_history()
    assert stored == empty_bucket.stat_object(archived_log_name(BUILD))
    # It has no template: it lets go of the layer.
    assert empty_bucket.list_objects(used_layers_prefix(BUILD)) == []
    found = read_archived_log(empty_bucket, BUILD)
    assert found is not None
    status, lines = found
    assert status.config.source == FromImage(reference="registry/web:1")
    assert status.is_login_left_out
    assert status.state is BuildState.COMPLETED
    assert [int(line.message.split()[0]) for line in lines] == list(range(LINES))
    assert all(line.message.endswith("é") for line in lines)
    assert len(history.events) < 20
