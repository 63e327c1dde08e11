"""The real workflow on a real Temporal server; only the activities are replaced."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError

from activities.contract.errors import (
    LOG_TAIL_LINE_CHARS,
    LOG_TAIL_LINES,
    CheckpointLostError,
    EarlierWorkerError,
    HostDrainingError,
    HostFaultError,
    ImageNotFoundError,
    ImageStepError,
    KernelMissingError,
    NameTakenError,
    ReadyTimeoutError,
    SnapshotNotResumableError,
    TemplateManagerError,
    error_type_of,
    failure_of,
)
from activities.contract.image_steps import Run, User
from activities.contract.inputs import BuildInput
from activities.contract.names import LOG_TOPIC, Step
from activities.contract.requests import MAX_CONFIG_BYTES, MAX_IMAGE_STEPS
from activities.contract.results import (
    MAX_IMAGE_CONFIG_BYTES,
    BuildCheckpoints,
    FoundHost,
    ImageConfig,
    PublishedTemplate,
)
from activities.contract.sources import FromTemplate
from activities.contract.status import BuildResult, BuildState, LogEntry
from activities.store.metadata import metadata_of
from tests.support.example_template import pulled_image
from tests.support.recording_host import (
    Journal,
    RecordingHost,
    RecordingLog,
    rootfs_checkpoint,
    running_host,
    running_stack,
    snapshot_checkpoint,
    stored,
    workflow_worker,
)
from tests.support.workflow_runs import OPTIONS, Handle, config, start
from workflows.build_template import BuildTemplate

# Every activity of a build, in order, with what must be undone when it is the one that stops.
HOST_UNDO: list[str] = ["host released"]
ROOTFS_UNDO = ["clean_up_rootfs", *HOST_UNDO]
BOOT_NETWORK_UNDO = ["tear_down_network boot", *HOST_UNDO]
BOOT_UNDO = ["kill_vm boot", *BOOT_NETWORK_UNDO]
VERIFY_NETWORK_UNDO = ["tear_down_network verify", *HOST_UNDO]
VERIFY_UNDO = ["kill_vm verify", *VERIFY_NETWORK_UNDO]
UPLOAD = ["discard_upload", *HOST_UNDO]
# On a host of an earlier version; on one of today networks come and go with the steps.
NETWORKS = ("set_up_network boot", "set_up_network verify")
EARLIER_PIPELINE = [
    ("pull_image", Step.PULL, HOST_UNDO),
    ("build_rootfs", Step.ROOTFS, ROOTFS_UNDO),
    ("find_snapshot", Step.BOOT, HOST_UNDO),
    ("set_up_network boot", Step.BOOT, BOOT_NETWORK_UNDO),
    ("start_vm", Step.BOOT, BOOT_UNDO),
    ("wait_until_ready", Step.BOOT, BOOT_UNDO),
    ("snapshot_vm", Step.BOOT, BOOT_UNDO),
    ("set_up_network verify", Step.VERIFY, VERIFY_NETWORK_UNDO),
    ("verify_snapshot", Step.VERIFY, VERIFY_UNDO),
    ("upload_artifact rootfs.ext4", Step.UPLOAD, UPLOAD),
    ("upload_artifact memfile", Step.UPLOAD, UPLOAD),
    ("upload_artifact snapfile", Step.UPLOAD, UPLOAD),
    ("publish_template", Step.UPLOAD, UPLOAD),
]
PIPELINE = [row for row in EARLIER_PIPELINE if row[0] not in NETWORKS]
EVERY_STEP = [(True, *row) for row in PIPELINE] + [(False, *row) for row in EARLIER_PIPELINE]


async def result_of(handle: Handle) -> BuildResult:
    return await asyncio.wait_for(handle.result(), 60)


async def failure_cause(handle: Handle) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as caught:
        await result_of(handle)
    return caught.value.cause


def undone(journal: Journal, activity: str) -> list[str]:
    """Return the compensations that ran after the last call of `activity`."""
    last = len(journal.calls) - 1 - journal.calls[::-1].index(activity)
    after = journal.calls[last + 1 :]
    known = ("clean_up", "kill_vm", "tear_down", "discard", "host released")
    return [call.split(" keep_parts")[0] for call in after if call.startswith(known)]


@pytest_asyncio.fixture
async def journal() -> Journal:
    return Journal()


@pytest_asyncio.fixture
async def host(
    client: Client, journal: Journal, request: pytest.FixtureRequest
) -> AsyncIterator[RecordingHost]:
    """With a parameter it may be of an earlier version, whose steps are not whole."""
    whole = getattr(request, "param", True)
    recording = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal, whole_steps=whole)
    async with running_stack(client, recording):
        yield recording


async def test_a_build_runs_every_step_in_order(client: Client, host: RecordingHost) -> None:
    handle = await start(client)
    result = await result_of(handle)

    journal = host.journal
    names = [name for name, _, _ in EARLIER_PIPELINE]
    assert journal.of(*names) == [name for name, _, _ in PIPELINE]
    assert journal.of(*VERIFY_UNDO[:-1], *BOOT_UNDO[:-1]) == []
    assert journal.calls[-2:] == ["host released", "archive_log"]
    assert [record.step for record in result.timeline] == list(Step)
    assert {record.outcome for record in result.timeline} == {"done"}


@pytest.mark.parametrize("host", [False], indirect=True)
async def test_a_host_of_an_earlier_version_has_networks_made_and_removed_for_it(
    client: Client, host: RecordingHost
) -> None:
    await result_of(await start(client))
    names = [name for name, _, _ in EARLIER_PIPELINE]
    assert host.journal.of(*names) == names
    assert host.journal.of(*BOOT_UNDO[:-1], *VERIFY_UNDO[:-1], *NETWORKS) == [
        NETWORKS[0],
        *BOOT_UNDO[:-1],
        NETWORKS[1],
        *VERIFY_UNDO[:-1],
    ]


async def test_the_host_is_told_first_what_is_to_boot(client: Client, host: RecordingHost) -> None:
    """So that it refuses before any work, not after it."""
    asked = config(steps=STEPS)
    await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    told = dict(host.journal.arguments)
    assert told["pull_image"].shape == told["start_vm"].shape
    assert told["pull_image"].shape.kernel_version == asked.kernel_version
    base = FromTemplate(build_id=str(uuid.uuid4()))
    await result_of(await start(client, BuildInput(config=config(source=base), options=OPTIONS)))
    assert dict(host.journal.arguments)["import_template"].shape == told["start_vm"].shape


async def test_status_and_log_tell_the_whole_story(client: Client, host: RecordingHost) -> None:
    from temporalio.contrib.workflow_streams import WorkflowStreamClient

    handle = await start(client)
    await result_of(handle)

    status = await handle.query(BuildTemplate.status)
    assert status.state is BuildState.COMPLETED
    assert status.published is not None
    stream = WorkflowStreamClient.create(client, handle.id)
    lines = [item.data.message async for item in stream.topic(LOG_TOPIC, type=LogEntry).subscribe()]
    assert lines[0] == "lease_host: started"
    assert lines[-1] == "build is completed"
    told = ["boot_and_snapshot: started on", "start_vm was called", "boot_and_snapshot: done in"]
    assert [line for line in lines if line.startswith(tuple(told))] == [
        f"{told[0]} {host.name}",
        told[1],
        next(line for line in lines if line.startswith(told[2])),
    ]


@pytest.mark.parametrize(("host", "activity", "step", "undo"), EVERY_STEP, indirect=["host"])
async def test_a_failing_step_is_undone_in_reverse_order(
    client: Client, host: RecordingHost, activity: str, step: Step, undo: list[str]
) -> None:
    host.journal.fail(activity, ImageNotFoundError("no such thing", log_tail=["the last line"]))
    handle = await start(client)
    cause = await failure_cause(handle)

    assert isinstance(cause, ApplicationError)
    failure = failure_of(cause)
    assert (failure.error_type, failure.step) == ("ImageNotFoundError", step)
    assert failure.log_tail == ("the last line",)
    assert failure.hint
    assert "the last line" in str(cause)
    assert undone(host.journal, activity) == undo
    assert host.journal.calls[-1] == "archive_log"
    if step is Step.UPLOAD:
        assert "discard_upload keep_parts=True" in host.journal.calls


@pytest.mark.parametrize(("host", "activity", "step", "undo"), EVERY_STEP, indirect=["host"])
async def test_a_cancelled_step_stops_and_everything_is_undone(
    client: Client, host: RecordingHost, activity: str, step: Step, undo: list[str]
) -> None:
    started = host.journal.hang(activity)
    handle = await start(client)
    await asyncio.wait_for(started.wait(), 30)
    await handle.cancel()
    cause = await failure_cause(handle)

    assert isinstance(cause, CancelledError)
    assert f"{activity} stopped" in host.journal.calls
    assert undone(host.journal, activity) == [*undo[:-1], "discard_checkpoints", "host released"]
    assert (await handle.query(BuildTemplate.status)).state is BuildState.CANCELLED
    if step is Step.UPLOAD:
        assert "discard_upload keep_parts=False" in host.journal.calls


async def test_what_temporal_does_not_take_ends_the_build(
    client: Client, host: RecordingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refused the workflow task for ever: the host was never free, and no cancel got through."""
    image = pulled_image()
    large = image.model_copy(update={"config": ImageConfig(env=("A=" + "x" * 1_500_000,))})
    monkeypatch.setattr("tests.support.recording_host.pulled_image", lambda: large)
    steps = (Run(command="y" * 30_000),) * 30
    handle = await start(client, BuildInput(config=config(steps=steps), options=OPTIONS))
    failure = failure_of(await failure_cause(handle) or Exception())
    assert (failure.error_type, failure.step) == ("InputTooLargeError", Step.ROOTFS)
    assert undone(host.journal, "build_rootfs")[-1:] == HOST_UNDO


