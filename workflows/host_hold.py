"""Holding a host for a build: taking a slot, noticing its loss, taking another.

`hold_host` runs on the host for as long as the build does. When its heartbeats stop, the host gets
a grace period (its worker may be restarting) to take the hold up again on its own queue; after
that it is given up and any host may take the build. Which host it is, is what the **latest**
`lease_granted` signal says: after a reset the hold is dispatched anew, to any host, while the
replayed signal still names the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from temporalio import workflow
from temporalio.common import Priority
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    FailureError,
    TimeoutError,
    TimeoutType,
    is_cancelled_exception,
)

from activities.contract.errors import (
    EgressMissingError,
    FirecrackerMissingError,
    HostDrainingError,
    HostRestartingError,
    HostTooSmallError,
    KernelMissingError,
    NoHostError,
    error_type_of,
    failure_of,
)
from activities.contract.inputs import FindHostInput, HoldHostInput
from activities.contract.interface import (
    AskedHostActivities,
    HostActivities,
    HostFindingActivities,
    HostReleaseActivities,
)
from activities.contract.names import (
    SHARED_HOST_TASK_QUEUE,
    WORKFLOW_TASK_QUEUE,
    lease_task_queue,
)
from activities.contract.requests import BuildOptions, TemplateConfig
from activities.contract.results import FoundHost
from activities.contract.scope import HostLease, VmShape
from workflows.calling import call
from workflows.telling import LEAN
from workflows.turn import Turn

# Before it, no layer went up before its template did: a newer host may have told that it could.
LAYERS_AHEAD = "layers-ahead"
# What a host says that cannot run the build; another may.
UNFIT = frozenset(
    error.__name__
    for error in (
        KernelMissingError,
        FirecrackerMissingError,
        HostTooSmallError,
        EgressMissingError,
    )
)
# So often a build asks again, each time after a longer wait, where a host that does not answer
# might be able to run it: ten minutes by the default options. Where one that is drained can: a day.
MOST_REFUSALS = 6
MOST_REFUSALS_WHILE_DRAINED = 75


class HostHold:
    """The hold of one build. `lease` is None while no host has it."""

    def __init__(
        self,
        config: TemplateConfig,
        options: BuildOptions,
        lost: Callable[[str, str], None],
        *,
        preferred_host: str | None,
        warm_host: str | None = None,
        shape: VmShape | None = None,
        weight: float = 1,
        turn: Turn | None = None,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`preferred_host` has what an earlier run of the build left; it is asked first.
        `warm_host` has what builds like it have left; it is asked once, for a free slot. `shape`
        is that of the VM which is to boot; by default as the request alone says. `weight` is the
        tenant's, among those that wait for a host. `turn` is waited for before any host. `refused`
        is told why a host cannot run the build.
        """
        self.lease: HostLease | None = None
        self._turn = turn
        self._config = config
        self._shape = shape or config.shape
        self._options = options
        self._lost = lost
        self._refused = refused
        self._preferred_host = preferred_host
        self._warm_host = None if preferred_host else warm_host
        self._priority = Priority(fairness_key=config.tenant, fairness_weight=weight)
        self._hosts_lost = 0
        self._refusals = 0
        self._refused_by: list[str] = []
        self._releasing = False
        self._task: asyncio.Task[None] | None = None

    def granted(self, lease: HostLease) -> None:
        """Obey the latest signal.

        A host that was upgraded while it held the build goes on with it as it began; one of an
        earlier version, in the place of one whose steps are whole, cannot: that is another lease.
        """
        whole, held = lease.whole_steps and workflow.patched(LEAN), self.lease
        ahead = lease.sends_ahead and workflow.patched(LAYERS_AHEAD)
        if held is not None and (held.host, held.number) == (lease.host, lease.number):
            whole = whole and held.whole_steps
            ahead = held.sends_ahead
        self.lease = lease.model_copy(update={"whole_steps": whole, "sends_ahead": ahead})

    def start(self) -> None:
        """Begin to hold; goes on until `release`."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    def has_failed(self) -> bool:
        """Whether no host can be had any more; `raise_failure` tells why."""
        return self._task is not None and self._task.done()

    async def raise_failure(self) -> None:
        """Raise what ended the holding."""
        if self._task is not None:
            await self._task

    async def release(self) -> None:
        """Give the slot back and wait until the host has let go; then the turn."""
        try:
            await self._let_go()
        finally:
            if self._turn is not None:
                await self._turn.give_back()

    async def _let_go(self) -> None:
        if self._task is None:
            return
        self._releasing = True
        task, self._task = self._task, None
        await self._tell_host()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, FailureError):
            await task

    async def _tell_host(self) -> None:
        """Ask the host to let go: a mere cancellation would wait for its next heartbeat."""
        if self.lease is None:
            return
        with contextlib.suppress(ActivityError):  # a host that is away is cancelled, and swept
            await call(
                HostReleaseActivities.release_host,
                self._config.scope(self.lease),
                queue=self.lease.lease_queue,
                summary=f"release {self.lease.host}",
                options=self._options,
            )

    async def _keep(self) -> None:
        if self._turn is not None:
            await self._turn.take()
        retake_from = self._preferred_host
        while True:
            warm, self._warm_host = self._warm_host, None
            try:
                await self._hold_once(retake_from, warm)
                if self._releasing:
                    return
                reason = "it let go of the build"
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise
                if warm is not None and self.lease is None:  # it does not take it: any host may
                    continue
                if error_type_of(error) == HostDrainingError.__name__:
                    retake_from = None  # it never had the build, so none is lost
                    continue
                if error_type_of(error) in UNFIT:
                    retake_from = await self._fitting_host(error)
                    continue
                if self._may_come_back(error):
                    retake_from = self.lease.host if self.lease else None
                    continue
                reason = _reason(error, retake_from, self._options)
            retake_from = None
            await self._give_up(reason)

    async def _hold_once(self, retake_from: str | None, warm: str | None) -> None:
        options = self._options
        hold = HoldHostInput(
            build_id=self._config.build_id,
            template_id=self._config.template_id,
            retaken_from=retake_from,
            lifetime_seconds=options.heartbeat_timeout_seconds + options.lease_grace_seconds,
            shape=self._shape,
            runs_steps=self._config.runs_steps,
        )
        if warm is not None:
            await call(
                AskedHostActivities.hold_host_if_free,
                hold,
                queue=lease_task_queue(warm),
                summary=f"hold {warm} if it has a free slot",
                options=options,
            )
            return
        await call(
            HostActivities.hold_host,
            hold,
            queue=lease_task_queue(retake_from) if retake_from else SHARED_HOST_TASK_QUEUE,
            summary=f"hold {retake_from} again" if retake_from else "hold a KVM host",
            options=options,
            wait_seconds=options.lease_grace_seconds if retake_from else None,
            priority=self._priority,
        )

    async def _fitting_host(self, refusal: ActivityError) -> str | None:
        """Return a host that can run the build; None when one may have come by now.

        Raises what the host that has refused it said, when no host can.
        """
        self._refusals += 1
        self._refused(failure_of(refusal).message)
        found = await self._find_host()
        most = MOST_REFUSALS_WHILE_DRAINED if found.is_drained else MOST_REFUSALS
        may_come = found.may_come or found.is_drained
        if self._refusals > most or (found.host is None and not may_come):
            raise refusal
        if found.host is not None:
            self._refused_by.append(found.host)
            return found.host
        await workflow.sleep(
            self._refusals * self._options.retry_maximum_seconds,
            summary="until a host comes that can run it",
        )
        return None

    async def _find_host(self) -> FoundHost:
        try:
            return await call(
                HostFindingActivities.find_host,
                FindHostInput(shape=self._shape, refused=tuple(self._refused_by)),
                queue=WORKFLOW_TASK_QUEUE,
                summary="find a host that can run it",
                options=self._options,
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return FoundHost(may_come=True)

    @staticmethod
    def _may_come_back(error: ActivityError) -> bool:
        silent = isinstance(error.cause, TimeoutError) and error.cause.type is TimeoutType.HEARTBEAT
        return silent or error_type_of(error) == HostRestartingError.__name__

    async def _give_up(self, reason: str) -> None:
        host = self.lease.host if self.lease else self._preferred_host or ""
        self.lease = self._preferred_host = None
        self._hosts_lost += 1
        self._lost(host, reason)
        if self._hosts_lost > self._options.max_hosts:
            raise NoHostError(
                f"gave up after {self._hosts_lost} lost hosts; the last: {host or 'none'}: {reason}"
            ).to_application_error()
        await workflow.sleep(self._options.retry_initial_seconds, summary="before the next host")


def _reason(error: ActivityError, retake_from: str | None, options: BuildOptions) -> str:
    """Say why the host is given up. Raises what no other host could do better."""
    cause = error.cause
    if isinstance(cause, TimeoutError) and cause.type is TimeoutType.SCHEDULE_TO_START:
        if retake_from is None:
            raise NoHostError(
                f"no KVM host took the build within {options.lease_wait_seconds:.0f} s"
            ).to_application_error() from error
        return "it did not come back"
    if isinstance(cause, ApplicationError) and cause.non_retryable:
        raise error
    return str(cause) or "its hold failed"
