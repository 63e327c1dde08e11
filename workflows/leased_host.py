"""The host that holds a build: where its steps run, and where they are undone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from temporalio.exceptions import ActivityError, FailureError, is_cancelled_exception

from activities.contract.errors import failure_of
from activities.contract.interface import MicrovmActivities, NetworkActivities
from activities.contract.names import VmPurpose
from activities.contract.requests import BuildOptions
from activities.contract.scope import BuildScope, VmRef
from activities.contract.status import LogEntry
from workflows.calling import call
from workflows.compensations import Compensations, Undo, shielded

S = TypeVar("S")
A = TypeVar("A")
T = TypeVar("T")


class LeasedHost:
    """One lease of one host. After `stop` nothing more is started on it but undos."""

    def __init__(
        self,
        scope: BuildScope,
        options: BuildOptions,
        undos: Compensations,
        is_held: Callable[[], bool],
        hear: Callable[[LogEntry], None],
    ) -> None:
        self.scope = scope
        self.lease = scope.lease
        self._options = options
        self._undos = undos
        self._is_held = is_held
        self._hear = hear if scope.lease.whole_steps else None
        self._stopped = False
        self._aside: asyncio.Future[None] | None = None

    def stop(self) -> None:
        """Start nothing more: a step that ends although it was cancelled has no successor.

        What runs aside is cancelled.
        """
        self._stopped = True
        if self._aside is not None:
            self._aside.cancel()

    async def run(self, method: Callable[[S, A], Awaitable[T]], argument: A, summary: str) -> T:
        """Run a step's activity. Raises ActivityError; CancelledError when it must stop."""
        if self._stopped or not self._is_held():
            raise asyncio.CancelledError
        result = await call(
            method,
            argument,
            queue=self.lease.step_queue,
            summary=summary,
            options=self._options,
            hear=self._hear,
        )
        if self._stopped:
            raise asyncio.CancelledError
        return result

    # ---- Beside the steps

    @property
    def has_run_aside(self) -> bool:
        """Whether anything has been begun beside the steps."""
        return self._aside is not None

    def run_aside(
        self,
        method: Callable[[S, A], Awaitable[object]],
        argument: A,
        summary: str,
        failed: Callable[[str], None],
    ) -> None:
        """Begin an activity that runs beside the steps. What it fails with is told, no more."""

        async def run() -> None:
            try:
                await self.run(method, argument, summary)
            except ActivityError as error:
                if not self._stopped and not is_cancelled_exception(error):
                    failed(failure_of(error).message)

        self._aside = asyncio.ensure_future(run())

    async def wait_for_aside(self) -> None:
        """Wait until what runs beside the steps has ended by itself."""
        if self._aside is not None:
            await self._aside

    async def end_aside(self) -> None:
        """Cancel what runs beside the steps, and wait for its end."""
        if self._aside is not None:
            self._aside.cancel()
            with contextlib.suppress(asyncio.CancelledError, FailureError):
                await shielded(self._aside)

    # ---- Undos

    def undo(self, name: str, method: Callable[[S, A], Awaitable[object]], argument: A) -> Undo:
        """Return a compensation that runs on this host."""
        return Undo(
            name,
            lambda: call(
                method,
                argument,
                queue=self.lease.step_queue,
                summary=f"undo: {name}",
                options=self._options,
                hear=self._hear,
            ),
            on_host=True,
        )

    @asynccontextmanager
    async def network_for(self, purpose: VmPurpose) -> AsyncIterator[VmRef]:
        """Have a VM's network for a block, and a kill registered for the VM that it starts.

        Whole steps make and remove both themselves: they are undone only if the block fails.
        """
        vm = VmRef(scope=self.scope, purpose=purpose)
        tear_down = self.undo("tear network down", NetworkActivities.tear_down_network, vm)
        kill = self.undo("kill VM", MicrovmActivities.kill_vm, vm)
        if self.lease.whole_steps:
            async with self._undos.until_done(tear_down), self._undos.until_done(kill):
                yield vm
            return
        async with self._undos.for_block(tear_down):
            await self.run(NetworkActivities.set_up_network, vm, f"netns {vm.name}")
            async with self._undos.for_block(kill):
                yield vm
