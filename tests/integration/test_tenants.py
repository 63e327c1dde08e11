"""What is another tenant's does not exist: every rpc, as owner, reader, stranger, operator, nobody.

The rpcs are those that the server tells of: one that is added and not thought of here fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from pydantic import SecretStr
from temporalio.client import WorkflowExecutionDescription
from temporalio.service import RPCError

from activities.contract.names import DEFAULT_TENANT, Step, build_workflow_id
from activities.contract.search_attributes import TENANT, TENANT_MEMO
from activities.contract.status import BuildState, LogEntry, LogLevel
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.log_archive import to_jsonl
from activities.store.objects import (
    archived_log_name,
    files_name,
    metadata_name,
    owner_name,
    part_name,
    parts_prefix,
)
from activities.store.owners import claim, read_owner
from api.client.client import CallError, TemplateClient, explain
from api.client.credentials import ClientCredentials
from api.pb import info_service_pb2 as info_pb
from api.pb import template_manager_pb2 as pb
from api.server.access import hash_token
from api.server.finding import BuildFinder
from api.server.interceptor import OPEN_SERVICES
from api.server.server import running_server
from tests.support.example_template import build_status, metadata, template_config
from tests.support.rpcs import all_rpcs
from tests.support.running_api import Api, template_of
from tests.support.workflow_runs import start

pytestmark = pytest.mark.counts_nothing

RPCS = {rpc.name: rpc for rpc in all_rpcs()}
TOKENS = {
    "owner": "admin tenant=acme",
    "reader": "read tenant=acme",
    "stranger": "admin tenant=beta",
    "operator": "operator",
    "old": "admin",
}
ROLES = ("owner", "reader", "stranger", "operator", "nobody")
HASH = "ab" * 32
IMAGE = "127.0.0.1:5000/demo/web:1"
"""Of the service's registry, and not pushed for a build: for all to build from."""


def create_of(build_id: str, role: str = "owner") -> pb.TemplateCreateRequest:
    team = "acme" if role == "operator" else ""
    template = template_of(build_id=build_id, team_id=team, from_image=IMAGE)
    return pb.TemplateCreateRequest(template=template)


REQUESTS: dict[str, Callable[[str, str], Message]] = {
    "HealthStatus": lambda build, role: Empty(),
    "TemplateBuildStatus": lambda build, role: pb.TemplateStatusRequest(build_id=build),
    "TemplateBuildLogs": lambda build, role: pb.TemplateBuildLogsRequest(build_id=build),
    "TemplateBuildList": lambda build, role: pb.TemplateBuildListRequest(page_size=100),
    "TemplateBuildInspect": lambda build, role: pb.TemplateBuildInspectRequest(build_id=build),
    "TemplateCreate": create_of,
    "TemplateBuildImage": create_of,
    "InitLayerFileUpload": lambda build, role: pb.InitLayerFileUploadRequest(
        template_id="web", hash=HASH
    ),
    "TemplateBuildRetry": lambda build, role: pb.TemplateBuildRetryRequest(build_id=build),
    "TemplateBuildCancel": lambda build, role: pb.TemplateBuildCancelRequest(build_id=build),
    "TemplateBuildDelete": lambda build, role: pb.TemplateBuildDeleteRequest(build_id=build),
    "TemplateNameReserve": lambda build, role: pb.TemplateNameReserveRequest(name="web"),
    "TemplateNameGet": lambda build, role: pb.TemplateNameGetRequest(name="acme/web"),
    "TemplateNameList": lambda build, role: pb.TemplateNameListRequest(),
    "TemplateTagsAssign": lambda build, role: pb.TemplateTagsAssignRequest(
        name="web", build_id=build
    ),
    "TemplateTagsRemove": lambda build, role: pb.TemplateTagsRemoveRequest(
        name="acme/web", tags=["default"]
    ),
    "ServiceInfo": lambda build, role: Empty(),
    "ServiceStatusOverride": lambda build, role: info_pb.ServiceStatusChangeRequest(),
}
"""A request about a build, by rpc."""

