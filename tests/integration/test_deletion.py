"""Removing a template: objects from a real emulator, tags from a real registry."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from devstack.stack import Stack
from pydantic import SecretStr
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import RegistryAuthError, RegistryUnavailableError
from activities.contract.image_reference import ImageReference
from activities.contract.inputs import DeleteTemplateInput
from activities.contract.names import Step
from activities.contract.registry_logins import GoogleKeyLogin, PasswordLogin, RegistryLogin
from activities.contract.results import DeletedTemplate
from activities.contract.status import BuildState, LogEntry, LogLevel
from activities.image.registry import Credentials, RegistryAccess, delete_tag
from activities.process.clock import utc_now
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from activities.store.log_archive import read_archived_log, to_jsonl
from activities.store.objects import archived_log_name, lease_name
from activities.template.deletion import BucketDeletionActivities
from tests.support.example_template import BUILD, build_status, template_config
from tests.support.layered_bucket import only_attempt
from workflows.policies import POLICIES

pytestmark = pytest.mark.counts_nothing

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
KEY = "k:" + base64.b64encode(bytes(32)).decode()


def settings(**more: Any) -> Settings:
    return Settings(internal_registries=("127.0.0.0/8",), **more)


@pytest.fixture
def deletion(empty_bucket: Bucket) -> BucketDeletionActivities:
    sealer = Sealer(SecretStr(KEY))
    return BucketDeletionActivities(empty_bucket, sealer, settings(), only_attempt)


async def delete_objects(deletion: BucketDeletionActivities) -> DeletedTemplate:
    delete = DeleteTemplateInput(template_id="web", build_id=BUILD)
    return await ActivityEnvironment().run(deletion.delete_objects, delete)


async def remove_late(deletion: BucketDeletionActivities, deleted: DeletedTemplate) -> int:
    return await ActivityEnvironment().run(deletion.remove_late_arrivals, deleted, BUILD)


def fill(bucket: Bucket) -> None:
    for name in ("metadata.json", "memfile", ".parts/memfile/000000-a-1"):
        bucket.write_object(f"{BUILD}/{name}", b"x")
    bucket.write_object(archived_log_name(BUILD), b"x")


async def test_delete_leaves_the_bucket_as_it_was(
    deletion: BucketDeletionActivities, empty_bucket: Bucket
) -> None:
    empty_bucket.write_object("another/metadata.json", b"x")
    before = empty_bucket.list_objects("")
    LeaseObjects(empty_bucket).take(BUILD, "h1", "w", None)
    fill(empty_bucket)
    deleted = await delete_objects(deletion)
    assert deleted.removed_objects == 4
    assert [o.name for o in empty_bucket.list_objects("")] == [
        lease_name(BUILD),
        "another/metadata.json",
    ]
    assert await remove_late(deletion, deleted) == 0
    assert empty_bucket.list_objects("") == before


async def test_the_metadata_goes_first(
    deletion: BucketDeletionActivities, empty_bucket: Bucket, storage: Stack
) -> None:
    fill(empty_bucket)
    storage.traffic(clear=True)
    await delete_objects(deletion)
    paths = [r["path"] for r in storage.traffic()["requests"] if r["operation"] == "delete"]
    assert "metadata.json" in paths[0]


async def test_a_delete_beats_so_that_the_death_of_its_worker_is_noticed(
    deletion: BucketDeletionActivities,
) -> None:
    beats: list[object] = []
    environment = ActivityEnvironment()
    environment.on_heartbeat = lambda *_: beats.append(_)
    await environment.run(
        deletion.delete_objects, DeleteTemplateInput(template_id="web", build_id=BUILD)
    )
    assert beats
    assert POLICIES["delete_objects"].heartbeat


async def test_deleting_twice_is_fine(
    deletion: BucketDeletionActivities, empty_bucket: Bucket
) -> None:
    fill(empty_bucket)
    first = await delete_objects(deletion)
    second = await delete_objects(deletion)
    assert second.removed_objects == 0
    assert await remove_late(deletion, first) == 0
    assert await remove_late(deletion, second) == 0
    assert await remove_late(deletion, second) == 0
    assert empty_bucket.list_objects("") == []


async def test_what_a_frozen_host_still_uploads_is_removed(
    deletion: BucketDeletionActivities, empty_bucket: Bucket
) -> None:
    lease = LeaseObjects(empty_bucket).take(BUILD, "h1", "w", None)
    deleted = await delete_objects(deletion)
    assert not LeaseObjects(empty_bucket).is_current(BUILD, lease)
    fill(empty_bucket)
    assert await remove_late(deletion, deleted) == 4
    assert empty_bucket.list_objects("") == []


async def test_a_new_build_of_the_same_id_keeps_its_objects(
    deletion: BucketDeletionActivities, empty_bucket: Bucket
) -> None:
    deleted = await delete_objects(deletion)
    lease = LeaseObjects(empty_bucket).take(BUILD, "h1", "w", None)
    fill(empty_bucket)
    assert await remove_late(deletion, deleted) == 0
    assert LeaseObjects(empty_bucket).is_current(BUILD, lease)
    assert len(empty_bucket.list_objects(f"{BUILD}/")) == 3


@pytest.mark.parametrize("kind", ["status", "reset", "lost_response", "error_body"])
async def test_a_delete_that_stumbles_ends_at_the_next_try(
    deletion: BucketDeletionActivities, empty_bucket: Bucket, storage: Stack, kind: str
) -> None:
    fill(empty_bucket)
    with storage.faults({"kind": kind, "operation": "delete", "count": 1}):
        try:
            await delete_objects(deletion)
        except Exception as error:
            assert getattr(error, "retryable", False), error
            await delete_objects(deletion)
    assert [o.name for o in empty_bucket.list_objects("")] == [lease_name(BUILD)]


def test_an_archived_log_is_read_back(empty_bucket: Bucket) -> None:
    config = template_config(start_command="echo 'a\u2028b\x85c'")
    status = build_status(BuildState.FAILED, Step.PULL, config)
    lines = [
        LogEntry(timestamp=utc_now(), level=LogLevel.INFO, message=m) for m in ("a", "é\u2028")
    ]
    empty_bucket.write_object(archived_log_name(BUILD), to_jsonl(status, lines))
    assert read_archived_log(empty_bucket, BUILD) == (status, lines)
    empty_bucket.write_object(archived_log_name(BUILD), to_jsonl(status, []))
    assert read_archived_log(empty_bucket, BUILD) == (status, [])


# ---- Image tags


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with Stack(only=("registry",)) as stack:
        yield f"127.0.0.1:{stack.environment.ports.registry}"


def push(registry: str, repository: str, *tags: str, content: str = "a") -> str:
    """Push the smallest image there is; returns its digest."""
    base = f"http://{registry}/v2/{repository}"
    config = json.dumps({"os": "linux", "architecture": "amd64", "x": content}).encode()
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    where = requests.post(f"{base}/blobs/uploads/", timeout=10).headers["Location"]
    requests.put(where, config, params={"digest": digest}, timeout=10).raise_for_status()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "size": len(config),
            "digest": digest,
        },
        "layers": [],
    }
    for tag in tags:
        answer = requests.put(
            f"{base}/manifests/{tag}",
            json.dumps(manifest),
            headers={"Content-Type": MANIFEST},
            timeout=10,
        )
        answer.raise_for_status()
    return str(answer.headers["Docker-Content-Digest"])


def tags(registry: str, repository: str) -> list[str]:
    answer = requests.get(f"http://{registry}/v2/{repository}/tags/list", timeout=10)
    return sorted(answer.json().get("tags") or [])


async def delete_image(
    deletion: BucketDeletionActivities, image: str, auth: RegistryLogin | None = None
) -> DeletedTemplate:
    delete = DeleteTemplateInput(
        template_id="web", build_id=BUILD, own_image=image, registry_auth=auth
    )
    return await ActivityEnvironment().run(deletion.delete_image_tag, delete)


async def test_our_own_tag_is_removed(deletion: BucketDeletionActivities, registry: str) -> None:
    push(registry, "own", BUILD)
    push(registry, "own", "other", content="b")
    deleted = await delete_image(deletion, f"{registry}/own:{BUILD}")
    assert (deleted.removed_tag, deleted.kept_tag_reason) == (True, "")
    assert tags(registry, "own") == ["other"]
    await delete_image(deletion, f"{registry}/own:{BUILD}")  # twice is fine


async def test_a_digest_that_has_another_tag_is_left_and_said(
    deletion: BucketDeletionActivities, registry: str
) -> None:
    push(registry, "shared", BUILD, "latest")
    deleted = await delete_image(deletion, f"{registry}/shared:{BUILD}")
    assert not deleted.removed_tag
    assert "latest" in deleted.kept_tag_reason
    assert tags(registry, "shared") == sorted([BUILD, "latest"])


async def test_an_image_that_was_never_pushed_is_as_good_as_deleted(
    deletion: BucketDeletionActivities, registry: str
) -> None:
    assert (await delete_image(deletion, f"{registry}/nothing:{BUILD}")).kept_tag_reason == ""


async def test_a_registry_that_is_away_is_retryable(deletion: BucketDeletionActivities) -> None:
    with pytest.raises(RegistryUnavailableError) as failure:
        await delete_image(deletion, f"127.0.0.1:9/own:{BUILD}")
    assert failure.value.retryable


class Gate(BaseHTTPRequestHandler):
    """Stands before a registry and asks for credentials, as Docker's does."""

    kind: str
    upstream: str
    basic: str
    deletes = True

    def _answer(self) -> None:
        if self.path.startswith("/token"):
            given = self.headers.get("Authorization") == self.basic
            self._send(200 if given else 401, json.dumps({"token": self._scope()}).encode())
        elif not self._is_allowed():
            self._send(401, b"", {"WWW-Authenticate": self._challenge()})
        elif self.command == "DELETE" and not self.deletes:
            self._send(405, b"{}")
        else:
            self._forward()

    def _scope(self) -> str:
        return "delete" if "delete" in self.path else "pull"

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.kind == "basic":
            return given == self.basic
        wanted = ["Bearer delete"] if self.command == "DELETE" else ["Bearer delete", "Bearer pull"]
        return given in wanted

    def _challenge(self) -> str:
        if self.kind == "basic":
            return 'Basic realm="here"'
        action = "delete" if self.command == "DELETE" else "pull"
        realm = f"http://{self.headers['Host']}/token"
        return f'Bearer realm="{realm}",service="r",scope="repository:own:{action}"'

    def _forward(self) -> None:
        accept = {"Accept": self.headers.get("Accept", "")}
        url = f"http://{self.upstream}{self.path}"
        answer = requests.request(self.command, url, headers=accept, timeout=10)
        self._send(answer.status_code, answer.content)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


