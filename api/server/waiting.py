"""Why a build waits for a host: its place in the line, the hosts and their slots.

Temporal is the waiting line, so it is asked for it; what a host has is asked of the host, once in a
while for all who wait, and only while somebody looks at a build that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

import structlog
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError

from activities.contract.names import (
    SHARED_HOST_TASK_QUEUE,
    WORKFLOW_TASK_QUEUE,
    Step,
    step_task_queue,
)
from activities.contract.results import HostFacts
from activities.process.sweep_schedule import swept_hosts
from api.server.hosts import ask_host

RPC_LIMIT = timedelta(seconds=5)
# A worker's poll lasts up to a minute: one that has not polled for longer has ended.
POLL_SECONDS = 75.0
POLLED_SECONDS = 3.0
FRESH_SECONDS = 20.0
# What was known so long ago is better than nothing while the hosts are being asked again.
STALE_SECONDS = 300.0
ANSWER_SECONDS = 2.0
# A build that no worker has begun yet has no step.
WAITING_BUILDS = (
    "WorkflowType='BuildTemplate' AND ExecutionStatus='Running' "
    f"AND (BuildStep='{Step.LEASE}' OR BuildStep IS NULL)"
)
MAX_PLACES = 1_000

_log = structlog.get_logger(__name__)


class Why(Enum):
    """Why no host takes a build."""

    NOT_KNOWN = auto()
    NO_WORKER = auto()
    NO_HOSTS = auto()
    ALL_DRAINING = auto()
    ALL_BUSY = auto()
    SLOT_IS_FREE = auto()


@dataclass(frozen=True)
class HostSlots:
    """The hosts that answer and their slots; `away` are those that are known and do not."""

    hosts: int = 0
    slots: int = 0
    free_slots: int = 0
    """Of the hosts that are not draining."""
    draining: int = 0
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
    taking = [told for told in answering if not told.draining]
    return HostSlots(
        hosts=len(answering),
        slots=sum(told.slots for told in answering),
        free_slots=sum(max(told.slots - len(told.builds), 0) for told in taking),
        draining=len(answering) - len(taking),
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
    return Why.SLOT_IS_FREE if hosts.free_slots else Why.ALL_BUSY


class WaitingLine:
    """The builds that wait for a host, and what they wait for."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: tuple[float, HostSlots] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._polled: dict[str, tuple[float, bool]] = {}

    async def look(self, started: datetime) -> Waiting:
        """Tell of a build that was started then. What cannot be found out in time is left out."""
        builds_before, works, polled = await asyncio.gather(
            self.builds_before(started),
            self._is_polled(WORKFLOW_TASK_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW),
            self._is_polled(SHARED_HOST_TASK_QUEUE, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY),
        )
        hosts = await self._hosts() if works else None
        return Waiting(why_none_takes_it(hosts, works=works, polled=polled), builds_before, hosts)

    async def builds_before(self, started: datetime) -> int:
        """Return how many builds wait since before then. Temporal's count lags a little."""
        query = f"{WAITING_BUILDS} AND StartTime < '{started.isoformat()}'"
        try:
            return (await self._client.count_workflows(query, rpc_timeout=RPC_LIMIT)).count
        except RPCError as error:
            _log.warning("waiting builds cannot be counted", error=str(error))
            return 0

    async def places(self) -> dict[str, int]:
        """Return for each of the latest waiting builds, by workflow id, how many are before it."""
        waiting = self._client.list_workflows(
            WAITING_BUILDS, page_size=MAX_PLACES, rpc_timeout=RPC_LIMIT
        )
        counted, _ = await asyncio.gather(
            self._client.count_workflows(WAITING_BUILDS, rpc_timeout=RPC_LIMIT),
            waiting.fetch_next_page(),
        )
        latest = [build.id for build in waiting.current_page or ()]
        total = max(counted.count, len(latest))
        return {name: total - 1 - number for number, name in enumerate(latest)}

    async def _is_polled(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        """Whether a worker asked for work there some seconds ago."""
        asked, polled = self._polled.get(queue, (float("-inf"), False))
        if time.monotonic() - asked > POLLED_SECONDS:
            polled = await self._has_pollers(queue, kind)
            self._polled[queue] = (time.monotonic(), polled)
        return polled

    async def _has_pollers(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        """Ask Temporal for a queue's workers; True when it does not say."""
        request = DescribeTaskQueueRequest(
            namespace=self._client.namespace,
            task_queue=TaskQueue(name=queue),
            task_queue_type=kind,
        )
        try:
            told = await self._client.workflow_service.describe_task_queue(
                request, timeout=RPC_LIMIT
            )
        except RPCError as error:
            _log.warning("a task queue cannot be described", queue=queue, error=str(error))
            return True
        since = time.time() - POLL_SECONDS
        return any(poller.last_access_time.ToSeconds() >= since for poller in told.pollers)

    async def _hosts(self) -> HostSlots | None:
        """Return what is known of the hosts, and ask them again when that has become old."""
        if self._age() > FRESH_SECONDS and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and self._age() > FRESH_SECONDS:
            await asyncio.wait([self._asking], timeout=ANSWER_SECONDS)
        return self._known[1] if self._known and self._age() <= STALE_SECONDS else None

    def _age(self) -> float:
        return time.monotonic() - self._known[0] if self._known else float("inf")

    async def _ask(self) -> None:
        with contextlib.suppress(RPCError):  # Temporal is away: what was known gets old
            names = await swept_hosts(self._client)
            facts = await asyncio.gather(*(self._facts(name) for name in names))
            told = slots_of(dict(zip(names, facts, strict=True)))
            self._known = (time.monotonic(), told)

    async def _facts(self, host: str) -> HostFacts | None:
        kind = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
        if not await self._is_polled(step_task_queue(host), kind):
            return None  # asking would only wait for it
        return await ask_host(self._client, host)


def _message(why: Why, hosts: HostSlots) -> str:
    match why:
        case Why.NO_WORKER:
            return "no process runs the workflows: start one (template-manager worker)"
        case Why.NO_HOSTS:
            away = f"none of {hosts.away} known hosts answers" if hosts.away else "no host runs"
            return f"{away}: start one (template-manager host)"
        case Why.ALL_DRAINING:
            return "all hosts are draining: let one take builds (template-manager hosts resume)"
        case Why.ALL_BUSY:
            return "all slots are taken: it goes on when a build ends"
        case Why.SLOT_IS_FREE:
            return "a slot is free: a host is about to take a build"
        case Why.NOT_KNOWN:
            return "the hosts are being asked"
