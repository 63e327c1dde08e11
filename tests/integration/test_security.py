"""TLS, client certificates, tokens, limits and audit lines, with real certificates and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from activities.contract.errors import ImageNotFoundError, TemporalUnavailableError
from activities.contract.search_attributes import TENANT_MEMO
from activities.contract.sources import FromImage, FromTemplate, Source
from activities.process.settings import Settings
from activities.process.temporal import connect
from activities.store.bucket import Bucket
from activities.store.objects import metadata_name
from api.client.client import CallError, TemplateClient
from api.client.credentials import ClientCredentials
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from api.server.access import hash_token
from api.server.server import BindError, require_safe_address, running_server, serve
from api.server.tls import server_credentials
from tests.support.certificates import Authority
from tests.support.command_line import cli
from tests.support.example_template import metadata
from tests.support.running_api import Api, template_of

pytestmark = pytest.mark.counts_nothing


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def with_tls(api: Api, authority: Authority, **more: object) -> Settings:
    certificate, key = authority.issue("server")
    changes = {"tls_cert": certificate, "tls_key": key, **more}
    return api.settings.model_copy(update=changes)


async def health_of(address: str, credentials: ClientCredentials) -> str:
    async with TemplateClient(address, credentials) as client:
        return str((await client.health()).status)


async def test_tls(api: Api, authority: Authority, tmp_path: Path) -> None:
    async with running_server(api.temporal, with_tls(api, authority)) as server:
        await health_of(server.address, ClientCredentials(tls_ca=authority.path))
        for wrong in (ClientCredentials(), ClientCredentials(tls=True)):
            with pytest.raises(CallError) as error:
                await health_of(server.address, wrong)
            assert error.value.code is grpc.StatusCode.UNAVAILABLE
        ended = await cli(
            "list",
            "--api-address",
            server.address,
            env={"TEMPLATE_MANAGER_TLS_CA": str(authority.path)},
        )
        assert ended.code == 0, ended.err


async def test_client_certificates(api: Api, authority: Authority, tmp_path: Path) -> None:
    settings = with_tls(api, authority, tls_client_ca=authority.path)
    certificate, key = authority.issue("client")
    other = Authority(tmp_path, "other")
    other_certificate, other_key = other.issue("stranger")
    async with running_server(api.temporal, settings) as server:
        await health_of(
            server.address,
            ClientCredentials(
                tls_ca=authority.path, tls_client_cert=certificate, tls_client_key=key
            ),
        )
        for wrong in (
            ClientCredentials(tls_ca=authority.path),
            ClientCredentials(
                tls_ca=authority.path, tls_client_cert=other_certificate, tls_client_key=other_key
            ),
        ):
            with pytest.raises(CallError):
                await asyncio.wait_for(health_of(server.address, wrong), 20)


async def test_a_client_certificate_has_the_rights_of_its_line(
    api: Api, authority: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "lines"
    path.write_text(
        f"gate cert:gate build tenant=acme\nboss {hash_token('ruling')} admin tenant=beta\n"
    )
    settings = with_tls(api, authority, tls_client_ca=authority.path, tokens_file=path)

    async def create(name: str, token: str = "", **changes: str) -> str:
        certificate, key = authority.issue(name)
        credentials = ClientCredentials(
            tls_ca=authority.path,
            tls_client_cert=certificate,
            tls_client_key=key,
            token=SecretStr(token),
        )
        async with TemplateClient(server.address, credentials) as client:
            asked = api.template(from_image="docker.io/library/debian:12", **changes)
            created = await client.create(asked)
        handle = api.temporal.get_workflow_handle(created.workflow_id)
        return str(await (await handle.describe()).memo_value(TENANT_MEMO))

    async with running_server(api.temporal, settings) as server:
        assert await create("gate", team_id="acme") == "acme"
        assert await create("gate", "ruling") == "beta"
        for name, token in (("other", ""), ("gate", "wrong")):
            with pytest.raises(CallError) as error:
                await create(name, token)
            assert error.value.code is grpc.StatusCode.UNAUTHENTICATED


# ---- Temporal's own connection


class SecureTemporal(grpc.GenericRpcHandler):
    """Answers every call with an empty message, and remembers who called with what."""

    def __init__(self) -> None:
        self.callers: list[tuple[str, str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        headers = dict(context.invocation_metadata() or ())
        names = context.auth_context().get("x509_common_name", [b""])
        self.callers.append((next(iter(names)).decode(), str(headers.get("authorization", ""))))
        return b""


async def test_temporal_by_client_certificate_and_api_key(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporal, server = SecureTemporal(), grpc.aio.server()
    server.add_generic_rpc_handlers((temporal,))
    certificate, key = authority.issue("temporal")
    credentials = server_credentials(certificate, key, authority.path)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        monkeypatch.setenv("TEMPORAL_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("TEMPORAL_TLS_SERVER_CA_CERT_PATH", str(authority.path))
        with pytest.raises(TemporalUnavailableError, match=f"127.0.0.1:{port}"):
            await connect("nobody")
        assert temporal.callers == []

        certificate, key = authority.issue("kvm-7")
        monkeypatch.setenv("TEMPORAL_TLS_CLIENT_CERT_PATH", str(certificate))
        monkeypatch.setenv("TEMPORAL_TLS_CLIENT_KEY_PATH", str(key))
        await connect("host")
        assert temporal.callers[-1] == ("kvm-7", "")

        monkeypatch.setenv("TEMPORAL_API_KEY", "the-key")
        await connect("host")
        assert temporal.callers[-1] == ("kvm-7", "Bearer the-key")
    finally:
        await server.stop(0)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(
        f"reader {hash_token('reading')} read\n"
        f"ci {hash_token('building')} build 127.0.0.1:5000/*\n"
        f"boss {hash_token('ruling')} admin\n"
    )
    return path


async def _bases_count_as_their_image(api: Api, ci: TemplateClient, bucket: Bucket) -> None:
    def put(source: Source) -> str:
        build_id = str(uuid.uuid4())
        content = metadata(build_id, source).model_dump_json().encode()
        bucket.write_object(metadata_name(build_id), content)
        return build_id

    def on(base_id: str) -> pb.TemplateConfig:
        base = pb.FromTemplateConfig(build_id=base_id)
        return api.template(from_image=None, from_template=base)

    allowed = put(FromTemplate(build_id=put(FromImage(reference="127.0.0.1:5000/web:1"))))
    await ci.create(on(allowed))
    other = put(FromTemplate(build_id=put(FromImage(reference="evil.example/x:1"))))
    gone = put(FromTemplate(build_id=str(uuid.uuid4())))
    for base_id in (other, gone):
        with pytest.raises(CallError, match="ci may not build from") as error:
            await ci.create(on(base_id))
        assert error.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_tokens_rights_images_and_audit(api: Api, tokens: Path, empty_bucket: Bucket) -> None:
    settings = api.settings.model_copy(update={"tokens_file": tokens})
    async with running_server(api.temporal, settings) as server:

        def client(token: str) -> TemplateClient:
            return TemplateClient(server.address, ClientCredentials(token=SecretStr(token)))

        with capture_logs() as logs:
            async with client("building") as ci:
                created = await ci.create(template_of())
                api.ids.append(created.build_id)
                denied = template_of(from_image="evil.example/x:1")
                with pytest.raises(CallError, match="ci may not build from") as error:
                    await ci.create(denied)
                assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
                await _bases_count_as_their_image(api, ci, empty_bucket)
                with pytest.raises(CallError, match="takes the right admin"):
                    await ci.delete(created.build_id)
            async with client("reading") as reader:
                assert (await reader.status(created.build_id)).state
                [line async for line in reader.logs(created.build_id)]
                with pytest.raises(CallError, match="takes the right build"):
                    await reader.cancel(created.build_id)
            async with client("wrong") as stranger:
                with pytest.raises(CallError) as error:
                    await stranger.status(created.build_id)
                assert error.value.code is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(CallError):
                    [line async for line in stranger.logs(created.build_id)]
        lines = [line for line in logs if line["event"] == "audit"]
        assert [(line["caller"], line["rpc"], line["outcome"]) for line in lines] == [
            ("ci", "TemplateCreate", "ok"),
            ("ci", "TemplateCreate", "IMAGE_NOT_ALLOWED"),
            ("ci", "TemplateCreate", "ok"),
            ("ci", "TemplateCreate", "IMAGE_NOT_ALLOWED"),
            ("ci", "TemplateCreate", "IMAGE_NOT_ALLOWED"),
        ]
        assert (lines[0]["build"], lines[0]["tenant"]) == (created.build_id, "default")
        assert "building" not in str(logs)


async def test_a_retry_takes_the_right_to_its_image(api: Api, tokens: Path) -> None:
    """Another's failed build is no way to an image that a token may not use."""
    failed: dict[str, str] = {}
    for image in ("evil.example/x:1", "127.0.0.1:5000/web:1"):
        api.journal.fail("pull_image", ImageNotFoundError("not there"))
        failed[image] = await api.completed(from_image=image)
    settings = api.settings.model_copy(update={"tokens_file": tokens})
    async with running_server(api.temporal, settings) as server:
        credentials = ClientCredentials(token=SecretStr("building"))
        async with TemplateClient(server.address, credentials) as ci:
            with pytest.raises(CallError, match="ci may not build from evil") as error:
                await ci.retry(failed["evil.example/x:1"])
            assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
            await ci.retry(failed["127.0.0.1:5000/web:1"])


