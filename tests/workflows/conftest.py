"""A real Temporal dev server for the workflow tests, one for the session.

It tells workflows to continue as new long before others do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from temporalio.client import Client

from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from tests.support.temporal_server import start_temporal

EARLY = "limit.historyCount.suggestContinueAsNew=30"


@pytest_asyncio.fixture(scope="session")
async def client() -> AsyncIterator[Client]:
    async with await start_temporal(
        search_attributes=SEARCH_ATTRIBUTES, config=[EARLY]
    ) as environment:
        yield environment.client
