"""Real parts for the integration tests: a host's directory, a lease, a Temporal, an API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.stack import Stack
from temporalio.client import Client

from activities.process.temporal import register_search_attributes
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from api.client.client import TemplateClient
from api.server.server import running_server
from tests.support.example_template import BUILD
from tests.support.held_build import HeldBuild, hold
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.running_api import Api, forget, serving, settings_for
from tests.support.temporal_server import start_temporal


@pytest.fixture
def held(tmp_path: Path, empty_bucket: Bucket) -> HeldBuild:
    """A build that this host holds, by a lease number from the bucket."""
    number = LeaseObjects(empty_bucket).take(BUILD, "h1", "workflow", None)
    return hold(tmp_path, number)


@pytest_asyncio.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    """A Temporal dev server that does not know our search attributes yet."""
    async with await start_temporal() as environment:
        yield environment.client


@pytest.fixture(scope="session")
def tenants_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tenants' file of the workflow worker, which limits nothing unless a test writes it."""
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    path.write_text("")
    return path


@pytest_asyncio.fixture(scope="session")
async def recording_host(temporal: Client, tenants_file: Path) -> AsyncIterator[RecordingHost]:
    """A host that records what it is asked for, and the workflow worker beside it."""
    await register_search_attributes(temporal)
    host = RecordingHost("recording-host", Journal())
    async with running_stack(temporal, host, tenants_file=tenants_file):
        yield host


@pytest_asyncio.fixture
async def api(
    temporal: Client, recording_host: RecordingHost, storage: Stack, empty_bucket: Bucket
) -> AsyncIterator[Api]:
    """The API over a real Temporal server and bucket; only the host's activities are replaced."""
    settings = settings_for(storage)
    forget(recording_host.journal)
    async with (
        running_server(temporal, settings) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        running = Api(server, client, temporal, recording_host, settings)
        yield running
        await running.end_everything()
