"""The API server, driven by real gRPC clients, over a real Temporal server and bucket.

The workflows are the real ones; only a KVM host's activities are replaced by recording ones.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from devstack.stack import Stack
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    ResetWorkflowExecutionRequest,
)
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from activities.contract.errors import (
    CheckpointLostError,
    ImageNotFoundError,
    RegistryUnavailableError,
    StartCommandError,
)
from activities.contract.image_reference import ImageReference
from activities.contract.inputs import PullImageInput
from activities.contract.names import Step, build_workflow_id, delete_workflow_id
from activities.contract.registry_logins import PasswordLogin
from activities.contract.sources import FromImage
from activities.contract.status import BuildState, BuildStatus, LogEntry, LogLevel
from activities.process.clock import utc_now
from activities.process.health import temporal_readiness
from activities.process.sealing import SealedFor, Sealer
from activities.store.bucket import Bucket
from activities.store.log_archive import BucketLogActivities, read_archived_log, to_jsonl
from activities.store.objects import archived_log_name, metadata_name
from api.client.client import CallError, TemplateClient
from api.pb import template_manager_pb2 as pb
from api.server import logs as build_logs
from api.server.access import ANONYMOUS, current_caller
from api.server.server import running_server
from tests.support.example_template import metadata
from tests.support.recording_host import (
    Journal,
    RecordingHost,
    RecordingLog,
    running_host,
    workflow_worker,
)
from tests.support.running_api import (
    Api,
    messages,
    publish,
    serving,
    settings_for,
    template_of,
)
from tests.support.temporal_server import start_temporal
from tests.support.workflow_runs import OPTIONS
from workflows.build_template import BuildTemplate

pytestmark = pytest.mark.counts_nothing

# Temporal deletes a workflow when its queues say that they are done with it: by default after 30 s.
QUICK_DELETES = tuple(
    f'history.{queue}ProcessorUpdateAckInterval="1s"' for queue in ("transfer", "visibility")
)


@pytest_asyncio.fixture
async def api_alone(storage: Stack, empty_bucket: Bucket) -> AsyncIterator[Api]:
    """The API with a Temporal of its own that no worker works for, but in `workers`."""
    settings = settings_for(storage)
    async with (
        # It does not know our search attributes: the API registers them.
        await start_temporal(config=QUICK_DELETES) as fresh,
        running_server(fresh.client, settings) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        yield Api(server, client, fresh.client, RecordingHost("h1", Journal()), settings)


@contextlib.asynccontextmanager
async def workers(api: Api, bucket: Bucket) -> AsyncIterator[None]:
    """Workers that keep the logs of builds in the bucket, as those of the service do."""
    archive_log = BucketLogActivities(bucket).archive_log
    async with (
        workflow_worker(api.temporal, (archive_log, api.host.discard_upload)),
        running_host(api.temporal, api.host),
    ):
        yield


# ---- Create


async def test_a_build_runs_and_its_status_tells_everything(api: Api) -> None:
    created = await api.client.create(api.template())
    assert created.workflow_id == build_workflow_id(created.build_id)
    assert created.run_id

    status = await api.ended(created.build_id)

    assert status.status == pb.Completed
    assert status.state == "completed"
    assert status.timeline[0].step == "lease_host"
    assert {artifact.name for artifact in status.artifacts} == {
        "rootfs.ext4",
        "memfile",
        "snapfile",
    }
    assert status.host == api.host.name
    assert status.image_digest.startswith("sha256:")
    assert status.metadata.kernel_version == "vmlinux-6.1"
    assert status.run_id == created.run_id
    assert (status.template_id, status.image) == ("web", "127.0.0.1:5000/web:1")
    assert not status.HasField("reason")


async def test_the_same_request_again_is_the_same_build(api: Api) -> None:
    template = api.template()
    first = await api.client.create(template)
    again = await api.client.create(template)
    assert again == first
    await api.ended(first.build_id)
    assert await api.client.create(template) == first


async def test_the_same_id_with_another_config_is_refused(api: Api) -> None:
    template = api.template()
    await api.client.create(template)
    template.memory_mb = 1024
    with pytest.raises(CallError) as caught:
        await api.client.create(template)
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert caught.value.reason == "BUILD_EXISTS_WITH_OTHER_CONFIG"
    assert "new build id" in caught.value.hint


async def test_of_many_creates_at_once_one_config_wins(api: Api) -> None:
    build_id = str(uuid.uuid4())
    results = await asyncio.gather(
        *(
            api.client.create(api.template(build_id=build_id, memory_mb=memory))
            for memory in (512, 1024) * 4
        ),
        return_exceptions=True,
    )
    created = [result for result in results if not isinstance(result, BaseException)]
    refused = [result for result in results if isinstance(result, CallError)]
    assert len(created) == 4 and len({build.run_id for build in created}) == 1
    assert {error.code for error in refused} == {grpc.StatusCode.ALREADY_EXISTS}


async def test_bad_fields_are_all_named(api: Api) -> None:
    bad = api.template(build_id="x", memory_mb=511, vcpu_count=3, disk_size_mb=-1)
    with pytest.raises(CallError) as caught:
        await api.client.create(bad)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    fields = {violation.field.removeprefix("template.") for violation in caught.value.violations}
    assert fields == {"build_id", "memory_mb", "vcpu_count", "disk_size_mb"}


async def test_a_secret_does_not_enter_the_workflow_in_the_clear(api: Api) -> None:
    general = pb.GeneralRegistry(username="me", password="hunter2-hunter2")
    build_id = await api.completed(from_image_registry=pb.FromImageRegistry(general=general))
    handle = api.temporal.get_workflow_handle(build_workflow_id(build_id))
    history = (await handle.fetch_history()).to_json()
    payloads = re.findall(r'"data": ?"([A-Za-z0-9+/=]+)"', history)
    assert payloads
    assert not any(b"hunter2" in base64.b64decode(payload) for payload in payloads)
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert "hunter2" not in pull.model_dump_json()
    assert pull.auth.username == "me"


# ---- Status


async def test_a_running_build_tells_its_step_and_what_it_waits_for(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    status = await api.client.status(build_id)
    assert (status.status, status.state, status.step) == (pb.Building, "building", "build_rootfs")
    assert status.progress.what == "building the root file system"
    assert status.progress.attempt == 1
    await api.client.cancel(build_id)


async def test_a_failed_build_tells_why_and_what_to_do(api: Api) -> None:
    api.journal.fail("pull_image", ImageNotFoundError("no such image", log_tail=["last line"]))
    status = await api.ended((await api.client.create(api.template())).build_id)
    assert (status.status, status.state) == (pb.Failed, "failed")
    reason = status.reason
    assert (reason.error_type, reason.pipeline_step) == ("ImageNotFoundError", "pull_image")
    assert reason.step == "base"  # as E2B's clients name it
    assert reason.message == "no such image"
    assert list(reason.log_tail) == ["last line"]
    assert "tag" in reason.hint


async def test_an_unknown_build_is_not_found(api: Api) -> None:
    unknown = str(uuid.uuid4())
    for call in (api.client.status, api.client.cancel, api.client.delete):
        with pytest.raises(CallError) as caught:
            await call(unknown)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
        assert caught.value.reason == "BUILD_NOT_FOUND"


async def test_an_unknown_build_is_deleted_already(api: Api) -> None:
    """E2B's clients take an error for a delete that has to be done again."""
    async with raw_stub(api.server.address) as stub:
        call = stub.TemplateBuildDelete(pb.TemplateBuildDeleteRequest(build_id=str(uuid.uuid4())))
        await call
        assert ("found", "false") in tuple(await call.trailing_metadata())


