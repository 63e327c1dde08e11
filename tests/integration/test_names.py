"""Names of templates and their tags: objects of a real bucket, and the API over them."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import (
    NamesBeyondLimitError,
    NameTakenError,
    StorageUnavailableError,
    TemplateNotFoundError,
)
from activities.contract.inputs import DeleteTemplateInput, MoveTagsInput
from activities.contract.references import TemplateReference
from activities.store import names as store
from activities.store.bucket import Bucket
from activities.store.names import AwaitedBuild, TenantNames, find_build, list_names
from activities.store.objects import metadata_name, names_object
from activities.template.naming import BucketNameActivities
from api.client.client import CallError
from api.pb import template_manager_pb2 as pb
from tests.support.example_template import metadata
from tests.support.layered_bucket import deleting
from tests.support.running_api import Api

pytestmark = pytest.mark.counts_nothing

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DEFAULT = "default"


def published(bucket: Bucket, build_id: str = "", template_id: str = "web") -> str:
    """Publish a template as far as names look at it; return its build's id."""
    build_id = build_id or str(uuid.uuid4())
    told = metadata(build_id).model_copy(update={"template_id": template_id})
    bucket.write_object(metadata_name(build_id), told.model_dump_json().encode())
    return build_id


@pytest.fixture
def names(empty_bucket: Bucket) -> TenantNames:
    return TenantNames(empty_bucket, DEFAULT)


def stands(names: TenantNames, tag: str) -> str:
    return names.resolve(TemplateReference("", "web", tag))


def test_tags_move_together_and_what_they_stood_for_is_kept(
    names: TenantNames, empty_bucket: Bucket
) -> None:
    first, second = published(empty_bucket), published(empty_bucket)
    names.assign("web", first, ("stable", "v1"), asked=NOW)
    names.assign("web", second, ("stable", "v2"), asked=NOW + timedelta(hours=1))
    assert [stands(names, tag) for tag in ("stable", "v1", "v2")] == [second, first, second]
    assert find_build(empty_bucket, "web:stable") == second
    assert find_build(empty_bucket, "default/web:v1") == first
    assert find_build(empty_bucket, first.upper()) == first
    rolled = names.roll_back("web", "stable", asked=NOW)
    assert (rolled.tags["stable"].build_id, rolled.tags["stable"].previous) == (first, ())
    with pytest.raises(TemplateNotFoundError, match="has stood for no other build"):
        names.roll_back("web", "stable", asked=NOW)


def test_a_build_that_was_asked_for_earlier_and_ends_later_moves_nothing(
    names: TenantNames, empty_bucket: Bucket
) -> None:
    slow, quick = published(empty_bucket), published(empty_bucket)
    names.assign("web", quick, ("stable",), asked=NOW)
    moved = names.assign("web", slow, ("stable", "slow"), asked=NOW - timedelta(seconds=1))
    assert moved.kept == ("stable",)
    assert (stands(names, "stable"), stands(names, "slow")) == (quick, slow)
    # The same again changes nothing: an activity may run twice.
    before = empty_bucket.read_object(names_object(DEFAULT, "web"))
    names.assign("web", slow, ("stable", "slow"), asked=NOW - timedelta(seconds=1))
    assert empty_bucket.read_object(names_object(DEFAULT, "web")) == before


def test_what_is_not_published_gets_no_tag(names: TenantNames, empty_bucket: Bucket) -> None:
    with pytest.raises(TemplateNotFoundError, match="is not published"):
        names.assign("web", str(uuid.uuid4()), ("stable",), asked=NOW)
    another = published(empty_bucket)
    with pytest.raises(TemplateNotFoundError, match="is not published"):
        TenantNames(empty_bucket, "acme").assign("web", another, ("stable",), asked=NOW)
    assert empty_bucket.list_objects("names/") == []


def test_a_name_is_one_template_s_and_a_template_has_one_name(
    names: TenantNames, empty_bucket: Bucket
) -> None:
    names.reserve("web", "web", awaited={}, now=NOW)
    with pytest.raises(NameTakenError, match="is that of template web"):
        names.reserve("web", "api", awaited={}, now=NOW)
    with pytest.raises(NameTakenError, match="has a name, which is web"):
        names.reserve("other", "web", awaited={}, now=NOW)
    with pytest.raises(NameTakenError):
        names.assign("web", published(empty_bucket, template_id="api"), ("v1",), asked=NOW)
    # Another tenant's names are others.
    TenantNames(empty_bucket, "acme").reserve("web", "api", awaited={}, now=NOW)
    assert [named.tenant for named in list_names(empty_bucket, None)] == ["acme", DEFAULT]