OK, PUBLISHED = "", "TEMPLATE_ALREADY_PUBLISHED"
NO_RIGHT, NO_TOKEN, NO_BUILD = "RIGHT_MISSING", "TOKEN_MISSING", "BUILD_NOT_FOUND"
NO_NAME = "TEMPLATE_NOT_FOUND"
NOTHING = "NOTHING_FOUND"
"""Of a delete that succeeds, since there was nothing to remove."""
# About a completed build of the owner's: what is told to each of ROLES.
TOLD: dict[str, tuple[str, ...]] = {
    "HealthStatus": (OK, OK, OK, OK, OK),
    "TemplateBuildStatus": (OK, OK, NO_BUILD, OK, NO_TOKEN),
    "TemplateBuildLogs": (OK, OK, NO_BUILD, OK, NO_TOKEN),
    "TemplateBuildList": (OK, OK, OK, OK, NO_TOKEN),
    "TemplateBuildInspect": (OK, OK, NO_BUILD, OK, NO_TOKEN),
    "TemplateCreate": (OK, NO_RIGHT, "BUILD_ID_TAKEN", OK, NO_TOKEN),
    "TemplateBuildImage": (OK, NO_RIGHT, OK, OK, NO_TOKEN),
    "InitLayerFileUpload": (OK, NO_RIGHT, OK, OK, NO_TOKEN),
    "TemplateBuildRetry": ("BUILD_NOT_FAILED", NO_RIGHT, NO_BUILD, "BUILD_NOT_FAILED", NO_TOKEN),
    "TemplateBuildCancel": (PUBLISHED, NO_RIGHT, NO_BUILD, PUBLISHED, NO_TOKEN),
    "TemplateBuildDelete": (OK, NO_RIGHT, NOTHING, OK, NO_TOKEN),
    "TemplateNameReserve": (OK, NO_RIGHT, OK, OK, NO_TOKEN),  # each for its own tenant
    "TemplateNameGet": (OK, OK, NO_NAME, OK, NO_TOKEN),
    "TemplateNameList": (OK, OK, OK, OK, NO_TOKEN),
    "TemplateTagsAssign": (OK, NO_RIGHT, NO_BUILD, OK, NO_TOKEN),
    "TemplateTagsRemove": (OK, NO_RIGHT, NO_NAME, OK, NO_TOKEN),
    "ServiceInfo": (OK, OK, OK, OK, OK),
    "ServiceStatusOverride": (NO_RIGHT, NO_RIGHT, NO_RIGHT, OK, NO_TOKEN),
}
BY_BUILD = [name for name, rpc in RPCS.items() if "build_id" in rpc.input_type.fields_by_name]
"""The rpcs that name a build."""


def test_every_rpc_is_thought_of() -> None:
    assert set(RPCS) == set(REQUESTS) == set(TOLD)
    assert len(BY_BUILD) == 7