async def test_too_many_calls(api: Api) -> None:
    settings = api.settings.model_copy(update={"calls_per_second": 0.5, "calls_burst": 3})
    async with (
        running_server(api.temporal, settings) as server,
        TemplateClient(server.address) as c,
    ):
        for _ in range(3):
            await c.health()
        with pytest.raises(CallError) as error:
            await c.health()
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.retry_after_seconds


async def test_too_many_calls_at_once(api: Api) -> None:
    """A place is free again when its follower has gone, however it went."""
    build_id = await api.running_until("build_rootfs")
    settings = api.settings.model_copy(update={"calls_at_once": 2})
    async with (
        running_server(api.temporal, settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
        TemplateClient(server.address) as c,
    ):
        stub: Any = pb_grpc.TemplateServiceStub(channel)
        asked = pb.TemplateBuildLogsRequest(build_id=build_id, template_id="web", follow=True)
        following = [stub.TemplateBuildLogs(asked) for _ in range(2)]
        for lines in following:
            assert await lines.read()
        with pytest.raises(CallError) as error:
            await c.health()
        assert (error.value.code, error.value.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_CALLS",
        )
        following[0].cancel()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(CallError):
                    await c.health()
                    break
                await asyncio.sleep(0.1)
        following[1].cancel()


async def test_too_many_builds(api: Api) -> None:
    await api.running_until("build_rootfs")
    settings = api.settings.model_copy(update={"max_running_builds": 1})
    async with (
        running_server(api.temporal, settings) as server,
        TemplateClient(server.address) as c,
    ):
        async with asyncio.timeout(20):  # visibility lags behind
            while True:
                try:
                    api.ids.append((await c.create(template_of())).build_id)
                except CallError as error:
                    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert error.reason == "TOO_MANY_BUILDS"
                    return
                await asyncio.sleep(0.2)


async def test_a_request_that_is_too_large(api: Api) -> None:
    with pytest.raises(CallError) as error:
        await api.client.create(template_of(start_command="x" * 2_000_000))
    assert error.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tls_cert": Path("/no/cert")}, "both a certificate"),
        ({"tls_client_ca": Path("/no/ca")}, "needs --tls-cert"),
        ({"tokens_file": Path("/no/tokens")}, "/no/tokens"),
        ({"tls_cert": Path("/no/cert"), "tls_key": Path("/no/key")}, "cannot read /no/"),
    ],
)
async def test_what_cannot_be_used_is_named_at_start(changes: dict[str, Path], told: str) -> None:
    settings = Settings(api_address="127.0.0.1:0").model_copy(update=changes)
    with pytest.raises(BindError, match=told):
        await serve(settings)