def test_many_who_move_tags_at_once_lose_none(names: TenantNames, empty_bucket: Bucket) -> None:
    builds = {f"v{number}": published(empty_bucket) for number in range(6)}
    with ThreadPoolExecutor(len(builds)) as pool:
        list(pool.map(lambda tag: names.assign("web", builds[tag], (tag,), asked=NOW), builds))
    assert {tag: stands(names, tag) for tag in builds} == builds


def test_names_tags_and_builds_that_wait_have_limits(
    names: TenantNames, empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = published(empty_bucket)
    monkeypatch.setattr(store, "MAX_TAGS", 2)
    names.assign("web", build, ("a", "b"), asked=NOW)
    with pytest.raises(NamesBeyondLimitError, match="would have 3 tags; 2 are allowed"):
        names.assign("web", build, ("c",), asked=NOW)
    monkeypatch.setattr(store, "MAX_NAMES", 1)
    with pytest.raises(NamesBeyondLimitError, match="has 1 names; 1 are allowed"):
        names.reserve("other", "other", awaited={}, now=NOW)
    monkeypatch.setattr(store, "MAX_AWAITED", 2)
    waiting = [str(uuid.uuid4()) for _ in range(3)]
    for number, build_id in enumerate(waiting):
        asked = NOW + timedelta(seconds=number)
        awaited = {build_id: AwaitedBuild(tags=("a",), asked=asked)}
        kept = names.reserve("web", "web", awaited=awaited, now=asked)
    assert [*kept.awaited] == waiting[1:]


def test_a_bucket_where_others_always_win_is_unavailable(
    names: TenantNames, empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "TRIES", 3)
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(TenantNames, "_written", lambda *_: False)
    with pytest.raises(StorageUnavailableError, match="are being moved by others"):
        names.reserve("web", "web", awaited={}, now=NOW)


async def test_the_activities_move_tags_and_take_them_away_with_the_build(
    names: TenantNames, empty_bucket: Bucket
) -> None:
    first, second = published(empty_bucket), published(empty_bucket)
    moving = BucketNameActivities(empty_bucket)
    for build_id, tags in ((first, ("v1", "stable")), (second, ("v2", "stable"))):
        move = MoveTagsInput(tenant=DEFAULT, name="web", tags=tags, build_id=build_id, asked=NOW)
        for _ in range(2):
            moved = await ActivityEnvironment().run(moving.move_tags, move)
            assert moved.kept == ()
    removing = deleting(empty_bucket)

    async def deleted(build_id: str) -> tuple[str, ...]:
        what = DeleteTemplateInput(template_id="web", build_id=build_id)
        return (await ActivityEnvironment().run(removing.delete_objects, what)).names

    assert await deleted(second) == ("web:stable", "web:v2")
    left = names.read("web")
    assert left is not None and left.tags_of(first) == ["v1"]
    assert await deleted(first) == ("web:v1", "web")
    assert names.read("web") is None
    assert await deleted(first) == ()


async def test_a_build_gets_its_tags_when_it_is_published(api: Api, empty_bucket: Bucket) -> None:
    build_id = await api.completed(template_id="", name="web_site", tags=["stable", "v1", "v1"])
    [move] = [argument for name, argument in api.journal.arguments if name == "move_tags"]
    assert (move.name, move.tags, move.build_id) == ("web_site", ("stable", "v1"), build_id)
    # The name is its template's since it was asked for, the tags are its own when it is published.
    [name] = (await api.client.names(pb.TemplateNameListRequest())).names
    assert (name.name, name.template_id, [*name.tags]) == ("web_site", "web-site", [])
    [awaited] = name.awaited
    assert (awaited.build_id, [*awaited.tags]) == (build_id, ["stable", "v1"])
    assert (awaited.memory_mb, awaited.vcpu_count, awaited.disk_size_mb) == (512, 1, 512)
    with pytest.raises(CallError) as error:
        await api.client.create(api.template(template_id="other", name="web_site"))
    assert (error.value.code, error.value.reason) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "NAME_TAKEN",
    )