class Tenants:
    """A running API with tokens, called as whoever is asked for."""

    def __init__(self, api: Api, address: str) -> None:
        self.api = api
        self.address = address

    @asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[TemplateClient]:
        async with TemplateClient(self.address, ClientCredentials(token=SecretStr(role))) as client:
            yield client

    async def build(self, role: str = "owner", *, until: str | None = None, **changes: Any) -> str:
        """Have a build of the role's: completed, or hanging in an activity."""
        template = self.api.template(**({"from_image": IMAGE} | changes))
        started = self.api.journal.hang(until) if until else None
        async with self.client(role) as client:
            await client.create(template)
        if started is None:
            await self.api.temporal.get_workflow_handle(
                build_workflow_id(template.build_id)
            ).result()
        else:
            await asyncio.wait_for(started.wait(), 20)
        return template.build_id

    async def call(self, method: str, request: Message, role: str) -> list[Message]:
        """Make a call and return its answers. Raises CallError, also when it found NOTHING."""
        told = RPCS[method]
        async with grpc.aio.insecure_channel(self.address) as channel:
            path = f"/{told.containing_service.full_name}/{method}"
            write, read = type(request).SerializeToString, GetMessageClass(told.output_type)
            token = () if role == "nobody" else (("authorization", f"Bearer {role}"),)
            try:
                if told.server_streaming:
                    stream = channel.unary_stream(path, write, read.FromString)
                    return [answer async for answer in stream(request, metadata=token, timeout=30)]
                unary = channel.unary_unary(path, write, read.FromString)
                call = unary(request, metadata=token, timeout=30)
                answer, trailers = await call, tuple(await call.trailing_metadata() or ())
            except grpc.aio.AioRpcError as error:
                raise explain(error, self.address) from None
        if ("found", "false") in trailers:
            raise CallError(grpc.StatusCode.OK, "nothing to remove", reason=NOTHING)
        return [answer]

    async def reason(self, method: str, build_id: str, role: str) -> str:
        """Make a call about a build and return why it is refused; "" when it is not."""
        try:
            await self.call(method, REQUESTS[method](build_id, role), role)
        except CallError as error:
            return error.reason
        return OK

    async def listed(self, role: str) -> list[str]:
        request = pb.TemplateBuildListRequest(page_size=100)
        [page] = await self.call("TemplateBuildList", request, role)
        assert isinstance(page, pb.TemplateBuildListResponse)
        return [build.build_id for build in page.builds]


@pytest_asyncio.fixture
async def tenants(api: Api, tmp_path: Path) -> AsyncIterator[Tenants]:
    path = tmp_path / "tokens"
    path.write_text("".join(f"{r} {hash_token(r)} {rest}\n" for r, rest in TOKENS.items()))
    settings = api.settings.model_copy(update={"tokens_file": path})
    async with running_server(api.temporal, settings) as server:
        yield Tenants(api, server.address)


async def test_the_server_has_no_other_rpcs(tenants: Tenants) -> None:
    told = await asyncio.to_thread(rpcs_of, tenants.address)
    assert told == sorted(rpc.full_name for rpc in RPCS.values())


def rpcs_of(address: str) -> list[str]:
    """Return what a server tells of itself, but for what everybody may call."""
    with grpc.insecure_channel(address) as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        services = set(told.get_services()) - set(OPEN_SERVICES)
        found = [DescriptorPool(told).FindServiceByName(service) for service in services]
        return sorted(method.full_name for service in found for method in service.methods)


async def test_what_each_caller_is_told(tenants: Tenants, empty_bucket: Bucket) -> None:
    build = await tenants.build()
    told = metadata(build, tenant="acme")  # a tag stands for what is published
    empty_bucket.write_object(metadata_name(build), told.model_dump_json().encode())
    methods = sorted(TOLD, key=lambda name: name == "TemplateBuildDelete")  # that one last
    for method in methods:
        for role, expected in zip(ROLES, TOLD[method], strict=True):
            if method == "TemplateBuildDelete" and expected == OK:
                continue
            assert await tenants.reason(method, build, role) == expected, f"{method} as {role}"
    for role in ("owner", "operator"):
        assert await tenants.reason("TemplateBuildDelete", build, role) == OK
        assert await tenants.reason("TemplateBuildStatus", build, role) == NO_BUILD
        build = await tenants.build()


