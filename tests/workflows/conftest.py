"""A real Temporal dev server for the workflow tests, one for the session."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest_asyncio
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from activities.contract.search_attributes import SEARCH_ATTRIBUTES


@pytest_asyncio.fixture(scope="session")
async def client() -> AsyncIterator[Client]:
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=shutil.which("temporal"),
        search_attributes=SEARCH_ATTRIBUTES,
    ) as environment:
        yield environment.client
