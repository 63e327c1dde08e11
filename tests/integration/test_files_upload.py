"""The files of COPY steps: clients put them into the bucket without a login of their own."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from devstack.stack import Stack

from activities.contract.errors import FilesTooLargeError, HostDiskFullError
from activities.contract.image_steps import Copy
from activities.contract.names import DEFAULT_TENANT, build_workflow_id
from activities.disk.room import Room
from activities.store import files as image_files
from activities.store.bucket import Bucket
from activities.store.objects import SentFiles, files_name, sent_files_name
from api.client import files_upload
from api.client.client import CallError
from api.client.files_upload import upload_files
from api.pb import template_manager_pb2 as pb
from tests.support.running_api import Api
from workflows.build_template import BuildTemplate

pytestmark = pytest.mark.counts_nothing

SIZE_BYTES = 3 * 1024 * 1024 + 17


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "files.tar"
    path.write_bytes(os.urandom(SIZE_BYTES))
    return path


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_upload, "RETRY_SECONDS", 0.05)


def sha256_of(tar: Path) -> str:
    return hashlib.sha256(tar.read_bytes()).hexdigest()


async def send(api: Api, tar: Path, shown: list[int] | None = None) -> bool:
    show = (shown if shown is not None else []).append
    return await upload_files(api.client, "web", tar, sha256_of(tar), show)


def stored(bucket: Bucket, tar: Path) -> bytes:
    found = bucket.read_object(files_name(sha256_of(tar)))
    assert found is not None
    return found[0]


async def test_files_are_sent_once_and_progress_is_shown(
    api: Api, empty_bucket: Bucket, tar: Path
) -> None:
    shown: list[int] = []
    assert await send(api, tar, shown)
    assert stored(empty_bucket, tar) == tar.read_bytes()
    assert len(shown) > 3
    assert shown == sorted(shown)
    assert shown[-1] == SIZE_BYTES
    before = empty_bucket.list_objects("")
    assert not await send(api, tar)
    assert empty_bucket.list_objects("") == before


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "status", "operation": "resumable-chunk", "count": 2},
        {"kind": "reset", "operation": "resumable-chunk", "after_bytes": 1_000_000},
        {"kind": "lost_response", "operation": "resumable-chunk"},
        {"kind": "status", "operation": "resumable-start", "count": 2},
    ],
    ids=["503", "reset", "lost response", "503 at the start"],
)
async def test_a_broken_upload_is_tried_again(
    api: Api, storage: Stack, empty_bucket: Bucket, tar: Path, rule: dict[str, Any]
) -> None:
    with storage.faults(rule):
        assert await send(api, tar)
    assert stored(empty_bucket, tar) == tar.read_bytes()
    assert len(empty_bucket.list_objects("")) == 1


async def test_two_clients_send_the_same_files_at_once(
    api: Api, storage: Stack, empty_bucket: Bucket, tar: Path
) -> None:
    slow = {"kind": "slow", "operation": "resumable-chunk", "delay": 0.5, "count": None}
    with storage.faults(slow):
        assert all(await asyncio.gather(send(api, tar), send(api, tar)))
    assert stored(empty_bucket, tar) == tar.read_bytes()
    assert len(empty_bucket.list_objects("")) == 1


async def test_files_that_would_soon_be_swept_are_sent_again(
    api: Api, empty_bucket: Bucket, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await send(api, tar)
    [first] = empty_bucket.list_objects("")
    monkeypatch.setattr(image_files, "KEPT_SECONDS", 0.0)
    address = await api.client.files_address("web", sha256_of(tar))
    assert address
    await files_upload._put(address, tar, lambda _: None)
    [second] = empty_bucket.list_objects("")
    assert second.generation > first.generation
    assert stored(empty_bucket, tar) == tar.read_bytes()


async def test_what_cannot_be_sent_says_where_to_and_keeps_the_address_to_itself(
    api: Api, storage: Stack, empty_bucket: Bucket, tar: Path
) -> None:
    rule = {"kind": "status", "operation": "resumable-chunk", "count": None}
    with storage.faults(rule), pytest.raises(CallError) as failure:
        await send(api, tar)
    assert failure.value.code is grpc.StatusCode.UNAVAILABLE
    assert failure.value.reason == "FILES_UPLOAD_FAILED"
    assert "HTTP 503" in failure.value.message
    assert "127.0.0.1" in failure.value.message
    assert "upload_id" not in str(failure.value)
    assert failure.value.hint
    assert empty_bucket.list_objects("") == []


async def test_leaving_stops_the_upload(
    api: Api, storage: Stack, empty_bucket: Bucket, tar: Path
) -> None:
    slow = {"kind": "slow", "operation": "resumable-chunk", "bytes_per_second": 300_000}
    with storage.faults(slow):
        sending = asyncio.create_task(send(api, tar))
        await asyncio.sleep(1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(sending, 5)
    assert empty_bucket.list_objects("") == []


async def test_a_build_of_files_that_were_not_sent_does_not_start(
    api: Api, empty_bucket: Bucket, tar: Path
) -> None:
    steps = [
        pb.TemplateStep(type="RUN", args=["true"]),
        pb.TemplateStep(type="COPY", args=["a", "/a"], files_hash=sha256_of(tar)),
    ]
    template = api.template(steps=steps)
    with pytest.raises(CallError) as failure:
        await api.client.create(template)
    assert failure.value.code is grpc.StatusCode.NOT_FOUND
    assert [v.field for v in failure.value.violations] == ["template.steps[1].files_hash"]
    assert "InitLayerFileUpload" in failure.value.hint
    assert await send(api, tar)
    await api.client.create(template)


async def test_a_wrong_request_names_every_bad_field(api: Api) -> None:
    with pytest.raises(CallError) as failure:
        await api.client.files_address("No Name", "../x")
    assert failure.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {violation.field for violation in failure.value.violations} == {"template_id", "hash"}


async def test_a_bucket_that_is_away_is_unavailable(api: Api, storage: Stack) -> None:
    rule = {"kind": "status", "status": 503, "count": None}
    with storage.faults(rule), pytest.raises(CallError) as failure:
        await api.client.files_address("web", "a" * 64)
    assert failure.value.code is grpc.StatusCode.UNAVAILABLE
    assert failure.value.retry_after_seconds


async def test_files_over_the_limit_are_refused_before_any_is_read(
    api: Api, empty_bucket: Bucket, tar: Path, tmp_path: Path
) -> None:
    await send(api, tar)
    target = tmp_path / "fetched.tar"

    def fetch(most_bytes: int, kept_bytes: int = 0) -> None:
        image_files.fetch_files(
            empty_bucket,
            sha256_of(tar),
            target,
            lambda: None,
            tenant=DEFAULT_TENANT,
            most_bytes=most_bytes,
            room=Room((tmp_path,), kept_bytes),
        )

    with pytest.raises(FilesTooLargeError, match=f"{SIZE_BYTES} bytes; at most {SIZE_BYTES - 1}"):
        fetch(SIZE_BYTES - 1)
    with pytest.raises(HostDiskFullError, match=r"no room to fetch files/.* MiB free") as error:
        fetch(SIZE_BYTES, kept_bytes=1 << 50)
    assert "TEMPLATE_MANAGER_MIN_FREE_DISK_MB" in error.value.hint
    assert not target.exists()
    fetch(SIZE_BYTES)
    assert target.read_bytes() == tar.read_bytes()


async def test_files_that_no_host_would_take_are_told_at_once(
    api: Api, empty_bucket: Bucket, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send(api, tar)
    monkeypatch.setattr(api.settings, "max_files_mb", 3)
    copies = [
        pb.TemplateStep(type="COPY", args=["a", "/a", "", ""], files_hash=sha256)
        for sha256 in ("a" * 64, sha256_of(tar))
    ]
    with pytest.raises(CallError) as error:
        await api.client.create(api.template(steps=copies))
    assert (error.value.code, error.value.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
    )
    [violation] = error.value.violations
    assert violation.field == "template.steps[1].files_hash"
    assert f"{SIZE_BYTES} bytes; at most {3 * 1024 * 1024} are" in violation.description


def scoped_copy(api: Api, scope: str = "team", name: str = "src@1") -> pb.TemplateCreateRequest:
    step = pb.TemplateStep(type="COPY", args=["a", "/a"], files_hash=name)
    return pb.TemplateCreateRequest(template=api.template(steps=[step]), cache_scope=scope)


async def upload(api: Api, name: str, scope: str) -> pb.InitLayerFileUploadResponse:
    request = pb.InitLayerFileUploadRequest(template_id="web", hash=name, cache_scope=scope)
    answer: pb.InitLayerFileUploadResponse = await api.client._stub.InitLayerFileUpload(request)
    return answer


async def put(api: Api, tar: Path, name: str = "src@1", scope: str = "team") -> None:
    """Send files as E2B's SDKs do: one PUT with its length."""
    answer = await upload(api, name, scope)
    response = await asyncio.to_thread(requests.put, answer.url, data=tar.read_bytes(), timeout=30)
    assert response.ok


