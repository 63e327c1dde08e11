"""The durable build of one template: `_pipeline` is the list of its steps.

What each step leaves is kept; a step that finds its part there is skipped, which is how a retry
goes on from where a build failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

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

from activities.contract.checkpoints import Checkpoint
from activities.contract.errors import BuildCancelledError, failure_of
from activities.contract.inputs import ArchiveLogInput, BuildInput, MoveTagsInput
from activities.contract.interface import CheckpointActivities, LogActivities, NameActivities
from activities.contract.names import WORKFLOW_TASK_QUEUE, Step
from activities.contract.scope import HostLease
from activities.contract.status import BuildResult, BuildState, BuildStatus
from activities.contract.units import MIB
from workflows.calling import call
from workflows.compensations import Compensations, shielded
from workflows.host_loop import HostLoop
from workflows.kept import Kept
from workflows.leased_host import LeasedHost
from workflows.steps import BuildSteps
from workflows.telling import Telling, failure_text

T = TypeVar("T")


@workflow.defn(name="BuildTemplate", failure_exception_types=[pydantic.ValidationError])
class BuildTemplate:
    """Builds one template on one KVM host, or on the next one when the first is lost."""

    @workflow.init
    def __init__(self, build: BuildInput) -> None:
        """Set up the state; the stream must be made here for its handlers to exist."""
        self._config, self._options = build.config, build.options
        self._kept = Kept(build.done)
        self._stream = WorkflowStream()
        self._telling = Telling(build, self._stream, self._host_name)
        self._undos = Compensations(self._telling.undo_failed)
        self._steps = BuildSteps(build, self._kept, self._telling, self._undos)
        self._hosts = HostLoop(build, self._kept, self._telling, self._undos)

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
        self._hosts.hold.granted(lease)

    @workflow.signal
    def turn_granted(self) -> None:
        """Learn that it is this build's turn among those of its tenant."""
        self._hosts.turn.granted()

    @workflow.query
    def status(self) -> BuildStatus:
        """Tell everything about the build."""
        lease, timeline = self._hosts.hold.lease, self._telling.timeline
        return BuildStatus(
            config=self._config,
            state=self._telling.state,
            step=timeline.step,
            host=lease.host if lease else self._kept.done.host,
            lease_number=lease.number if lease else None,
            done=self._kept.done,
            timeline=timeline.records,
            failure=self._telling.failure,
            published=self._kept.published,
            waits_for_turn=self._hosts.turn.is_awaited,
        )

    # ---- The pipeline

    async def _pipeline(self, host: LeasedHost) -> None:
        do, done = self._steps, self._kept.done
        image = await self._step(Step.PULL, do.kept_image(), lambda: do.pull(host))
        rootfs = await self._step(Step.ROOTFS, done.rootfs, lambda: do.build_rootfs(host, image))
        snapshot = await self._step(Step.BOOT, done.snapshot, lambda: do.boot(host, rootfs))
        await self._step(Step.VERIFY, done.verification, lambda: do.verify(host, snapshot))
        await self._step(
            Step.UPLOAD, self._kept.published, lambda: do.upload(host, image, rootfs, snapshot)
        )

    async def _step(self, step: Step, known: T | None, work: Callable[[], Awaitable[T]]) -> T:
        """Run a step, unless an earlier run has left what it makes."""
        if known is not None:
            self._telling.kept(step, self._kept.done.host)
            return known
        self._telling.begin(step, self._kept.done.host)
        result = await work()
        self._telling.done(reused=isinstance(result, Checkpoint) and result.reused)
        return result

    # ---- The end, good or bad

    async def _build_or_undo(self) -> BuildResult:
        try:
            await self._hosts.run(self._pipeline)
        except (asyncio.CancelledError, FailureError) as error:
            if self._kept.published is None:
                await self._undo_everything(error)
            if self._kept.published is None:
                self._raise_failure(error)
        self._telling.begin(Step.RELEASE, self._kept.done.host)
        await self._undos.unwind()
        await self._hosts.release()
        if self._config.name is not None:
            await self._move_tags(self._config.name)
        self._telling.timeline.end("done")
        self._telling.failure = None
        self._telling.enter(BuildState.COMPLETED)
        return self._result()

    async def _move_tags(self, name: str) -> None:
        """Let the tags that were asked for stand for what is published now, and say if not."""
        config = self._config
        move = call(
            NameActivities.move_tags,
            MoveTagsInput(
                tenant=config.tenant,
                name=name,
                tags=config.tags,
                build_id=config.build_id,
                asked=workflow.info().start_time,
            ),
            queue=WORKFLOW_TASK_QUEUE,
            summary=f"move {', '.join(config.tags)} of {name}",
            options=self._options,
        )
        try:
            moved = await shielded(asyncio.ensure_future(move))
        except ActivityError as error:
            self._telling.warn(f"the tags of {name} were not moved: {failure_of(error).message}")
            return
        for tag in config.tags:
            stays = tag in moved.kept and "stays: a build that was asked for later has it"
            self._telling.say(f"{name}:{tag} {stays or 'is this build now'}")

    async def _undo_everything(self, error: BaseException) -> None:
        step = self._telling.timeline.step
        if is_cancelled_exception(error):
            self._telling.timeline.stop_running("cancelled")
            cancelled = BuildCancelledError("the build was cancelled", step=step)
            self._telling.cancelling(cancelled.failure())
            self._discard_on_host()
        else:
            self._telling.timeline.stop_running("failed")
            self._telling.failed(failure_of(error, step))
        await self._undos.unwind()
        await self._hosts.release()

    def _discard_on_host(self) -> None:
        """Let nothing of a cancelled build stay on its host, once all that runs there has ended."""
        lease = self._hosts.hold.lease
        if lease is not None:
            discard = CheckpointActivities.discard_checkpoints
            self._undos.put_beneath(
                self._hosts.leased(lease).undo(
                    "discard checkpoints", discard, self._config.build_id
                )
            )

    def _raise_failure(self, error: BaseException) -> NoReturn:
        failure = self._telling.failure
        assert failure is not None
        if is_cancelled_exception(error):
            self._telling.enter(BuildState.CANCELLED)
            raise CancelledError(failure.message)
        self._telling.enter(BuildState.FAILED)
        raise ApplicationError(
            failure_text(failure),
            failure.model_dump(mode="json"),
            self._kept.done.model_dump(mode="json"),
            type=failure.error_type,
            non_retryable=True,
        ) from error

    def _result(self) -> BuildResult:
        done, published = self._kept.done, self._kept.published
        assert published and done.image and done.rootfs and done.verification
        return BuildResult(
            published=published,
            timeline=self._telling.timeline.records,
            image=done.image,
            verification=done.verification,
            rootfs_size_mb=done.rootfs.size_bytes // MIB,
            agent_version=done.rootfs.facts.agent_version,
        )

    async def _close(self) -> None:
        """Archive the log, and let followers read the rest from the closed workflow."""
        try:
            archive = call(
                LogActivities.archive_log,
                ArchiveLogInput(build_id=self._config.build_id, final_status=self.status()),
                queue=WORKFLOW_TASK_QUEUE,
                summary="archive the build log",
                options=self._options,
            )
            await shielded(asyncio.ensure_future(archive))
        except FailureError:
            workflow.logger.warning("the build log could not be archived")
        self._stream.detach_pollers()
        await workflow.wait_condition(workflow.all_handlers_finished)

    def _host_name(self) -> str | None:
        lease = self._hosts.hold.lease
        return lease.host if lease else None
