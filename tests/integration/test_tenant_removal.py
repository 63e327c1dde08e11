"""Removing a tenant takes all that is its own, and nothing else: real Temporal, bucket and API."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.stack import Stack
from pydantic import SecretStr
from temporalio import activity
from temporalio.client import Client

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import ReadyTimeoutError
from activities.contract.inputs import BuildRootfsInput, HoldHostInput, SendLayersInput
from activities.contract.names import (
    WORKFLOW_TASK_QUEUE,
    ArtifactName,
    build_workflow_id,
    delete_tenant_workflow_id,
)
from activities.contract.tenant_removal import TenantRemoval
from activities.host.served import bucket_activities, served_by
from activities.process.settings import Settings
from activities.process.temporal import register_search_attributes
from activities.store.bucket import Bucket
from activities.store.layers import EVERYBODY, LayerObjects
from activities.store.lease_numbers import LeaseObjects
from activities.store.objects import (
    OWNERS,
    archived_log_name,
    artifact_name,
    files_name,
    metadata_name,
)
from activities.store.owners import claim
from activities.store.stored import count_stored
from api.client.client import TemplateClient
from api.client.credentials import ClientCredentials
from api.server.access import hash_token
from api.server.server import running_server
from api.server.tenant_removal import TenantRemover
from tests.support import held_build
from tests.support.command_line import Ended, cli
from tests.support.example_template import metadata
from tests.support.held_layers import held_at
from tests.support.layered_bucket import id_of, make_chain, make_layer, release, scope_of
from tests.support.layered_builds import LayeredBuild, build_on, require_whole
from tests.support.recording_host import (
    Journal,
    RecordingHost,
    rootfs_checkpoint,
    running_host,
    workflow_worker,
)
from tests.support.running_api import serving, settings_for, template_of
from tests.support.temporal_server import start_temporal
from workflows.delete_tenant import DeleteTenant

pytestmark = pytest.mark.counts_nothing

IMAGE = "127.0.0.1:5000/demo/web:1"
TENANTS = ("acme", "beta")
SECONDS = 90


@dataclass
class Service:
    """A Temporal of its own, the API, and a bucket; processes that do the work come and go."""

    temporal: Client
    settings: Settings
    bucket: Bucket
    address: str
    journal: Journal

    @asynccontextmanager
    async def at_work(self, sending: RecordingHost | None = None) -> AsyncIterator[None]:
        """A worker with the real activities of the bucket, and a host that at most sends."""
        real = bucket_activities(self.settings, self.temporal)
        remover = served_by(TenantRemover(self.temporal, self.settings))
        host = sending or RecordingHost(f"h-{uuid.uuid4().hex[:8]}", self.journal)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(workflow_worker(self.temporal, [*real, *remover]))
            await stack.enter_async_context(running_host(self.temporal, host))
            yield

    async def build(self, tenant: str, *, until: str | None = None) -> str:
        """Have a build of a tenant: ended, or hanging in an activity."""
        started = self.journal.hang(until) if until else None
        template = template_of(from_image=IMAGE)
        credentials = ClientCredentials(token=SecretStr(tenant))
        async with TemplateClient(self.address, credentials) as client:
            await client.create(template)
        async with asyncio.timeout(SECONDS):
            if started is not None:
                await started.wait()
            else:
                handle = self.temporal.get_workflow_handle(build_workflow_id(template.build_id))
                await asyncio.wait([asyncio.create_task(handle.result())])
        return template.build_id

    def store(self, tenant: str) -> str:
        """Have a template whose build Temporal has forgotten; return its id."""
        build_id = str(uuid.uuid4())
        claim(self.bucket, build_id, tenant)
        whose, told = {"tenant": tenant}, metadata(build_id, tenant=tenant)
        memfile = artifact_name(build_id, ArtifactName.MEMFILE)
        self.bucket.write_object(memfile, b"memory", metadata=whose)
        self.bucket.write_object(
            metadata_name(build_id), told.model_dump_json().encode(), metadata=whose
        )
        return build_id

    def objects(self) -> set[str]:
        """Names of all objects, but for what stays of each build and delete for a while."""
        return {
            stored.name
            for stored in self.bucket.list_objects("")
            if not stored.name.startswith((OWNERS, ".leases/"))
        }

    async def remove(self, *words: str) -> Ended:
        address = self.temporal.service_client.config.target_host
        env = {"TEMPORAL_ADDRESS": address}
        return await cli("tenants", "delete", *words, env=env)


@pytest_asyncio.fixture
async def service(storage: Stack, empty_bucket: Bucket, tmp_path: Path) -> AsyncIterator[Service]:
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"{t} {hash_token(t)} admin tenant={t}\n" for t in TENANTS))
    settings = settings_for(storage, tokens_file=tokens)
    async with await start_temporal() as environment:
        await register_search_attributes(environment.client)
        async with running_server(environment.client, settings) as server:
            await serving(server.address, True)
            yield Service(environment.client, settings, empty_bucket, server.address, Journal())


class SendingHost(RecordingHost):
    """A host that has two disks for each build, and sends their layers for real."""

    def __init__(self, service: Service, place: Path) -> None:
        super().__init__("sending-host", service.journal, sends_ahead=True)
        self._bucket = service.bucket
        self._place = place
        self.builds: dict[str, LayeredBuild] = {}

    @activity.defn(name="hold_host")
    async def hold_host(self, hold: HoldHostInput, /) -> None:
        number = LeaseObjects(self._bucket).take(hold.build_id, self.name, "workflow", None)
        self.journal.next_lease = number
        held = held_build.hold(self._place, number, hold.build_id)
        self.builds[hold.build_id] = LayeredBuild(held, self._bucket)
        await super().hold_host(hold)

    @activity.defn(name="build_rootfs")
    async def build_rootfs(self, build: BuildRootfsInput, /) -> RootfsCheckpoint:
        made = self.builds[build.scope.build_id]
        makes_disks(made, build.scope.tenant)
        return rootfs_checkpoint(self.name, made.chain)

    @activity.defn(name="send_layers")
    async def send_layers(self, send: SendLayersInput, /) -> int:
        return await self.builds[send.scope.build_id].layer_activities().send_layers(send)


def makes_disks(build: LayeredBuild, tenant: str) -> None:
    """Have everybody's base made, and what a tenant's step has made of it."""
    build.makes("base", "base", 50).makes("step", tenant, 20, owner=tenant)


def of(builds: Iterable[str], names: set[str]) -> set[str]:
    return {name for name in names if any(build in name for build in builds)}


async def test_all_that_is_the_tenant_s_goes_and_nothing_else(service: Service) -> None:
    bucket = service.bucket
    theirs = [service.store("beta")]
    make_layer(bucket, scope_of(theirs[0], "beta"), "everybody's", owner=EVERYBODY)
    make_layer(bucket, scope_of(theirs[0], "beta"), "beta's", owner="beta")
    bucket.write_object(files_name("ab" * 32, "beta"), b"files")
    bucket.write_object(files_name("ab" * 32), b"the default tenant's")
    mine = [service.store("acme")]
    LayerObjects(bucket).refer(id_of("everybody's", EVERYBODY), scope_of(mine[0], "acme"))
    cached = make_chain(bucket, forgotten := scope_of(tenant="acme"), "low", "high")
    release(LayerObjects(bucket), forgotten.build_id)
    bucket.write_object(files_name("ab" * 32, "acme"), b"files")
    bucket.write_object(archived_log_name(str(uuid.uuid4()), "acme"), b"forgotten")
    async with service.at_work():
        theirs.append(await service.build("beta"))
        kept = service.objects() - of(mine, service.objects())
        kept = {name for name in kept if "/acme/" not in name}
        kept -= of([layer.layer_id for layer in cached], kept)
        mine.append(await service.build("acme"))
        service.journal.fail("wait_until_ready", *[ReadyTimeoutError("not ready")] * 2)
        mine.append(await service.build("acme"))
        service.journal.failures.clear()
        mine.append(await service.build("acme", until="wait_until_ready"))
        ended = await service.remove("acme", "--yes", "--json")
        assert ended.code == 0, ended.err
        # The logs of builds go with these.
        assert ended.json == {"tenant": "acme", "builds": 4, "objects": 2, "left": []}
        assert service.objects() == kept
        for build_id in mine:
            with_token = ClientCredentials(token=SecretStr("acme"))
            async with TemplateClient(service.address, with_token) as client:
                with pytest.raises(Exception, match="there is no build"):
                    await client.status(build_id)
        again = await service.remove("acme", "--yes")
        assert (again.code, again.out) == (0, "0 builds, and 0 files and logs, are removed\n")
        assert service.objects() == kept


async def cancelled(service: Service, build_id: str) -> None:
    """Wait until a build has been asked to end."""
    handle = service.temporal.get_workflow_handle(build_workflow_id(build_id))
    async with asyncio.timeout(SECONDS):
        while not any(
            event.HasField("workflow_execution_cancel_requested_event_attributes")
            for event in (await handle.fetch_history()).events
        ):
            await asyncio.sleep(0.05)


async def test_a_build_that_sends_its_layers_is_removed_with_them(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it still ends to send, too; the base that it has in common with others stays."""
    bucket = service.bucket
    theirs = build_on(tmp_path / "beta", bucket, tenant="beta")
    makes_disks(theirs, "beta")
    await theirs.publish(theirs.boots())
    kept = service.objects()
    reached, released = held_at(monkeypatch, "header")
    host = SendingHost(service, tmp_path / "acme")
    async with service.at_work(host):
        mine = await service.build("acme", until="wait_until_ready")
        assert await asyncio.to_thread(reached.wait, SECONDS)
        removal = asyncio.create_task(service.remove("acme", "--yes", "--json"))
        await cancelled(service, mine)
        released.set()
        ended = await removal
    assert ended.json == {"tenant": "acme", "builds": 1, "objects": 0, "left": []}
    assert service.objects() == kept
    require_whole(bucket, theirs, tmp_path / "out")
    assert set(count_stored(bucket).tenants) == {"beta"}


async def test_a_removal_goes_on_when_its_worker_is_back(service: Service) -> None:
    builds = [service.store("acme") for _ in range(25)]
    others = service.store("beta")
    removal = await service.temporal.start_workflow(
        DeleteTenant.run,
        TenantRemoval(tenant="acme"),
        id=delete_tenant_workflow_id("acme"),
        task_queue=WORKFLOW_TASK_QUEUE,
    )
    async with service.at_work(), asyncio.timeout(SECONDS):
        while not (await removal.query(DeleteTenant.removed)).builds:
            await asyncio.sleep(0.02)
    assert of(builds, service.objects())  # it is not done
    async with service.at_work(), asyncio.timeout(SECONDS):
        removed = await removal.result()
    assert (removed.builds, removed.left) == (25, ())
    assert of(builds, service.objects()) == set()
    assert of([others], service.objects())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("acme",), "--yes"),
        (("default", "--yes"), "no tenant that can be removed"),
        (("a'b", "--yes"), "no tenant that can be removed"),
    ],
)
async def test_what_is_not_removed_by_mistake(words: tuple[str, ...], told: str) -> None:
    ended = await cli("tenants", "delete", *words)
    assert ended.code == 2
    assert told in ended.err
