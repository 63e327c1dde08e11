"""Pulling images from a real registry with the real dockerd."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from devstack.ports import free_port
from devstack.registry import Layer, Registry, running_registry
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import (
    DockerUnavailableError,
    ImageNotFoundError,
    ImageUnusableError,
    LeaseLostError,
    RegistryAuthError,
    RegistryUnavailableError,
    WrongArchitectureError,
)
from activities.contract.inputs import PullImageInput
from activities.contract.registry_logins import AwsLogin, PasswordLogin
from activities.process.sealing import SealedFor
from tests.support.fake_ecr import running_ecr
from tests.support.host_resources import all_resources, assert_nothing_left
from tests.support.local_http import QuietHandler, serving
from tests.support.registry_login import HTPASSWD, PASSWORD, USER

pytestmark = pytest.mark.counts_host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Workbench]:
    before = all_resources()
    made = workbench(tmp_path)
    yield made
    made.remove_images()
    assert_nothing_left(before)


def small_layer(content: bytes = b"hello\n") -> bytes:
    return Layer().directory("etc").add("etc/greeting", content).tar()


def answering(
    status: int, headers: dict[str, str], body: bytes = b"{}"
) -> contextlib.AbstractContextManager[str]:
    """A server that answers everything alike; its address."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.answer(status, body, **headers)

    return serving(Handler)


async def test_an_image_is_pulled_at_its_digest(host: Workbench, registry: Registry) -> None:
    config = {"Env": ["A=1"], "User": "7:8", "WorkingDir": "/srv", "Cmd": ["/bin/x"]}
    digest = registry.push("plain", [small_layer()], config=config)
    pulled = await host.pull(f"{registry.address}/plain:latest")
    assert pulled.digest == digest
    assert pulled.reference == f"{registry.address}/plain@{digest}"
    assert pulled.architecture == "amd64"
    assert pulled.layer_count == 1
    assert pulled.config.env == ("A=1",)
    assert (pulled.config.user, pulled.config.working_dir) == ("7:8", "/srv")
    assert pulled.config.cmd == ("/bin/x",)


async def test_a_moved_tag_gives_the_new_image(host: Workbench, registry: Registry) -> None:
    registry.push("moving", [small_layer(b"old\n")])
    old = await host.pull(f"{registry.address}/moving")
    new_digest = registry.push("moving", [small_layer(b"new\n")])
    new = await host.pull(f"{registry.address}/moving")
    assert new.digest == new_digest != old.digest


async def test_an_index_gives_the_hosts_own_platform(host: Workbench, registry: Registry) -> None:
    amd = registry.push("multi", [small_layer(b"amd\n")], tag="amd")
    arm = registry.push("multi", [small_layer(b"arm\n")], tag="arm", architecture="arm64")
    registry.push_index("multi", {"arm64": arm, "amd64": amd})
    pulled = await host.pull(f"{registry.address}/multi:latest")
    assert pulled.digest == amd


@pytest.mark.parametrize("indexed", [False, True])
async def test_another_architecture_is_refused_before_unpacking(
    host: Workbench, registry: Registry, indexed: bool
) -> None:
    tag = "arm" if indexed else "latest"
    name = f"foreign-{indexed}".lower()
    digest = registry.push(name, [small_layer()], tag=tag, architecture="arm64")
    if indexed:
        registry.push_index(name, {"arm64": digest})
    with pytest.raises(WrongArchitectureError, match=r"linux/arm64.*linux/amd64"):
        await host.pull(f"{registry.address}/{name}:latest")
    assert not host.client.images(name=f"{registry.address}/{name}")


async def test_a_missing_image_says_so(host: Workbench, registry: Registry) -> None:
    with pytest.raises(ImageNotFoundError, match="nothing-here:v1") as error:
        await host.pull(f"{registry.address}/nothing-here:v1")
    assert error.value.hint


async def test_an_unreachable_registry_can_be_tried_again(host: Workbench) -> None:
    with pytest.raises(RegistryUnavailableError, match="refused") as error:
        await host.pull(f"127.0.0.1:{free_port()}/web")
    assert error.value.retryable


async def test_an_unknown_registry_host_is_named(host: Workbench) -> None:
    with pytest.raises(RegistryUnavailableError, match=r"no-such-host\.invalid"):
        await host.pull("no-such-host.invalid/web")


async def test_too_many_requests_waits_as_long_as_the_registry_says(host: Workbench) -> None:
    with (
        answering(429, {"Retry-After": "7"}) as address,
        pytest.raises(RegistryUnavailableError, match="429") as error,
    ):
        await host.pull(f"{address}/web")
    assert error.value.retry_after_seconds == 7


async def test_an_answer_that_is_no_manifest_is_a_registry_error(host: Workbench) -> None:
    with (
        answering(200, {}, b"<html>captive portal</html>") as address,
        pytest.raises(RegistryUnavailableError, match="not a manifest"),
    ):
        await host.pull(f"{address}/web")


@pytest.fixture
def locked_registry(tmp_path: Path) -> Iterator[Registry]:
    directory = tmp_path / "locked"
    directory.mkdir()
    with running_registry(directory, htpasswd=HTPASSWD) as registry:
        registry.login = (USER, PASSWORD)
        registry.push("private", [small_layer()])
        yield registry


