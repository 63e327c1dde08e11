"""The saga: what must be undone, in reverse order, whatever happens.

An undo is registered before its step runs, because a step that timed out may have left things.
It must not assume that the step ran.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
    """A stack of undos. A failed one is recorded and does not keep the others from running.

    An undo is pushed for the length of a block: `until_done` forgets it when the block succeeds,
    `for_block` runs it then. When the block fails, it stays for `unwind`.
    """

    def __init__(self, record_failure: Callable[[str, BaseException], None]) -> None:
        self._stack: list[Undo] = []
        self._record_failure = record_failure

    @asynccontextmanager
    async def until_done(self, undo: Undo) -> AsyncIterator[None]:
        """Have `undo` registered until the block has succeeded: what it made is then wanted.

        One that has been put beneath is forgotten then, too.
        """
        if undo not in self._stack:
            self._stack.append(undo)
        yield
        self._stack.remove(undo)

    @asynccontextmanager
    async def for_block(self, undo: Undo) -> AsyncIterator[None]:
        """Have `undo` registered for a block, and run when it succeeds, too."""
        self._stack.append(undo)
        yield
        self._stack.remove(undo)
        await self.run(undo)

    def put_beneath(self, undo: Undo) -> None:
        """Register an undo that runs after all others."""
        self._stack.insert(0, undo)

    async def unwind(self) -> None:
        """Run all undos in reverse order, shielded from cancellation."""
        while self._stack:
            await self.run(self._stack.pop())

    def forget_on_host(self) -> list[str]:
        """Drop those undos that a lost host would have to run; say which."""
        lost = [undo.name for undo in self._stack if undo.on_host]
        self._stack = [undo for undo in self._stack if not undo.on_host]
        return lost

    async def run(self, undo: Undo) -> None:
        """Run one undo, shielded from cancellation."""
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
