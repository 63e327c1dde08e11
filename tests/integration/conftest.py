"""Real parts for the integration tests: a bucket, a host's directory, a lease."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.registry import Registry, running_registry
from devstack.stack import Stack
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from activities.contract.scope import BuildScope, HostLease
from activities.process.settings import Settings
from activities.process.temporal import register_search_attributes
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from api.client.client import TemplateClient
from api.server.server import running_server
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.running_api import Api, forget, serving, settings_for

BUILD = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(scope="session")
def storage() -> Iterator[Stack]:
    """An emulated Google Cloud Storage behind the proxy that keeps its promises."""
    with Stack(only=("gcs-emulator", "gcs", "bucket")) as stack:
        yield stack


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An empty registry that wants no login."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def empty_bucket(storage: Stack, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket without any object."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.variables["STORAGE_EMULATOR_HOST"])
    bucket = Bucket(storage.environment.bucket)
    for stored in bucket.list_objects(""):
        bucket.delete_object(stored.name, stored.generation)
    return bucket


@dataclass(frozen=True)
class HeldBuild:
    """A host that holds a build."""

    settings: Settings
    ledger: LeaseLedger
    store: CheckpointStore
    scope: BuildScope


def hold(data_dir: Path, number: int = 1, build_id: str = BUILD) -> HeldBuild:
    """Let a host with that data directory hold a build by that lease number."""
    settings = Settings(data_dir=data_dir, host="h1", upload_chunk_mb=1)
    ledger = LeaseLedger(data_dir)
    ledger.put(
        build_id=build_id,
        template_id="web",
        workflow_id=f"template-build-{build_id}",
        number=number,
        lifetime_seconds=600,
    )
    scope = BuildScope(
        build_id=build_id, template_id="web", lease=HostLease(host="h1", number=number)
    )
    return HeldBuild(settings, ledger, CheckpointStore(data_dir, "h1"), scope)


@pytest.fixture
def held(tmp_path: Path, empty_bucket: Bucket) -> HeldBuild:
    """A build that this host holds, by a lease number from the bucket."""
    number = LeaseObjects(empty_bucket).take(BUILD, "h1", "workflow", None)
    return hold(tmp_path, number)


@pytest_asyncio.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    """A Temporal dev server that does not know our search attributes yet."""
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        dev_server_existing_path=shutil.which("temporal"),
    ) as environment:
        yield environment.client


@pytest_asyncio.fixture(scope="session")
async def recording_host(temporal: Client) -> AsyncIterator[RecordingHost]:
    """A host that records what it is asked for, and the workflow worker beside it."""
    await register_search_attributes(temporal)
    host = RecordingHost("recording-host", Journal())
    async with running_stack(temporal, host):
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
