"""The saga: what must be undone, in reverse order, whatever happens.

An undo is registered before its step runs, because a step that timed out may have left things.
It must not assume that the step ran.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from temporalio import workflow
from temporalio.exceptions import FailureError

T = TypeVar("T")


@dataclass(frozen=True)
class Undo:
    """One compensation."""

    name: str
    run: Callable[[], Awaitable[object]]
    on_host: bool = False
    """Whether it runs on the host that held the build, and so cannot run when that is gone."""


class Compensations:
    """A stack of undos. A failed one is recorded and does not keep the others from running."""

    def __init__(self, record_failure: Callable[[str, BaseException], None]) -> None:
        self._stack: list[Undo] = []
        self._record_failure = record_failure

    def __len__(self) -> int:
        return len(self._stack)

    def add(
        self, name: str, run: Callable[[], Awaitable[object]], *, on_host: bool = False
    ) -> None:
        """Register an undo, before its step runs."""
        self._stack.append(Undo(name, run, on_host))

    async def unwind(self, down_to: int = 0) -> None:
        """Run the undos above `down_to` in reverse order, shielded from cancellation."""
        while len(self._stack) > down_to:
            await self._run(self._stack.pop())

    def forget(self, down_to: int) -> None:
        """Drop the undos above `down_to`: their step has succeeded."""
        del self._stack[down_to:]

    def forget_on_host(self, down_to: int) -> list[str]:
        """Drop those undos above `down_to` that a lost host would have to run; say which."""
        above = self._stack[down_to:]
        self._stack[down_to:] = [undo for undo in above if not undo.on_host]
        return [undo.name for undo in above if undo.on_host]

    def take(self, down_to: int) -> list[Undo]:
        """Take the undos above `down_to` off the stack, to be put back on top of others."""
        taken = self._stack[down_to:]
        del self._stack[down_to:]
        return taken

    def put_back(self, undos: list[Undo]) -> None:
        """Put back what `take` took."""
        self._stack.extend(undos)

    async def _run(self, undo: Undo) -> None:
        try:
            await shielded(asyncio.ensure_future(undo.run()))
        except (FailureError, asyncio.CancelledError) as error:
            workflow.logger.warning("compensation failed", extra={"compensation": undo.name})
            self._record_failure(undo.name, error)


async def shielded(work: asyncio.Future[T]) -> T:
    """Wait for `work` to its end, although we are cancelled meanwhile."""
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            continue  # ours, or the work's own: then it is done
        except FailureError:
            break
    return work.result()