TLS = {"tls_cert": Path("/c"), "tls_key": Path("/k")}
TOKENS = {"tokens_file": Path("/t")}
CERTIFICATES = {"tls_client_ca": Path("/a")}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_on_loopback_all_is_allowed(address: str) -> None:
    require_safe_address(Settings(api_address=address))


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "api.internal:1", ":1"])
@pytest.mark.parametrize(
    ("given", "insecure", "missing"),
    [
        ({}, False, "--tls-cert"),
        (TOKENS, False, "--tls-cert"),
        ({"no_authentication": True}, False, "--tls-cert"),
        ({}, True, "--no-authentication"),
        (TLS, False, "--no-authentication"),
        (TOKENS, True, ""),
        (TLS | TOKENS, False, ""),
        (TLS | CERTIFICATES, False, ""),
        (TLS | {"no_authentication": True}, False, ""),
        ({"no_authentication": True}, True, ""),
    ],
)
async def test_another_address_takes_tls_and_to_know_its_callers(
    address: str, given: dict[str, Any], insecure: bool, missing: str
) -> None:
    settings = Settings(api_address=address).model_copy(update=given)
    if not missing:
        require_safe_address(settings, insecure=insecure)
        return
    with pytest.raises(BindError, match=missing):
        await serve(settings, insecure=insecure)


async def test_the_command_line_says_how_to_mend_it() -> None:
    refused = await cli("api", "--listen", "0.0.0.0:0", "--insecure")
    assert refused.code == 2
    for way in ("--tokens-file", "--tls-client-ca", "127.0.0.1", "--no-authentication"):
        assert way in refused.err


async def test_a_token_is_made(tmp_path: Path) -> None:
    ended = await cli("token", "ci", "--right", "build", "--image", "a.example/*")
    assert ended.code == 0
    token = ended.out.splitlines()[0].removeprefix("token: ")
    assert ended.out.splitlines()[1].removeprefix("line:  ") == (
        f"ci {hash_token(token)} build a.example/*"
    )
    made = json.loads((await cli("token", "ci", "--json")).out)
    assert made["line"] == f"ci {hash_token(made['token'])} build"
    of_tenant = await cli("token", "ci", "--tenant", "acme", "--certificate", "ci.example")
    assert (of_tenant.out, of_tenant.code) == ("line:  ci cert:ci.example build tenant=acme\n", 0)
    assert (await cli("token", "ci", "--right", "everything")).code == 2
    assert (await cli("token", "ci", "--tenant", "no/tenant")).code == 2