async def test_a_list_has_the_caller_s_builds_alone(tenants: Tenants) -> None:
    mine, theirs, old = [await tenants.build(role) for role in ("owner", "stranger", "old")]
    before = (await start(tenants.api.temporal)).id.removeprefix("template-build-")
    seen = {
        "owner": {mine},
        "reader": {mine},
        "stranger": {theirs},
        "old": {old, before},
        "operator": {mine, theirs, old, before},
    }
    try:
        async with asyncio.timeout(20):  # visibility lags behind
            while not {mine, theirs, old, before} <= set(await tenants.listed("operator")):
                await asyncio.sleep(0.2)
        all_of_them = {mine, theirs, old, before}
        for role, builds in seen.items():
            assert set(await tenants.listed(role)) & all_of_them == builds, role
    finally:
        with contextlib.suppress(RPCError):  # it may have ended by itself
            await tenants.api.temporal.get_workflow_handle(build_workflow_id(before)).terminate()


async def test_a_name_is_seen_by_its_tenant_and_an_operator(
    tenants: Tenants, empty_bucket: Bucket
) -> None:
    build = await tenants.build()
    told = metadata(build, tenant="acme")
    empty_bucket.write_object(metadata_name(build), told.model_dump_json().encode())
    assert await tenants.reason("TemplateTagsAssign", build, "owner") == OK

    async def said(role: str, written: str) -> str:
        request = pb.TemplateStatusRequest(build_id=written)
        try:
            [status] = await tenants.call("TemplateBuildStatus", request, role)
        except CallError as error:
            return f"{error.reason}: {error.message}"
        assert isinstance(status, pb.TemplateBuildStatusResponse)
        return status.state

    assert await said("owner", "web") == await said("owner", "acme/web") == "completed"
    assert await said("operator", "acme/web") == "completed"
    # Its own tenant has none, and another's is as one of a tenant that never was.
    assert await said("operator", "web") == f"{NO_NAME}: there is no template web:default"
    hidden = await said("stranger", "acme/web")
    assert hidden == f"{NO_NAME}: there is no template acme/web:default"
    assert hidden == (await said("stranger", "none/web")).replace("none", "acme")

    async def seen(role: str, tenant: str = "") -> list[str]:
        request = pb.TemplateNameListRequest(tenant=tenant)
        [page] = await tenants.call("TemplateNameList", request, role)
        assert isinstance(page, pb.TemplateNameListResponse)
        return [f"{name.tenant}/{name.name}" for name in page.names]

    assert await seen("owner") == await seen("operator") == ["acme/web"]
    assert await seen("stranger") == await seen("stranger", "acme") == []


async def test_an_operator_lists_one_tenant_and_another_hears_of_none(tenants: Tenants) -> None:
    mine, theirs = [await tenants.build(role) for role in ("owner", "stranger")]
    await tenants.build("old")

    async def listed(role: str, tenant: str) -> list[tuple[str, str]]:
        request = pb.TemplateBuildListRequest(page_size=100, tenant=tenant)
        [page] = await tenants.call("TemplateBuildList", request, role)
        assert isinstance(page, pb.TemplateBuildListResponse)
        builds = [(build.build_id, build.tenant) for build in page.builds]
        return [build for build in builds if build[0] in (mine, theirs)]

    async with asyncio.timeout(20):  # visibility lags behind
        while await listed("operator", "beta") != [(theirs, "beta")]:
            await asyncio.sleep(0.2)
    assert await listed("operator", "acme") == [(mine, "acme")]
    assert await listed("owner", "acme") == await listed("owner", "") == [(mine, "acme")]
    assert await listed("owner", "beta") == []
    with pytest.raises(CallError) as error:
        await listed("operator", "a' OR Tenant='beta")
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_page_token_of_another_tenant_is_none(tenants: Tenants) -> None:
    for _ in range(2):
        await tenants.build()
    request = pb.TemplateBuildListRequest(page_size=1)
    async with asyncio.timeout(20):
        while True:
            [page] = await tenants.call("TemplateBuildList", request, "owner")
            assert isinstance(page, pb.TemplateBuildListResponse)
            if page.next_page_token:
                break
            await asyncio.sleep(0.2)
    request.page_token = page.next_page_token
    await tenants.call("TemplateBuildList", request, "reader")
    with pytest.raises(CallError) as error:
        await tenants.call("TemplateBuildList", request, "stranger")
    assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT


