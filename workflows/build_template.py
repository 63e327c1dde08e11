"""The durable build of one template.

The pipeline reads from top to bottom in `_pipeline`. What each step leaves stands in `self._done`;
a step that finds its part there is skipped, which is how a retry goes on from where a build
failed. A step that finds on the host's disk that something it needs is gone says so
(`CheckpointLost`), and the pipeline goes back to the step that makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import pydantic
from temporalio import workflow
from temporalio.contrib.workflow_streams import WorkflowStream
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    FailureError,
    is_cancelled_exception,
)

from activities.contract.errors import (
    BuildCancelledError,
    CheckpointLostError,
    error_type_of,
    failure_of,
)
from activities.contract.inputs import (
    ArchiveLogInput,
    BuildImageInput,
    BuildInput,
    BuildRootfsInput,
    DiscardUploadInput,
    FindSnapshotInput,
    ImportTemplateInput,
    PublishTemplateInput,
    PullImageInput,
    SnapshotVmInput,
    StartVmInput,
    UploadArtifactInput,
    VerifySnapshotInput,
    WaitUntilReadyInput,
)
from activities.contract.interface import (
    ArtifactActivities,
    CheckpointActivities,
    ImageActivities,
    ImageStepActivities,
    LogActivities,
    MicrovmActivities,
    NetworkActivities,
    RootfsActivities,
    UploadUndoActivities,
)
from activities.contract.names import LOG_TOPIC, WORKFLOW_TASK_QUEUE, Step, VmPurpose
from activities.contract.results import (
    BuildCheckpoints,
    Checkpoint,
    PublishedTemplate,
    PulledImage,
    Verification,
)
from activities.contract.scope import BuildScope, HostLease, VmRef, VmShape
from activities.contract.search_attributes import BUILD_STATE, BUILD_STEP, KVM_HOST
from activities.contract.status import (
    BuildFailure,
    BuildResult,
    BuildState,
    BuildStatus,
    LogEntry,
    LogLevel,
)
from workflows.compensations import Compensations, shielded
from workflows.host_hold import HostHold
from workflows.policies import POLICIES, SCHEDULE_TO_START, undo_retry
from workflows.timeline import Timeline, details_markdown

T = TypeVar("T")

MAX_REWINDS = 5
ARTIFACTS = ("rootfs.ext4", "memfile", "snapfile")
UNDO_ATTEMPT = timedelta(seconds=60)
ARCHIVE_LIMIT = timedelta(minutes=5)
MIB = 1024 * 1024


@workflow.defn(name="BuildTemplate", failure_exception_types=[pydantic.ValidationError])
class BuildTemplate:
    """Builds one template on one KVM host, or on the next one when the first is lost."""

    @workflow.init
    def __init__(self, build: BuildInput) -> None:
        """Set up the state; the stream must be made here for its handlers to exist."""
        self._config = build.config
        self._options = build.options
        self._done = build.done or BuildCheckpoints()
        self._state = BuildState.BUILDING
        self._failure: BuildFailure | None = None
        self._published: PublishedTemplate | None = None
        self._stopping = False
        self._lost_hosts: set[str] = set()
        self._timeline = Timeline()
        self._stream = WorkflowStream()
        self._log_topic = self._stream.topic(LOG_TOPIC, type=LogEntry)
        self._hold = HostHold(
            self._config, self._options, self._host_lost, preferred_host=self._done.host
        )
        self._undos = Compensations(self._undo_failed)

    @workflow.run
    async def run(self, build: BuildInput) -> BuildResult:
        """Build, or undo; whatever happens, the log is archived at the end."""
        try:
            result = await self._build_or_undo()
        except FailureError:  # anything else is a bug: the workflow task fails and can be mended
            await self._close()
            raise
        await self._close()
        return result

    @workflow.signal
    async def lease_granted(self, lease: HostLease) -> None:
        """Learn which host holds the build, and by which lease number."""
        await asyncio.sleep(0)  # lines published before this signal come first
        self._hold.granted(lease)

    @workflow.query
    def status(self) -> BuildStatus:
        """Tell everything about the build."""
        lease = self._hold.lease
        return BuildStatus(
            config=self._config,
            state=self._state,
            step=self._timeline.step,
            host=lease.host if lease else self._done.host,
            lease_number=lease.number if lease else None,
            done=self._done,
            timeline=self._timeline.records,
            failure=self._failure,
            published=self._published,
        )

    # ---- The pipeline

    async def _pipeline(self, lease: HostLease) -> None:
        self._settle_on(lease.host)
        scope, done = self._scope(lease), self._done
        image = await self._step(Step.PULL, done.image_on_host, lambda: self._pull(scope))
        rootfs = await self._step(
            Step.ROOTFS, done.rootfs, lambda: self._build_rootfs(scope, image)
        )
        snapshot = await self._step(Step.BOOT, done.snapshot, lambda: self._boot(scope, rootfs))
        await self._step(Step.VERIFY, done.verification, lambda: self._verify(scope, snapshot))
        await self._step(
            Step.UPLOAD, self._published, lambda: self._upload(scope, image, rootfs, snapshot)
        )

    def _settle_on(self, host: str) -> None:
        if self._done.host != host:
            self._done = self._done.on_other_host()
            self._keep(host=host)

    async def _pull(self, scope: BuildScope) -> PulledImage:
        image = await self._base_image(scope)
        if self._config.steps:
            image = await self._build_image(scope, image)
        self._keep(image=image, image_is_on_host=True)
        return image

    async def _base_image(self, scope: BuildScope) -> PulledImage:
        if self._config.from_template is not None:
            template = self._config.from_template
            return await self._on_host(
                ImageStepActivities.import_template,
                ImportTemplateInput(scope=scope, build_id=template),
                f"take template {template}",
            )
        known = self._done.image
        return await self._on_host(
            ImageActivities.pull_image,
            PullImageInput(
                scope=scope,
                image=known.reference_to_pull if known else self._config.image,
                auth=self._config.registry_auth,
                timeout_seconds=self._options.pull_timeout_seconds,
            ),
            f"pull {self._config.image}",
        )

    async def _build_image(self, scope: BuildScope, base: PulledImage) -> PulledImage:
        steps = self._config.steps
        build = BuildImageInput(
            scope=scope,
            base=base,
            steps=steps,
            timeout_seconds=self._options.image_step_timeout_seconds,
            force=self._config.force,
        )
        mark = len(self._undos)
        self._undo_on_host("clean up rootfs", RootfsActivities.clean_up_rootfs, scope)
        image = await self._on_host(
            ImageStepActivities.build_image, build, f"{len(steps)} steps on {base.digest[:19]}"
        )
        self._undos.forget(mark)  # it cleans up after itself when it succeeds
        return image

    async def _build_rootfs(self, scope: BuildScope, image: PulledImage) -> Checkpoint:
        mark = len(self._undos)
        self._undo_on_host("clean up rootfs", RootfsActivities.clean_up_rootfs, scope)
        rootfs = await self._on_host(
            RootfsActivities.build_rootfs,
            BuildRootfsInput(
                scope=scope,
                image=image,
                disk_size_mb=self._config.disk_size_mb,
                memory_mb=self._config.memory_mb,
                start_command=self._config.start_command,
                ready_command=self._config.ready_command,
                env=self._config.env,
                ready_timeout_seconds=self._options.ready_timeout_seconds,
                provision_timeout_seconds=self._options.provision_timeout_seconds,
                force=self._config.force,
            ),
            f"make rootfs.ext4 of {image.digest[:19]}",
        )
        self._undos.forget(mark)  # it cleans up after itself when it succeeds
        self._keep(rootfs=rootfs)
        return rootfs

    async def _boot(self, scope: BuildScope, rootfs: Checkpoint) -> Checkpoint:
        shape = self._shape()
        snapshot = None if self._config.force else await self._find_snapshot(scope, rootfs, shape)
        if snapshot is None:
            snapshot = await self._boot_and_snapshot(scope, rootfs, shape)
        self._keep(snapshot=snapshot)
        return snapshot

    async def _find_snapshot(
        self, scope: BuildScope, rootfs: Checkpoint, shape: VmShape
    ) -> Checkpoint | None:
        return await self._on_host(
            CheckpointActivities.find_snapshot,
            FindSnapshotInput(scope=scope, rootfs=rootfs, shape=shape),
            "look for a snapshot of the same inputs",
        )

    async def _boot_and_snapshot(
        self, scope: BuildScope, rootfs: Checkpoint, shape: VmShape
    ) -> Checkpoint:
        vm = VmRef(scope=scope, purpose=VmPurpose.BOOT)
        mark = len(self._undos)
        self._undo_on_host("tear network down", NetworkActivities.tear_down_network, vm)
        await self._on_host(NetworkActivities.set_up_network, vm, f"netns {vm.name}")
        self._undo_on_host("kill VM", MicrovmActivities.kill_vm, vm)
        start = StartVmInput(vm=vm, rootfs=rootfs, shape=shape)
        await self._on_host(
            MicrovmActivities.start_vm, start, f"boot {shape.vcpu_count} vCPU {shape.memory_mb} MiB"
        )
        wait = WaitUntilReadyInput(vm=vm, timeout_seconds=self._options.ready_timeout_seconds)
        await self._on_host(MicrovmActivities.wait_until_ready, wait, "wait for the ready command")
        take = SnapshotVmInput(vm=vm, rootfs=rootfs, shape=shape)
        snapshot = await self._on_host(MicrovmActivities.snapshot_vm, take, "snapshot the guest")
        await self._undos.unwind(mark)
        return snapshot

    async def _verify(self, scope: BuildScope, snapshot: Checkpoint) -> Verification:
        vm = VmRef(scope=scope, purpose=VmPurpose.VERIFY)
        mark = len(self._undos)
        self._undo_on_host("tear network down", NetworkActivities.tear_down_network, vm)
        await self._on_host(NetworkActivities.set_up_network, vm, f"netns {vm.name}")
        self._undo_on_host("kill VM", MicrovmActivities.kill_vm, vm)
        verify = VerifySnapshotInput(vm=vm, snapshot=snapshot, shape=self._shape())
        verification = await self._on_host(
            MicrovmActivities.verify_snapshot, verify, "resume the snapshot and ping the guest"
        )
        await self._undos.unwind(mark)
        self._keep(verification=verification)
        return verification

    async def _upload(
        self, scope: BuildScope, image: PulledImage, rootfs: Checkpoint, snapshot: Checkpoint
    ) -> PublishedTemplate:
        mark = len(self._undos)
        self._undos.add("discard upload", lambda: self._discard_upload(scope))
        for name in ARTIFACTS:
            if name not in self._done.uploads:
                await self._upload_artifact(scope, snapshot, name)
        self._published = await self._publish(scope, image, rootfs, snapshot)
        self._undos.forget(mark)  # the point of no return: the template exists
        return self._published

    async def _upload_artifact(self, scope: BuildScope, snapshot: Checkpoint, name: str) -> None:
        size_mb = snapshot.files[name].allocated_bytes / MIB
        uploaded = await self._on_host(
            ArtifactActivities.upload_artifact,
            UploadArtifactInput.model_validate(
                {"scope": scope, "snapshot": snapshot, "name": name}
            ),
            f"upload {name} {size_mb:.0f} MiB",
        )
        self._keep(uploads={**self._done.uploads, name: uploaded})

    async def _publish(
        self, scope: BuildScope, image: PulledImage, rootfs: Checkpoint, snapshot: Checkpoint
    ) -> PublishedTemplate:
        assert self._done.verification is not None
        return await self._on_host(
            ArtifactActivities.publish_template,
            PublishTemplateInput(
                scope=scope,
                config=self._config,
                image=image,
                rootfs=rootfs,
                snapshot=snapshot,
                verification=self._done.verification,
                uploads=self._done.uploads,
                timeline=self._timeline.records,
            ),
            "publish metadata.json",
        )

    # ---- Hosts: take one, lose one, go back

    async def _build_on_hosts(self) -> None:
        self._begin(Step.LEASE, None)
        self._undos.add("release host", self._release)
        self._hold.start()
        rewinds = 0
        while self._published is None:
            lease = await self._next_lease()
            try:
                await self._pipeline_while_leased(lease)
            except FailureError as error:
                rewinds += 1
                step = _step_to_go_back_to(error)
                if step is None or rewinds > MAX_REWINDS:
                    raise
                await self._rewind(step)

    async def _next_lease(self) -> HostLease:
        await workflow.wait_condition(
            lambda: self._hold.lease is not None or self._hold.has_failed(),
            timeout_summary="waiting for a KVM host",
        )
        if self._hold.lease is None:
            await self._hold.raise_failure()
        lease = self._hold.lease
        assert lease is not None
        if self._timeline.step is Step.LEASE:
            self._timeline.stop_running("done")
        self._lost_hosts.discard(lease.host)
        workflow.upsert_search_attributes([KVM_HOST.value_set(lease.host)])
        self._say(f"host {lease.host} holds the build (lease {lease.number})")
        return lease

    async def _pipeline_while_leased(self, lease: HostLease) -> None:
        """Run the pipeline until it ends or the lease does. Raises what the pipeline raises."""
        self._stopping = False
        work = asyncio.ensure_future(self._pipeline(lease))
        try:
            await workflow.wait_condition(
                lambda: work.done() or self._hold.lease != lease or self._hold.has_failed()
            )
        except asyncio.CancelledError:
            await self._stop(work)
            raise
        if work.done():
            work.result()
            return
        await self._stop(work)
        if self._published is None:
            self._timeline.stop_running("rewound")
            await self._leave(lease)

    async def _stop(self, work: asyncio.Future[None]) -> None:
        # A step that finishes although it was cancelled must not be followed by the next one.
        self._stopping = True
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, FailureError):
            await shielded(work)

    async def _leave(self, lease: HostLease) -> None:
        """Undo on a host that is no longer ours, unless it is gone: its sweep will do it then."""
        if lease.host in self._lost_hosts:
            for name in self._undos.forget_on_host(1):
                self._say(f"left to the sweep of host {lease.host}: {name}", LogLevel.WARN)
        await self._undos.unwind(1)  # all but the hold itself

    async def _rewind(self, step: Step) -> None:
        self._say(f"going back to {step}: what it left is no longer there", LogLevel.WARN)
        self._timeline.stop_running("rewound")
        await self._undos.unwind(1)
        self._done = self._done.before(step)

    def _host_lost(self, host: str, reason: str) -> None:
        if host:
            self._lost_hosts.add(host)
        self._say(f"host {host or '(none)'} is given up: {reason}", LogLevel.WARN)

    async def _release(self) -> None:
        await self._hold.release()

    # ---- The end, good or bad

    async def _build_or_undo(self) -> BuildResult:
        try:
            await self._build_on_hosts()
        except (asyncio.CancelledError, FailureError) as error:
            await self._undo_everything(error)
            if self._published is None:
                self._raise_failure(error)
        self._begin(Step.RELEASE, self._done.host)
        await self._undos.unwind()
        self._timeline.end("done")
        self._failure = None
        self._set_state(BuildState.COMPLETED)
        return self._result()

    async def _undo_everything(self, error: BaseException) -> None:
        cancelled = is_cancelled_exception(error)
        if self._published is not None:
            return
        step = self._timeline.step
        self._timeline.stop_running("cancelled" if cancelled else "failed")
        if cancelled:
            self._failure = BuildCancelledError("the build was cancelled", step=step).failure()
            self._set_state(BuildState.CANCELLING)
            self._discard_on_host()
        else:
            self._failure = failure_of(error, step)
            self._say_failure(self._failure)
        self._show()
        await self._undos.unwind()

    def _discard_on_host(self) -> None:
        lease = self._hold.lease
        if lease is None:
            return
        # Below the teardown in the stack, above the hold: it must still be ours, and idle.
        teardown = self._undos.take(1)
        self._undo_on_host(
            "discard checkpoints", CheckpointActivities.discard_checkpoints, self._config.build_id
        )
        self._undos.put_back(teardown)

    def _raise_failure(self, error: BaseException) -> NoReturn:
        assert self._failure is not None
        if is_cancelled_exception(error):
            self._set_state(BuildState.CANCELLED)
            raise CancelledError(self._failure.message)
        self._set_state(BuildState.FAILED)
        raise ApplicationError(
            _failure_text(self._failure),
            self._failure.model_dump(mode="json"),
            self._done.model_dump(mode="json"),
            type=self._failure.error_type,
            non_retryable=True,
        ) from error

    async def _discard_upload(self, scope: BuildScope) -> None:
        cancelled = self._state is BuildState.CANCELLING
        discarded = await self._undo_activity(
            UploadUndoActivities.discard_upload,
            DiscardUploadInput(scope=scope, keep_parts=not cancelled),
            WORKFLOW_TASK_QUEUE,
            "discard upload",
        )
        if discarded.published is not None:
            self._say("the template was published before the build was stopped: it stays")
            self._published = discarded.published
            self._failure = None
        self._done = self._done.model_copy(update={"uploads": {}})

    def _result(self) -> BuildResult:
        done = self._done
        assert self._published and done.image and done.rootfs and done.verification
        return BuildResult(
            published=self._published,
            timeline=self._timeline.records,
            image=done.image,
            verification=done.verification,
            rootfs_size_mb=done.rootfs.files["rootfs.ext4"].size_bytes // MIB,
            agent_version=str(done.rootfs.facts.get("agent_version", "")),
        )

    async def _close(self) -> None:
        """Archive the log, and let followers read the rest from the closed workflow."""
        try:
            archive: Awaitable[Any] = workflow.execute_activity_method(
                LogActivities.archive_log,
                ArchiveLogInput(build_id=self._config.build_id, final_status=self.status()),
                task_queue=WORKFLOW_TASK_QUEUE,
                start_to_close_timeout=UNDO_ATTEMPT,
                schedule_to_close_timeout=ARCHIVE_LIMIT,
                retry_policy=undo_retry(self._options),
                summary="archive the build log",
            )
            await shielded(asyncio.ensure_future(archive))
        except ActivityError:
            workflow.logger.warning("the build log could not be archived")
        self._stream.detach_pollers()
        await workflow.wait_condition(workflow.all_handlers_finished)

    # ---- Running things

    async def _step(self, step: Step, known: T | None, work: Callable[[], Awaitable[T]]) -> T:
        """Run a step, unless an earlier run has left what it makes."""
        if known is not None:
            self._say_kept(step)
            return known
        self._begin(step, self._done.host)
        result = await work()
        reused = isinstance(result, Checkpoint) and result.reused
        record = self._timeline.end("done", reused=reused)
        how = "reused" if reused else "done"
        self._say(f"{step}: {how} in {record.seconds:.1f} s")
        self._show()
        return result

    def _say_kept(self, step: Step) -> None:
        if step in (record.step for record in self._timeline.records):
            return  # this run made it, and has told so
        self._timeline.begin(step, self._done.host)
        self._timeline.end("done", reused=True)
        self._say(f"{step}: reused from an earlier run of this build")

    async def _on_host(
        self, method: Callable[[Any, Any], Awaitable[T]], argument: Any, summary: str
    ) -> T:
        """Run a step's activity on the host that holds the build."""
        lease = self._hold.lease
        if self._stopping or lease is None:
            raise asyncio.CancelledError
        policy = POLICIES[method.__name__]
        result: T = await workflow.execute_activity_method(
            method,
            argument,
            task_queue=lease.step_queue,
            schedule_to_start_timeout=SCHEDULE_TO_START,
            start_to_close_timeout=policy.start_to_close(self._options),
            heartbeat_timeout=timedelta(seconds=self._options.heartbeat_timeout_seconds),
            retry_policy=policy.retry(self._options),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            summary=summary,
        )
        if self._stopping:
            raise asyncio.CancelledError
        return result

    def _undo_on_host(
        self, name: str, method: Callable[[Any, Any], Awaitable[object]], argument: Any
    ) -> None:
        """Register a compensation that runs on the host that holds the build now."""
        lease = self._hold.lease
        if lease is None:
            return
        queue = lease.step_queue
        self._undos.add(
            name, lambda: self._undo_activity(method, argument, queue, name), on_host=True
        )

    async def _undo_activity(
        self, method: Callable[[Any, Any], Awaitable[T]], argument: Any, queue: str, name: str
    ) -> T:
        options = self._options
        result: T = await workflow.execute_activity_method(
            method,
            argument,
            task_queue=queue,
            schedule_to_start_timeout=timedelta(seconds=options.teardown_timeout_seconds),
            start_to_close_timeout=UNDO_ATTEMPT,
            schedule_to_close_timeout=timedelta(seconds=options.teardown_timeout_seconds),
            heartbeat_timeout=timedelta(seconds=options.heartbeat_timeout_seconds),
            retry_policy=undo_retry(options),
            summary=f"undo: {name}",
        )
        return result

    def _undo_failed(self, name: str, error: BaseException) -> None:
        why = failure_of(error).message
        self._say(f"could not {name}: {why}; left to the host's sweep", LogLevel.WARN)

    # ---- Telling

    def _begin(self, step: Step, host: str | None) -> None:
        self._timeline.begin(step, host)
        workflow.upsert_search_attributes([BUILD_STEP.value_set(step)])
        self._say(f"{step}: started" + (f" on {host}" if host else ""))
        self._show()

    def _keep(self, **left: object) -> None:
        self._done = self._done.model_copy(update=left)

    def _say(self, message: str, level: LogLevel = LogLevel.INFO) -> None:
        self._log_topic.publish(
            LogEntry(
                timestamp=workflow.now(), level=level, message=message, step=self._timeline.step
            )
        )

    def _say_failure(self, failure: BuildFailure) -> None:
        self._say(f"{failure.error_type}: {failure.message}", LogLevel.ERROR)
        if failure.hint:
            self._say(f"what to do: {failure.hint}", LogLevel.ERROR)

    def _set_state(self, state: BuildState) -> None:
        self._state = state
        workflow.upsert_search_attributes([BUILD_STATE.value_set(state)])
        self._say(f"build is {state}")
        self._show()

    def _show(self) -> None:
        workflow.set_current_details(
            details_markdown(
                self._config, self._state, self._hold.lease, self._timeline, self._failure
            )
        )

    def _scope(self, lease: HostLease) -> BuildScope:
        return BuildScope(
            build_id=self._config.build_id, template_id=self._config.template_id, lease=lease
        )

    def _shape(self) -> VmShape:
        config = self._config
        return VmShape(
            memory_mb=config.memory_mb,
            vcpu_count=config.vcpu_count,
            kernel_version=config.kernel_version,
            firecracker_version=config.firecracker_version,
            huge_pages=config.huge_pages,
        )


def _step_to_go_back_to(error: FailureError) -> Step | None:
    if error_type_of(error) != CheckpointLostError.__name__:
        return None
    return failure_of(error).step


def _failure_text(failure: BuildFailure) -> str:
    """Return the message that the Web UI shows: cause, last lines and the next thing to do."""
    parts = [f"{failure.step}: {failure.message}" if failure.step else failure.message]
    parts += ["last lines:", *failure.log_tail] if failure.log_tail else []
    parts += [f"what to do: {failure.hint}"] if failure.hint else []
    return "\n".join(parts)
