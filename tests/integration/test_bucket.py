"""The object store client and the leases, against a real emulator that misbehaves when told to."""

from __future__ import annotations

import os
import time

import pytest
from devstack.stack import Stack

from activities.contract.errors import (
    LeaseLostError,
    PreconditionFailedError,
    StorageCorruptionError,
    StorageDeniedError,
    StorageUnavailableError,
)
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from activities.store.objects import lease_name
from tests.support.example_template import BUILD
from tests.support.step_checks import Stopped, stop_at

pytestmark = pytest.mark.counts_nothing

MIB = 1024 * 1024


@pytest.mark.parametrize("size", [0, 100, 9 * MIB])
def test_what_is_written_is_read_and_listed(empty_bucket: Bucket, size: int) -> None:
    data = os.urandom(size)
    stored = empty_bucket.write_object("folder/a", data, if_generation_match=0)
    assert empty_bucket.read_object("folder/a") == (data, stored.generation)
    assert empty_bucket.stat_object("folder/a") == stored
    assert empty_bucket.list_objects("folder/") == [stored]
    assert empty_bucket.read_range(stored, size // 2, size // 4) == (
        data[size // 2 : size // 2 + size // 4] if size else b""
    )


def test_what_does_not_exist_is_none(empty_bucket: Bucket) -> None:
    assert empty_bucket.read_object("a") is None
    assert empty_bucket.stat_object("a") is None
    assert empty_bucket.list_objects("a") == []


@pytest.mark.parametrize("size", [1, 9 * MIB])
def test_a_write_that_expects_another_generation_is_refused(
    empty_bucket: Bucket, size: int
) -> None:
    first = empty_bucket.write_object("a", b"1", if_generation_match=0)
    with pytest.raises(PreconditionFailedError):
        empty_bucket.write_object("a", b"2" * size, if_generation_match=0)
    second = empty_bucket.write_object("a", b"3" * size, if_generation_match=first.generation)
    assert second.generation > first.generation


def test_a_delete_names_the_generation_it_deletes(empty_bucket: Bucket) -> None:
    first = empty_bucket.write_object("a", b"1")
    second = empty_bucket.write_object("a", b"2")
    assert not empty_bucket.delete_object("a", first.generation)
    assert empty_bucket.stat_object("a") == second
    assert empty_bucket.delete_object("a", second.generation)
    assert not empty_bucket.delete_object("a", second.generation)


def test_composing_makes_a_new_object_only(empty_bucket: Bucket) -> None:
    for name in ("a", "b"):
        empty_bucket.write_object(name, name.encode())
    whole = empty_bucket.compose("whole", ["a", "b"])
    assert empty_bucket.read_object("whole") == (b"ab", whole.generation)
    with pytest.raises(PreconditionFailedError):
        empty_bucket.compose("whole", ["a"])
    with pytest.raises(PreconditionFailedError):
        empty_bucket.compose("other", ["a", "gone"])
    assert empty_bucket.stat_object("other") is None


def test_a_bucket_that_does_not_exist_is_named_in_seconds(empty_bucket: Bucket) -> None:
    started = time.monotonic()
    with pytest.raises(StorageDeniedError, match="404"):
        Bucket("no-such-bucket").write_object("a", b"b", if_generation_match=0)
    with pytest.raises(StorageDeniedError, match="404"):
        Bucket("no-such-bucket").list_objects("")
    assert time.monotonic() - started < 5


def test_a_bucket_that_cannot_be_reached_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("activities.store.bucket.RETRY_SECONDS", 0.5)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(StorageUnavailableError):
        Bucket("anything").stat_object("a")


@pytest.mark.parametrize("size", [100, 9 * MIB])
@pytest.mark.parametrize("kind", ["status", "reset", "lost_response"])
def test_a_blip_is_ridden_out(empty_bucket: Bucket, storage: Stack, kind: str, size: int) -> None:
    data = os.urandom(size)
    rule = {"kind": kind, "operation": "upload|resumable-start|resumable-chunk", "count": 1}
    try:
        with storage.faults(rule):
            empty_bucket.write_object("a", data, if_generation_match=0)
    except PreconditionFailedError:  # its first try had come through
        assert kind == "lost_response"
    found = empty_bucket.read_object("a")
    assert found is not None
    assert found[0] == data


def test_a_piece_may_take_longer_to_send_than_a_connection_to_open(
    empty_bucket: Bucket, storage: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.store.bucket.TIMEOUT", (0.2, 30.0))
    data = os.urandom(MIB) * 16  # more than a connection holds that nobody reads
    with storage.faults({"kind": "slow", "bytes_per_second": 8 * MIB, "count": None}):
        stored = empty_bucket.write_object("a", data, if_generation_match=0)
    assert stored.size_bytes == len(data)


def test_a_denial_is_not_tried_again(empty_bucket: Bucket, storage: Stack) -> None:
    with (
        storage.faults({"kind": "status", "status": 403, "count": None}),
        pytest.raises(StorageDeniedError),
    ):
        empty_bucket.write_object("a", b"b", if_generation_match=0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_lasts_is_unavailable_and_says_when_to_come_back(
    empty_bucket: Bucket, storage: Stack, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("activities.store.bucket.RETRY_SECONDS", 0.3)
    rule = {"kind": "status", "status": status, "retry_after": 7, "count": None}
    with storage.faults(rule), pytest.raises(StorageUnavailableError) as failure:
        empty_bucket.write_object("a", b"b", if_generation_match=0)
    assert failure.value.retry_after_seconds == 7
    assert failure.value.retryable


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_a_wrong_checksum_is_never_taken_for_success(
    empty_bucket: Bucket, storage: Stack, size: int
) -> None:
    rule = {"kind": "wrong_crc", "operation": "upload|resumable-chunk", "count": None}
    with storage.faults(rule), pytest.raises(StorageCorruptionError):
        empty_bucket.write_object("a", b"x" * size, if_generation_match=0)


def test_a_truncated_download_is_fetched_again(empty_bucket: Bucket, storage: Stack) -> None:
    data = os.urandom(MIB)
    empty_bucket.write_object("a", data)
    with storage.faults({"kind": "truncate", "operation": "download", "after_bytes": 1000}):
        found = empty_bucket.read_object("a")
    assert found is not None
    assert found[0] == data


def test_an_error_sent_with_status_200_is_never_taken_for_an_answer(
    empty_bucket: Bucket, storage: Stack
) -> None:
    stored = empty_bucket.write_object("a", b"content")
    with storage.faults({"kind": "error_body", "count": None}):
        for call in (
            lambda: empty_bucket.write_object("b", b"b", if_generation_match=0),
            lambda: empty_bucket.stat_object("a"),
            lambda: empty_bucket.read_object("a"),
            lambda: empty_bucket.list_objects(""),
            lambda: empty_bucket.compose("c", ["a"]),
        ):
            with pytest.raises(StorageUnavailableError):
                call()
    with (
        storage.faults({"kind": "error_body", "operation": "download", "count": None}),
        pytest.raises(StorageCorruptionError),
    ):
        empty_bucket.read_object("a")
    assert empty_bucket.list_objects("") == [stored]


def test_an_upload_stops_within_a_request(empty_bucket: Bucket) -> None:
    with pytest.raises(Stopped):
        empty_bucket.write_object("a", b"x" * (20 * MIB), if_generation_match=0, check=stop_at(20))
    assert empty_bucket.stat_object("a") is None


def test_a_large_object_is_sent_in_few_requests(empty_bucket: Bucket, storage: Stack) -> None:
    data = os.urandom(MIB) * 33
    storage.traffic(clear=True)
    stored = empty_bucket.write_object("a", data, if_generation_match=0)
    assert storage.traffic()["operations"]["resumable-chunk"]["requests"] == 2
    assert empty_bucket.read_object("a") == (data, stored.generation)


def test_a_later_lease_has_a_higher_number(empty_bucket: Bucket) -> None:
    leases = LeaseObjects(empty_bucket)
    first = leases.take(BUILD, "h1", "w", None)
    assert leases.take(BUILD, "h1", "w", first) == first
    second = leases.take(BUILD, "h2", "w", None)
    assert second > first
    assert not leases.is_current(BUILD, first)
    leases.release(BUILD, first)  # somebody else's by now
    assert leases.is_current(BUILD, second)
    leases.release(BUILD, second)
    assert leases.take(BUILD, "h1", "w", second) > second


def test_the_first_lease_of_a_build_costs_one_call(empty_bucket: Bucket, storage: Stack) -> None:
    storage.traffic(clear=True)
    LeaseObjects(empty_bucket).take(BUILD, "h1", "w", None)
    assert len(storage.traffic()["requests"]) == 1


def test_a_tombstone_outdates_leases_but_does_not_stop_a_new_one(empty_bucket: Bucket) -> None:
    leases = LeaseObjects(empty_bucket)
    before = leases.take(BUILD, "h1", "w", None)
    tombstone = leases.bury(BUILD)
    assert tombstone > before
    assert not leases.is_current(BUILD, before)
    after = leases.take(BUILD, "h3", "w", before)
    assert after > tombstone
    assert not leases.unbury(BUILD, tombstone)
    assert leases.is_current(BUILD, after)


def test_a_lease_whose_answer_is_lost_is_taken_all_the_same(
    empty_bucket: Bucket, storage: Stack
) -> None:
    leases = LeaseObjects(empty_bucket)
    with storage.faults({"kind": "lost_response", "operation": "upload"}):
        number = leases.take(BUILD, "h1", "w", None)
    assert leases.is_current(BUILD, number)


def test_of_two_hosts_that_race_for_a_lease_the_loser_looks_again(
    empty_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = LeaseObjects(empty_bucket)
    leases.take(BUILD, "rival", "w", None)
    stat, rivals = empty_bucket.stat_object, 1

    def stat_and_be_overtaken(name: str) -> object:
        nonlocal rivals
        found = stat(name)
        if rivals:
            rivals -= 1
            empty_bucket.write_object(lease_name(BUILD), b"rival")
        return found

    monkeypatch.setattr(empty_bucket, "stat_object", stat_and_be_overtaken)
    number = leases.take(BUILD, "h1", "w", None)
    assert leases.is_current(BUILD, number)
    rivals = 99
    with pytest.raises(LeaseLostError):
        leases.take(BUILD, "h1", "w", None)
