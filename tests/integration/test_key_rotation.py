"""Sealing keys rotate while builds wait: each opens what its own key has closed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from devstack.stack import Stack
from pydantic import SecretStr
from temporalio.client import Client, WorkflowHandle

from activities.contract.errors import ReadyTimeoutError, SealedSecretError
from activities.contract.inputs import BuildInput, PullImageInput
from activities.contract.names import build_workflow_id
from activities.contract.registry_logins import PasswordLogin
from activities.process.sealing import SealedFor, Sealer
from activities.process.temporal import register_search_attributes
from activities.store.bucket import Bucket
from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb
from api.server.server import running_server
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.running_api import serving, settings_for, template_of
from tests.support.temporal_server import start_temporal

pytestmark = pytest.mark.counts_nothing

REGISTRY = "registry.test"
OLD, NEW = (f"{name}:{letter * 43}=" for name, letter in (("k1", "A"), ("k2", "B")))
# An operator's three steps; each is in force everywhere before the next begins.
BEFORE, BOTH, TURNED, AFTER = OLD, f"{OLD},{NEW}", f"{NEW},{OLD}", NEW


@pytest_asyncio.fixture
async def temporal(empty_bucket: Bucket) -> AsyncIterator[Client]:
    async with await start_temporal() as environment:
        await register_search_attributes(environment.client)
        yield environment.client


async def created(temporal: Client, storage: Stack, keys: str, password: str) -> str:
    """Have an API with these keys start a build that logs in to a registry."""
    login = pb.FromImageRegistry(general=pb.GeneralRegistry(username="me", password=password))
    template = template_of(from_image=f"{REGISTRY}/web:1", from_image_registry=login)
    settings = settings_for(storage, secret_keys=keys)
    async with (
        running_server(temporal, settings) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        return (await client.create(template)).build_id


def sealed_in(pull: PullImageInput) -> PasswordLogin:
    assert isinstance(pull.auth, PasswordLogin)
    return pull.auth


def opened(pull: PullImageInput, keys: str) -> str:
    """Open as a host with these keys does."""
    build = SealedFor(pull.scope.build_id, REGISTRY)
    return Sealer(SecretStr(keys)).open(sealed_in(pull).secret, build)


def run_of(temporal: Client, build_id: str) -> WorkflowHandle[object, object]:
    return temporal.get_workflow_handle(build_workflow_id(build_id))


async def test_builds_that_wait_while_keys_rotate_are_opened(
    temporal: Client, storage: Stack
) -> None:
    passwords = {
        await created(temporal, storage, keys, f"with {keys[:2]} {number}"): f"{number}"
        for number, keys in enumerate((BEFORE, BOTH, TURNED))
    }
    journal = Journal()
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)
    async with running_stack(temporal, host, slots=1):
        for build_id in passwords:
            await asyncio.wait_for(run_of(temporal, build_id).result(), 60)
    pulls = [pull for name, pull in journal.arguments if name == "pull_image"]
    assert {pull.scope.build_id for pull in pulls} == set(passwords)
    for pull in pulls:
        key_id = sealed_in(pull).secret.key_id
        for keys in (BOTH, TURNED):
            assert opened(pull, keys) == f"with {key_id} {passwords[pull.scope.build_id]}"
    assert [sealed_in(pull).secret.key_id for pull in pulls].count("k2") == 1


async def test_a_build_that_is_retried_after_the_turn_keeps_its_login(
    temporal: Client, storage: Stack
) -> None:
    build_id = await created(temporal, storage, BEFORE, "secret")
    journal = Journal()
    journal.fail("wait_until_ready", ReadyTimeoutError("not ready"))
    settings = settings_for(storage, secret_keys=TURNED)
    async with running_stack(temporal, RecordingHost(f"h-{uuid.uuid4().hex[:8]}", journal)):
        await asyncio.wait([asyncio.create_task(run_of(temporal, build_id).result())])
        async with (
            running_server(temporal, settings) as server,
            TemplateClient(server.address) as client,
        ):
            await serving(server.address, True)
            await client.retry(build_id)
            await asyncio.wait_for(run_of(temporal, build_id).result(), 60)
    history = await run_of(temporal, build_id).fetch_history()
    started = history.events[0].workflow_execution_started_event_attributes.input
    [again] = await temporal.data_converter.decode(started.payloads, [BuildInput])
    login = again.config.source.login
    assert isinstance(login, PasswordLogin)
    build = SealedFor(build_id, REGISTRY)
    assert Sealer(SecretStr(TURNED)).open(login.secret, build) == "secret"
    with pytest.raises(SealedSecretError, match="'k1'"):  # what an operator waits for
        Sealer(SecretStr(AFTER)).open(login.secret, build)
