"""The dev stack's bucket keeps Cloud Storage's promises, and misbehaves when it is told to."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import google.api_core.exceptions as errors
import pytest
import requests
from devstack.processes import ServiceError
from devstack.stack import Stack
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client
from google.cloud.storage.exceptions import DataCorruption
from google.cloud.storage.retry import DEFAULT_RETRY

pytestmark = pytest.mark.counts_nothing

PATIENT = DEFAULT_RETRY.with_delay(initial=0.05, maximum=0.2).with_timeout(20)
CHUNK_BYTES = 256 * 1024
# The client sends content up to 8 MiB in one piece, whatever its chunk size.
LARGE_BYTES = 9 * 1024 * 1024


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(only=("gcs-emulator", "gcs", "bucket")) as running:
        yield running


@pytest.fixture
def bucket(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", stack.variables["STORAGE_EMULATOR_HOST"])
    client = Client(project="dev", credentials=AnonymousCredentials())  # type: ignore[no-untyped-call] # untyped upstream
    found = client.bucket(stack.environment.bucket)
    for blob in found.list_blobs():
        blob.delete()
    stack.traffic(clear=True)
    return found


def put(bucket: Any, name: str, content: str | bytes = "content", **conditions: Any) -> Any:
    blob = bucket.blob(name)
    blob.upload_from_string(content, **conditions)
    return blob


def start_session(bucket: Any, name: str, **conditions: Any) -> str:
    url: str = bucket.blob(name).create_resumable_upload_session(
        content_type="application/octet-stream", **conditions
    )
    return url


def content_of(bucket: Any, name: str) -> bytes:
    content: bytes = bucket.blob(name).download_as_bytes()
    return content


# Preconditions


def test_simple_upload_keeps_its_generation_precondition(bucket: Any) -> None:
    first = put(bucket, "a", "first", if_generation_match=0)
    with pytest.raises(errors.PreconditionFailed):
        put(bucket, "a", "second", if_generation_match=0)
    put(bucket, "a", "third", if_generation_match=first.generation)
    assert content_of(bucket, "a") == b"third"


def test_media_upload_keeps_its_generation_precondition(stack: Stack, bucket: Any) -> None:
    put(bucket, "a", "first")
    host = stack.variables["STORAGE_EMULATOR_HOST"]
    url = f"{host}/upload/storage/v1/b/{bucket.name}/o?uploadType=media&name=a&ifGenerationMatch=0"
    answer = requests.post(url, data=b"second", timeout=10)
    assert answer.status_code == 412
    assert answer.json()["error"]["errors"][0]["reason"] == "conditionNotMet"
    assert content_of(bucket, "a") == b"first"


def test_resumable_upload_is_refused_at_its_start_when_the_object_exists(bucket: Any) -> None:
    put(bucket, "a", "first")
    with pytest.raises(errors.PreconditionFailed):
        start_session(bucket, "a", if_generation_match=0)


def test_of_two_resumable_uploads_only_the_first_to_end_creates_the_object(bucket: Any) -> None:
    one = start_session(bucket, "a", if_generation_match=0)
    two = start_session(bucket, "a", if_generation_match=0)
    assert requests.put(one, data=b"one", timeout=10).status_code == 200
    assert requests.put(two, data=b"two", timeout=10).status_code == 412
    assert content_of(bucket, "a") == b"one"


def test_compose_keeps_its_generation_precondition(bucket: Any) -> None:
    parts = [put(bucket, "a", "A"), put(bucket, "b", "B")]
    bucket.blob("whole").compose(parts, if_generation_match=0)
    with pytest.raises(errors.PreconditionFailed):
        bucket.blob("whole").compose(parts[:1], if_generation_match=0)
    assert content_of(bucket, "whole") == b"AB"


def test_compose_keeps_the_preconditions_of_its_sources(bucket: Any) -> None:
    part = put(bucket, "a", "A")
    old = part.generation
    put(bucket, "a", "newer")
    with pytest.raises(errors.PreconditionFailed):
        bucket.blob("whole").compose([part], if_source_generation_match=[old])


def test_compose_of_a_missing_source_is_not_found(bucket: Any) -> None:
    with pytest.raises(errors.NotFound):
        bucket.blob("whole").compose([bucket.blob("nowhere")], retry=None)


def test_delete_removes_only_the_generation_that_it_names(bucket: Any) -> None:
    old = put(bucket, "a", "old").generation
    new = put(bucket, "a", "new").generation
    with pytest.raises(errors.PreconditionFailed):
        bucket.blob("a").delete(if_generation_match=old)
    with pytest.raises(errors.NotFound):
        bucket.blob("a", generation=old).delete()
    assert content_of(bucket, "a") == b"new"
    bucket.blob("a").delete(if_generation_match=new)
    assert not bucket.blob("a").exists()


def test_delete_and_patch_keep_the_metageneration_precondition(bucket: Any) -> None:
    blob = put(bucket, "a")
    with pytest.raises(errors.PreconditionFailed):
        blob.delete(if_metageneration_match=7)
    blob.metadata = {"key": "value"}
    with pytest.raises(errors.PreconditionFailed):
        blob.patch(if_metageneration_match=7)


@pytest.mark.parametrize(
    "conditions", [{"if_generation_match": 0}, {"if_source_generation_match": 5}]
)
def test_rewrite_and_copy_keep_their_preconditions(bucket: Any, conditions: dict[str, int]) -> None:
    source = put(bucket, "source", "new")
    put(bucket, "target", "old")
    with pytest.raises(errors.PreconditionFailed):
        bucket.blob("target").rewrite(source, **conditions)
    with pytest.raises(errors.PreconditionFailed):
        bucket.copy_blob(source, bucket, "target", **conditions)
    assert content_of(bucket, "target") == b"old"


def test_reads_keep_their_preconditions(bucket: Any) -> None:
    blob = put(bucket, "a")
    with pytest.raises(errors.PreconditionFailed):
        blob.download_as_bytes(if_generation_match=5)
    with pytest.raises(errors.PreconditionFailed):
        blob.reload(if_generation_match=5)


def test_of_many_creators_at_the_same_time_exactly_one_wins(bucket: Any) -> None:
    part = put(bucket, "part", "x")
    start = threading.Barrier(8)

    def compose() -> bool:
        start.wait()
        try:
            bucket.blob("whole").compose([part], if_generation_match=0)
        except errors.PreconditionFailed:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        wins = [pool.submit(compose) for _ in range(8)]
        assert sum(win.result() for win in wins) == 1


def test_a_stalled_upload_does_not_hold_up_others(stack: Stack, bucket: Any) -> None:
    url = start_session(bucket, "slow")
    with stack.faults({"kind": "slow", "operation": "resumable-chunk", "bytes_per_second": 50_000}):
        thread = threading.Thread(target=requests.put, args=(url, b"x" * 200_000))
        thread.start()
        started = time.monotonic()
        put(bucket, "quick")
        bucket.blob("quick").delete()
        assert time.monotonic() - started < 1
        assert thread.is_alive()
        thread.join()
    assert len(content_of(bucket, "slow")) == 200_000


def test_batches_are_refused_because_they_would_bypass_the_lock(stack: Stack) -> None:
    host = stack.variables["STORAGE_EMULATOR_HOST"]
    assert requests.post(f"{host}/batch/storage/v1", data=b"", timeout=10).status_code == 400


# Resumable uploads


def test_a_resumable_upload_in_chunks_goes_through_the_proxy(stack: Stack, bucket: Any) -> None:
    blob = bucket.blob("folder/object with spaces")
    blob.chunk_size = 12 * CHUNK_BYTES
    content = os.urandom(LARGE_BYTES + 17)
    blob.upload_from_string(content)
    blob.reload()
    assert blob.download_as_bytes() == content
    assert stack.traffic()["operations"]["resumable-chunk"]["requests"] == 4


@pytest.mark.parametrize("total", [f"{CHUNK_BYTES + 1}", "*"])
def test_asking_for_the_state_of_an_upload_does_not_end_it(bucket: Any, total: str) -> None:
    url = start_session(bucket, "a")
    first = {"Content-Range": f"bytes 0-{CHUNK_BYTES - 1}/{CHUNK_BYTES + 1}"}
    assert requests.put(url, b"x" * CHUNK_BYTES, headers=first, timeout=10).status_code == 308
    state = requests.put(url, headers={"Content-Range": f"bytes */{total}"}, timeout=10)
    assert (state.status_code, state.headers["Range"]) == (308, f"bytes=0-{CHUNK_BYTES - 1}")
    last = {"Content-Range": f"bytes {CHUNK_BYTES}-{CHUNK_BYTES}/{CHUNK_BYTES + 1}"}
    assert requests.put(url, b"x", headers=last, timeout=10).status_code == 200
    assert len(content_of(bucket, "a")) == CHUNK_BYTES + 1


def test_an_upload_of_unknown_size_ends_with_an_empty_chunk(bucket: Any) -> None:
    url = start_session(bucket, "a", if_generation_match=0)
    first = {"Content-Range": f"bytes 0-{CHUNK_BYTES - 1}/*"}
    assert requests.put(url, b"x" * CHUNK_BYTES, headers=first, timeout=10).status_code == 308
    end = {"Content-Range": f"bytes */{CHUNK_BYTES}"}
    assert requests.put(url, headers=end, timeout=10).status_code == 200
    assert len(content_of(bucket, "a")) == CHUNK_BYTES


@pytest.mark.parametrize("kind", ["status", "reset", "lost_response"])
def test_a_failed_chunk_is_made_good_by_the_client(stack: Stack, bucket: Any, kind: str) -> None:
    content = os.urandom(LARGE_BYTES)
    blob = bucket.blob("a", chunk_size=12 * CHUNK_BYTES)
    rule = {"kind": kind, "operation": "resumable-chunk", "skip": 1, "after_bytes": 1_000_000}
    with stack.faults(rule):
        blob.upload_from_string(content, if_generation_match=0, retry=PATIENT)
    assert content_of(bucket, "a") == content


def test_the_last_chunk_may_be_sent_again_when_its_answer_was_lost(
    stack: Stack, bucket: Any
) -> None:
    url = start_session(bucket, "a", if_generation_match=0)
    with stack.faults({"kind": "lost_response", "operation": "resumable-chunk"}):
        with pytest.raises(requests.ConnectionError):
            requests.put(url, b"content", timeout=10)
        again = requests.put(url, b"content", timeout=10)
    assert (again.status_code, again.json()["name"]) == (200, "a")


# Generations and restarts


def test_generations_grow_also_over_delete_and_restart(stack: Stack, bucket: Any) -> None:
    generations = [put(bucket, "a").generation, put(bucket, "a").generation]
    bucket.blob("a").delete()
    generations.append(put(bucket, "a").generation)
    bucket.blob("b").compose([bucket.blob("a")])
    stack.restart("gcs-emulator")
    generations.append(put(bucket, "a").generation)
    assert generations == sorted(set(generations))


@pytest.mark.parametrize("crash", [False, True])
def test_objects_survive_a_restart_unchanged(stack: Stack, bucket: Any, crash: bool) -> None:
    put(bucket, "folder/a", "content")
    before = [(b.name, b.generation, b.crc32c, b.size) for b in bucket.list_blobs()]
    for name in ("gcs", "gcs-emulator"):
        if crash:
            stack.kill(name)
        stack.restart(name)
    assert [(b.name, b.generation, b.crc32c, b.size) for b in bucket.list_blobs()] == before
    assert content_of(bucket, "folder/a") == b"content"


def test_while_the_emulator_is_away_the_answer_is_503(stack: Stack, bucket: Any) -> None:
    stack.kill("gcs-emulator")
    try:
        with pytest.raises(errors.ServiceUnavailable):
            bucket.blob("a").reload(retry=None)
    finally:
        stack.restart("gcs-emulator")


# Faults


def test_a_503_is_retried_by_the_client(stack: Stack, bucket: Any) -> None:
    with stack.faults({"kind": "status", "operation": "upload", "count": 2, "retry_after": 0}):
        put(bucket, "a", retry=PATIENT)
    assert content_of(bucket, "a") == b"content"
    assert stack.traffic()["operations"]["upload"] | {"bytes_in": 0, "bytes_out": 0} == {
        "requests": 3,
        "bytes_in": 0,
        "bytes_out": 0,
        "faults": 2,
    }


def test_a_503_without_end_reaches_the_caller_with_its_retry_after(
    stack: Stack, bucket: Any
) -> None:
    with (
        stack.faults({"kind": "status", "method": "GET", "count": None, "retry_after": 7}),
        pytest.raises(errors.ServiceUnavailable) as failure,
    ):
        bucket.blob("a").reload(retry=None)
    assert failure.value.response.headers["Retry-After"] == "7"


def test_a_reset_in_mid_body_stores_nothing(stack: Stack, bucket: Any) -> None:
    with stack.faults({"kind": "reset", "operation": "upload", "after_bytes": 300_000}):
        with pytest.raises((requests.ConnectionError, errors.RetryError)):
            put(bucket, "a", b"x" * 2_000_000, retry=None)
        assert not bucket.blob("a").exists()
        put(bucket, "a", b"x" * 2_000_000, retry=None)


def test_a_reset_strikes_reads_as_well(stack: Stack, bucket: Any) -> None:
    put(bucket, "a")
    with stack.faults({"kind": "reset", "operation": "get"}):
        with pytest.raises(requests.ConnectionError):
            bucket.blob("a").reload(retry=None)
        bucket.blob("a").reload(retry=None)


def test_a_lost_response_leaves_the_object_behind(stack: Stack, bucket: Any) -> None:
    with (
        stack.faults({"kind": "lost_response", "operation": "upload"}),
        pytest.raises(requests.ConnectionError),
    ):
        put(bucket, "a", if_generation_match=0, retry=None)
    assert content_of(bucket, "a") == b"content"


def test_a_lost_response_to_a_delete_makes_its_retry_not_found(stack: Stack, bucket: Any) -> None:
    blob = put(bucket, "a")
    with (
        stack.faults({"kind": "lost_response", "operation": "delete"}),
        pytest.raises(errors.NotFound),
    ):
        blob.delete(if_generation_match=blob.generation, retry=PATIENT)


@pytest.mark.parametrize("size", [100, 2_000_000])
def test_a_truncated_download_is_noticed(stack: Stack, bucket: Any, size: int) -> None:
    put(bucket, "a", os.urandom(size))
    with stack.faults({"kind": "truncate", "operation": "download", "after_bytes": 50}):
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            bucket.blob("a").download_as_bytes(retry=None)
        assert len(content_of(bucket, "a")) == size


def test_a_200_with_an_error_in_its_body_stores_nothing(stack: Stack, bucket: Any) -> None:
    with stack.faults({"kind": "error_body", "operation": "upload"}):
        blob = put(bucket, "a", retry=None)
    # The client takes it for a success: only what the answer lacks tells.
    assert blob.generation is None
    assert not bucket.blob("a").exists()


def test_a_wrong_crc_of_an_upload_is_visible(stack: Stack, bucket: Any) -> None:
    right = put(bucket, "a").crc32c
    with stack.faults({"kind": "wrong_crc", "operation": "upload"}):
        assert put(bucket, "a").crc32c != right


@pytest.mark.parametrize(
    "transfer",
    [
        pytest.param(lambda bucket: bucket.blob("a").download_as_bytes(), id="download"),
        pytest.param(
            lambda bucket: put(bucket, "b", b"x" * LARGE_BYTES, checksum="crc32c"),
            id="resumable upload",
        ),
    ],
)
def test_a_wrong_crc_is_data_corruption_to_the_client(
    stack: Stack, bucket: Any, transfer: Callable[[Any], object]
) -> None:
    put(bucket, "a")
    rule = {"kind": "wrong_crc", "operation": "download|resumable-chunk", "count": None}
    with stack.faults(rule), pytest.raises(DataCorruption):
        transfer(bucket)


def test_a_slow_bucket_is_slow_in_both_directions(stack: Stack, bucket: Any) -> None:
    rule = {"kind": "slow", "bytes_per_second": 1_000_000, "count": None}
    with stack.faults(rule):
        started = time.monotonic()
        put(bucket, "a", b"x" * 300_000)
        uploaded = time.monotonic()
        content_of(bucket, "a")
        assert uploaded - started > 0.3
        assert time.monotonic() - uploaded > 0.3


def test_a_delay_holds_a_request_back(stack: Stack, bucket: Any) -> None:
    put(bucket, "a")
    with stack.faults({"kind": "slow", "delay": 0.3, "operation": "delete"}):
        started = time.monotonic()
        bucket.blob("a").delete()
        assert time.monotonic() - started > 0.3


def test_a_rule_strikes_by_path_after_skipping_and_counts_its_hits(
    stack: Stack, bucket: Any
) -> None:
    put(bucket, "hit")
    put(bucket, "miss")
    with stack.faults({"kind": "status", "path": "/o/hit", "skip": 1, "count": 1}):
        bucket.blob("miss").reload(retry=None)
        bucket.blob("hit").reload(retry=None)
        with pytest.raises(errors.ServiceUnavailable):
            bucket.blob("hit").reload(retry=None)
        host = stack.variables["STORAGE_EMULATOR_HOST"]
        assert requests.get(f"{host}/_faults", timeout=10).json()[0]["hits"] == 1
    assert requests.get(f"{host}/_faults", timeout=10).json() == []


@pytest.mark.parametrize(
    "rule", [{"kind": "magic"}, {"kind": "slow", "speed": 1}, {"kind": "reset", "path": "("}]
)
def test_a_rule_that_makes_no_sense_is_refused(stack: Stack, rule: dict[str, Any]) -> None:
    with pytest.raises(ServiceError), stack.faults(rule):
        pass


# Size


def test_the_proxy_never_holds_an_upload_in_memory(stack: Stack, bucket: Any) -> None:
    url = start_session(bucket, "big")
    before = peak_memory_kib(stack.pid("gcs"))
    piece = os.urandom(1024 * 1024)
    assert requests.put(url, (piece for _ in range(128)), timeout=120).status_code == 200
    path = f"/download/storage/v1/b/{bucket.name}/o/big?alt=media"
    download = requests.get(url.partition("/upload/")[0] + path, stream=True, timeout=60)
    assert sum(len(part) for part in download.iter_content(1 << 20)) == 128 << 20
    assert peak_memory_kib(stack.pid("gcs")) - before < 32 * 1024


def peak_memory_kib(pid: int | None) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
