"""What every long activity on a host needs: its fence, its log, its heartbeat, its stop sign."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, ParamSpec, TypeVar

from temporalio import activity

from activities.contract.errors import HostDiskFullError, TemplateManagerError
from activities.contract.names import Step
from activities.contract.scope import BuildScope
from activities.contract.status import Progress
from activities.disk.data_dir import DataDir
from activities.disk.room import NO_ROOM
from activities.process.settings import Settings
from activities.step.build_log import BuildLog, LogLimits, open_build_log
from activities.step.ledger import LeaseLedger

P = ParamSpec("P")
T = TypeVar("T")

MAX_BEAT_SECONDS = 5.0
MIN_BEAT_SECONDS = 0.2


class StepStopped(Exception):
    """Raised in blocking code when its step has been cancelled."""


class RunningStep:
    """A step at work. Blocking code calls `check()` often: it raises when it must stop."""

    def __init__(self, ledger: LeaseLedger, scope: BuildScope, log: BuildLog, step: Step) -> None:
        self.scope = scope
        self.step = step
        self.log = log
        self.stop = threading.Event()
        self.latest: Progress | None = None
        self._ledger = ledger
        self._began = (time.monotonic(), 0)

    def progress(
        self,
        what: str,
        done: int = 0,
        total: int = 0,
        unit: Literal["bytes", "files", "layers", "attempts", ""] = "",
    ) -> None:
        """Tell how far the step is; goes out with the next heartbeat. Thread-safe.

        Speed is measured from the first time that the same `what` is told.
        """
        now, before = time.monotonic(), self.latest
        if before is None or before.what != what or done < before.done:
            self._began = (now, done)
        since, done_then = self._began
        speed = (done - done_then) / (now - since) if now > since else 0.0
        self.latest = Progress(what=what, done=done, total=total, unit=unit, per_second=speed)

    @contextmanager
    def step_of_request(self, number: int | None) -> Iterator[None]:
        """What is logged and raised in the body is of that step of the request, from 1 on."""
        self.log.step_number = number
        try:
            yield
        except TemplateManagerError as error:
            error.step_number = number
            raise  # what is still logged is about that step, too
        self.log.step_number = None

    def check(self) -> None:
        """Go on or not. Raises StepStopped (cancelled) or LeaseLostError (no longer ours)."""
        if self.stop.is_set():
            raise StepStopped
        self._ledger.require(self.scope)

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking code off the event loop; on cancellation stop it and wait for its end."""
        work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.stop.set()
            with contextlib.suppress(StepStopped, TemplateManagerError):
                await work
            raise


@asynccontextmanager
async def running_step(
    settings: Settings, ledger: LeaseLedger, scope: BuildScope, step: Step
) -> AsyncIterator[RunningStep]:
    """Check the lease, open the build log and heartbeat while the body runs.

    Raises LeaseLostError before anything is done when the host no longer holds the build. An
    error of ours that passes through gets the step's name; a disk without room is HostDiskFullError
    wherever it is met.
    """
    ledger.require(scope)
    whole, limits = scope.lease.whole_steps, LogLimits.of(settings)
    logging = open_build_log(
        DataDir(settings.data_dir), scope.build_id, step, limits, last_with_result=whole
    )
    async with logging as log:
        running = RunningStep(ledger, scope, log, step)
        beat = asyncio.create_task(_heartbeat(running))
        try:
            yield running
        except TemplateManagerError as error:
            _tell(error, step, log)
            raise
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            full = HostDiskFullError(f"the host's disk is full: {error}")
            _tell(full, step, log)
            raise full from error
        finally:
            running.stop.set()
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat


def _tell(error: TemplateManagerError, step: Step, log: BuildLog) -> None:
    error.step = error.step or step
    with contextlib.suppress(OSError):  # there may be no room for it
        log.error(error.message, error_type=type(error).__name__)


async def _heartbeat(running: RunningStep) -> None:
    timeout = activity.info().heartbeat_timeout
    beat = timeout.total_seconds() / 3 if timeout else MAX_BEAT_SECONDS
    while True:
        # First: Temporal counts from the step's start, and a short one need not beat at all.
        await asyncio.sleep(min(max(beat, MIN_BEAT_SECONDS), MAX_BEAT_SECONDS))
        if running.latest is None:
            activity.heartbeat()
        else:
            activity.heartbeat(running.latest.model_dump(mode="json"))
