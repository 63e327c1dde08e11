"""What the API knows of the hosts: asked of them once in a while for all who want to know.

Only while somebody does: an API that nobody asks leaves the hosts alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from datetime import timedelta

import structlog
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    DescribeTaskQueueResponse,
)
from temporalio.client import Client
from temporalio.service import RPCError

from activities.contract.names import step_task_queue
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

_log = structlog.get_logger(__name__)


class KnownHosts:
    """The hosts of the service and what they told last."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: tuple[float, Mapping[str, HostFacts | None]] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._polled: dict[str, tuple[float, bool]] = {}

    async def facts(self) -> Mapping[str, HostFacts | None] | None:
        """Return what hosts told, by name; None is a host that does not answer.

        They are asked again when that has become old, and waited for for a moment. None instead of
        all while nothing is known.
        """
        if self._age() > FRESH_SECONDS and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and self._age() > FRESH_SECONDS:
            await asyncio.wait([self._asking], timeout=ANSWER_SECONDS)
        return self._known[1] if self._known and self._age() <= STALE_SECONDS else None

    async def is_polled(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        """Whether a worker asked for work there some seconds ago."""
        asked, polled = self._polled.get(queue, (float("-inf"), False))
        if time.monotonic() - asked > POLLED_SECONDS:
            polled = await self._has_pollers(queue, kind)
            self._polled[queue] = (time.monotonic(), polled)
        return polled

    async def waiting(self, queue: str, kind: TaskQueueType.ValueType) -> int:
        """Return about how many tasks wait there. Raises RPCError."""
        return (await self._described(queue, kind)).stats.approximate_backlog_count

    async def _has_pollers(self, queue: str, kind: TaskQueueType.ValueType) -> bool:
        """Ask Temporal for a queue's workers; True when it does not say."""
        try:
            told = await self._described(queue, kind)
        except RPCError as error:
            _log.warning("a task queue cannot be described", queue=queue, error=str(error))
            return True
        since = time.time() - POLL_SECONDS
        return any(poller.last_access_time.ToSeconds() >= since for poller in told.pollers)

    async def _described(
        self, queue: str, kind: TaskQueueType.ValueType
    ) -> DescribeTaskQueueResponse:
        request = DescribeTaskQueueRequest(
            namespace=self._client.namespace,
            task_queue=TaskQueue(name=queue),
            task_queue_type=kind,
            report_stats=True,
        )
        return await self._client.workflow_service.describe_task_queue(request, timeout=RPC_LIMIT)

    def _age(self) -> float:
        return time.monotonic() - self._known[0] if self._known else float("inf")

    async def _ask(self) -> None:
        # Temporal is away, or was never reached: what was known gets old.
        with contextlib.suppress(RPCError, RuntimeError):
            names = await swept_hosts(self._client)
            facts = await asyncio.gather(*(self._facts(name) for name in names))
            self._known = (time.monotonic(), dict(zip(names, facts, strict=True)))

    async def _facts(self, host: str) -> HostFacts | None:
        kind = TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY
        if not await self.is_polled(step_task_queue(host), kind):
            return None  # asking would only wait for it
        return await ask_host(self._client, host)
