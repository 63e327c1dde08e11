"""The REST API over a real gRPC API, and E2B's SDK on it; only a KVM host's activities are
replaced."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio

from activities.contract.errors import ImageStepError
from activities.store.bucket import Bucket
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from api.rest.requests import RequestLimits
from api.rest.server import Listening
from tests.support.e2b_sdk import VERSIONS, Sdk
from tests.support.example_template import metadata
from tests.support.published_base import write_metadata
from tests.support.running_api import Api
from tests.support.running_rest import IMAGE, KEY, Rest, rest_of

pytestmark = pytest.mark.counts_nothing


@pytest_asyncio.fixture
async def rest(api: Api) -> AsyncIterator[Rest]:
    listening = Listening("127.0.0.1:0", asks_for_tokens=False)
    async with rest_of(api.server.address, listening) as running:
        yield running


@pytest.fixture
def name() -> str:
    """A template of this test alone: all share a Temporal."""
    return f"web-{uuid.uuid4().hex[:8]}"


# ---- What the SDK does


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_sdk_builds_a_template_and_says_which_line_has_failed(
    api: Api, rest: Rest, name: str, version: str, tmp_path: Path
) -> None:
    api.journal.fail("run_steps", ImageStepError("it ended with 1", step_number=2))
    told = await Sdk(version, rest.url, KEY).run(
        tmp_path,
        f"""
        logs = []
        template = Template().from_image("{IMAGE}")
        template.set_envs({{"A": "1"}})
        template.run_cmd("make")  # the second step
        template.set_start_cmd("serve", "check")
        tell(exists=Template.exists("{name}"))
        try:
            Template.build(template, "{name}", **SMALL, skip_cache=True)
        except BuildException as error:
            tell(message=str(error), line=line_of(error))
        built = Template.build(template, "{name}", **SMALL, on_build_logs=logs.append)
        tell(exists=Template.exists("{name}"), name=built.name, build=built.build_id)
        tell(logs=[entry.message for entry in logs], status=Template.get_build_status(built).status)
        """,
    )
    before, failed, after, end = told
    assert "it ended with 1" in failed["message"]
    assert "→" in failed["message"]  # what to do next
    assert failed["line"].endswith("# the second step")
    assert (before["exists"], after["exists"], after["name"]) == (False, True, name)
    assert "Starting building..." in end["logs"]
    assert len(end["logs"]) > 6  # the SDK's own, and the build's
    assert "ready" in end["status"].lower()
    status = await api.client.status(after["build"])
    assert (status.state, status.template_id) == ("completed", name)


async def test_the_sdk_builds_on_a_template(
    api: Api, rest: Rest, empty_bucket: Bucket, name: str, tmp_path: Path
) -> None:
    sdk = Sdk(VERSIONS[-1], rest.url, KEY)
    build_id, _ = await rest.build(name)
    assert (await api.ended(build_id)).state == "completed"
    write_metadata(empty_bucket, metadata(build_id))  # the recording host publishes nothing
    told = await sdk.run(
        tmp_path,
        f"""
        async def build():
            template = AsyncTemplate().from_template("{build_id}").run_cmd("more")
            info = await AsyncTemplate.build_in_background(template, "more", **SMALL)
            tell(build=info.build_id)
            try:
                await AsyncTemplate.build(AsyncTemplate().from_template("none"), "more", **SMALL)
            except BuildException as error:
                tell(message=str(error))
        asyncio.run(build())
        """,
    )
    assert "404" in told[1]["message"] and "'none'" in told[1]["message"]
    [base] = [
        argument.build_id for name, argument in api.journal.arguments if name == "import_template"
    ]
    assert base == build_id


# ---- What is asked of templates


async def test_templates_are_listed_told_and_deleted(api: Api, rest: Rest, name: str) -> None:
    for each in (name, name, f"{name}-db"):
        build_id, status = await rest.build(each)
        assert status == 202
        await api.ended(build_id)
    web = (await until_listed(rest, name, 2))[0]
    assert (web["buildCount"], web["buildStatus"], web["memoryMB"]) == (2, "ready", 256)
    assert (web["names"], web["cpuCount"], web["diskSizeMB"]) == ([name], 2, 512)
    status, one = await rest.ask("GET", f"/templates/{name}")
    assert status == 200 and [each["status"] for each in one["builds"]] == ["ready", "ready"]
    assert one["builds"][0]["buildID"] == web["buildID"]
    alias = {"templateID": name, "public": False}
    assert await rest.ask("GET", f"/templates/aliases/{name}") == (200, alias)
    assert (await rest.ask("PATCH", f"/templates/{name}", json={"public": False}))[0] == 200
    patched = await rest.ask("PATCH", f"/v2/templates/{name}", json={"public": False})
    assert patched == (200, {"names": [name]})
    assert (await rest.ask("PATCH", f"/templates/{name}", json={"public": True}))[0] == 501
    assert await rest.ask("DELETE", f"/templates/{name}") == (204, None)
    await until_listed(rest, name, 1)
    assert (await rest.ask("GET", f"/templates/aliases/{name}"))[0] == 404
    assert (await rest.ask("DELETE", f"/templates/{name}"))[0] == 404


async def until_listed(rest: Rest, name: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many templates whose name begins so are listed: Temporal's lists lag."""
    async with asyncio.timeout(20):
        while True:
            _, listed = await rest.ask("GET", "/templates")
            found = [each for each in listed if each["templateID"].startswith(name)]
            if len(found) == count:
                return found
            await asyncio.sleep(0.1)