async def create_scoped(api: Api, **called: str) -> str:
    """Create a build and return what its COPY is of."""
    request = scoped_copy(api, **called)
    await api.client._stub.TemplateCreate(request)
    workflow_id = build_workflow_id(request.template.build_id)
    handle = api.temporal.get_workflow_handle_for(BuildTemplate.run, workflow_id)
    [step] = (await handle.query(BuildTemplate.status)).config.steps
    assert isinstance(step, Copy)
    return step.files_sha256


async def test_files_in_a_scope_are_found_by_their_name_and_known_by_their_bytes(
    api: Api, empty_bucket: Bucket, tar: Path
) -> None:
    assert not (await upload(api, "src@1", "team")).present
    await put(api, tar)
    assert (await upload(api, "src@1", "team")).present
    assert await create_scoped(api) == sha256_of(tar)
    # Once they have been taken they lie there once, under the SHA-256 of what they are.
    assert stored(empty_bucket, tar) == tar.read_bytes()
    sent = empty_bucket.read_object(sent_files_name(SentFiles("src@1", "team"), DEFAULT_TENANT))
    assert sent is not None and sent[0] == b""
    again = await upload(api, "src@1", "team")
    assert again.present and again.url
    assert await create_scoped(api) == sha256_of(tar)


async def test_what_is_sent_under_a_name_anew_is_what_the_next_build_takes(
    api: Api, tar: Path, tmp_path: Path
) -> None:
    await put(api, tar)
    assert await create_scoped(api) == sha256_of(tar)
    other = tmp_path / "other.tar"
    other.write_bytes(b"other")
    await put(api, other)
    assert await create_scoped(api) == sha256_of(other)


