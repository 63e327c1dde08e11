"""Who gets through the REST API to the gRPC API, and as whom; TLS; connections that say nothing."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import aiohttp
import pytest

from activities.process.settings import Settings
from api.cli.rest_process import serve
from api.client.credentials import ClientCredentials
from api.rest import server as rest_server
from api.rest.server import ListenError, Listening, running_rest
from api.server.access import hash_token
from api.server.server import BindError, running_server
from tests.support.certificates import Authority
from tests.support.command_line import cli
from tests.support.running_api import Api
from tests.support.running_rest import KEY, rest_of

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
        image = {"json": {"fromImage": "127.0.0.1:5000/demo/web:1"}}
        api.ids.append(build["buildID"])
        status, refused = await rest.ask("POST", start, **image, **key("e2b_r"))
        assert (status, refused["error_code"]) == (403, "RIGHT_MISSING")
        assert (await rest.ask("POST", start, **image, **key("e2b_a")))[0] == 202
        path = f"/templates/of-acme/builds/{build['buildID']}/status"
        assert (await rest.ask("GET", path, **key("e2b_r")))[0] == 200
        assert (await rest.ask("GET", path, **key("e2b_b")))[0] == 404
        assert (await rest.ask("DELETE", "/templates/of-acme", **key("e2b_b")))[0] == 404


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


async def test_a_head_that_does_not_come_is_not_waited_for(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_server, "HEAD_SECONDS", 0.5)
    async with rest_of(api.server.address, LOOPBACK) as rest:
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


async def test_without_the_grpc_api_it_starts_and_says_so() -> None:
    async with rest_of("127.0.0.1:1", Listening("127.0.0.1:0", asks_for_tokens=False)) as rest:
        status, told = await rest.ask("GET", "/templates", **key(KEY))
        assert (status, told["code"]) == (503, 503)
        assert "127.0.0.1:1" in await rest.server.readiness()
        async with aiohttp.ClientSession() as session, session.get(f"{rest.url}/health") as answer:
            assert answer.status == 503