async def test_a_tag_stands_wherever_a_build_id_does(api: Api, empty_bucket: Bucket) -> None:
    build_id = published(empty_bucket, await api.completed())
    assigned = await api.client.assign_tags(
        pb.TemplateTagsAssignRequest(name="web", tags=["stable", "default"], build_id=build_id)
    )
    assert [(tag.tag, tag.build_id) for tag in assigned.tags] == [
        ("default", build_id),
        ("stable", build_id),
    ]
    for written in ("web", "web:stable", "default/web:stable"):
        assert (await api.client.status(written)).state == "completed"
        assert [line async for line in api.client.logs(written)]
        for call in (api.client.retry, api.client.cancel):
            with pytest.raises(CallError) as error:
                await call(written)
            assert build_id in error.value.message
        base = pb.FromTemplateConfig(build_id=written)
        created = await api.client.create(api.template(from_image=None, from_template=base))
        await api.ended(created.build_id)
    base = pb.FromTemplateConfig(alias="web:stable")
    await api.completed(from_image=None, from_template=base)
    takes = [argument for name, argument in api.journal.arguments if name == "import_template"]
    assert {take.build_id for take in takes} == {build_id}
    promoted = await api.client.assign_tags(
        pb.TemplateTagsAssignRequest(name="web", tags=["live"], build_id="web:stable")
    )
    assert {tag.build_id for tag in promoted.tags} == {build_id}
    async with asyncio.timeout(20):  # visibility lags behind
        while True:
            page = await api.client.list_builds(pb.TemplateBuildListRequest(page_size=100))
            if shown := [b.names for b in page.builds if b.build_id == build_id]:
                break
            await asyncio.sleep(0.2)
    assert [*shown[0]] == ["web:default", "web:live", "web:stable"]
    await api.client.delete("web:stable")
    with pytest.raises(CallError) as error:
        await api.client.status(build_id)
    assert error.value.code is grpc.StatusCode.NOT_FOUND


RPCS = {
    method.name: method.input_type.name
    for method in pb.DESCRIPTOR.services_by_name["TemplateService"].methods
    if "build_id" in method.input_type.fields_by_name
}
"""Every rpc that takes a build's id, and its request."""


async def outcome(api: Api, rpc: str, written: str) -> list[object]:
    """Call an rpc about a build; return all that is told, but for when."""
    kind = getattr(pb, RPCS[rpc])
    asked = kind(build_id=written, **({"name": "web"} if rpc == "TemplateTagsAssign" else {}))
    call = getattr(api.client._stub, rpc)(asked)
    try:
        if rpc == "TemplateBuildLogs":
            return [line.entry.message async for line in call]
        answer = await call
    except grpc.aio.AioRpcError as error:
        return [error.code(), error.details()]
    if rpc == "TemplateBuildStatus":
        return [answer.build_id, answer.state]
    if rpc == "TemplateBuildInspect":
        return [answer.build_id, answer.own_bytes]
    if rpc == "TemplateTagsAssign":
        return [(tag.tag, tag.build_id) for tag in answer.tags]
    return [(key, value) for key, value in await call.trailing_metadata() if key == "build-id"]


async def test_every_rpc_about_a_build_takes_what_people_call_it(
    api: Api, empty_bucket: Bucket
) -> None:
    build_id = published(empty_bucket, await api.completed())
    assign = pb.TemplateTagsAssignRequest(name="web", tags=["a.1", "default"], build_id=build_id)
    await api.client.assign_tags(assign)
    last = "TemplateBuildDelete"
    for rpc in (*(rpc for rpc in RPCS if rpc != last), last):
        told = [
            await outcome(api, rpc, written)
            for written in (build_id, build_id.upper(), "web:a.1", "web", "default/web:a.1")
            if rpc != last or written == "web:a.1"
        ]
        assert all(told[0] == each for each in told), (rpc, told)
        assert build_id in str(told[0]) or rpc == "TemplateBuildLogs", (rpc, told)
    with pytest.raises(CallError) as error:
        await api.client.status(build_id)
    assert error.value.code is grpc.StatusCode.NOT_FOUND


