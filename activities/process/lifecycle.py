"""Running Temporal workers until a signal: drain, stop, and fail loudly when one of them fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

import structlog
from temporalio.worker import Worker

from activities.process.health import Readiness, health_endpoint
from activities.process.ready_file import shown_as_ready
from activities.process.settings import Settings

_log = structlog.get_logger(__name__)


async def run_until_signalled(
    workers: Sequence[Worker], settings: Settings, readiness: Readiness
) -> None:
    """Run workers; a signal drains them, a fatal error of one ends them all and is raised.

    Raises AddressTakenError when the health endpoint cannot listen.
    """
    stopped = asyncio.Event()

    async def ready() -> str:
        return "stopping" if stopped.is_set() else await readiness()

    async with health_endpoint(settings, ready):
        await _run(workers, settings, stopped)


async def _run(workers: Sequence[Worker], settings: Settings, stopped: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    running = [asyncio.create_task(worker.run()) for worker in workers]
    waiting = asyncio.create_task(stopped.wait())
    with shown_as_ready(settings):
        _log.info("ready", task_queues=[worker.task_queue for worker in workers])
        await asyncio.wait([*running, waiting], return_when=asyncio.FIRST_COMPLETED)
    _log.info("stopping")
    await asyncio.gather(*(worker.shutdown() for worker in workers), return_exceptions=True)
    waiting.cancel()
    await asyncio.gather(*running)
