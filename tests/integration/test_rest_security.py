"""Who gets through the REST API to the gRPC API, and as whom; TLS; connections that say nothing."""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from starlette.routing import Route

from activities.process.settings import Settings
from api.cli.rest_process import serve
from api.client.credentials import ClientCredentials
from api.rest.app import rest_app
from api.rest.calls import Upstream
from api.rest.requests import RequestLimits
from api.rest.server import ListenError, Listening, running_rest
from api.server.access import hash_token
from api.server.server import BindError, running_server
from tests.support.certificates import Authority
from tests.support.command_line import cli
from tests.support.running_api import Api
from tests.support.running_rest import KEY, Rest, rest_of

pytestmark = pytest.mark.counts_nothing

LOOPBACK = Listening("127.0.0.1:0")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def key(token: str) -> dict[str, dict[str, str]]:
    return {"headers": {"X-API-KEY": token}}


async def test_a_key_is_its_tenants_token(api: Api, tmp_path: Path) -> None:
    rights = {"e2b_a": "build tenant=acme", "e2b_r": "read tenant=acme", "e2b_b": "build tenant=b"}
    tokens = tmp_path / "tokens"
    tokens.write_text("".join(f"x {hash_token(name)} {right}\n" for name, right in rights.items()))
    settings = api.settings.model_copy(update={"tokens_file": tokens})
    async with (
        running_server(api.temporal, settings) as guarded,
        rest_of(guarded.address, LOOPBACK) as rest,
    ):
        asked = {"json": {"name": "of-acme", "memoryMB": 256}}
        for wrong in (KEY, "", "é"):
            assert (await rest.ask("GET", "/templates", **key(wrong)))[0] == 401
        status, build = await rest.ask("POST", "/v3/templates", **asked, **key("e2b_a"))
        assert status == 202
        start = f"/v2/templates/of-acme/builds/{build['buildID']}"
        image = {"json": {"fromImage": PUBLIC}}
        api.ids.append(build["buildID"])
        status, refused = await rest.ask("POST", start, **image, **key("e2b_r"))
        assert (status, refused["error_code"]) == (403, "RIGHT_MISSING")
        assert (await rest.ask("POST", start, **image, **key("e2b_a")))[0] == 202
        path = f"/templates/of-acme/builds/{build['buildID']}/status"
        assert (await rest.ask("GET", path, **key("e2b_r")))[0] == 200
        assert (await rest.ask("GET", path, **key("e2b_b")))[0] == 404
        assert (await rest.ask("DELETE", "/templates/of-acme", **key("e2b_b")))[0] == 404


HASH = "a" * 64
PUBLIC = "127.0.0.1:5000/demo/web:1"
BODIES: dict[tuple[str, str], dict[str, object] | None] = {
    ("POST", "/v3/templates"): None,  # it is about no other's
    ("GET", "/templates"): None,
    ("GET", "/v2/templates"): None,
    ("GET", "/templates/{template_id}/files/{hash}"): {},
    ("POST", "/v2/templates/{template_id}/builds/{build_id}"): {"fromImage": PUBLIC},
    ("GET", "/templates/{template_id}/builds/{build_id}/status"): {},
    ("GET", "/templates/{template_id}/builds/{build_id}/logs"): {},
    ("GET", "/templates/aliases/{template_id}"): {},
    ("POST", "/templates/tags"): {"target": "{template_id}:v1", "tags": ["v2"]},
    ("DELETE", "/templates/tags"): {"name": "{template_id}", "tags": ["v1"]},
    ("GET", "/templates/{template_id}/tags"): {},
    ("GET", "/templates/{template_id}"): {},
    ("PATCH", "/templates/{template_id}"): {"public": False},
    ("PATCH", "/v2/templates/{template_id}"): {"public": False},
    ("DELETE", "/templates/{template_id}"): {},
}
"""Every route, with the body of a request about a template; None where it is about none."""