CREDENTIALS = Credentials("me", "secret")
ACCESS = RegistryAccess.of(settings())


@pytest.fixture(params=["basic", "bearer"])
def gate(request: pytest.FixtureRequest, registry: str) -> Iterator[type[Gate]]:
    class OneGate(Gate):
        kind = request.param
        upstream = registry
        basic = basic("me", "secret")

    server = ThreadingHTTPServer(("127.0.0.1", 0), OneGate)
    OneGate.address = f"127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined] # set for the request handlers
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield OneGate
    server.shutdown()
    server.server_close()


async def test_a_registry_that_wants_credentials_gets_the_sealed_ones(
    deletion: BucketDeletionActivities, registry: str, gate: Any
) -> None:
    push(registry, "own", BUILD)
    secret = Sealer(SecretStr(KEY)).seal("secret", SealedFor(BUILD, gate.address))
    auth = PasswordLogin(username="me", secret=secret)
    deleted = await delete_image(deletion, f"{gate.address}/own:{BUILD}", auth)
    assert deleted.removed_tag
    assert BUILD not in tags(registry, "own")


async def test_a_google_key_is_a_password_too(
    deletion: BucketDeletionActivities, registry: str, gate: Any
) -> None:
    push(registry, "own", BUILD)
    key = '{"type": "service_account"}'
    gate.basic = basic("_json_key_base64", base64.b64encode(key.encode()).decode())
    auth = GoogleKeyLogin(secret=Sealer(SecretStr(KEY)).seal(key, SealedFor(BUILD, gate.address)))
    assert (await delete_image(deletion, f"{gate.address}/own:{BUILD}", auth)).removed_tag


