"""Holding a build on this host: a slot, a ledger entry, and a lease number from the bucket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from temporalio import activity

from activities.contract.errors import HostRestartingError, LeaseLostError
from activities.contract.inputs import HoldHostInput
from activities.contract.interface import (
    AskedHostActivities,
    HostActivities,
    HostReleaseActivities,
)
from activities.contract.names import HostName
from activities.contract.scope import BuildScope, HostLease, VmShape
from activities.host.admission import Admission
from activities.step.ledger import LeaseLedger, LedgerEntry, boottime
from activities.step.running_step import MAX_BEAT_SECONDS, MIN_BEAT_SECONDS
from activities.store.lease_numbers import LeaseObjects

LET_GO_SECONDS = 2.0
"""So long a release waits until the hold has let go."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Held:
    """A hold that runs."""

    released: asyncio.Event = field(default_factory=asyncio.Event)
    """It is to end."""
    has_let_go: asyncio.Event = field(default_factory=asyncio.Event)


class KvmHostActivities(HostActivities, AskedHostActivities, HostReleaseActivities):
    """Implements `hold_host`. See `interface` for the contract."""

    def __init__(
        self,
        host: HostName,
        ledger: LeaseLedger,
        lease_objects: LeaseObjects,
        admission: Admission,
        require_fit: Callable[[VmShape], object] = lambda _: None,
    ) -> None:
        """`require_fit` raises when this host cannot run such a VM."""
        self._host = host
        self._ledger = ledger
        self._objects = lease_objects
        self._admission = admission
        self._require_fit = require_fit
        self._held: dict[int, _Held] = {}

    @activity.defn(name="hold_host")
    async def hold_host(self, hold: HoldHostInput, /) -> None:
        """Take a slot, signal `lease_granted`, and heartbeat until cancelled."""
        await self._hold_build(hold)

    @activity.defn(name="hold_host_if_free")
    async def hold_host_if_free(self, hold: HoldHostInput, /) -> None:
        """Do so unless there is no free slot now. Raises HostDrainingError then."""
        await self._hold_build(hold, if_free=True)

    async def _hold_build(self, hold: HoldHostInput, *, if_free: bool = False) -> None:
        if hold.shape is not None:
            self._require_fit(hold.shape)
        memory_mb = self._admission.memory.of_build(hold)
        is_new = hold.retaken_from is None
        admitted = is_new and not if_free  # it came by the shared queue, with a permit
        async with self._admission.room_for(
            hold.build_id, is_new=is_new, memory_mb=memory_mb, if_free=if_free
        ):
            started = boottime()
            entry = await self._take(hold, memory_mb)
        if admitted:
            self._admission.entered_ledger()
        held = self._held[entry.number] = _Held()
        try:
            self._require_prompt(started)
            await self._signal(entry)
            await self._hold(entry, held.released)
            await self._let_go(entry)
        except asyncio.CancelledError:
            if activity.cancellation_details() is None or self._is_shutdown():
                raise HostRestartingError(f"host {self._host} is restarting") from None
            await self._let_go(entry)
            raise
        except LeaseLostError:  # somebody else has it: the object is theirs
            self._ledger.remove(entry.build_id, entry.number)
            raise
        finally:
            held.has_let_go.set()
            if self._held.get(entry.number) is held:  # not one that took it up again meanwhile
                del self._held[entry.number]
            if admitted:
                self._admission.left_ledger()

    @activity.defn(name="release_host")
    async def release_host(self, scope: BuildScope, /) -> None:
        """End the hold of this lease. Where none runs, the slot is given back all the same."""
        held = self._held.get(scope.lease.number)
        if held is not None:
            held.released.set()
            # The build hears of both ends at once: else it would ask for the other one's.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LET_GO_SECONDS):
                    await held.has_let_go.wait()
            return
        entry = self._ledger.get(scope.build_id)
        if entry is not None and entry.number == scope.lease.number:
            await self._let_go(entry)

    async def _take(self, hold: HoldHostInput, memory_mb: int) -> LedgerEntry:
        held = self._ledger.get(hold.build_id)
        info = activity.info()
        workflow_id = info.workflow_id or ""
        # Before the number: a crash in between leaves an entry for the sweep, not a lost slot.
        number = await asyncio.to_thread(
            self._objects.take,
            hold.build_id,
            self._host,
            workflow_id,
            held.number if held else None,
        )
        return self._ledger.put(
            build_id=hold.build_id,
            template_id=hold.template_id,
            workflow_id=workflow_id,
            number=number,
            lifetime_seconds=hold.lifetime_seconds,
            memory_mb=memory_mb,
        )

    @staticmethod
    def _require_prompt(started: float) -> None:
        """A hold that was frozen before it could signal must not claim the build any more."""
        timeout = activity.info().heartbeat_timeout
        if timeout and boottime() - started > timeout.total_seconds() / 2:
            raise LeaseLostError("taking the lease took too long: the build may be elsewhere")

    async def _signal(self, entry: LedgerEntry) -> None:
        info = activity.info()
        workflow = activity.client().get_workflow_handle(
            entry.workflow_id, run_id=info.workflow_run_id
        )
        lease = HostLease(host=self._host, number=entry.number, whole_steps=True, sends_ahead=True)
        await workflow.signal("lease_granted", lease)

    async def _hold(self, entry: LedgerEntry, released: asyncio.Event) -> None:
        timeout = activity.info().heartbeat_timeout
        beat = timeout.total_seconds() / 3 if timeout else MAX_BEAT_SECONDS
        pause = min(max(beat, MIN_BEAT_SECONDS), MAX_BEAT_SECONDS)
        while not released.is_set():
            if self._is_shutdown():
                raise HostRestartingError(f"host {self._host} is restarting")
            activity.heartbeat()
            await self._renew(entry)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(released.wait(), pause)

    async def _renew(self, entry: LedgerEntry) -> None:
        """Extend the deadline; after a freeze, ask the bucket first whether it is still ours."""
        current = self._ledger.get(entry.build_id)
        if current is None or current.number != entry.number:
            raise LeaseLostError(f"build {entry.build_id} has another lease on this host")
        if current.expired:
            await self._require_current(entry)
        self._ledger.renew(entry)

    async def _require_current(self, entry: LedgerEntry) -> None:
        await asyncio.to_thread(self._objects.require_current, entry.build_id, entry.number)
        _log.warning("lease renewed after a pause", build_id=entry.build_id)

    async def _let_go(self, entry: LedgerEntry) -> None:
        # Whatever happens to the object, the slot is free: a later lease outdates the number.
        self._ledger.remove(entry.build_id, entry.number)
        self._admission.look_again()
        with contextlib.suppress(Exception):
            await asyncio.to_thread(self._objects.release, entry.build_id, entry.number)

    @staticmethod
    def _is_shutdown() -> bool:
        details = activity.cancellation_details()
        return activity.is_worker_shutdown() or bool(details and details.worker_shutdown)
