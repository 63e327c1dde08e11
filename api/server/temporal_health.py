"""Whether Temporal can be reached: for the API's own health, and to fail fast while it is away."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import structlog
from temporalio.client import Client
from temporalio.service import RPCError

from activities.process.temporal import register_search_attributes
from api.errors import temporal_unavailable

CHECK_SECONDS = 1.0
CHECK_LIMIT = timedelta(seconds=3)

_log = structlog.get_logger(__name__)


class TemporalHealth:
    """Watches the connection. Registers the search attributes once, as soon as it can."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._serving = False
        self._checked = asyncio.Event()
        self._registered = False
        self.changed = asyncio.Event()
        """Set whenever `is_serving` has changed; whoever waits for it clears it."""

    @property
    def is_serving(self) -> bool:
        """Whether Temporal answered the last check, and knows our search attributes."""
        return self._serving

    async def require(self) -> None:
        """Raise ApiError UNAVAILABLE unless Temporal answers. Waits for the first check."""
        await self._checked.wait()
        if not self._serving:
            raise temporal_unavailable()

    async def watch(self) -> None:
        """Check for ever."""
        while True:
            serving = await self._check()
            if serving is not self._serving:
                self._serving = serving
                self.changed.set()
                _log.info("Temporal is reachable" if serving else "Temporal is away")
            self._checked.set()
            await asyncio.sleep(CHECK_SECONDS)

    async def _check(self) -> bool:
        try:
            healthy = await self._client.service_client.check_health(timeout=CHECK_LIMIT)
            if healthy and not self._registered:
                await register_search_attributes(self._client)
                self._registered = True
        except RPCError as error:
            _log.debug("Temporal does not answer", error=str(error))
            return False
        except RuntimeError as error:  # the first connection could not be made
            _log.debug("Temporal cannot be connected to", error=str(error))
            return False
        return healthy
