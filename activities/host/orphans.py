"""Telling what no live build owns from what one does, and removing it.

A thing is owned when its build's workflow is open and the lease number in its name or label is the
generation of the build's lease object, whoever holds it. Things are listed first and their owners
asked for afterwards, so that what a build makes meanwhile is never taken for an orphan. When
Temporal or the bucket cannot be asked, nothing is removed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from activities.contract.errors import TemplateManagerError, TemporalUnavailableError
from activities.contract.names import build_workflow_id
from activities.contract.results import SweepReport, SweptItem
from activities.disk.leftovers import Leftover
from activities.store.lease_numbers import LeaseObjects

Describe = Callable[[str], Awaitable[WorkflowExecutionStatus | None]]


def describe_with(client: Client) -> Describe:
    """Return a function that tells the state of a build's workflow; None when it is unknown.

    It raises TemporalUnavailableError when Temporal does not tell.
    """

    async def describe(build_id: str) -> WorkflowExecutionStatus | None:
        handle = client.get_workflow_handle(build_workflow_id(build_id))
        try:
            return (await handle.describe()).status
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise TemporalUnavailableError(
                f"Temporal does not tell of build {build_id}: {error.message}"
            ) from error

    return describe


class Owners:
    """Answers, asking once per build, whether something is a live build's."""

    def __init__(self, describe: Describe, leases: LeaseObjects) -> None:
        self._describe = describe
        self._leases = leases
        self._states: dict[str, WorkflowExecutionStatus | None] = {}
        self._numbers: dict[str, int | None] = {}

    async def orphans(self, found: Iterable[Leftover], young_seconds: float) -> list[Leftover]:
        """Return what nobody owns of what was found; what is younger than that is left alone.

        Raises StorageUnavailableError and TemporalUnavailableError.
        """
        return [thing for thing in found if await self._is_orphan(thing, young_seconds)]

    async def running(self, build_ids: Iterable[str]) -> set[str]:
        """Return those builds whose workflows are open."""
        return {build_id for build_id in build_ids if await self._is_open(build_id)}

    async def _is_orphan(self, thing: Leftover, young_seconds: float) -> bool:
        if time.time() - thing.made_at < young_seconds:
            return False
        if not thing.build_id:
            return True
        if thing.number is None:
            return not await self._can_be_retried(thing.build_id)
        return not await self._owns(thing.build_id, thing.number)

    async def _owns(self, build_id: str, number: int) -> bool:
        """Whether a live build owns what was made under that lease number."""
        if not await self._is_open(build_id):
            return False
        if build_id not in self._numbers:
            self._numbers[build_id] = await asyncio.to_thread(self._leases.current, build_id)
        return self._numbers[build_id] == number

    async def _can_be_retried(self, build_id: str) -> bool:
        """Whether the build is open, or has failed and Temporal still knows it."""
        state = await self._state(build_id)
        return state is not None and state not in (
            WorkflowExecutionStatus.COMPLETED,
            WorkflowExecutionStatus.CANCELED,
        )

    async def _is_open(self, build_id: str) -> bool:
        return await self._state(build_id) is WorkflowExecutionStatus.RUNNING

    async def _state(self, build_id: str) -> WorkflowExecutionStatus | None:
        """Return the state of the build's workflow; None when Temporal does not know it."""
        if build_id not in self._states:
            self._states[build_id] = await self._describe(build_id)
        return self._states[build_id]


def remove_all(orphans: Sequence[Leftover], *, dry_run: bool) -> SweepReport:
    """Remove orphans in their order, unless it is a dry run. Blocking.

    One that does not go does not keep the next from going: the report says why it stayed.
    """
    items = tuple(thing.item() if dry_run else _remove(thing) for thing in orphans)
    return SweepReport(items=items, dry_run=dry_run)


def _remove(thing: Leftover) -> SweptItem:
    try:
        thing.remove()
    except (OSError, TemplateManagerError) as error:
        return thing.item(str(error))
    return thing.item()
