"""How many builds a host takes: its slots, minus the builds that its ledger says it holds.

The worker on `kvm-hosts` polls only while there is a free slot, so Temporal is the waiting line.
A build that this host takes up again after a restart comes by another queue; it is in the ledger
already and so keeps its slot.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from temporalio import activity
from temporalio.worker import (
    CustomSlotSupplier,
    SlotMarkUsedContext,
    SlotPermit,
    SlotReleaseContext,
    SlotReserveContext,
)

from activities.step.ledger import LeaseLedger

POLL_SECONDS = 0.2


class Admission(CustomSlotSupplier):
    """Hands out slots for new builds. Used by one worker, on one event loop."""

    def __init__(self, ledger: LeaseLedger, slots: int) -> None:
        self._ledger = ledger
        self._slots = slots
        self._permits = 0
        self._in_ledger = 0
        self._entering = asyncio.Lock()
        self._lock = threading.Lock()  # Temporal's core releases permits from threads of its own
        self.open = False
        """False until the restart grace has passed, and while the host is draining."""

    @property
    def free(self) -> int:
        """How many more builds this host would take now."""
        not_yet_in_ledger = self._permits - self._in_ledger
        return self._slots - self._ledger.count() - not_yet_in_ledger

    @asynccontextmanager
    async def room_for(self, build_id: str) -> AsyncIterator[None]:
        """Wait, heartbeating, until one more build fits; enter it in the ledger in the body.

        A permit is not enough: a retried build comes back to this host without one.
        """
        async with self._entering:
            while self._ledger.get(build_id) is None and self._ledger.count() >= self._slots:
                activity.heartbeat()
                await asyncio.sleep(POLL_SECONDS)
            yield

    def entered_ledger(self) -> None:
        """A build that came with a permit now has its ledger entry, which counts instead."""
        with self._lock:
            self._in_ledger += 1

    def left_ledger(self) -> None:
        """The hold that came with a permit has ended."""
        with self._lock:
            self._in_ledger -= 1

    async def reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit:
        """Wait for a free slot."""
        while not self._take_permit():  # noqa: ASYNC110 # the ledger changes on disk
            await asyncio.sleep(POLL_SECONDS)
        return SlotPermit()

    def try_reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit | None:
        """Refuse eager tasks: a build must go where it waits in line."""
        return None

    def mark_slot_used(self, ctx: SlotMarkUsedContext) -> None:
        """Nothing to do: a reserved permit already counts."""

    def release_slot(self, ctx: SlotReleaseContext) -> None:
        """Take a permit back."""
        with self._lock:
            self._permits -= 1

    def _take_permit(self) -> bool:
        with self._lock:
            if not self.open or self.free <= 0:
                return False
            self._permits += 1
            return True