async def test_every_route_is_thought_of() -> None:
    upstream = Upstream("127.0.0.1:1", ClientCredentials(), must_know_callers=False)
    app = rest_app(upstream, lambda method, path, status, seconds: None, RequestLimits())
    routes = [route for route in app.routes if isinstance(route, Route)]
    served = {(method, each.path) for each in routes for method in (each.methods or ())}
    await upstream.close()
    assert {each for each in served if each[0] != "HEAD"} - {("GET", "/health")} == {*BODIES}


def put_in(pattern: str, template: str, build: str) -> str:
    """Fill in what a route, or a body, is about."""
    for name, value in (("template_id", template), ("build_id", build), ("hash", HASH)):
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern


@asynccontextmanager
async def two_tenants(api: Api, place: Path) -> AsyncIterator[tuple[Rest, str]]:
    """Have a REST API that knows acme, which has built the template `of-acme`, and b."""
    tokens = place / "tokens"
    rights = {"e2b_a": "build tenant=acme", "e2b_b": "build tenant=b", "e2b_o": "operator tenant=o"}
    tokens.write_text("".join(f"x {hash_token(name)} {right}\n" for name, right in rights.items()))
    settings = api.settings.model_copy(update={"tokens_file": tokens})
    async with (
        running_server(api.temporal, settings) as guarded,
        rest_of(guarded.address, LOOPBACK) as rest,
    ):
        asked = {"name": "of-acme", "memoryMB": 256}
        _, build = await rest.ask("POST", "/v3/templates", json=asked, **key("e2b_a"))
        api.ids.append(build["buildID"])
        start = f"/v2/templates/of-acme/builds/{build['buildID']}"
        assert (await rest.ask("POST", start, json={"fromImage": PUBLIC}, **key("e2b_a")))[0] == 202
        yield rest, build["buildID"]


async def test_another_tenant_s_template_is_as_one_that_never_was(api: Api, tmp_path: Path) -> None:
    async with two_tenants(api, tmp_path) as (rest, build_id):
        for (method, path), body in BODIES.items():
            if body is None:
                continue
            told = []
            for template, build in (("of-acme", build_id), ("of-nobody", str(uuid.uuid4()))):
                filled = {"data": put_in(json.dumps(body), template, build)} if body else {}
                asked = put_in(path, template, build)
                status, answer = await rest.ask(method, asked, **filled, **key("e2b_b"))
                plain = json.dumps(answer).replace(template, "T").replace(build, "B")
                told.append((status, plain))
            assert told[0] == told[1], (method, path)
            assert told[0][0] == 404, (method, path, told)
        assert (await rest.ask("GET", "/templates", **key("e2b_b"))) == (200, [])
        assert (await rest.ask("GET", "/v2/templates?nextToken=", **key("e2b_b"))) == (200, [])
        # Of the same name they have each their own, and acme's is as it was.
        same = {"name": "of-acme", "memoryMB": 256}
        status, own = await rest.ask("POST", "/v3/templates", json=same, **key("e2b_b"))
        assert (status, own["buildID"] == build_id) == (202, False)
        assert (await rest.ask("DELETE", "/templates/of-acme", **key("e2b_b")))[0] == 204
        path = f"/templates/of-acme/builds/{build_id}/status"
        assert (await rest.ask("GET", path, **key("e2b_a")))[0] == 200


async def test_an_operator_s_template_is_not_all_tenants_of_that_name(
    api: Api, tmp_path: Path
) -> None:
    """It sees them all: to delete its own must not be to delete theirs."""
    async with two_tenants(api, tmp_path) as (rest, build_id):
        same = {"name": "of-acme", "memoryMB": 256}
        assert (await rest.ask("POST", "/v3/templates", json=same, **key("e2b_o")))[0] == 202
        async with asyncio.timeout(60):  # Temporal's lists lag
            while not (theirs := [each for each in await build_counts(rest) if each]):
                await asyncio.sleep(0.1)
        _, own = await rest.ask("GET", "/templates/of-acme", **key("e2b_o"))
        assert (own["buildCount"], own["builds"]) == (0, [])
        assert (await rest.ask("DELETE", "/templates/of-acme", **key("e2b_o")))[0] == 204
        path = f"/templates/of-acme/builds/{build_id}/status"
        assert (await rest.ask("GET", path, **key("e2b_a")))[0] == 200
        assert await build_counts(rest) == theirs