async def test_an_address_takes_one_upload_and_none_when_another_has_come_first(
    api: Api, empty_bucket: Bucket
) -> None:
    """It lives for long: who finds it later must not change what has been sent."""
    first, second = [(await upload(api, "src@1", "team")).url for _ in range(2)]
    name = sent_files_name(SentFiles("src@1", "team"), DEFAULT_TENANT)
    assert (await asyncio.to_thread(requests.put, first, data=b"sent", timeout=30)).ok
    sent = empty_bucket.read_object(name)
    for late in (second, first):
        await asyncio.to_thread(requests.put, late, data=b"junk", timeout=30)
        assert empty_bucket.read_object(name) == sent
    assert sent is not None and sent[0] == b"sent"


async def test_a_name_is_no_claim_about_bytes(
    api: Api, empty_bucket: Bucket, tar: Path, tmp_path: Path
) -> None:
    """Who sends junk by the hash of what others have gets junk, and changes nothing of theirs."""
    await send(api, tar)
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk")
    await put(api, junk, name=sha256_of(tar))
    assert await create_scoped(api, name=sha256_of(tar)) == sha256_of(junk)
    assert stored(empty_bucket, tar) == tar.read_bytes()


@pytest.mark.parametrize("called", [{"scope": "other"}, {"name": "src@2"}, {"scope": ""}])
async def test_a_name_of_another_scope_is_not_there(
    api: Api, tar: Path, called: dict[str, str]
) -> None:
    await put(api, tar)
    request = scoped_copy(api, **called)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await api.client._stub.TemplateCreate(request)
    wanted = grpc.StatusCode.NOT_FOUND if request.cache_scope else grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.code() is wanted


async def test_builds_that_take_the_same_files_at_once_agree(
    api: Api, empty_bucket: Bucket, tar: Path
) -> None:
    await put(api, tar)
    found = await asyncio.gather(*(create_scoped(api) for _ in range(4)))
    assert set(found) == {sha256_of(tar)}
    kept = [item for item in empty_bucket.list_objects("files/") if item.size_bytes]
    assert [item.name for item in kept] == [files_name(sha256_of(tar))]


async def test_files_of_a_scope_that_are_too_large_are_not_read(
    api: Api, empty_bucket: Bucket, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(api, tar)
    monkeypatch.setattr(api.settings, "max_files_mb", 3)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await api.client._stub.TemplateCreate(scoped_copy(api))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{SIZE_BYTES} bytes; at most" in (error.value.details() or "")
    assert empty_bucket.stat_object(files_name(sha256_of(tar))) is None


async def test_files_of_a_scope_whose_content_was_swept_are_to_be_sent_again(
    api: Api, empty_bucket: Bucket, tar: Path
) -> None:
    await put(api, tar)
    await create_scoped(api)
    content = empty_bucket.stat_object(files_name(sha256_of(tar)))
    assert content is not None
    empty_bucket.delete_object(content.name, content.generation)
    assert not (await upload(api, "src@1", "team")).present
    await put(api, tar)
    assert await create_scoped(api) == sha256_of(tar)