async def test_another_template_s_build_is_not_found(api: Api) -> None:
    build_id = await api.completed()
    async with raw_stub(api.server.address) as stub:
        for method, request in (
            (stub.TemplateBuildStatus, pb.TemplateStatusRequest),
            (stub.TemplateBuildDelete, pb.TemplateBuildDeleteRequest),
            (stub.TemplateBuildCancel, pb.TemplateBuildCancelRequest),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(request(build_id=build_id, template_id="other"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await api.client.status(build_id)).state == "completed"


async def test_status_selects_log_lines(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    await publish(api.temporal, build_id, "w1", "w2", "w3", level=LogLevel.WARN)
    now = Timestamp()
    now.GetCurrentTime()
    async with raw_stub(api.server.address) as stub:

        async def lines(**selection: Any) -> list[str]:
            request = pb.TemplateStatusRequest(build_id=build_id, **selection)
            answer = await stub.TemplateBuildStatus(request)
            return [entry.message for entry in answer.log_entries]

        everything = await lines()
        assert everything[-3:] == ["w1", "w2", "w3"]
        assert await lines(offset=2, limit=2) == everything[2:4]
        assert await lines(level=pb.Warn) == ["w1", "w2", "w3"]
        assert await lines(level=pb.Warn, offset=1, limit=1) == ["w2"]
        assert await lines(direction=pb.Backward, limit=2) == ["w3", "w2"]
        assert await lines(start=now) == []
        assert await lines(end=now) == everything
    await api.client.cancel(build_id)


async def test_a_base_must_be_a_published_template(api: Api, empty_bucket: Bucket) -> None:
    def on(base_id: str) -> pb.TemplateConfig:
        return api.template(
            from_image=None, from_template=pb.FromTemplateConfig(build_id=base_id), start_command=""
        )

    with pytest.raises(CallError, match="no template") as caught:
        await api.client.create(on(str(uuid.uuid4())))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert [v.field for v in caught.value.violations] == ["template.from_template.build_id"]

    building = await api.running_until("wait_until_ready")
    with pytest.raises(CallError, match="still being built") as caught:
        await api.client.create(on(building))
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.retry_after_seconds
    await api.client.cancel(building)

    published = str(uuid.uuid4())
    name = metadata_name(published)
    stored = empty_bucket.write_object(name, metadata(published).model_dump_json().encode())
    request = on(published)
    created = await api.client.create(request)
    await api.ended(created.build_id)
    # A build that has been made of it is found also when it has gone.
    assert empty_bucket.delete_object(name, stored.generation)
    assert (await api.client.create(request)).build_id == created.build_id


async def test_a_build_that_temporal_has_forgotten_is_read_from_the_archive(
    api: Api, empty_bucket: Bucket
) -> None:
    build_id = await api.completed()
    handle = api.temporal.get_workflow_handle_for(BuildTemplate.run, build_workflow_id(build_id))
    status: BuildStatus = await handle.query(BuildTemplate.status)
    forgotten = str(uuid.uuid4())
    config = status.config.model_copy(update={"build_id": forgotten})
    failed = status.model_copy(
        update={"config": config, "state": BuildState.FAILED, "published": None}
    )
    lines = [LogEntry(timestamp=utc_now(), level=LogLevel.INFO, message=str(n)) for n in range(5)]
    empty_bucket.write_object(archived_log_name(forgotten), to_jsonl(failed, lines))

    assert (await api.client.status(forgotten)).state == "failed"
    assert await messages(api, forgotten, cursor=2) == ["2", "3", "4"]
    assert await messages(api, forgotten, follow=True) == ["0", "1", "2", "3", "4"]
    with pytest.raises(CallError) as caught:
        await api.client.create(api.template(build_id=forgotten, memory_mb=2048))
    assert caught.value.code is grpc.StatusCode.ALREADY_EXISTS


async def test_without_workers_status_still_tells_what_temporal_knows(api_alone: Api) -> None:
    created = await api_alone.client.create(template_of())
    status = await api_alone.client.status(created.build_id)
    assert status.state == "building"
    assert status.progress.what == ""


async def test_a_build_ended_by_an_operator_reads_failed(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    await api.temporal.get_workflow_handle(build_workflow_id(build_id)).terminate()
    status = await api.client.status(build_id)
    assert (status.state, status.reason.error_type) == ("failed", "BuildTerminatedError")
    assert status.reason.hint


# ---- Logs


async def test_a_log_is_followed_to_the_end_by_many_without_loss(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    followers = [asyncio.create_task(messages(api, build_id, follow=True)) for _ in range(15)]
    late = asyncio.create_task(messages(api, build_id, follow=True, cursor=3))
    for number in range(10):
        await publish(api.temporal, build_id, f"line {number}", level=LogLevel.INFO)
    async with asyncio.timeout(10):  # until the first of them has been let in
        while api.server.logs.followed == 0:
            await asyncio.sleep(0.05)
    assert api.server.logs.followed == 1
    api.journal.hanging.clear()
    logs = await asyncio.wait_for(asyncio.gather(*followers), 30)

    assert all(log == logs[0] for log in logs)
    assert [line for line in logs[0] if line.startswith("line ")] == [
        f"line {n}" for n in range(10)
    ]
    assert logs[0][-1] == "build is completed"
    assert await late == logs[0][3:]
    assert await messages(api, build_id) == logs[0]
    assert api.server.logs.followed == 0
    starts = [
        event
        async for event in (
            api.temporal.get_workflow_handle(build_workflow_id(build_id))
        ).fetch_history_events()
    ]
    assert not [
        e for e in starts if e.HasField("workflow_execution_update_accepted_event_attributes")
    ]


async def test_a_log_goes_on_at_its_cursor_when_the_api_restarts(api: Api, storage: Stack) -> None:
    build_id = await api.running_until("build_rootfs")
    settings = settings_for(storage, api_address=api.server.address)
    seen: list[str] = []
    cursors: list[int] = []

    async def follow() -> None:
        async for line in api.client.logs(build_id, follow=True):
            seen.append(line.entry.message)
            cursors.append(line.next_cursor)

    following = asyncio.create_task(follow())
    await publish(api.temporal, build_id, "before", level=LogLevel.INFO)
    while "before" not in seen:
        await asyncio.sleep(0.05)
    await api.server.drain()
    await publish(api.temporal, build_id, "meanwhile", level=LogLevel.INFO)
    async with running_server(api.temporal, settings):
        await publish(api.temporal, build_id, "after", level=LogLevel.INFO)
        api.journal.hanging.clear()
        await asyncio.wait_for(following, 30)
        whole = await messages(api, build_id)
    assert seen == whole
    assert cursors == list(range(1, len(whole) + 1))
    assert [line for line in seen if line in ("before", "meanwhile", "after")] == [
        "before",
        "meanwhile",
        "after",
    ]


@pytest.mark.parametrize("busy_worker", [False, True])
async def test_a_follower_goes_on_with_the_new_run_of_a_reset_build(
    api: Api, busy_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_id = await api.running_until("start_vm")
    first_run = (await api.client.status(build_id)).run_id
    if busy_worker:
        answer_second_questions_only(monkeypatch)
    following = asyncio.create_task(messages(api, build_id, follow=True))
    await asyncio.sleep(1)
    await reset_to(api, build_id, "build_rootfs")
    api.journal.hanging.clear()
    seen = await asyncio.wait_for(following, 30)
    assert (await api.client.status(build_id)).state == "completed"
    await require_both_runs(api, build_id, first_run, seen)


async def test_a_reset_and_a_restart_of_the_api_lose_no_line_together(
    api: Api, storage: Stack
) -> None:
    build_id = await api.running_until("start_vm")
    first_run = (await api.client.status(build_id)).run_id
    settings = settings_for(storage, api_address=api.server.address)
    following = asyncio.create_task(messages(api, build_id, follow=True))
    await asyncio.sleep(1)
    await api.server.drain()
    await reset_to(api, build_id, "build_rootfs")
    api.journal.hanging.clear()
    async with running_server(api.temporal, settings):
        seen = await asyncio.wait_for(following, 30)
        await require_both_runs(api, build_id, first_run, seen)
        with pytest.raises(CallError) as caught:
            await messages(api, build_id, cursor=1, run_id="the last one")
        assert [v.field for v in caught.value.violations] == ["run_id"]
        # Of a run that nobody knows no line is taken for read.
        unknown = await messages(api, build_id, cursor=3, run_id=str(uuid.uuid4()))
        assert unknown == await messages(api, build_id)


async def require_both_runs(api: Api, build_id: str, first_run: str, seen: list[str]) -> None:
    """The first run's log is whole, then comes the second one's without what both share."""
    current_caller.set(ANONYMOUS)  # of the test's own task
    view = await api.server.service._finder.view(build_id)
    assert view.run_id != first_run
    first = await api.server.logs._whole(replace(view, run_id=first_run))
    second = await api.server.logs._whole(view)
    pairs = zip(first, second, strict=False)
    shared = len(list(itertools.takewhile(lambda two: two[0] == two[1], pairs)))
    assert shared > 2
    assert seen == [entry.message for entry in first + second[shared:]]
    assert seen[-1] == "build is completed"


def answer_second_questions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every other question for lines of a log run out of time, as with a busy worker."""
    page = build_logs._Source.page
    questions = itertools.count()

    async def sometimes(source: Any, offset: int) -> Any:
        if next(questions) % 2 == 0:
            raise build_logs._Unreadable("timed out")
        return await page(source, offset)

    monkeypatch.setattr(build_logs._Source, "page", sometimes)


async def reset_to(api: Api, build_id: str, activity_type: str) -> None:
    """Reset a build as an operator does in the Web UI, to before an activity."""
    handle = api.temporal.get_workflow_handle(build_workflow_id(build_id))
    [task] = [
        event.activity_task_scheduled_event_attributes.workflow_task_completed_event_id
        async for event in handle.fetch_history_events()
        if event.activity_task_scheduled_event_attributes.activity_type.name == activity_type
    ]
    await api.temporal.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=api.temporal.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id),
            reason="test",
            request_id=str(uuid.uuid4()),
            workflow_task_finish_event_id=task,
        )
    )


async def test_a_log_is_filtered_by_level_and_its_success_told_in_trailers(api: Api) -> None:
    build_id = await api.completed()
    assert await messages(api, build_id, level=pb.Error) == []
    async with raw_stub(api.server.address) as stub:
        call = stub.TemplateBuildLogs(pb.TemplateBuildLogsRequest(build_id=build_id, follow=True))
        assert [line.next_cursor async for line in call]
        trailers = dict(await call.trailing_metadata())
    assert trailers["rootfs_size"] == "1"
    assert "envd_version" in trailers


# ---- Cancel and delete


async def test_a_cancelled_build_is_undone_and_can_be_created_anew(api: Api) -> None:
    template = api.template()
    build_id = await api.running_until("build_rootfs", build_id=template.build_id)
    await api.client.cancel(build_id)
    assert "clean_up_rootfs" in api.journal.calls
    await api.client.cancel(build_id)  # twice is fine
    status = await api.client.status(build_id)
    assert (status.status, status.state) == (pb.Failed, "cancelled")
    assert status.reason.message == "cancelled"

    api.journal.hanging.clear()
    again = await api.client.create(template)
    assert again.run_id != status.run_id
    assert (await api.ended(build_id)).state == "completed"


async def test_a_build_that_is_being_cancelled_cannot_be_created(api: Api) -> None:
    template = api.template()
    build_id = await api.running_until("build_rootfs", build_id=template.build_id)
    api.journal.hang("clean_up_rootfs")
    cancelling = asyncio.create_task(api.client.cancel(build_id))
    await asyncio.wait_for(api.journal.started["clean_up_rootfs"].wait(), 10)
    with pytest.raises(CallError) as caught:
        await api.client.create(template)
    assert caught.value.reason == "BUILD_BEING_CANCELLED"
    assert caught.value.retry_after_seconds
    assert (await api.client.status(build_id)).state == "cancelling"
    api.journal.hanging.clear()
    await asyncio.wait_for(cancelling, 20)


async def test_a_published_template_cannot_be_cancelled(api: Api) -> None:
    build_id = await api.completed()
    with pytest.raises(CallError) as caught:
        await api.client.cancel(build_id)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.reason == "TEMPLATE_ALREADY_PUBLISHED"


async def test_a_deleted_template_is_gone_twice_and_can_be_built_and_deleted_again(
    api: Api,
) -> None:
    template = api.template()
    for _ in range(2):
        first = await api.client.create(template)
        assert (await api.ended(first.build_id)).state == "completed"
        api.journal.calls.clear()
        await api.client.delete(template.build_id)
        assert api.journal.of("delete_objects", "discard_checkpoints", "delete_image_tag") == [
            "delete_objects",
            "discard_checkpoints",
        ]
        await api.client.delete(template.build_id)
        with pytest.raises(CallError) as caught:
            await api.client.status(template.build_id)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_delete_stops_a_running_build_and_removes_the_service_s_own_tag(api: Api) -> None:
    build_id = await api.running_until("build_rootfs", from_image="")
    await api.client.delete(build_id)
    assert "clean_up_rootfs" in api.journal.calls
    [delete] = [argument for name, argument in api.journal.arguments if name == "delete_image_tag"]
    assert delete.own_image == f"{api.settings.registry}/web:{build_id}"


async def test_delete_removes_the_tag_of_an_image_that_a_client_has_pushed(api: Api) -> None:
    build_id = str(uuid.uuid4())
    own = await api.client.image_of(api.template(build_id=build_id, from_image=""))
    assert own == f"{api.settings.registry}/web:{build_id}"
    pinned = f"{own}@sha256:{'a' * 64}"
    assert await api.completed(build_id=build_id, from_image=pinned) == build_id
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.image == pinned
    await api.client.delete(build_id)
    [delete] = [argument for name, argument in api.journal.arguments if name == "delete_image_tag"]
    assert delete.own_image == own, "the name alone: a digest is not a tag"


# ---- Where images belong


async def test_the_image_of_a_request_is_told_and_nothing_started(api: Api) -> None:
    template = api.template(from_image="")
    assert (await api.client.image_of(template)).endswith(f"/web:{template.build_id}")
    given = api.template(from_image="127.0.0.1:5000/mine:1")
    assert await api.client.image_of(given) == "127.0.0.1:5000/mine:1"
    base = pb.FromTemplateConfig(build_id=str(uuid.uuid4()))
    assert await api.client.image_of(api.template(from_template=base)) == ""
    with pytest.raises(CallError) as caught:
        await api.client.image_of(api.template(from_image="", memory_mb=511))
    assert [violation.field for violation in caught.value.violations] == ["template.memory_mb"]
    for each in (template, given):
        with pytest.raises(CallError) as caught:
            await api.client.status(each.build_id)
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


# ---- Retry and list


async def test_a_failed_build_is_retried_from_where_it_failed(api: Api) -> None:
    api.journal.fail("start_vm", StartCommandError("exit code 1"))
    build_id = (await api.client.create(api.template(ready_timeout_seconds=77))).build_id
    failed = await api.ended(build_id)
    assert failed.state == "failed"
    api.journal.calls.clear()
    api.journal.arguments.clear()

    again = await api.client.retry(build_id)
    assert again.run_id != failed.run_id
    assert (await api.ended(build_id)).state == "completed"
    assert api.journal.of("pull_image", "build_rootfs", "start_vm") == ["start_vm"]
    [wait] = [asked for name, asked in api.journal.arguments if name == "wait_until_ready"]
    assert wait.timeout_seconds == 77
    assert (await messages(api, build_id, follow=True))[-1] == "build is completed"
    with pytest.raises(CallError) as caught:
        await api.client.retry(build_id)
    assert caught.value.reason == "BUILD_NOT_FAILED"


PASSWORD = "hunter2-hunter2"
LOGIN = pb.FromImageRegistry(general=pb.GeneralRegistry(username="me", password=PASSWORD))


async def failed_without_workers(api: Api, bucket: Bucket, **changes: Any) -> str:
    """Let a build fail as the journal says; from then on nobody answers a query for it."""
    async with workers(api, bucket):
        created = await api.client.create(api.template(**changes))
        assert (await api.ended(created.build_id)).state == "failed"
    api.journal.calls.clear()
    api.journal.arguments.clear()
    return created.build_id


async def pull_of_retry(api: Api, bucket: Bucket, build_id: str) -> PullImageInput:
    """Let workers come back and complete a retried build; return what it pulled its image with."""
    async with workers(api, bucket):
        assert (await api.ended(build_id)).state == "completed"
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert isinstance(pull, PullImageInput)
    return pull


def password_of(api: Api, pull: PullImageInput) -> str:
    assert isinstance(pull.auth, PasswordLogin)
    asked_for = ImageReference.parse(template_of().from_image)  # the known image is a fixture's
    only_for = SealedFor(pull.scope.build_id, asked_for.registry)
    return Sealer(api.settings.secret_keys).open(pull.auth.secret, only_for)


async def forget_in_temporal(api: Api, build_id: str) -> None:
    """Delete a build's workflow, as Temporal itself does when its retention is over."""
    workflow_id = build_workflow_id(build_id)
    await api.temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=api.temporal.namespace,
            workflow_execution=WorkflowExecution(workflow_id=workflow_id),
        )
    )
    async with asyncio.timeout(20):
        with contextlib.suppress(RPCError):  # NOT_FOUND
            while await api.temporal.get_workflow_handle(workflow_id).describe():
                await asyncio.sleep(0.1)


async def begun(api: Api, workflow_id: str) -> None:
    """Wait until Temporal knows a workflow."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(RPCError):  # NOT_FOUND
                await api.temporal.get_workflow_handle(workflow_id).describe()
                return
            await asyncio.sleep(0.1)


def let_registry_fail(api: Api) -> None:
    errors = [RegistryUnavailableError("503")] * OPTIONS.retry_attempts
    api.journal.fail("pull_image", *errors)


async def test_a_private_image_s_build_is_retried_while_no_worker_answers(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    let_registry_fail(api)
    build_id = await failed_without_workers(api, empty_bucket, from_image_registry=LOGIN)
    archived = read_archived_log(empty_bucket, build_id)
    assert archived is not None
    assert isinstance(archived[0].config.source, FromImage)
    assert archived[0].config.source.login is None

    await api.client.retry(build_id)
    pull = await pull_of_retry(api, empty_bucket, build_id)
    assert password_of(api, pull) == PASSWORD


async def test_a_private_image_s_build_is_retried_when_temporal_s_history_is_all_there_is(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    api.journal.fail("start_vm", StartCommandError("exit code 1"))
    build_id = await failed_without_workers(api, empty_bucket, from_image_registry=LOGIN)
    remove(empty_bucket, archived_log_name(build_id))
    # The host has lost the image meanwhile: it goes on at the VM, and goes back to the pull.
    api.journal.fail("start_vm", CheckpointLostError("no image", step=Step.PULL))

    await api.client.retry(build_id)
    pull = await pull_of_retry(api, empty_bucket, build_id)
    assert password_of(api, pull) == PASSWORD
    assert api.journal.of("pull_image", "build_rootfs", "start_vm") == [
        "start_vm",
        "pull_image",
        "build_rootfs",
        "start_vm",
    ]


async def test_a_login_that_is_known_nowhere_any_more_is_asked_for(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    let_registry_fail(api)
    build_id = await failed_without_workers(api, empty_bucket, from_image_registry=LOGIN)
    await forget_in_temporal(api, build_id)
    assert (await api.client.status(build_id)).state == "failed"

    with pytest.raises(CallError, match="registry login") as caught:
        await api.client.retry(build_id)
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.reason == "REGISTRY_LOGIN_FORGOTTEN"
    assert "new build id" in caught.value.hint and "--registry-user" in caught.value.hint


async def test_a_public_image_s_build_is_retried_when_only_the_archive_remembers_it(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    let_registry_fail(api)
    build_id = await failed_without_workers(api, empty_bucket)
    await forget_in_temporal(api, build_id)

    await api.client.retry(build_id)
    pull = await pull_of_retry(api, empty_bucket, build_id)
    assert (pull.image, pull.auth) == ("127.0.0.1:5000/web:1", None)


async def test_a_private_image_of_the_service_s_own_is_deleted_with_its_login(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    let_registry_fail(api)
    build_id = await failed_without_workers(
        api, empty_bucket, from_image="", from_image_registry=LOGIN
    )
    deleting = asyncio.create_task(api.client.delete(build_id))
    log = RecordingLog(api.journal)
    removing = (log.delete_objects, log.delete_image_tag, log.remove_late_arrivals)
    await begun(api, delete_workflow_id(build_id))  # nobody answers what the build was of
    async with workflow_worker(api.temporal, removing), running_host(api.temporal, api.host):
        await deleting
    [delete] = [asked for name, asked in api.journal.arguments if name == "delete_image_tag"]
    assert delete.own_image == f"{api.settings.registry}/web:{build_id}"
    assert isinstance(delete.registry_auth, PasswordLogin)
    sealer = Sealer(api.settings.secret_keys)
    only_for = SealedFor(build_id, api.settings.registry)
    assert sealer.open(delete.registry_auth.secret, only_for) == PASSWORD


async def test_what_was_done_is_not_guessed_when_nothing_tells_it(
    api_alone: Api, empty_bucket: Bucket
) -> None:
    api = api_alone
    started = api.journal.hang("build_rootfs")
    async with workers(api, empty_bucket):
        created = await api.client.create(api.template())
        await asyncio.wait_for(started.wait(), 20)
        handle = api.temporal.get_workflow_handle(build_workflow_id(created.build_id))
        await handle.terminate()
        api.journal.hanging.clear()
    with pytest.raises(CallError, match="no worker answers") as caught:
        await api.client.retry(created.build_id)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


def remove(bucket: Bucket, name: str) -> None:
    stored = bucket.stat_object(name)
    assert stored is not None and bucket.delete_object(name, stored.generation)


async def test_builds_are_listed_by_template_and_state_in_pages(api: Api) -> None:
    template_id = f"t-{uuid.uuid4().hex[:8]}"
    done = [await api.completed(template_id=template_id) for _ in range(2)]
    api.journal.fail("pull_image", ImageNotFoundError("no such image"))
    failed = (await api.client.create(api.template(template_id=template_id))).build_id
    await api.ended(failed)
    running = await api.running_until("build_rootfs", template_id=template_id)

    async def listed(**request: Any) -> list[str]:
        request = {"template_id": template_id, **request}
        page = await api.client.list_builds(pb.TemplateBuildListRequest(**request))
        return [build.build_id for build in page.builds]

    async with asyncio.timeout(10):  # visibility lags behind
        while await listed() != [running, failed, done[1], done[0]]:
            await asyncio.sleep(0.1)
    assert await listed(states=["completed"]) == [done[1], done[0]]
    assert await listed(states=["failed", "building"]) == [running, failed]
    began = (await api.client.status(failed)).timeline[0].started
    assert await listed(started_after=began) in ([running], [running, failed])
    assert set(done) <= set(await listed(started_before=began))

    first = await api.client.list_builds(
        pb.TemplateBuildListRequest(template_id=template_id, page_size=3)
    )
    [build] = [build for build in first.builds if build.build_id == failed]
    assert (build.state, build.image) == ("failed", "127.0.0.1:5000/web:1")
    assert await listed(page_size=3, page_token=first.next_page_token) == [done[0]]

    await api.client.delete(done[0])
    async with asyncio.timeout(10):
        while done[0] in await listed():
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("template_id", {"template_id": "x' OR ''='"}),
        ("states", {"states": ["done"]}),
        ("page_token", {"page_token": "%%%"}),
        ("page_token", {"page_token": "AAAA"}),
        ("page_token", {"page_token": base64.urlsafe_b64encode(bytes(16) + b"{}").decode()}),
        ("started_after", {"started_after": Timestamp(seconds=10**15)}),
    ],
)
async def test_a_bad_list_request_is_refused(
    api: Api, field: str, request_fields: dict[str, Any]
) -> None:
    with pytest.raises(CallError) as caught:
        await api.client.list_builds(pb.TemplateBuildListRequest(**request_fields))
    assert [violation.field for violation in caught.value.violations] == [field]


# ---- Errors and health


@contextlib.asynccontextmanager
async def raw_stub(address: str) -> AsyncIterator[Any]:
    from api.pb import template_manager_pb2_grpc as pb_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.TemplateServiceStub(channel)


async def test_a_deadline_is_honoured_and_the_cancel_goes_on(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    api.journal.hang("clean_up_rootfs")
    started = time.monotonic()
    async with raw_stub(api.server.address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.TemplateBuildCancel(
                pb.TemplateBuildCancelRequest(build_id=build_id), timeout=1
            )
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 3
    api.journal.hanging.clear()
    assert (await api.ended(build_id)).state == "cancelled"


async def test_garbage_is_never_unknown(api: Api) -> None:
    async with grpc.aio.insecure_channel(api.server.address) as channel:
        for method in ("TemplateCreate", "TemplateBuildStatus", "TemplateBuildLogs", "NoSuchRpc"):
            call: Any = channel.unary_unary(f"/TemplateService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff\xff")
            assert caught.value.code() is not grpc.StatusCode.UNKNOWN
            assert "Traceback" not in str(caught.value.details())


async def test_a_bug_of_ours_shows_no_trace_but_an_incident(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise KeyError("a secret of ours")

    monkeypatch.setattr(api.server.service._finder, "view", broken)
    with pytest.raises(CallError) as caught:
        await api.client.status(str(uuid.uuid4()))
    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert "secret of ours" not in caught.value.message
    assert caught.value.metadata["incident"] in caught.value.message


async def test_while_temporal_is_away_calls_are_unavailable_and_health_says_so(
    storage: Stack, empty_bucket: Bucket, tmp_path: Path
) -> None:
    database = str(tmp_path / "temporal.db")

    async def start(port: int | None = None) -> WorkflowEnvironment:
        return await start_temporal(database=database, port=port)

    environment = await start()
    address = environment.client.service_client.config.target_host
    lazy = await Client.connect(address, data_converter=pydantic_data_converter, lazy=True)
    async with (
        running_server(lazy, settings_for(storage)) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        of_a_worker = temporal_readiness(lazy)
        assert (await server.readiness(), await of_a_worker()) == ("", "")
        known = (await client.create(template_of())).build_id
        before = await client.status(known)
        assert not before.HasField("known_until")
        await environment.shutdown()
        await serving(server.address, False)
        assert await server.readiness() == "Temporal does not answer"
        assert await of_a_worker() == "Temporal does not answer"
        with pytest.raises(CallError) as caught:
            await client.status(str(uuid.uuid4()))
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.reason == "TEMPORAL_UNAVAILABLE"
        assert caught.value.retry_after_seconds
        away = await client.status(known)
        assert away.HasField("known_until")
        assert (away.status, away.run_id) == (pb.Building, before.run_id)
        assert (await client.health()).status == pb.Healthy

        environment = await start(int(address.rpartition(":")[2]))
        await serving(server.address, True, limit_seconds=30)
        with pytest.raises(CallError) as caught:
            await client.status(str(uuid.uuid4()))
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
        await environment.shutdown()


async def test_a_draining_server_says_so_and_lets_calls_end(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    api.journal.hang("clean_up_rootfs")
    cancelling = asyncio.create_task(api.client.cancel(build_id))
    await asyncio.wait_for(api.journal.started["clean_up_rootfs"].wait(), 10)
    draining = asyncio.create_task(api.server.drain())
    await serving(api.server.address, False)
    assert (await api.client.health()).status == pb.Draining
    api.journal.hanging.clear()
    await asyncio.wait_for(cancelling, 10)
    await asyncio.wait_for(draining, 10)