async def build_counts(rest: Rest) -> list[int]:
    _, listed = await rest.ask("GET", "/templates", **key("e2b_o"))
    return sorted(each["buildCount"] for each in listed if each["names"] == ["of-acme"])


ODD = ("..%2f..", "%00", "a%0ab", "%C3%A9", "%ff", "x" * 5000, "'%20OR%20''='", "web:a:b", "{}")
ODD_BODIES: tuple[object, ...] = (
    *(None, [], "web", 1e400, {}, {"name": None}, {"name": {}}, {"name": "a" * 100_000}),
    *({"name": "web", "tags": "v1"}, {"name": "web", "tags": [None]}, {"name": "web\x00"}),
    *({"name": "web", "tags": ["a"] * 10_000}, {"name": "web", "cpuCount": -1}),
    *({"name": "web", "memoryMB": 1e30}, {"name": "web", "minFreeDiskMB": "a"}),
    *({"target": ":", "tags": ["x"]}, {"target": "/", "tags": ["x"]}, {"public": "perhaps"}),
    *({"fromImage": PUBLIC, "steps": [{}]}, {"fromImage": PUBLIC, "steps": {"type": "RUN"}}),
    *(
        {"fromImage": PUBLIC, "steps": [{"type": "RUN", "args": ["x"]}] * 5000},
        {"fromImage": "\ud800"},
    ),
    *({"fromImage": PUBLIC, "fromImageRegistry": {"type": "none"}}, {"fromTemplate": "../x"}),
)
ODD_QUERY = "?logsOffset=1e3&limit=-1&level=%00&cursor=9e9&direction=%ff&nextToken=%00%ff/../"


async def test_odd_values_are_refused_in_words_on_every_route(api: Api) -> None:
    async def require_told(method: str, path: str, data: str | None = None) -> None:
        status, answer = await rest.ask(method, path, data=data)
        what = (method, path[:100], (data or "")[:100], status, answer)
        assert status < 500 or answer.get("error_code") == "NOT_SERVED", what
        if status >= 400:
            assert answer["code"] == status and answer["message"], what
            assert len(answer["message"]) < 3000, what

    async with rest_of(api.server.address, Listening("127.0.0.1:0", asks_for_tokens=False)) as rest:
        for (method, path), body in BODIES.items():
            plain = json.dumps(body) if body else None
            for odd in ODD:
                await require_told(method, put_in(path, odd, odd).replace(HASH, odd), plain)
            await require_told(method, put_in(path, "web", str(uuid.uuid4())) + ODD_QUERY, plain)
            if method in ("POST", "PATCH") or path == "/templates/tags":
                for wrong in ODD_BODIES:
                    asked = put_in(path, "web", str(uuid.uuid4()))
                    await require_told(method, asked, json.dumps(wrong))