async def test_what_a_base_was_called_is_told_with_the_template(
    api: Api, empty_bucket: Bucket
) -> None:
    build_id = published(empty_bucket, await api.completed())
    await api.client.assign_tags(pb.TemplateTagsAssignRequest(name="web", build_id=build_id))
    for base, alias in (
        (pb.FromTemplateConfig(build_id="web"), "web"),
        (pb.FromTemplateConfig(alias="default/web:default"), "default/web:default"),
        (pb.FromTemplateConfig(build_id=build_id, alias="web"), "web"),
        (pb.FromTemplateConfig(build_id=build_id), ""),
    ):
        await api.completed(from_image=None, from_template=base)
        publishes = [told for name, told in api.journal.arguments if name == "publish_template"]
        source = publishes[-1].config.source
        assert (source.build_id, source.alias) == (build_id, alias)


@pytest.mark.parametrize("written", ["", "No Name", "web:", "a/b/c", "x" * 200, "web:a\n"])
async def test_what_can_stand_for_no_build_is_named(api: Api, written: str) -> None:
    with pytest.raises(CallError) as error:
        await api.client.status(written)
    assert [violation.field for violation in error.value.violations] == ["build_id"]
    with pytest.raises(CallError) as error:
        await api.client.status("web:unknown")
    assert (error.value.code, error.value.reason) == (
        grpc.StatusCode.NOT_FOUND,
        "TEMPLATE_NOT_FOUND",
    )


async def test_wrong_names_and_tags_are_named_with_all_else(api: Api) -> None:
    with pytest.raises(CallError) as error:
        await api.client.create(api.template(name="No", tags=["a", "-b"], memory_mb=1))
    fields = {violation.field for violation in error.value.violations}
    assert fields == {"template.name", "template.tags[1]", "template.memory_mb"}
    with pytest.raises(CallError) as error:
        await api.client.create(api.template(tags=["a"]))
    assert [violation.field for violation in error.value.violations] == ["template.tags"]


async def test_a_tag_of_what_is_not_published_is_refused(api: Api) -> None:
    build_id = await api.running_until("build_rootfs")
    with pytest.raises(CallError) as error:
        await api.client.assign_tags(pb.TemplateTagsAssignRequest(name="web", build_id=build_id))
    assert (error.value.code, error.value.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "BUILD_NOT_PUBLISHED",
    )


async def test_a_name_is_reserved_looked_up_rolled_back_and_taken_away(
    api: Api, empty_bucket: Bucket
) -> None:
    """What the REST API of E2B's SDKs is made of."""
    stub = api.client._stub
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.TemplateNameGet(pb.TemplateNameGetRequest(name="web"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    wanted = pb.TemplateNameReserveRequest(name="web", tags=["v1"], memory_mb=512, vcpu_count=2)
    reserved = await stub.TemplateNameReserve(wanted)
    assert (reserved.template_id, [*reserved.tags]) == ("web", ["v1"])
    for request in (
        pb.TemplateNameGetRequest(name="web"),
        pb.TemplateNameGetRequest(name="default/web"),
        pb.TemplateNameGetRequest(template_id="web"),
    ):
        [awaited] = (await stub.TemplateNameGet(request)).awaited
        assert (awaited.build_id, awaited.memory_mb) == (reserved.build_id, 512)
    first, second = [published(empty_bucket, await api.completed()) for _ in range(2)]
    for build_id in (first, second):
        await api.client.assign_tags(pb.TemplateTagsAssignRequest(name="web", build_id=build_id))
    back = await api.client.assign_tags(pb.TemplateTagsAssignRequest(name="web", roll_back=True))
    assert [(tag.tag, tag.build_id, [*tag.previous]) for tag in back.tags] == [
        ("default", first, [])
    ]
    assert [*(await api.client.remove_tags("web", ["default"])).tags] == []
    await api.client.remove_tags("web", [])
    assert empty_bucket.list_objects("names/") == []
    with pytest.raises(CallError) as failure:
        await api.client.remove_tags("web", [])
    assert failure.value.code is grpc.StatusCode.NOT_FOUND


async def test_names_come_in_pages(api: Api, empty_bucket: Bucket) -> None:
    for name in ("a", "a-b", "a-c", "a0", "b"):  # as objects they lie in another order
        TenantNames(empty_bucket, DEFAULT).reserve(name, name, awaited={}, now=NOW)
    TenantNames(empty_bucket, "acme").reserve("z", "z", awaited={}, now=NOW)
    request, found = pb.TemplateNameListRequest(page_size=2), []
    while True:
        page = await api.client.names(request)
        found += [(name.tenant, name.name) for name in page.names]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    own = [(DEFAULT, name) for name in ("a", "a-b", "a-c", "a0", "b")]
    assert found == [("acme", "z"), *own]