async def test_templates_come_in_pages(api: Api, rest: Rest, name: str) -> None:
    for letter in "abc":
        await api.ended((await rest.build(name + letter))[0])
    await until_listed(rest, name, 3)
    seen: list[str] = []
    token: str | None = ""
    async with aiohttp.ClientSession(headers={"X-API-KEY": KEY}) as session:
        while token is not None:
            query = {"limit": "2"} | ({"nextToken": token} if token else {})
            async with session.get(f"{rest.url}/v2/templates", params=query) as answer:
                seen += [each["templateID"] for each in await answer.json()]
                token = answer.headers.get("X-Next-Token")
    assert [each for each in seen if each.startswith(name)] == [name + each for each in "abc"]
    assert len(seen) == len({*seen})


async def test_log_lines_are_told_from_an_offset_and_from_a_moment_on(api: Api, rest: Rest) -> None:
    build_id, _ = await rest.build()
    await api.ended(build_id)
    path = f"/templates/web/builds/{build_id}"
    _, whole = await rest.ask("GET", f"{path}/status?logsOffset=0")
    lines = whole["logEntries"]
    assert len(lines) > 2 and whole["status"] == "ready" and whole["logs"] == []
    assert {"timestamp", "message", "level"} <= set(lines[0])
    _, later = await rest.ask("GET", f"{path}/status?logsOffset=1&limit=1")
    assert later["logEntries"] == lines[1:2]
    _, none = await rest.ask("GET", f"{path}/status?logsOffset={len(lines)}&limit=9999999")
    assert none["logEntries"] == []
    _, errors = await rest.ask("GET", f"{path}/status?level=error")
    assert errors["logEntries"] == []
    _, all_logs = await rest.ask("GET", f"{path}/logs?cursor=0&direction=forward")
    assert all_logs["logs"] == lines
    _, backward = await rest.ask("GET", f"{path}/logs?direction=backward&limit=2")
    assert backward["logs"] == lines[::-1][:2]
    for query in ("logsOffset=-1", "limit=x", "level=loud", "logsOffset=" + "9" * 30):
        assert (await rest.ask("GET", f"{path}/status?{query}"))[0] == 400, query