async def test_the_largest_request_and_image_are_taken(
    client: Client, host: RecordingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = ImageConfig(env=("A=" + "x" * (MAX_IMAGE_CONFIG_BYTES - 100),))
    image = pulled_image().model_copy(update={"config": most})
    monkeypatch.setattr("tests.support.recording_host.pulled_image", lambda: image)
    steps = tuple(Run(command="\1" * 1700) for _ in range(MAX_IMAGE_STEPS))
    request = config(steps=steps)
    assert MAX_CONFIG_BYTES * 0.95 < len(request.model_dump_json()) <= MAX_CONFIG_BYTES
    tail = ["\N{OGHAM SPACE MARK}" * LOG_TAIL_LINE_CHARS] * LOG_TAIL_LINES
    host.journal.fail("publish_template", ImageNotFoundError("at the end", log_tail=tail))
    handle = await start(client, BuildInput(config=request, options=OPTIONS))
    assert failure_of(await failure_cause(handle) or Exception()).message == "at the end"
    assert host.journal.calls[-1] == "archive_log"


async def test_what_may_pass_is_tried_again(client: Client, host: RecordingHost) -> None:
    host.journal.fail("start_vm", HostFaultError("try me again"))
    await result_of(await start(client))
    assert host.journal.of("start_vm") == ["start_vm", "start_vm"]


async def test_a_failed_compensation_does_not_stop_the_others(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("wait_until_ready", ReadyTimeoutError("not ready"))
    host.journal.fail("kill_vm boot", *[ImageNotFoundError("cannot")] * 2)
    handle = await start(client)
    cause = await failure_cause(handle)
    assert failure_of(cause or ValueError()).error_type == "ReadyTimeoutError"
    assert undone(host.journal, "wait_until_ready") == BOOT_UNDO


async def test_a_lost_checkpoint_sends_the_build_back_to_its_step(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("start_vm", CheckpointLostError("rootfs gone", step=Step.ROOTFS))
    await result_of(await start(client))
    calls = host.journal.of("pull_image", "build_rootfs", "start_vm", "snapshot_vm")
    assert calls == [
        "pull_image",
        "build_rootfs",
        "start_vm",
        "build_rootfs",
        "start_vm",
        "snapshot_vm",
    ]


async def test_a_reused_snapshot_skips_the_boot(client: Client, host: RecordingHost) -> None:
    found = snapshot_checkpoint(host.name)
    host.reused = found.model_copy(update={"reused": True})
    result = await result_of(await start(client))
    assert host.journal.of("start_vm", "verify_snapshot") == ["verify_snapshot"]
    assert [record.reused for record in result.timeline if record.step is Step.BOOT] == [True]


async def test_a_new_run_goes_on_from_what_is_done(client: Client, host: RecordingHost) -> None:
    host.journal.fail("upload_artifact memfile", ImageNotFoundError("no"))
    handle = await start(client)
    await failure_cause(handle)
    status = await handle.query(BuildTemplate.status)

    host.journal.calls.clear()
    build = BuildInput(config=status.config, options=OPTIONS, done=status.done)
    await result_of(await start(client, build))
    assert host.journal.of("pull_image", "build_rootfs", "start_vm", "verify_snapshot") == []
    assert host.journal.of("upload_artifact rootfs.ext4") == ["upload_artifact rootfs.ext4"]


async def test_a_retry_takes_a_new_snapshot_when_the_host_has_condemned_the_old_one(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("verify_snapshot", SnapshotNotResumableError("its clock is off"))
    handle = await start(client)
    await failure_cause(handle)
    status = await handle.query(BuildTemplate.status)

    host.journal.calls.clear()
    host.journal.fail("verify_snapshot", CheckpointLostError("of no use", step=Step.BOOT))
    build = BuildInput(config=status.config, options=OPTIONS, done=status.done)
    await result_of(await start(client, build))
    calls = host.journal.of("build_rootfs", "start_vm", "snapshot_vm", "verify_snapshot")
    assert calls == ["verify_snapshot", "start_vm", "snapshot_vm", "verify_snapshot"]


async def test_a_retry_prefers_the_host_that_has_the_checkpoints(
    client: Client, journal: Journal
) -> None:
    hosts = [RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal) for _ in range(2)]
    image = BuildCheckpoints(host=hosts[1].name)
    async with running_stack(client, *hosts):
        build = BuildInput(config=config(), options=OPTIONS, done=image)
        result = await result_of(await start(client, build))
    assert {record.host for record in result.timeline if record.host} == {hosts[1].name}


async def test_a_retry_goes_elsewhere_when_that_host_is_gone(
    client: Client, host: RecordingHost
) -> None:
    done = BuildCheckpoints(host="gone", rootfs=rootfs_checkpoint("gone"))
    build = BuildInput(config=config(), options=OPTIONS, done=done)
    result = await result_of(await start(client, build))
    assert host.journal.of("build_rootfs") == ["build_rootfs"]
    assert result.timeline[-1].host == host.name


async def test_a_lost_host_costs_its_grace_and_another_host_builds(
    client: Client, journal: Journal
) -> None:
    first = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    second = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    started = journal.hang("wait_until_ready")
    async with running_stack(client, first):
        handle = await start(client)
        await asyncio.wait_for(started.wait(), 30)
        first.silent.set()  # its heartbeats stop, as a dead host's do
        journal.hanging.clear()
    async with running_stack(client, second):
        result = await result_of(handle)
    assert [r.outcome for r in result.timeline if r.step is Step.BOOT] == ["rewound", "done"]
    pulls = [argument.image for name, argument in journal.arguments if name == "pull_image"]
    assert pulls[1].startswith("registry/web@sha256:")  # the same image, though the tag may move
    assert result.timeline[-1].host == second.name


@pytest.mark.parametrize(
    ("before", "after", "boots"), [(True, True, 1), (False, True, 1), (True, False, 2)]
)
async def test_a_restarted_host_takes_its_build_up_again(
    client: Client, journal: Journal, before: bool, after: bool, boots: int
) -> None:
    """Upgraded or not the boot is not lost; an earlier version cannot go on with whole steps."""
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal, whole_steps=before)
    started = journal.hang("wait_until_ready")
    async with running_stack(client, host):
        handle = await start(client, BuildInput(config=config(), options=OPTIONS))
        await asyncio.wait_for(started.wait(), 30)
        host.silent.set()
        host.whole_steps = after
        async with asyncio.timeout(30):
            while len(journal.of("hold_host")) < 2:
                await asyncio.sleep(0.1)
        host.silent.clear()
        journal.hanging.clear()
        result = await result_of(handle)
    holds = [argument.retaken_from for name, argument in journal.arguments if name == "hold_host"]
    assert holds == [None, host.name]
    assert journal.of("start_vm") == ["start_vm"] * boots
    outcomes = {record.outcome for record in result.timeline}
    assert outcomes == ({"done"} if boots == 1 else {"done", "rewound"})


async def test_hosts_that_begin_to_drain_are_not_lost_hosts(
    client: Client, host: RecordingHost
) -> None:
    drained = OPTIONS.max_hosts + 2
    host.journal.fail("hold_host", *[HostDrainingError("draining")] * drained)
    result = await result_of(await start(client))
    assert host.journal.of("hold_host") == ["hold_host"] * (drained + 1)
    assert {record.outcome for record in result.timeline} == {"done"}


async def test_a_published_template_survives_a_late_cancel(
    client: Client, host: RecordingHost
) -> None:
    started = host.journal.hang("publish_template")
    handle = await start(client)
    await asyncio.wait_for(started.wait(), 30)
    host.journal.published = PublishedTemplate(
        bucket="b", prefix="p/", metadata=stored("metadata.json"), artifacts={}
    )
    await handle.cancel()
    result = await result_of(handle)
    assert result.published.metadata.name == "metadata.json"
    assert (await handle.query(BuildTemplate.status)).state is BuildState.COMPLETED


async def test_without_any_host_the_build_fails_and_says_so(client: Client) -> None:
    journal = Journal()
    host = RecordingHost("unused", journal)
    async with running_stack(client, host):
        pass  # the workflow worker must exist once, the host must not
    log = RecordingLog(journal)
    async with workflow_worker(client, [log.archive_log, host.discard_upload]):
        options = OPTIONS.model_copy(update={"lease_wait_seconds": 1})
        handle = await start(client, BuildInput(config=config(), options=options))
        cause = await failure_cause(handle)
    assert failure_of(cause or ValueError()).error_type == "NoHostError"


async def test_a_build_waits_for_a_host(client: Client, journal: Journal) -> None:
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    log = RecordingLog(journal)
    async with workflow_worker(client, [log.archive_log, host.discard_upload]):
        handle = await start(client)
        await asyncio.sleep(0.5)
        assert journal.calls == []
        async with running_host(client, host):
            await result_of(handle)


def test_checkpoints_before_a_step_keep_what_earlier_steps_left() -> None:
    done = BuildCheckpoints(
        rootfs=rootfs_checkpoint("h"),
        snapshot=snapshot_checkpoint("h"),
        host="h",
    )
    back = done.before(Step.BOOT)
    assert (back.rootfs, back.snapshot, back.host) == (done.rootfs, None, "h")


STEPS = (Run(command="make"), User(name="web"))


async def test_steps_run_on_the_bare_disk_of_the_pulled_image(
    client: Client, host: RecordingHost
) -> None:
    asked = config(steps=STEPS, force=True, start_command="serve")
    result = await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    names = ["pull_image", "build_rootfs", "run_steps", "start_vm"]
    assert host.journal.calls[1:5] == names
    told = dict(host.journal.arguments)
    bare = told["build_rootfs"]
    assert (bare.bare, bare.start_command, bare.image.config) == (True, "", ImageConfig())
    steps = told["run_steps"]
    assert (steps.steps, steps.force, steps.start_command) == (STEPS, True, "serve")
    assert steps.image == pulled_image()
    assert told["publish_template"].image.config.user == "web"
    assert [record.step for record in result.timeline] == list(Step)


async def test_a_template_is_the_base(client: Client, host: RecordingHost) -> None:
    base = str(uuid.uuid4())
    build = BuildInput(
        config=config(source=FromTemplate(build_id=base), steps=STEPS), options=OPTIONS
    )
    await result_of(await start(client, build))
    done = ("pull_image", "import_template", "build_rootfs", "run_steps", "start_vm")
    assert host.journal.of(*done) == ["import_template", "run_steps", "start_vm"]
    told = dict(host.journal.arguments)
    assert told["import_template"].build_id == base
    assert told["run_steps"].disk == told["run_steps"].image.base.disk
    published = told["publish_template"].image
    assert (published.config.user, published.tenant) == ("web", "default")


async def test_a_template_without_steps_is_made_in_a_vm_too(
    client: Client, host: RecordingHost
) -> None:
    asked = config(source=FromTemplate(build_id=str(uuid.uuid4())))
    await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    told = dict(host.journal.arguments)
    assert "build_rootfs" not in told
    assert told["run_steps"].steps == ()
    assert told["publish_template"].image.base is not None


@pytest.mark.parametrize(
    ("own", "run"),
    [
        ({}, ("base serves", "base answers")),
        ({"start_command": "serve"}, ("serve", "")),
        ({"ready_command": "ask"}, ("base serves", "ask")),
        ({"start_command": "serve", "ready_command": "ask"}, ("serve", "ask")),
    ],
    ids=["neither", "start", "ready", "both"],
)
async def test_commands_are_the_templates_unless_the_request_has_some(
    client: Client, host: RecordingHost, own: dict[str, str], run: tuple[str, str]
) -> None:
    source = FromTemplate(build_id=str(uuid.uuid4()))
    asked = config(source=source, **{"start_command": "", "ready_command": "", **own})
    await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    told = dict(host.journal.arguments)
    steps = told["run_steps"]
    assert (steps.start_command, steps.ready_command) == run
    made = metadata_of(told["publish_template"], stored("build.log"))
    assert made.config.start_command == own.get("start_command", "")
    assert (made.commands.start, made.commands.ready) == run  # for those that are built on it


async def test_a_disk_that_is_gone_is_taken_again(client: Client, host: RecordingHost) -> None:
    host.journal.fail("run_steps", CheckpointLostError("the disk is gone", step=Step.PULL))
    asked = config(source=FromTemplate(build_id=str(uuid.uuid4())))
    await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    assert host.journal.of("import_template", "run_steps") == ["import_template", "run_steps"] * 2


STEPS_UNDO = ["kill_vm boot", "tear_down_network boot"]


async def test_a_failing_step_is_cleaned_up_after(client: Client, host: RecordingHost) -> None:
    host.journal.fail("run_steps", ImageStepError("step 1: RUN make: exit code 2"))
    handle = await start(client, BuildInput(config=config(steps=STEPS), options=OPTIONS))
    cause = await failure_cause(handle)
    assert error_type_of(cause or Exception()) == "ImageStepError"
    assert undone(host.journal, "run_steps") == [*STEPS_UNDO, "host released"]


async def test_a_cancelled_step_is_cleaned_up_after(client: Client, host: RecordingHost) -> None:
    started = host.journal.hang("run_steps")
    handle = await start(client, BuildInput(config=config(steps=STEPS), options=OPTIONS))
    await started.wait()
    await handle.cancel()
    assert isinstance(await failure_cause(handle), CancelledError)
    assert undone(host.journal, "run_steps") == [
        *STEPS_UNDO,
        "discard_checkpoints",
        "host released",
    ]


async def test_steps_are_not_run_again_on_an_image_that_has_them(
    client: Client, journal: Journal
) -> None:
    """An earlier version ran them on the image: a retry of its build begins with the base."""
    made = pulled_image().model_copy(update={"base_reference": "registry/base@sha256:1"})
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    done = BuildCheckpoints(image=made, image_is_on_host=True, host=host.name)
    async with running_stack(client, host):
        build = BuildInput(config=config(steps=STEPS), options=OPTIONS, done=done)
        await result_of(await start(client, build))
    [pull] = [argument for name, argument in journal.arguments if name == "pull_image"]
    assert pull.image == "registry/base@sha256:1"
    [steps] = [argument for name, argument in journal.arguments if name == "run_steps"]
    assert steps.image == pulled_image()


class NotFoundError(TemplateManagerError):
    """As Temporal's worker tells of an activity that it does not know."""


async def test_a_host_of_an_earlier_version_runs_the_steps_in_its_way(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("run_steps", NotFoundError("run_steps is not registered"))
    await result_of(await start(client, BuildInput(config=config(steps=STEPS), options=OPTIONS)))
    assert host.journal.of("build_rootfs", "run_steps", "build_image", "publish_template") == [
        "build_rootfs",
        "run_steps",
        "build_image",
        "build_rootfs",
        "publish_template",
    ]
    told = dict(host.journal.arguments)
    assert told["build_rootfs"].image.base_reference
    assert not told["build_rootfs"].bare
    assert told["publish_template"].image.config.user == "web"


async def test_a_host_that_is_upgraded_in_the_midst_of_steps_runs_them_in_a_vm(
    client: Client, host: RecordingHost
) -> None:
    """What the earlier one has begun in containers is begun anew."""
    host.journal.fail("run_steps", NotFoundError("run_steps is not registered"))
    host.journal.fail("build_image", EarlierWorkerError("this host runs them in VMs"))
    asked = config(steps=STEPS, start_command="serve")
    await result_of(await start(client, BuildInput(config=asked, options=OPTIONS)))
    done = ("build_rootfs", "run_steps", "build_image", "start_vm")
    assert host.journal.of(*done) == [
        "build_rootfs",
        "run_steps",
        "build_image",
        "run_steps",
        "start_vm",
    ]
    told = dict(host.journal.arguments)
    assert (told["run_steps"].steps, told["run_steps"].start_command) == (STEPS, "serve")
    assert told["publish_template"].image.config.user == "web"


# ---- Hosts that cannot run it


async def test_a_build_goes_to_a_host_that_can_run_it(client: Client, journal: Journal) -> None:
    refusing = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    fitting = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal())
    journal.fail("hold_host", KernelMissingError("host h1 has no kernel"))
    journal.found_hosts = [FoundHost(may_come=True), FoundHost(host=fitting.name)]
    journal.fail("hold_host", KernelMissingError("host h1 has no kernel"))
    async with running_stack(client, refusing):
        handle = await start(client)
        async with asyncio.timeout(60):
            while journal.calls.count("find_host") < 2:
                await asyncio.sleep(0.05)
        async with running_host(client, fitting):
            await result_of(handle)
    assert fitting.journal.of("hold_host", "publish_template") == ["hold_host", "publish_template"]
    holds = [hold for name, hold in journal.arguments if name == "hold_host"]
    assert [hold.shape for hold in holds] == [config().shape] * 2
    assert not journal.of("pull_image")


async def test_what_no_host_can_run_fails_with_what_a_host_says(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("hold_host", KernelMissingError("host h1 has no kernel"))
    failure = failure_of(await failure_cause(await start(client)) or Exception())
    assert (failure.error_type, failure.step) == ("KernelMissingError", Step.LEASE)
    assert host.journal.calls.count("find_host") == 1


async def test_a_host_that_refuses_whatever_its_facts_say_is_not_found_again(
    client: Client, host: RecordingHost
) -> None:
    refusals = [KernelMissingError("host h1 has no kernel")] * 2
    host.journal.fail("hold_host", *refusals)
    host.journal.found_hosts = [FoundHost(host=host.name)]
    await failure_cause(await start(client))
    asked = [find.refused for name, find in host.journal.arguments if name == "find_host"]
    assert asked == [(), (host.name,)]


# ---- Names


async def start_named(client: Client, *tags: str) -> Handle:
    named = config(name="web", tags=tags)
    return await start(client, BuildInput(config=named, options=OPTIONS))


async def test_tags_move_once_it_is_published_and_not_before(
    client: Client, host: RecordingHost
) -> None:
    handle = await start_named(client, "stable", "v1")
    await result_of(handle)
    calls = host.journal.of("publish_template", "move_tags", "archive_log")
    assert calls == ["publish_template", "move_tags", "archive_log"]
    [move] = [argument for name, argument in host.journal.arguments if name == "move_tags"]
    described = await handle.describe()
    assert (move.name, move.tags) == ("web", ("stable", "v1"))
    assert abs(move.asked - described.start_time) < timedelta(seconds=5)


async def test_a_build_that_fails_moves_no_tag(client: Client, host: RecordingHost) -> None:
    host.journal.fail("pull_image", ImageNotFoundError("no image"))
    assert await failure_cause(await start_named(client, "stable"))
    assert "move_tags" not in host.journal.calls


async def test_a_template_whose_tags_cannot_be_moved_is_published_all_the_same(
    client: Client, host: RecordingHost
) -> None:
    host.journal.fail("move_tags", NameTakenError("the name web is that of template api"))
    handle = await start_named(client, "stable")
    await result_of(handle)
    status = await handle.query(BuildTemplate.status)
    assert status.state is BuildState.COMPLETED


async def test_a_build_that_is_cancelled_while_its_tags_move_has_them(
    client: Client, host: RecordingHost
) -> None:
    moving = host.journal.hang("move_tags")
    handle = await start_named(client, "stable")
    await asyncio.wait_for(moving.wait(), 60)
    await handle.cancel()
    await asyncio.sleep(0.5)
    host.journal.hanging.clear()
    await result_of(handle)
    assert "move_tags stopped" not in host.journal.calls