# ---- Another's build is as one that never was


async def _running(tenants: Tenants, bucket: Bucket) -> str:
    return await tenants.build(until="build_rootfs")


async def _completed(tenants: Tenants, bucket: Bucket) -> str:
    return await tenants.build()


async def _only_in_the_bucket(tenants: Tenants, bucket: Bucket) -> str:
    build_id = str(uuid.uuid4())
    claim(bucket, build_id, "acme")
    told = metadata(build_id, tenant="acme")
    bucket.write_object(metadata_name(build_id), told.model_dump_json().encode())
    return build_id


async def _only_parts(tenants: Tenants, bucket: Bucket) -> str:
    build_id = str(uuid.uuid4())
    claim(bucket, build_id, "acme")
    bucket.write_object(part_name(parts_prefix(build_id), 1, "AAAAAA==", 1), b"x")
    return build_id


async def _deleted(tenants: Tenants, bucket: Bucket) -> str:
    build_id = await tenants.build()
    async with tenants.client("owner") as owner:
        await owner.delete(build_id)
    return build_id


@pytest.fixture
def look_ups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the API asks Temporal and the bucket for, in order."""
    asked: list[str] = []

    def recorded(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def ask(self: object, what: str, *rest: object, **more: object) -> object:
            asked.append(f"{name} {what}")
            return real(self, what, *rest, **more)

        monkeypatch.setattr(owner, name, ask)

    for name in ("read_object", "stat_object", "list_objects", "write_object", "delete_object"):
        recorded(Bucket, name)
    recorded(BuildFinder, "_describe")
    yield asked


@pytest.mark.parametrize("make", [_running, _completed, _only_in_the_bucket, _only_parts, _deleted])
async def test_another_s_build_is_as_one_that_never_was(
    tenants: Tenants,
    empty_bucket: Bucket,
    look_ups: list[str],
    make: Callable[[Tenants, Bucket], Any],
) -> None:
    build_id, unknown = await make(tenants, empty_bucket), str(uuid.uuid4())

    async def told(method: str, which: str) -> tuple[object, ...]:
        look_ups.clear()
        with pytest.raises(CallError) as error:
            await tenants.call(method, REQUESTS[method](which, "stranger"), "stranger")
        plain = (error.value.message, error.value.hint, str(error.value.metadata), *look_ups)
        return error.value.code, error.value.reason, *(t.replace(which, "ID") for t in plain)

    for method in BY_BUILD:
        assert await told(method, build_id) == await told(method, unknown), method
        is_delete = method == "TemplateBuildDelete"
        code = grpc.StatusCode.OK if is_delete else grpc.StatusCode.NOT_FOUND
        assert (await told(method, build_id))[0] is code
    base = pb.FromTemplateConfig(build_id=build_id)
    on_unknown = pb.FromTemplateConfig(build_id=unknown)
    messages = []
    async with tenants.client("stranger") as stranger:
        for source in (base, on_unknown):
            with pytest.raises(CallError) as error:
                await stranger.create(template_of(from_image=None, from_template=source))
            assert error.value.reason == "BASE_NOT_FOUND"
            messages.append(error.value.message.replace(source.build_id, "ID"))
    assert messages[0] == messages[1]


# ---- Build ids are their tenant's for ever


@pytest.mark.parametrize("make", [_running, _completed, _only_in_the_bucket, _only_parts, _deleted])
async def test_a_build_id_is_its_tenant_s_for_ever(
    tenants: Tenants, empty_bucket: Bucket, make: Callable[[Tenants, Bucket], Any]
) -> None:
    build_id = await make(tenants, empty_bucket)
    for role in ("stranger", "old", "operator"):  # for `default`, if it does not name a tenant
        async with tenants.client(role) as other:
            with pytest.raises(CallError) as error:
                await other.create(template_of(build_id=build_id, from_image=IMAGE))
            told = (error.value.code, error.value.reason, error.value.message)
            assert told == (
                grpc.StatusCode.ALREADY_EXISTS,
                "BUILD_ID_TAKEN",
                f"build id {build_id} cannot be used",
            )
    assert read_owner(empty_bucket, build_id) == "acme"


async def test_an_id_of_before_there_were_tenants_is_the_default_one_s(
    tenants: Tenants, empty_bucket: Bucket
) -> None:
    of_before = await tenants.build("old")
    for stored in empty_bucket.list_objects(owner_name(of_before)):
        empty_bucket.delete_object(stored.name, stored.generation)
    in_bucket = str(uuid.uuid4())
    told = metadata(in_bucket)
    empty_bucket.write_object(metadata_name(in_bucket), told.model_dump_json().encode())
    for build_id in (of_before, in_bucket):
        assert await tenants.reason("TemplateBuildStatus", build_id, "old") == OK
        assert await tenants.reason("TemplateBuildStatus", build_id, "owner") == NO_BUILD
        assert await tenants.reason("TemplateCreate", build_id, "owner") == "BUILD_ID_TAKEN"
        assert await tenants.reason("TemplateBuildDelete", build_id, "old") == OK
        assert read_owner(empty_bucket, build_id) == DEFAULT_TENANT
        assert await tenants.reason("TemplateCreate", build_id, "owner") == "BUILD_ID_TAKEN"


async def test_of_two_tenants_at_once_one_gets_the_id(
    tenants: Tenants, empty_bucket: Bucket
) -> None:
    build_id = tenants.api.template().build_id
    told = await asyncio.gather(
        *(tenants.reason("TemplateCreate", build_id, role) for role in ("owner", "stranger"))
    )
    assert sorted(told) == [OK, "BUILD_ID_TAKEN"]
    winner = "acme" if told[0] == OK else "beta"
    assert read_owner(empty_bucket, build_id) == winner
    assert await _tenant_in_temporal(tenants, build_id) == (winner, winner)


# ---- Where the tenant comes from


async def _tenant_in_temporal(tenants: Tenants, build_id: str) -> tuple[object, object]:
    handle = tenants.api.temporal.get_workflow_handle(build_workflow_id(build_id))
    described: WorkflowExecutionDescription = await handle.describe()
    memo = await described.memo_value(TENANT_MEMO, None)
    return memo, described.typed_search_attributes.get(TENANT)


async def test_the_token_says_the_tenant_and_an_operator_names_it(tenants: Tenants) -> None:
    for role, team, tenant in (
        ("owner", "", "acme"),
        ("owner", "acme", "acme"),
        ("old", "", DEFAULT_TENANT),
        ("operator", "beta", "beta"),
    ):
        build_id = await tenants.build(role, team_id=team)
        assert await _tenant_in_temporal(tenants, build_id) == (tenant, tenant)
    async with tenants.client("owner") as owner:
        with pytest.raises(CallError) as error:
            await owner.create(template_of(team_id="beta", from_image=IMAGE))
    assert error.value.reason == "TEAM_NOT_YOURS"


async def test_without_tokens_there_is_one_tenant(api: Api) -> None:
    build_id = await api.completed(team_id="a label")
    handle = api.temporal.get_workflow_handle(build_workflow_id(build_id))
    assert await (await handle.describe()).memo_value(TENANT_MEMO) == DEFAULT_TENANT
    assert (await api.client.status(build_id)).state == "completed"


async def test_a_base_is_of_the_same_tenant_also_for_an_operator(tenants: Tenants) -> None:
    base = pb.FromTemplateConfig(build_id=await _only_in_the_bucket(tenants, _bucket(tenants)))
    async with tenants.client("operator") as operator:
        with pytest.raises(CallError) as error:
            await operator.create(template_of(from_image=None, from_template=base, team_id="beta"))
        assert error.value.reason == "BASE_NOT_FOUND"
        on_it = tenants.api.template(from_image=None, from_template=base, team_id="acme")
        await operator.create(on_it)


def _bucket(tenants: Tenants) -> Bucket:
    return Bucket(tenants.api.settings.bucket)


# ---- Objects, images


async def test_files_are_their_tenant_s(tenants: Tenants, empty_bucket: Bucket) -> None:
    async def address(role: str) -> str:
        async with tenants.client(role) as client:
            return await client.files_address("web", HASH)

    empty_bucket.write_object(files_name(HASH), b"of before there were tenants")
    empty_bucket.write_object(files_name(HASH, "acme"), b"acme's")
    there = {role: await address(role) == "" for role in ("owner", "old", "stranger")}
    assert there == {"owner": True, "old": True, "stranger": False}
    copy = pb.TemplateStep(type="COPY", args=["a", "/a"], files_hash=HASH)
    await tenants.build(steps=[copy])
    async with tenants.client("stranger") as stranger:
        with pytest.raises(CallError) as error:
            await stranger.create(template_of(from_image=IMAGE, steps=[copy]))
    assert error.value.reason == "FILES_NOT_FOUND"


async def test_a_forgotten_build_s_log_is_found_by_its_tenant_and_an_operator(
    tenants: Tenants, empty_bucket: Bucket
) -> None:
    lines = [LogEntry(timestamp=utc_now(), level=LogLevel.INFO, message="it was so")]
    told: dict[str, dict[str, str]] = {}
    for tenant in ("acme", DEFAULT_TENANT):
        build_id = str(uuid.uuid4())
        config = template_config(build_id=build_id, tenant=tenant)
        content = to_jsonl(build_status(BuildState.FAILED, Step.PULL, config), lines)
        empty_bucket.write_object(archived_log_name(build_id, tenant), content)
        if tenant != DEFAULT_TENANT:  # the other one is of before there were tenants
            claim(empty_bucket, build_id, tenant)
        told[tenant] = {r: await _first_line(tenants, build_id, r) for r in TOKENS}
    seen, hidden = "it was so", NO_BUILD
    assert told["acme"] == {
        "owner": seen,
        "reader": seen,
        "stranger": hidden,
        "operator": seen,
        "old": hidden,
    }
    assert told[DEFAULT_TENANT] == {
        "owner": hidden,
        "reader": hidden,
        "stranger": hidden,
        "operator": seen,
        "old": seen,
    }


async def _first_line(tenants: Tenants, build_id: str, role: str) -> str:
    request = pb.TemplateBuildLogsRequest(build_id=build_id)
    try:
        [line] = await tenants.call("TemplateBuildLogs", request, role)
    except CallError as error:
        return error.reason
    assert isinstance(line, pb.TemplateBuildLogsResponse)
    return line.entry.message


async def test_images_pushed_for_another_tenant_cannot_be_named(tenants: Tenants) -> None:
    registry = tenants.api.settings.registry
    ids = {"template_id": "web", "build_id": str(uuid.uuid4())}
    own = {
        "owner": f"{registry}/tenants/acme/web:{ids['build_id']}",
        "stranger": f"{registry}/tenants/beta/web:{ids['build_id']}",
        "old": f"{registry}/web:{ids['build_id']}",
    }

    async def image_of(role: str, image: str) -> str:
        async with tenants.client(role) as client:
            return await client.image_of(template_of(from_image=image, **ids))

    for role, image in own.items():
        assert await image_of(role, "") == await image_of(role, image) == image
        for other in set(own) - {role}:
            for name in (image, f"{image.rpartition(':')[0]}@sha256:{'a' * 64}"):
                with pytest.raises(CallError) as error:
                    await image_of(other, name)
                assert error.value.reason == "IMAGE_NOT_ALLOWED"
        assert await image_of(role, IMAGE) == IMAGE