async def test_a_template_may_be_called_by_its_name_in_every_path(api: Api, rest: Rest) -> None:
    name = f"web_{uuid.uuid4().hex[:8]}"  # no template's id: that has no _
    template_id = name.replace("_", "-")
    files = f"files/{'a' * 64}"
    assert (await rest.ask("GET", f"/templates/{name}/{files}"))[0] == 404
    build_id, status = await rest.build(name)
    assert status == 202
    await api.ended(build_id)
    for called in (template_id, name, name.upper()):
        build = f"/templates/{called}/builds/{build_id}"
        told = await until_ready(rest, build)
        assert told["buildID"] == build_id
        assert told["templateID"] == template_id
        assert (await rest.ask("GET", f"{build}/logs"))[1]["logs"] == told["logEntries"]
        assert (await rest.ask("GET", f"/templates/{called}/{files}"))[0] == 201
        assert (await rest.ask("GET", f"/templates/{called}/tags"))[0] == 200
        assert (await rest.ask("GET", f"/templates/{called}"))[1]["templateID"] == template_id
    other, _ = await rest.build("other")
    for called in ("other", "none", "a b", "x" * 200):
        status, told = await rest.ask("GET", f"/templates/{called}/builds/{build_id}/status")
        assert (status, told["error_code"]) == (404, "BUILD_NOT_FOUND"), (called, told)
    assert (await rest.ask("DELETE", f"/templates/{name.upper()}"))[0] == 204
    await api.ended(other)


async def until_ready(rest: Rest, build: str) -> dict[str, Any]:
    """Ask for a build that has ended until that is told: a busy API tells what it knew last."""
    async with asyncio.timeout(60):
        while True:
            status, told = await rest.ask("GET", f"{build}/status")
            assert status == 200, told
            if told["status"] == "ready" and told["logEntries"]:
                assert isinstance(told, dict)
                return told
            await asyncio.sleep(0.2)


async def test_tags_are_told_moved_and_taken_away(
    api: Api, rest: Rest, empty_bucket: Bucket, name: str
) -> None:
    build_id, _ = await rest.build(name)
    await api.ended(build_id)
    write_metadata(empty_bucket, metadata(build_id, template_id=name))
    async with grpc.aio.insecure_channel(api.server.address) as channel:
        assign = pb_grpc.TemplateServiceStub(channel).TemplateTagsAssign
        await assign(pb.TemplateTagsAssignRequest(name=name, tags=["v1"], build_id=build_id))
    move = {"target": f"{name}:v1", "tags": ["stable", "default"]}
    told = await rest.ask("POST", "/templates/tags", json=move)
    assert told == (201, {"tags": ["stable", "default"], "buildID": build_id})
    take = {"name": name, "tags": ["stable"]}
    assert await rest.ask("DELETE", "/templates/tags", json=take) == (204, None)
    _, tags = await rest.ask("GET", f"/templates/{name}/tags")
    assert {(each["tag"], each["buildID"]) for each in tags} == {
        ("v1", build_id),
        ("default", build_id),
    }
    # Nothing is taken for all.
    for body in ({"name": name}, {"name": name, "tags": []}):
        assert (await rest.ask("DELETE", "/templates/tags", json=body))[0] == 400
    for target in (f"{name}:none", "none", "a:b:c", ""):
        body = {"target": target, "tags": ["x"]}
        assert (await rest.ask("POST", "/templates/tags", json=body))[0] in (400, 404), target
    assert (await rest.ask("GET", "/templates/none/tags"))[0] == 404


# ---- What is refused


async def test_a_build_starts_once(api: Api, rest: Rest) -> None:
    build_id, status = await rest.build()
    path = f"/v2/templates/web/builds/{build_id}"
    assert status == 202
    assert (await rest.ask("POST", path, json={"fromImage": IMAGE}))[0] == 202
    status, told = await rest.ask("POST", path, json={"fromImage": "127.0.0.1:5000/other:1"})
    assert (status, told["code"]) == (409, 409)
    assert told["error_code"] == "BUILD_EXISTS_WITH_OTHER_CONFIG"