async def test_nobody_borrows_the_certificate_of_the_rest_api(
    api: Api, authority: Authority, tmp_path: Path
) -> None:
    """The gRPC API knows it as an operator; those who come through it are themselves."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"rest cert:rest operator\nacme {hash_token('e2b_a')} read tenant=acme\n")
    certificate, private = authority.issue("server")
    own, own_key = authority.issue("rest")
    settings = api.settings.model_copy(
        update={
            "tls_cert": certificate,
            "tls_key": private,
            "tls_client_ca": authority.path,
            "tokens_file": tokens,
        }
    )
    credentials = ClientCredentials(
        tls_ca=authority.path, tls_client_cert=own, tls_client_key=own_key
    )
    async with (
        running_server(api.temporal, settings) as guarded,
        rest_of(guarded.address, LOOPBACK, credentials) as rest,
    ):
        assert (await rest.ask("GET", "/templates", headers={}))[0] == 401
        assert (await rest.ask("GET", "/templates", **key(KEY)))[0] == 401
        assert (await rest.ask("GET", "/templates", **key("e2b_a")))[0] == 200


async def test_an_address_of_others_is_served_only_where_the_api_knows_its_callers(
    api: Api, tmp_path: Path
) -> None:
    async with rest_of(api.server.address, LOOPBACK) as rest:
        status, told = await rest.ask("GET", "/templates", **key(KEY))
        assert (status, told["error_code"]) == (503, "CALLERS_NOT_KNOWN")
    with pytest.raises(BindError, match="no TLS"):
        await serve(Settings(rest_address="0.0.0.0:0"))
    refused = await cli("rest", "--listen", "0.0.0.0:0")
    assert refused.code == 2
    assert "--tls-cert" in refused.err


async def test_tls_and_client_certificates(api: Api, authority: Authority, tmp_path: Path) -> None:
    certificate, private = authority.issue("server")
    listening = Listening(
        "127.0.0.1:0",
        certificate=certificate,
        key=private,
        client_authority=authority.path,
        asks_for_tokens=False,
    )
    knowing = ssl.create_default_context(cafile=str(authority.path))
    async with rest_of(api.server.address, listening, tls=knowing) as rest:
        with pytest.raises(aiohttp.ClientError):
            await rest.ask("GET", "/templates", **key(KEY))
    knowing.load_cert_chain(*authority.issue("client"))
    async with rest_of(api.server.address, listening, tls=knowing) as rest:
        assert (await rest.ask("GET", "/templates", **key(KEY)))[0] == 200


@pytest.mark.parametrize(
    "listening",
    [
        Listening("127.0.0.1:99999"),
        Listening("no.such.host.invalid:1"),
        Listening("127.0.0.1:0", certificate=Path("/no/cert"), key=Path("/no/key")),
        Listening("127.0.0.1:0", certificate=Path(__file__), key=Path(__file__)),
    ],
)
async def test_what_cannot_be_used_is_told(listening: Listening) -> None:
    with pytest.raises(ListenError):
        async with running_rest(listening, "127.0.0.1:1", ClientCredentials(), lambda *_: None):
            pass


async def test_a_head_that_does_not_come_is_not_waited_for(api: Api) -> None:
    listening = replace(LOOPBACK, limits=RequestLimits(seconds=0.5))
    async with rest_of(api.server.address, listening) as rest:
        host, port = rest.server.address.split(":")
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for before, sent in ((b"", b""), (b"", b"GET / HTTP/1.1\r\nX-A: "), (whole, b"GET /")):
            reader, writer = await asyncio.open_connection(host, int(port))
            async with asyncio.timeout(20):
                if before:
                    writer.write(before)
                    assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
                writer.write(sent)
                assert await reader.read() == b""
            writer.close()


async def test_an_answer_that_is_not_read_is_not_waited_for() -> None:
    """Before: who asked ten thousand times and read nothing had a connection for ever, without a
    token, and there are a thousand of them."""
    limits = RequestLimits(seconds=0.5)
    listening = Listening("127.0.0.1:0", asks_for_tokens=False, limits=limits)
    async with rest_of("127.0.0.1:1", listening) as rest:
        host, port = rest.server.address.split(":")
        asking = b"GET /templates HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
        _, writer = await asyncio.open_connection(host, int(port))
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(120):
                while True:
                    writer.write(asking)
                    await writer.drain()
        assert (await rest.ask("GET", "/templates"))[0] == 503  # there is no gRPC API


async def test_without_the_grpc_api_it_starts_and_says_so() -> None:
    async with rest_of("127.0.0.1:1", Listening("127.0.0.1:0", asks_for_tokens=False)) as rest:
        status, told = await rest.ask("GET", "/templates", **key(KEY))
        assert (status, told["code"]) == (503, 503)
        assert "127.0.0.1:1" in await rest.server.readiness()
        async with aiohttp.ClientSession() as session, session.get(f"{rest.url}/health") as answer:
            assert answer.status == 503