async def test_a_password_opens_a_private_registry(
    host: Workbench, locked_registry: Registry
) -> None:
    scope = host.scope().model_copy(update={"tenant": "acme"})
    only_for = SealedFor(scope.build_id, locked_registry.address, "acme")
    auth = PasswordLogin(username=USER, secret=host.secret_keys.seal(PASSWORD, only_for))
    pulled = await host.pull(f"{locked_registry.address}/private", auth, scope)
    assert (pulled.layer_count, pulled.tenant) == (1, "acme")
    assert PASSWORD not in host.log_of(scope)


@pytest.mark.parametrize("password", [None, "wrong-password-0000"])
async def test_without_the_right_password_the_registry_refuses(
    host: Workbench, locked_registry: Registry, password: str | None
) -> None:
    scope = host.scope()
    auth = None
    if password:
        sealed = host.secret_keys.seal(password, SealedFor(scope.build_id, locked_registry.address))
        auth = PasswordLogin(username=USER, secret=sealed)
    with pytest.raises(RegistryAuthError) as error:
        await host.pull(f"{locked_registry.address}/private", auth, scope)
    assert "wrong-password" not in error.value.message
    assert "wrong-password" not in host.log_of(scope)


@pytest.mark.parametrize("lent", [True, False])
async def test_what_docker_login_has_left_is_used_where_it_is_lent(
    locked_registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lent: bool,
) -> None:
    lent_to = (f"{locked_registry.address}/private",) if lent else ()
    host = workbench(tmp_path / "data", host_login_registries=lent_to)
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    config = {"auths": {locked_registry.address: {"auth": token}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if lent:
        assert (await host.pull(f"{locked_registry.address}/private")).layer_count == 1
        host.remove_images()
    else:
        with pytest.raises(RegistryAuthError, match="asks for credentials"):
            await host.pull(f"{locked_registry.address}/private")


async def test_a_damaged_layer_is_never_taken(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    digest = registry.push("damaged", [small_layer(os.urandom(100_000))])
    registry.damage_layer("damaged", digest)
    with pytest.raises((ImageUnusableError, RegistryUnavailableError, DockerUnavailableError)):
        await host.pull(f"{registry.address}/damaged")
    assert not host.client.images(name=f"{registry.address}/damaged")


async def test_a_cancelled_pull_stops_at_once(host: Workbench, registry: Registry) -> None:
    layers = [Layer().add(f"file-{n}", os.urandom(40_000_000)).tar() for n in range(3)]
    registry.push("large", layers)
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(environment.info, heartbeat_timeout=timedelta(seconds=1))
    asked = PullImageInput(
        scope=host.scope(), image=f"{registry.address}/large", auth=None, timeout_seconds=60
    )
    pulling = asyncio.Event()

    def beat(*details: Any) -> None:
        if details and details[0]["what"] == "pulling":
            pulling.set()

    environment.on_heartbeat = beat
    task = asyncio.ensure_future(environment.run(host.images.pull_image, asked))
    await asyncio.wait_for(pulling.wait(), 30)
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    await _no_image(host, f"{registry.address}/large")


async def _no_image(host: Workbench, name: str) -> None:
    await asyncio.sleep(1)  # dockerd could still be at it
    assert not host.client.images(name=name)


async def test_two_pulls_at_once_give_the_same(host: Workbench, registry: Registry) -> None:
    registry.push("shared", [small_layer(os.urandom(1_000_000))])
    image = f"{registry.address}/shared"
    one, other = await asyncio.gather(host.pull(image), host.pull(image))
    assert one == other


async def test_a_host_without_the_lease_pulls_nothing(host: Workbench, registry: Registry) -> None:
    registry.push("fenced", [small_layer()])
    scope = host.scope(number=1)
    host.scope(scope.build_id, number=2)
    with pytest.raises(LeaseLostError):
        await host.pull(f"{registry.address}/fenced", scope=scope)
    assert not host.client.images(name=f"{registry.address}/fenced")


async def test_an_image_that_only_dockerd_has_says_to_push_it(
    host: Workbench, registry: Registry
) -> None:
    registry.push("source", [small_layer(b"local\n")])
    pulled = await host.pull(f"{registry.address}/source")
    name = f"{registry.address}/only-local"
    host.client.tag(pulled.image_id, name, "latest")
    try:
        with pytest.raises(ImageNotFoundError, match="only in this host's dockerd") as error:
            await host.pull(f"{name}:latest")
        assert "Push" in error.value.hint
    finally:
        host.client.remove_image(f"{name}:latest")


async def test_a_token_that_has_run_out_is_renewed_once(
    host: Workbench, locked_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = host.scope()
    sealed = host.secret_keys.seal(
        "aws-secret-key", SealedFor(scope.build_id, locked_registry.address)
    )
    auth = AwsLogin(access_key_id=USER, secret=sealed, region="eu-central-1")
    with running_ecr("an-old-token-0000", PASSWORD, user=USER) as ecr:
        monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", ecr.address)
        pulled = await host.pull(f"{locked_registry.address}/private", auth, scope)
    assert pulled.layer_count == 1
    assert len(ecr.asked) == 2
    for secret in ("an-old-token-0000", PASSWORD, "aws-secret-key"):
        assert secret not in host.log_of(scope)