async def test_what_docker_login_has_left_opens_it(
    empty_bucket: Bucket,
    registry: str,
    gate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(registry, "own", BUILD)
    entry = {"auth": base64.b64encode(b"me:secret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {gate.address: entry}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    lent = settings(host_login_registries=(gate.address,))
    deletion = BucketDeletionActivities(empty_bucket, Sealer(SecretStr(KEY)), lent)
    assert (await delete_image(deletion, f"{gate.address}/own:{BUILD}")).removed_tag


async def test_what_docker_login_has_left_is_lent_to_no_other_registry(
    deletion: BucketDeletionActivities,
    registry: str,
    gate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(registry, "own", BUILD)
    entry = {"auth": base64.b64encode(b"me:secret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {gate.address: entry}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(RegistryAuthError):
        await delete_image(deletion, f"{gate.address}/own:{BUILD}")
    assert BUILD in tags(registry, "own")


async def test_plain_http_beyond_loopback_is_asked_for(
    empty_bucket: Bucket, registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(registry, "own", BUILD)
    monkeypatch.setattr(
        "activities.image.registry._is_plain", lambda name, insecure: name in insecure
    )
    secure = BucketDeletionActivities(empty_bucket, Sealer(SecretStr(KEY)), settings())
    with pytest.raises(RegistryUnavailableError):
        await delete_image(secure, f"{registry}/own:{BUILD}")
    told = settings(insecure_registries=(registry,))
    plain = BucketDeletionActivities(empty_bucket, Sealer(SecretStr(KEY)), told)
    assert (await delete_image(plain, f"{registry}/own:{BUILD}")).removed_tag


def test_without_credentials_it_is_refused_and_nothing_is_removed(registry: str, gate: Any) -> None:
    push(registry, "own", BUILD)
    with pytest.raises(RegistryAuthError):
        delete_tag(ImageReference.parse(f"{gate.address}/own:{BUILD}"), access=ACCESS)
    assert BUILD in tags(registry, "own")


def test_a_registry_that_does_not_delete_is_said(registry: str, gate: Any) -> None:
    push(registry, "own", BUILD)
    gate.deletes = False
    own = ImageReference.parse(f"{gate.address}/own:{BUILD}")
    assert "does not allow deletion" in delete_tag(own, CREDENTIALS, ACCESS)
