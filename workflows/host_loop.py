"""Taking hosts and losing them: the pipeline runs while a host holds the build.

A host that is lost is left, what can be undone is undone, and the next one begins with what is
still true there. A step that finds on the host's disk that something it needs is gone says so
(`CheckpointLost`), and the pipeline goes back to the step that makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.exceptions import ApplicationError, FailureError

from activities.contract.errors import (
    BuildTooLongError,
    CheckpointLostError,
    error_type_of,
    failure_of,
)
from activities.contract.inputs import BuildInput
from activities.contract.names import Step
from activities.contract.scope import HostLease
from workflows.compensations import Compensations, Undo, shielded
from workflows.host_hold import HostHold
from workflows.kept import Kept
from workflows.leased_host import LeasedHost
from workflows.telling import Telling
from workflows.turn import Turn

MAX_REWINDS = 5

Pipeline = Callable[[LeasedHost], Coroutine[object, object, None]]


class HostLoop:
    """Runs the pipeline of one build on one host after another."""

    def __init__(
        self,
        build: BuildInput,
        kept: Kept,
        telling: Telling,
        undos: Compensations,
    ) -> None:
        self._config, self._options = build.config, build.options
        self._seconds = build.terms.build_seconds
        self._ends_at: datetime | None = None
        self.turn = Turn(build)
        self.hold = HostHold(
            build.config,
            build.options,
            self._host_lost,
            preferred_host=kept.done.host,
            warm_host=build.warm_host,
            shape=build.shape,
            weight=build.fairness_weight,
            turn=self.turn,
            refused=telling.warn,
        )
        self._kept = kept
        self._telling = telling
        self._undos = undos
        self._lost_hosts: set[str] = set()

    async def run(self, pipeline: Pipeline) -> None:
        """Run until the template is published. Raises what no other host could do better."""
        self._telling.begin(Step.LEASE, None)
        self.hold.start()
        rewinds = 0
        while self._kept.published is None:
            lease = await self._next_lease()
            try:
                await self._while_leased(lease, pipeline)
            except FailureError as error:
                rewinds += 1
                step = _step_to_go_back_to(error)
                if step is None or rewinds > MAX_REWINDS:
                    raise
                await self._rewind(step)

    async def release(self) -> None:
        """Let the last host go; whatever happens, it is given back."""
        await self._undos.run(Undo("release host", self.hold.release))

    def leased(self, lease: HostLease) -> LeasedHost:
        """Return the host of a lease, to run steps and undos on."""
        return LeasedHost(
            self._config.scope(lease),
            self._options,
            self._undos,
            is_held=lambda: self.hold.lease is not None,
            hear=self._telling.hear,
        )

    async def _next_lease(self) -> HostLease:
        await workflow.wait_condition(
            lambda: self.hold.lease is not None or self.hold.has_failed(),
            timeout_summary="waiting for a KVM host",
        )
        if self.hold.lease is None:
            await self.hold.raise_failure()
        lease = self.hold.lease
        assert lease is not None
        self._lost_hosts.discard(lease.host)
        self._telling.held(lease.host, lease.number)
        return lease

    async def _while_leased(self, lease: HostLease, pipeline: Pipeline) -> None:
        """Run the pipeline until it ends or the lease does. Raises what the pipeline raises."""
        host = self.leased(lease)
        self._kept.settle_on(lease.host)
        work = asyncio.ensure_future(_run(pipeline, host))
        try:
            await workflow.wait_condition(
                lambda: work.done() or self.hold.lease != lease or self.hold.has_failed(),
                timeout=self._seconds_left(),
            )
        except asyncio.CancelledError:
            await _stop(host, work)
            raise
        except TimeoutError:
            await _stop(host, work)
            if self._kept.published is None:
                raise self._too_long() from None
        if work.done():
            work.result()
            return
        await _stop(host, work)
        if self._kept.published is None:
            self._telling.timeline.stop_running("rewound")
            await self._leave(lease)

    def _seconds_left(self) -> float | None:
        """Return how long the build may still take; None, and no timer, without a limit."""
        if self._seconds is None:
            return None
        now = workflow.now()
        self._ends_at = self._ends_at or now + timedelta(seconds=self._seconds)
        return max(0.0, (self._ends_at - now).total_seconds())

    def _too_long(self) -> ApplicationError:
        return BuildTooLongError(
            f"it took longer than a build of tenant {self._config.tenant} may: {self._seconds:g} s"
        ).to_application_error()

    async def _leave(self, lease: HostLease) -> None:
        """Undo on a host that is no longer ours, unless it is gone: its sweep will do it then."""
        if lease.host in self._lost_hosts:
            for name in self._undos.forget_on_host():
                self._telling.warn(f"left to the sweep of host {lease.host}: {name}")
        await self._undos.unwind()

    async def _rewind(self, step: Step) -> None:
        self._telling.warn(f"going back to {step}: what it left is no longer there")
        self._telling.timeline.stop_running("rewound")
        await self._undos.unwind()
        self._kept.go_back_to(step)

    def _host_lost(self, host: str, reason: str) -> None:
        if host:
            self._lost_hosts.add(host)
        self._telling.warn(f"host {host or '(none)'} is given up: {reason}")


async def _run(pipeline: Pipeline, host: LeasedHost) -> None:
    try:
        await pipeline(host)
    finally:
        await host.end_aside()


async def _stop(host: LeasedHost, work: asyncio.Future[None]) -> None:
    host.stop()
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, FailureError):
        await shielded(work)


def _step_to_go_back_to(error: FailureError) -> Step | None:
    if error_type_of(error) != CheckpointLostError.__name__:
        return None
    return failure_of(error).step
