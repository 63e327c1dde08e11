"""A tenant's builds get their turns: real workflows on a real Temporal server, recorded hosts."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowQueryFailedError,
)
from temporalio.service import RPCError

from activities.contract.errors import failure_of
from activities.contract.inputs import BuildInput
from activities.contract.line import (
    MAX_IN_LINE,
    EnteringBuild,
    LinedBuild,
    RunningLimits,
    TenantLineState,
    TenantTerms,
)
from activities.contract.names import WORKFLOW_TASK_QUEUE, tenant_line_workflow_id
from activities.process.at_once import ask_for_each
from activities.process.clock import utc_now
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.workflow_runs import OPTIONS, Handle, config, start
from workflows.build_template import BuildTemplate
from workflows.tenant_line import TenantLine, fits

PATIENT = OPTIONS.model_copy(update={"lease_wait_seconds": 300})
TURNS = TenantTerms(takes_turns=True)
LIMIT_SECONDS = 90


class Tenant:
    """A tenant of its own, with a file of limits; its hosts can have one build at a time."""

    def __init__(self, client: Client, path: Path) -> None:
        self.client = client
        self.name = f"t-{uuid.uuid4().hex[:8]}"
        self.path = path
        self.journal = Journal()

    def limit(self, **limits: int) -> None:
        lines = [f"{name} = {value}" for name, value in limits.items()]
        self.path.write_text("\n".join([f"[tenants.{self.name}]", *lines, ""]))

    async def build(self, *, terms: TenantTerms = TURNS, **changes: object) -> Handle:
        build = config(tenant=self.name, **changes)
        return await start(self.client, BuildInput(config=build, options=PATIENT, terms=terms))

    @asynccontextmanager
    async def processes(self) -> AsyncIterator[None]:
        """A worker, and a new host each time."""
        host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", self.journal)
        async with running_stack(self.client, host, tenants_file=self.path):
            yield

    async def begin_line(self, **changes: object) -> None:
        """Begin the line as the first build would, with what a test wants otherwise."""
        state = TenantLineState.model_validate({"tenant": self.name, **changes})
        await self.client.start_workflow(
            TenantLine.run,
            state,
            id=tenant_line_workflow_id(self.name),
            task_queue=WORKFLOW_TASK_QUEUE,
        )

    async def line(self, is_right: Callable[[TenantLineState], bool]) -> TenantLineState:
        """Look until the line is as it should be."""
        handle = self.client.get_workflow_handle_for(
            TenantLine.run, tenant_line_workflow_id(self.name)
        )
        async with asyncio.timeout(LIMIT_SECONDS):
            while True:
                try:
                    state = await handle.query(TenantLine.state)
                    if is_right(state):
                        return state
                except (RPCError, WorkflowQueryFailedError):  # not begun, or too busy to tell
                    pass
                await asyncio.sleep(0.1)

    async def running(self, waiting: int) -> list[str]:
        """Look until one runs and so many wait; returns which one runs."""
        return [build.build_id for build in (await self.line(counts(1, waiting))).running]

    async def build_that_runs(self) -> Handle:
        """Start a build that has its turn and does not end."""
        self.journal.hang("pull_image")
        build = await self.build()
        await self.running(0)
        return build


@asynccontextmanager
async def tenant_of(client: Client, tmp_path: Path, **limits: int) -> AsyncIterator[Tenant]:
    tenant = Tenant(client, tmp_path / "tenants.toml")
    tenant.limit(**limits)
    async with tenant.processes():
        yield tenant


def counts(running: int, waiting: int) -> Callable[[TenantLineState], bool]:
    return lambda state: (len(state.running), len(state.waiting)) == (running, waiting)


def id_of(build: Handle) -> str:
    return build.id.removeprefix("template-build-")


async def ended(build: Handle) -> None:
    await asyncio.wait_for(build.result(), LIMIT_SECONDS)


async def test_builds_above_the_limit_wait_outside_of_the_shared_queue(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path, running_builds=1) as tenant:
        tenant.journal.hang("pull_image")
        builds = [await tenant.build() for _ in range(3)]
        state = await tenant.line(counts(1, 2))
        assert state.limits == RunningLimits(builds=1)
        waiting = {build.build_id for build in state.waiting}
        for build in builds:
            status = await build.query(BuildTemplate.status)
            assert status.waits_for_turn == (id_of(build) in waiting)
            if status.waits_for_turn:
                described = await build.describe()
                assert not described.raw_description.pending_activities
        tenant.journal.hanging.clear()
        await asyncio.gather(*map(ended, builds))
        await tenant.line(counts(0, 0))


async def test_batch_builds_get_their_turns_after_all_others(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path, running_builds=0) as tenant:
        await tenant.begin_line(look_seconds=0.5)
        batch = await tenant.build(is_batch=True)
        await tenant.line(counts(0, 1))
        others = [await tenant.build() for _ in range(2)]
        order = [build.build_id for build in (await tenant.line(counts(0, 3))).waiting]
        assert order[-1] == id_of(batch)
        assert set(order[:2]) == set(map(id_of, others))
        tenant.limit(running_builds=1)
        await asyncio.gather(*map(ended, (batch, *others)))
        held = [hold.build_id for name, hold in tenant.journal.arguments if name == "hold_host"]
        assert held == order


async def test_a_build_that_is_cancelled_leaves_its_place_or_its_turn(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path, running_builds=1) as tenant:
        first = await tenant.build_that_runs()
        second, third = await tenant.build(), await tenant.build()
        await tenant.line(counts(1, 2))
        await second.cancel()
        with pytest.raises(WorkflowFailureError):
            await ended(second)
        assert await tenant.running(1) == [id_of(first)]
        await first.cancel()
        assert await tenant.running(0) == [id_of(third)]
        tenant.journal.hanging.clear()
        await ended(third)


async def test_a_build_that_was_terminated_gives_its_turn_to_the_next(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path, running_builds=1) as tenant:
        await tenant.begin_line(look_seconds=0.5)
        first = await tenant.build_that_runs()
        second = await tenant.build()
        await tenant.line(counts(1, 1))
        await first.terminate()
        assert await tenant.running(0) == [id_of(second)]
        tenant.journal.hanging.clear()
        await ended(second)


async def test_a_larger_limit_counts_for_those_who_wait_already(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path, running_builds=0) as tenant:
        await tenant.begin_line(look_seconds=0.5)
        builds = [await tenant.build() for _ in range(2)]
        await tenant.line(counts(0, 2))
        tenant.limit(running_builds=1)
        await asyncio.gather(*map(ended, builds))


async def test_a_line_goes_on_in_its_next_run_and_after_its_workers_were_away(
    client: Client, tmp_path: Path
) -> None:
    """What one run carries over, and what waits in Temporal while no worker is there."""
    async with tenant_of(client, tmp_path, running_builds=1) as tenant:
        first = await tenant.build_that_runs()
        second = await tenant.build()
        carried = await tenant.line(counts(1, 1))
        line = client.get_workflow_handle(tenant_line_workflow_id(tenant.name))
        await line.terminate()
        await tenant.begin_line(**dict(carried))
        assert await tenant.line(counts(1, 1)) == carried
    tenant.journal.hanging.clear()
    async with tenant.processes():
        await asyncio.gather(ended(first), ended(second))
        await tenant.line(counts(0, 0))


@pytest.mark.parametrize(
    ("count", "at_once"),
    [
        (20, 2),
        # More than Temporal lets a workflow signal at a time.
        pytest.param(
            MAX_IN_LINE, 250, marks=[pytest.mark.whole, pytest.mark.timeout(10 * LIMIT_SECONDS)]
        ),
    ],
)
async def test_a_line_that_continues_as_new_forgets_nobody(
    client: Client, tmp_path: Path, count: int, at_once: int
) -> None:
    """Many builds wait; when they may all run, they are gone, and so the line ends."""
    async with tenant_of(client, tmp_path, running_builds=0) as tenant:
        await tenant.begin_line(look_seconds=2)
        line = client.get_workflow_handle(tenant_line_workflow_id(tenant.name))
        limits = RunningLimits(builds=0)

        async def enter(build: LinedBuild) -> None:
            await line.signal(TenantLine.enter, EnteringBuild(build=build, limits=limits))

        many = [lined() for _ in range(count)]
        for start in range(0, count, at_once):
            await ask_for_each(enter, many[start : start + at_once])
            state = await tenant.line(counts(0, start + at_once))
        assert list(state.waiting) == many
        described = await line.describe()
        assert described.run_id != described.raw_description.workflow_execution_info.first_run_id
        tenant.limit()
        await line.result()


async def test_without_a_limit_there_is_no_line(client: Client, tmp_path: Path) -> None:
    async with tenant_of(client, tmp_path) as tenant:
        await ended(await tenant.build(terms=TenantTerms()))
        line = client.get_workflow_handle(tenant_line_workflow_id(tenant.name))
        with pytest.raises(RPCError, match="not found"):
            await line.describe()


async def test_a_turn_that_does_not_come_is_told_in_the_end(client: Client, tmp_path: Path) -> None:
    async with tenant_of(client, tmp_path, running_builds=0) as tenant:
        options = OPTIONS.model_copy(update={"lease_wait_seconds": 1})
        build = BuildInput(config=config(tenant=tenant.name), options=options, terms=TURNS)
        handle = await start(client, build)
        with pytest.raises(WorkflowFailureError) as caught:
            await ended(handle)
        failure = failure_of(caught.value)
        assert failure.error_type == "NoTurnError"
        assert tenant.name in failure.message
        await tenant.line(counts(0, 0))


async def test_a_build_that_takes_too_long_is_undone_and_says_so(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path) as tenant:
        tenant.journal.hang("wait_until_ready")
        handle = await tenant.build(terms=TenantTerms(build_seconds=3))
        with pytest.raises(WorkflowFailureError) as caught:
            await ended(handle)
        failure = failure_of(caught.value)
        assert (failure.error_type, failure.step) == ("BuildTooLongError", "boot_and_snapshot")
        stopped = {"wait_until_ready stopped", "kill_vm boot", "host released"}
        assert stopped <= set(tenant.journal.calls)
        assert (await handle.describe()).status is WorkflowExecutionStatus.FAILED


async def test_a_template_that_becomes_too_large_is_refused_before_it_boots(
    client: Client, tmp_path: Path
) -> None:
    async with tenant_of(client, tmp_path) as tenant:
        handle = await tenant.build(terms=TenantTerms(template_mb=512), memory_mb=512)
        with pytest.raises(WorkflowFailureError) as caught:
            await ended(handle)
        failure = failure_of(caught.value)
        assert (failure.error_type, failure.step) == ("TemplateTooLargeError", "build_rootfs")
        assert "513 MiB" in failure.message and "512 MiB" in failure.message
        assert not tenant.journal.of("start_vm")


def lined(vcpus: int = 1, memory_mb: int = 512) -> LinedBuild:
    return LinedBuild(
        build_id=str(uuid.uuid4()), since=utc_now(), vcpu_count=vcpus, memory_mb=memory_mb
    )


@pytest.mark.parametrize(
    ("limits", "fit"),
    [
        (RunningLimits(), True),
        (RunningLimits(builds=2, vcpus=3, memory_mb=1536), True),
        (RunningLimits(builds=1), False),
        (RunningLimits(vcpus=2), False),
        (RunningLimits(memory_mb=1535), False),
    ],
)
def test_builds_vcpus_and_memory_are_counted_together(limits: RunningLimits, fit: bool) -> None:
    assert fits([lined(), lined(vcpus=2, memory_mb=1024)], limits) is fit


def test_a_line_of_builds_can_be_carried_into_the_next_run() -> None:
    state = TenantLineState(tenant="t" * 63, waiting=(lined(100, 10**6),) * MAX_IN_LINE)
    assert len(state.model_dump_json()) < 1_500_000  # of Temporal's 2 MiB
