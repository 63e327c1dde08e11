"""How many builds a host takes: its slots, minus the builds that its ledger says it holds, and as
many as there is memory for.

None while a disk of it is nearly full.

The worker on `kvm-hosts` polls only while there is a free slot, so Temporal is the waiting line.
A build that this host takes up again after a restart comes by another queue; it is in the ledger
already and so keeps its slot.
"""

from __future__ import annotations

import asyncio
import contextlib
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

from activities.contract.errors import HostDrainingError
from activities.disk.room import Room
from activities.host.memory import UNCOUNTED, HostMemory
from activities.step.ledger import LeaseLedger

POLL_SECONDS = 0.2
CLOSE_SECONDS = 3.0
"""So long a build that is being entered in the ledger is waited for; its host is frozen else."""


class Admission(CustomSlotSupplier):
    """Hands out slots for new builds. Used by one worker, on one event loop."""

    def __init__(
        self, ledger: LeaseLedger, slots: int, room: Room, memory: HostMemory = UNCOUNTED
    ) -> None:
        self._ledger = ledger
        self._slots = slots
        self._room = room
        self.memory = memory
        self._permits = 0
        self._in_ledger = 0
        self._entering = asyncio.Lock()
        self._changed = asyncio.Event()
        self._lock = threading.Lock()  # Temporal's core releases permits from threads of its own
        self.open = False
        """False until the restart grace has passed, and while the host is draining."""

    @property
    def free(self) -> int:
        """How many more builds this host would take now."""
        not_yet_in_ledger = self._permits - self._in_ledger
        return self._slots - self._ledger.count() - not_yet_in_ledger

    @property
    def lacking(self) -> str:
        """Which disk is too full for a new build; '' if none is."""
        return self._room.lacking()

    @asynccontextmanager
    async def room_for(
        self, build_id: str, *, is_new: bool, memory_mb: int = 0, if_free: bool = False
    ) -> AsyncIterator[None]:
        """Wait, heartbeating, until one more build fits; enter it in the ledger in the body.

        One that wants more memory than there is at all is taken when it is alone.

        A permit is not enough: a retried build comes back to this host without one. Nor is it for a
        new build: Temporal may answer a poll that began before the host was closed, or its disk was
        full, or builds that came without a permit had its slots. Raises HostDrainingError then, and
        with `if_free` instead of waiting.
        """
        if if_free and self._entering.locked():  # by one that waits for memory, perhaps
            raise HostDrainingError("the host is taking another build")
        async with self._entering:
            while self._ledger.get(build_id) is None and not self._fits(memory_mb):
                self._require_open(is_new)
                self._require_slot(is_new, if_free)
                activity.heartbeat()
                await asyncio.sleep(POLL_SECONDS)
            self._require_open(is_new)
            yield

    def _fits(self, memory_mb: int) -> bool:
        held = self._ledger.count()
        if held == 0 or held >= self._slots:
            return held < self._slots
        taken_mb = sum(entry.memory_mb for entry in self._ledger.entries())
        return taken_mb + memory_mb <= self.memory.total_mb

    async def close(self) -> None:
        """Take no new build from now on. Every one that was taken before is in the ledger then."""
        self.open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS), self._entering:
                pass

    def _require_open(self, is_new: bool) -> None:
        if is_new and not self.open:
            raise HostDrainingError("the host takes no new builds")
        if is_new and (lacking := self.lacking):
            raise HostDrainingError(f"the host takes no new builds: {lacking}")

    def _require_slot(self, is_new: bool, if_free: bool) -> None:
        """A new build need not wait here: another host may have a slot for it."""
        if if_free or (is_new and self._ledger.count() >= self._slots):
            raise HostDrainingError("the host has no free slot")

    def entered_ledger(self) -> None:
        """A build that came with a permit now has its ledger entry, which counts instead."""
        with self._lock:
            self._in_ledger += 1

    def left_ledger(self) -> None:
        """The hold that came with a permit has ended."""
        with self._lock:
            self._in_ledger -= 1

    def look_again(self) -> None:
        """A slot may have become free: what waits for one need not wait for its next look."""
        self._changed.set()

    async def reserve_slot(self, ctx: SlotReserveContext) -> SlotPermit:
        """Wait for a free slot. The ledger is on disk, where others change it too."""
        while not self._take_permit():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
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
            if not self.open or self.free <= 0 or self.lacking:
                return False
            self._permits += 1
            return True