async def test_bad_requests_are_told_in_the_callers_words(rest: Rest) -> None:
    async def told(path: str, body: object) -> str:
        status, answer = await rest.ask("POST", path, json=body)
        assert (status, answer["code"]) == (400, 400), answer
        return str(answer["message"])

    assert "name" in await told("/v3/templates", {"memoryMB": 256})
    assert "name" in await told("/v3/templates", {"name": "Not/a/name"})
    assert "tags[1]" in await told("/v3/templates", {"name": "web", "tags": ["v1", "a b"]})
    assert "memoryMB" in await told("/v3/templates", {"name": "web", "memoryMB": 1 << 40})
    assert "cpuCount" in await told("/v3/templates", {"name": "web", "cpuCount": "many"})
    asked = {"name": "web", "cpuCount": 3, "memoryMB": 1}
    _, build = await rest.ask("POST", "/v3/templates", json=asked)
    start = f"/v2/templates/web/builds/{build['buildID']}"
    wrong = {"fromImage": IMAGE, "steps": [{"type": "RUN", "args": ["x"]}, {"type": "NO"}]}
    message = await told(start, wrong)
    assert all(word in message for word in ("cpuCount", "memoryMB", "steps[1]"))
    assert "vcpu" not in message and "template." not in message
    assert "one of" in await told(start, {})
    assert "one of" in await told(start, {"fromImage": IMAGE, "fromTemplate": "web"})
    secret = {"type": "registry", "username": "me", "password": {"hunter2": 1}}
    message = await told(start, {"fromImage": IMAGE, "fromImageRegistry": secret})
    assert "fromImageRegistry" in message and "hunter2" not in message


async def test_an_id_that_was_not_given_out_starts_nothing(rest: Rest) -> None:
    for build_id in (str(uuid.uuid4()), "x", str(uuid.UUID(int=0))):
        path = f"/v2/templates/web/builds/{build_id}"
        assert (await rest.ask("POST", path, json={"fromImage": IMAGE}))[0] == 404
    path = f"/templates/web/builds/{uuid.uuid4()}/status"
    status, told = await rest.ask("GET", path)
    assert (status, told["error_code"]) == (404, "BUILD_NOT_FOUND")


async def test_what_is_not_served_is_told(rest: Rest) -> None:
    for method, path in (("POST", "/sandboxes"), ("GET", "/v2/sandboxes"), ("PUT", "/templates")):
        status, told = await rest.ask(method, path)
        assert status in (404, 405)
        assert "runs no sandboxes" in told["message"]


async def test_large_broken_and_slow_bodies_are_refused(rest: Rest) -> None:
    large = await rest.ask("POST", "/v3/templates", data=b" " * (RequestLimits().body_bytes + 1))
    assert large[0] == 413

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    with contextlib.suppress(aiohttp.ClientError):  # it may be cut off while it sends
        assert (await rest.ask("POST", "/v3/templates", data=endless()))[0] == 413
    for broken in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000):
        status, told = await rest.ask("POST", "/v3/templates", data=broken)
        assert (status, told["code"]) == (400, 400), broken[:10]
    assert (await rest.ask("GET", "/templates"))[0] == 200


async def test_a_token_is_wanted_and_said_to_be_wrong(rest: Rest) -> None:
    for headers in ({}, {"X-API-KEY": ""}, {"X-API-KEY": " "}, {"X-API-KEY": "a b"}):
        status, told = await rest.ask("GET", "/templates", headers=headers)
        assert (status, told["code"]) == (401, 401)
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert (await rest.ask("GET", "/templates", headers=bearer))[0] == 200


async def test_requests_are_counted_by_path_and_health_is_told(rest: Rest) -> None:
    await rest.ask("GET", "/templates/aliases/none")
    assert rest.seen == [("GET", "/templates/aliases/{template_id}", 404)]
    async with aiohttp.ClientSession() as session, session.get(f"{rest.url}/health") as answer:
        assert (answer.status, await answer.text()) == (200, "ok")
