"""Why a build waits for a host: its place in the line, the hosts and their slots.

Temporal is the waiting line, so it is asked for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

import structlog
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from temporalio.service import RPCError

from activities.contract.names import (
    SHARED_HOST_TASK_QUEUE,
    WORKFLOW_TASK_QUEUE,
    Step,
)
from activities.contract.results import HostFacts
from activities.contract.search_attributes import RUNNING_BUILDS
from api.server.known_hosts import KnownHosts
from api.server.tenancy import visible_condition

RPC_LIMIT = timedelta(seconds=5)
# A build that no worker has begun yet has no step.
WAITING_BUILDS = f"{RUNNING_BUILDS} AND (BuildStep='{Step.LEASE}' OR BuildStep IS NULL)"
MAX_PLACES = 1_000

_log = structlog.get_logger(__name__)


class Why(Enum):
    """Why no host takes a build."""

    NOT_KNOWN = auto()
    NO_WORKER = auto()
    NO_HOSTS = auto()
    ALL_DRAINING = auto()
    NO_ROOM = auto()
    ALL_BUSY = auto()
    SLOT_IS_FREE = auto()
    TENANT_LIMIT = auto()


@dataclass(frozen=True)
class HostSlots:
    """The hosts that answer and their slots; `away` are those that are known and do not."""

    hosts: int = 0
    slots: int = 0
    free_slots: int = 0
    """Of the hosts that are not draining, and have room."""
    draining: int = 0
    full: int = 0
    """Hosts whose disks are, of those that are not draining."""
    away: int = 0


@dataclass(frozen=True)
class Waiting:
    """What a build waits for."""

    why: Why
    builds_before: int
    hosts: HostSlots | None
    """None while it is not known."""

    @property
    def message(self) -> str:
        """The reason in words, with what to do about it."""
        return _message(self.why, self.hosts or HostSlots())


def slots_of(facts: Mapping[str, HostFacts | None]) -> HostSlots:
    """Add up what hosts tell; None is one that does not answer."""
    answering = [told for told in facts.values() if told is not None]
    staying = [told for told in answering if not told.draining]
    taking = [told for told in staying if not told.lacks]
    return HostSlots(
        hosts=len(answering),
        slots=sum(told.slots for told in answering),
        free_slots=sum(max(told.slots - len(told.builds), 0) for told in taking),
        draining=len(answering) - len(staying),
        full=len(staying) - len(taking),
        away=len(facts) - len(answering),
    )


def why_none_takes_it(hosts: HostSlots | None, *, works: bool, polled: bool) -> Why:
    """Return why none of these hosts takes a build.

    `works` is whether a process runs workflows, `polled` whether any host asks for a build.
    """
    if not works:
        return Why.NO_WORKER
    if hosts is None:
        return Why.NOT_KNOWN
    if hosts.hosts == 0:
        return Why.SLOT_IS_FREE if polled else Why.NO_HOSTS
    if hosts.draining == hosts.hosts:
        return Why.ALL_DRAINING
    if hosts.draining + hosts.full == hosts.hosts:
        return Why.NO_ROOM
    return Why.SLOT_IS_FREE if hosts.free_slots else Why.ALL_BUSY


class WaitingLine:
    """The builds that wait for a host, and what they wait for."""

    def __init__(self, client: Client, hosts: KnownHosts) -> None:
        self._client = client
        self._hosts = hosts

    async def look(self, started: datetime, *, for_turn: bool = False) -> Waiting:
        """Tell of a build that was started then. What cannot be found out in time is left out.

        `for_turn` is whether it waits in its tenant's own line.
        """
        if for_turn:
            return Waiting(Why.TENANT_LIMIT, await self.builds_before(started), None)
        builds_before, works, polled = await asyncio.gather(
            self.builds_before(started),
            self._hosts.is_polled(WORKFLOW_TASK_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
            self._hosts.is_polled(SHARED_HOST_TASK_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
        )
        facts = await self._hosts.facts() if works else None
        hosts = slots_of(facts) if facts is not None else None
        return Waiting(why_none_takes_it(hosts, works=works, polled=polled), builds_before, hosts)

    async def builds_before(self, started: datetime) -> int:
        """Return how many of the caller's builds wait since before then. It lags a little."""
        query = f"{_waiting_builds()} AND StartTime < '{started.isoformat()}'"
        try:
            return (await self._client.count_workflows(query, rpc_timeout=RPC_LIMIT)).count
        except RPCError as error:
            _log.warning("waiting builds cannot be counted", error=str(error))
            return 0

    async def places(self) -> dict[str, int]:
        """Return for each of the caller's latest waiting builds, by workflow id, how many of them
        are before it."""
        query = _waiting_builds()
        waiting = self._client.list_workflows(query, page_size=MAX_PLACES, rpc_timeout=RPC_LIMIT)
        counted, _ = await asyncio.gather(
            self._client.count_workflows(query, rpc_timeout=RPC_LIMIT),
            waiting.fetch_next_page(),
        )
        latest = [build.id for build in waiting.current_page or ()]
        total = max(counted.count, len(latest))
        return {name: total - 1 - number for number, name in enumerate(latest)}


def _waiting_builds() -> str:
    return " AND ".join(filter(None, [WAITING_BUILDS, visible_condition()]))


_MESSAGES = {
    Why.NO_WORKER: "no process runs the workflows: start one (template-manager worker)",
    Why.ALL_DRAINING: "all hosts are draining: let one take builds (template-manager hosts resume)",
    Why.NO_ROOM: "the disks of all hosts are nearly full: free some (template-manager sweep)",
    Why.ALL_BUSY: "all slots are taken: it goes on when a build ends",
    Why.SLOT_IS_FREE: "a slot is free: a host is about to take a build",
    Why.TENANT_LIMIT: "its tenant runs as many builds as it may: it goes on when one of them ends",
    Why.NOT_KNOWN: "the hosts are being asked",
}


def _message(why: Why, hosts: HostSlots) -> str:
    if why is not Why.NO_HOSTS:
        return _MESSAGES[why]
    away = f"none of {hosts.away} known hosts answers" if hosts.away else "no host runs"
    return f"{away}: start one (template-manager host)"
