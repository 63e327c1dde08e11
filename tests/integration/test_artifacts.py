"""Upload, publish, undo and pull against a real emulator of Google Cloud Storage."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any

import pytest
from devstack.environment import REPOSITORY
from devstack.stack import Stack
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.errors import (
    CheckpointLostError,
    LeaseLostError,
    StorageCorruptionError,
    StorageDeniedError,
    TemplateAlreadyPublishedError,
    TemplateDamagedError,
    TemplateManagerError,
    TemplateNotFoundError,
)
from activities.contract.inputs import (
    DiscardUploadInput,
    PublishTemplateInput,
    UploadArtifactInput,
    UploadArtifactsInput,
)
from activities.contract.names import ArtifactName, Step
from activities.contract.results import (
    PublishedTemplate,
    StoredObject,
    UploadedArtifact,
    Verification,
)
from activities.disk.sparse_files import sha256_of
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.download import pull_template
from activities.store.headers import parse_header
from activities.store.lease_numbers import LeaseObjects
from activities.store.metadata import read_metadata, wrong_objects
from activities.store.names import TenantNames
from activities.store.objects import METADATA, parts_prefix
from activities.template.artifacts import BucketArtifactActivities, discard_upload
from activities.template.upload import PartSender
from tests.support.command_line import cli, started
from tests.support.example_template import BUILD, pulled_image, template_config
from tests.support.held_build import HeldBuild, hold
from tests.support.step_checks import go_on

pytestmark = pytest.mark.counts_nothing

MIB = 1024 * 1024
NAMES = tuple(ArtifactName)


def activities(held: HeldBuild, bucket: Bucket) -> BucketArtifactActivities:
    return BucketArtifactActivities(
        held.settings, bucket, held.ledger, held.store, LeaseObjects(bucket)
    )


def snapshot(held: HeldBuild, seed: int = 1, mebibytes: int = 40) -> SnapshotCheckpoint:
    """Make a snapshot checkpoint of sparse files with some data."""
    key = f"{seed:064x}"
    with held.store.making(Step.BOOT, key, held.scope, 1, go_on) as work:
        for name in NAMES:
            chance = random.Random(f"{seed}{name}")
            with (work / name).open("wb") as file:
                file.truncate(mebibytes * MIB)
                for _ in range(60):
                    file.seek(chance.randrange(mebibytes * 256 - 32) * 4096)
                    file.write(chance.randbytes(chance.randrange(1, 32 * 4096)))
                file.seek(5 * MIB)
                file.write(bytes(MIB))  # zeros that are written, not a hole
                for at in (4, mebibytes - 1, mebibytes - 2):  # the same, three times
                    file.seek(at * MIB)
                    file.write(b"again" * (MIB // 10))
        with (work / "snapfile").open("r+b") as file:
            file.truncate(70_001)
        made = SnapshotCheckpoint(fingerprint=key, host=held.scope.lease.host)
        return held.store.publish(work, made, held.scope, names=NAMES, check=go_on)


async def upload(
    held: HeldBuild, bucket: Bucket, what: SnapshotCheckpoint, name: str
) -> UploadedArtifact:
    sent = UploadArtifactInput.model_validate({"scope": held.scope, "snapshot": what, "name": name})
    return await ActivityEnvironment().run(activities(held, bucket).upload_artifact, sent)


async def upload_all(
    held: HeldBuild, bucket: Bucket, what: SnapshotCheckpoint
) -> dict[str, UploadedArtifact]:
    sent = UploadArtifactsInput(scope=held.scope, snapshot=what, names=tuple(ArtifactName))
    return await ActivityEnvironment().run(activities(held, bucket).upload_artifacts, sent)


async def publish(
    held: HeldBuild,
    bucket: Bucket,
    what: SnapshotCheckpoint,
    uploads: dict[str, UploadedArtifact] | None = None,
) -> PublishedTemplate:
    uploads = uploads or await upload_all(held, bucket, what)
    publishing = PublishTemplateInput(
        scope=held.scope,
        config=template_config(tenant=held.scope.tenant),
        image=pulled_image(),
        rootfs=RootfsCheckpoint(fingerprint="f" * 64, host=held.scope.lease.host),
        snapshot=what,
        verification=Verification(
            resume_ms=1, load_ms=1, clock_skew_ms=0, seconds_since_snapshot=1
        ),
        uploads=uploads,
        timeline=(),
    )
    return await ActivityEnvironment().run(activities(held, bucket).publish_template, publishing)


def names(bucket: Bucket) -> list[str]:
    return [stored.name.removeprefix(f"{BUILD}/") for stored in bucket.list_objects(f"{BUILD}/")]


async def test_together_artifacts_are_sent_as_each_alone_is(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    what = snapshot(held)
    first = await upload(held, empty_bucket, what, "memfile")
    together = await upload_all(held, empty_bucket, what)
    assert together["memfile"] == first  # it was there, and is not sent again
    assert together == {name: await upload(held, empty_bucket, what, name) for name in NAMES}


async def test_a_template_comes_back_byte_for_byte(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    what = snapshot(held)
    await publish(held, empty_bucket, what)
    assert sorted(names(empty_bucket)) == sorted(
        [*NAMES, "rootfs.ext4.header", "memfile.header", "build.log", "metadata.json"]
    )
    for name in names(empty_bucket):
        blob = empty_bucket._bucket.get_blob(f"{BUILD}/{name}")
        assert blob is not None and blob.metadata == {"tenant": "default"}, name
    pull_template(empty_bucket, BUILD, tmp_path / "out", lambda *_: None)
    for name in NAMES:
        source, target = held.store.file(what, name), tmp_path / "out" / name
        assert target.read_bytes() == source.read_bytes()
    assert (tmp_path / "out" / "memfile").stat().st_blocks * 512 < 20 * MIB


async def test_a_template_says_whose_it_is(held: HeldBuild, empty_bucket: Bucket) -> None:
    theirs = replace(held, scope=held.scope.model_copy(update={"tenant": "acme"}))
    await publish(theirs, empty_bucket, snapshot(theirs))
    blobs = list(empty_bucket._bucket.list_blobs(prefix=f"{BUILD}/"))
    assert {blob.metadata["tenant"] for blob in blobs} == {"acme"}
    told = read_metadata(empty_bucket, BUILD)
    assert told is not None and told.config.tenant == "acme"


async def test_no_block_of_a_memory_is_sent_twice(held: HeldBuild, empty_bucket: Bucket) -> None:
    what = snapshot(held)  # which has zeros, too
    sent = await upload(held, empty_bucket, what, "memfile")
    content = held.store.file(what, ArtifactName.MEMFILE).read_bytes()
    blocks = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    stored = {block for block in blocks if any(block)}
    assert len(stored) < sum(any(block) for block in blocks) - 200
    assert sent.sent_bytes == sent.objects["data"].size_bytes == len(stored) * 4096
    header = empty_bucket.read_object(f"{BUILD}/memfile.header")
    assert header is not None
    assert parse_header(header[0]).size == len(content)


async def test_an_operator_may_want_equal_pages_apart(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    """An older orchestrator joins records of one build as if their storage were contiguous."""
    what = snapshot(held)
    apart = replace(held, settings=held.settings.model_copy(update={"equal_pages_once": False}))
    await upload(apart, empty_bucket, what, "memfile")
    content = held.store.file(what, ArtifactName.MEMFILE).read_bytes()
    header = empty_bucket.read_object(f"{BUILD}/memfile.header")
    assert header is not None
    stored = [one for one in parse_header(header[0]).extents if one.storage_offset is not None]
    assert [one.storage_offset for one in stored] == [0, *(one.storage_end for one in stored[:-1])]
    data = empty_bucket.read_object(f"{BUILD}/memfile")
    assert data is not None
    assert data[0] == b"".join(
        block
        for block in (content[at : at + 4096] for at in range(0, len(content), 4096))
        if any(block)
    )


async def test_uploading_twice_changes_nothing(held: HeldBuild, empty_bucket: Bucket) -> None:
    what = snapshot(held)
    first = await upload(held, empty_bucket, what, "memfile")
    second = await upload(held, empty_bucket, what, "memfile")
    assert first == second


async def test_uploading_at_the_same_time_gives_one_object(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    what = snapshot(held)
    both = await asyncio.gather(*(upload(held, empty_bucket, what, "memfile") for _ in range(2)))
    stored = empty_bucket.stat_object(f"{BUILD}/memfile")
    assert both[0] == both[1]
    assert both[0].objects["data"] == stored
    assert sorted(names(empty_bucket)) == ["memfile", "memfile.header"]


async def test_publishing_at_the_same_time_is_publishing_once(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    what = snapshot(held)
    both = await asyncio.gather(*(publish(held, empty_bucket, what) for _ in range(2)))
    assert both[0] == both[1]


async def test_publishing_twice_is_publishing_once(held: HeldBuild, empty_bucket: Bucket) -> None:
    what = snapshot(held)
    assert await publish(held, empty_bucket, what) == await publish(held, empty_bucket, what)


async def test_an_interrupted_upload_sends_only_what_is_missing(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack
) -> None:
    what = snapshot(held, mebibytes=80)
    rule = {"kind": "status", "status": 403, "operation": "upload", "skip": 2, "count": None}
    with storage.faults(rule), pytest.raises(StorageDeniedError):
        await upload(held, empty_bucket, what, "memfile")
    parts = {s.name for s in empty_bucket.list_objects(parts_prefix(BUILD))}
    assert parts
    discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=True))
    assert {s.name for s in empty_bucket.list_objects(parts_prefix(BUILD))} == parts
    storage.traffic(clear=True)
    uploaded = await upload(held, empty_bucket, what, "memfile")
    missing = -(-uploaded.sent_bytes // MIB) - len(parts)
    header = 1
    assert missing > 0
    assert storage.traffic()["operations"]["upload"]["requests"] == missing + header
    assert empty_bucket.list_objects(parts_prefix(BUILD)) == []


async def test_a_cancelled_upload_stops_within_seconds_and_leaves_nothing_after_its_undo(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack
) -> None:
    what = snapshot(held, mebibytes=80)
    environment = ActivityEnvironment()
    running = asyncio.ensure_future(
        environment.run(
            activities(held, empty_bucket).upload_artifact,
            UploadArtifactInput(scope=held.scope, snapshot=what, name=ArtifactName.MEMFILE),
        )
    )
    with storage.faults({"kind": "slow", "bytes_per_second": 400_000, "count": None}):
        await asyncio.sleep(0.5)
        started = time.monotonic()
        environment.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert time.monotonic() - started < 5
    discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=False))
    assert names(empty_bucket) == []


async def test_a_fenced_host_publishes_nothing(held: HeldBuild, empty_bucket: Bucket) -> None:
    what = snapshot(held)
    LeaseObjects(empty_bucket).take(BUILD, "h2", "workflow", None)
    with pytest.raises(LeaseLostError):
        await upload(held, empty_bucket, what, "memfile")
    assert empty_bucket.stat_object(f"{BUILD}/memfile") is None


async def test_a_host_whose_ledger_has_a_newer_lease_does_not_even_begin(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    what = snapshot(held)
    hold(tmp_path, held.scope.lease.number + 1)
    with pytest.raises(LeaseLostError):
        await upload(held, empty_bucket, what, "memfile")
    assert names(empty_bucket) == []


async def test_discarding_leaves_the_bucket_as_it_was(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    what = snapshot(held)
    await upload(held, empty_bucket, what, "memfile")
    discarded = discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=False))
    assert discarded.published is None
    assert names(empty_bucket) == []


async def test_discarding_what_is_published_keeps_it(held: HeldBuild, empty_bucket: Bucket) -> None:
    published = await publish(held, empty_bucket, snapshot(held))
    discarded = discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=False))
    assert discarded.published == published


async def test_a_damaged_template_is_not_published(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    stored = empty_bucket.stat_object(f"{BUILD}/memfile")
    assert stored is not None
    empty_bucket.delete_object(stored.name, stored.generation)
    metadata = read_metadata(empty_bucket, BUILD)
    assert metadata is not None
    assert wrong_objects(empty_bucket, metadata) == [f"{BUILD}/memfile"]
    with pytest.raises(TemplateDamagedError, match="memfile"):
        pull_template(empty_bucket, BUILD, tmp_path / "out", lambda *_: None)
    discarded = discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=False))
    assert discarded.published is None
    assert names(empty_bucket) == []


async def test_what_changed_on_disk_is_not_published(held: HeldBuild, empty_bucket: Bucket) -> None:
    what = snapshot(held)
    path = held.store.file(what, ArtifactName.MEMFILE)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed behind our back")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointLostError, match="has changed") as lost:
        await upload(held, empty_bucket, what, "memfile")
    assert lost.value.step is Step.BOOT
    assert empty_bucket.stat_object(f"{BUILD}/memfile") is None


@pytest.mark.parametrize("operation", ["upload", "compose", "list", "get", "delete"])
@pytest.mark.parametrize("kind", ["status", "reset", "lost_response", "error_body", "wrong_crc"])
async def test_a_fault_is_ridden_out_or_retryable_and_never_half_published(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, kind: str, operation: str
) -> None:
    what = snapshot(held, mebibytes=8)
    with storage.faults({"kind": kind, "operation": operation, "skip": 1, "count": 2}):
        for _ in range(6):
            try:
                published = await publish(held, empty_bucket, what)
            except TemplateManagerError as error:
                assert error.retryable, error
            else:
                break
    metadata = read_metadata(empty_bucket, BUILD)
    assert metadata is not None
    assert wrong_objects(empty_bucket, metadata) == []
    assert published.artifacts == metadata.artifacts
    assert empty_bucket.list_objects(parts_prefix(BUILD)) == []


async def test_a_template_changed_before_publishing_goes_back_to_the_upload(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    what = snapshot(held)
    uploads: dict[str, UploadedArtifact] = {
        name: await upload(held, empty_bucket, what, name) for name in NAMES
    }
    gone = uploads["memfile"].objects["data"]
    empty_bucket.delete_object(gone.name, gone.generation)
    with pytest.raises(CheckpointLostError) as lost:
        await publish(held, empty_bucket, what, uploads)
    assert lost.value.step is Step.UPLOAD
    assert read_metadata(empty_bucket, BUILD) is None


async def test_metadata_of_a_host_that_lost_its_lease_is_no_template_and_in_nobodys_way(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    published = await publish(held, empty_bucket, snapshot(held))
    frozen = empty_bucket.read_object(published.metadata.name)
    assert frozen is not None
    discard = DiscardUploadInput(scope=held.scope, keep_parts=False)
    stale = published.artifacts["memfile"].objects["data"]
    empty_bucket.delete_object(stale.name, stale.generation)
    discard_upload(empty_bucket, discard)
    empty_bucket.write_object(published.metadata.name, frozen[0], if_generation_match=0)
    again = await publish(held, empty_bucket, snapshot(held, seed=2))
    assert again.artifacts != published.artifacts
    assert discard_upload(empty_bucket, discard).published == again


async def test_another_snapshot_does_not_replace_what_is_published(
    held: HeldBuild, empty_bucket: Bucket
) -> None:
    published = await publish(held, empty_bucket, snapshot(held))
    with pytest.raises(TemplateAlreadyPublishedError):
        await upload(held, empty_bucket, snapshot(held, seed=2), "memfile")
    discarded = discard_upload(empty_bucket, DiscardUploadInput(scope=held.scope, keep_parts=False))
    assert discarded.published == published


async def test_a_download_that_is_damaged_leaves_no_file(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    out = tmp_path / "out"
    rule = {"kind": "error_body", "operation": "download", "path": "memfile\\?", "count": None}
    with storage.faults(rule), pytest.raises(StorageCorruptionError):
        pull_template(empty_bucket, BUILD, out, lambda *_: None)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_an_interrupted_pull_goes_on_when_it_is_called_again(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, tmp_path: Path, number: signal.Signals
) -> None:
    what = snapshot(held)
    await publish(held, empty_bucket, what)
    out, whence = tmp_path / "out", ("--bucket", empty_bucket.name)
    slow = {
        "kind": "slow",
        "operation": "download",
        "path": "memfile\\?",
        "delay": 4,
        "count": None,
    }
    with storage.faults(slow):
        process = await started("pull", BUILD, str(out), *whence)
        async with asyncio.timeout(60):
            while not (out / ".memfile.part").exists() or not _come(out / ".rootfs.ext4.part.list"):
                await asyncio.sleep(0.05)
            process.send_signal(number)
            _, told = await process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (b"the same command goes on" in told) == (number == signal.SIGINT)
    assert not (out / "rootfs.ext4").exists()

    storage.traffic(clear=True)
    again = await cli("pull", BUILD, str(out), *whence)
    assert again.code == 0, again.err
    fetched = [each["path"] for each in storage.traffic()["requests"]]
    assert any("memfile?" in path for path in fetched)
    assert not any("rootfs.ext4?" in path for path in fetched)
    assert {path.name for path in out.iterdir()} == {*ArtifactName, METADATA}
    for name in ArtifactName:
        assert sha256_of(out / name, go_on) == sha256_of(held.store.file(what, name), go_on)


async def test_a_pull_that_is_ended_before_anything_has_come_does_not_say_that_it_has(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    slow = {"kind": "slow", "operation": "download", "path": "rootfs.ext4\\?", "delay": 4}
    with storage.faults({**slow, "count": None}):
        process = await started("pull", BUILD, str(tmp_path), "--bucket", empty_bucket.name)
        async with asyncio.timeout(60):
            while not (tmp_path / ".rootfs.ext4.part.list").exists():
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, told = await process.communicate()
    assert process.returncode == 130
    assert b"what has come" not in told


@pytest.mark.parametrize("kind", ["link", "pipe"])
async def test_a_pull_writes_through_nothing_that_lies_in_its_way(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path, kind: str
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_text("mine")
    way = out / f".{METADATA}.part"
    way.symlink_to(mine) if kind == "link" else os.mkfifo(way)
    async with asyncio.timeout(60):
        ended = await cli("pull", BUILD, str(out), "--bucket", empty_bucket.name)
    assert ended.code == 0, ended.err
    assert mine.read_text() == "mine"
    assert not (out / METADATA).is_symlink()
    assert (out / METADATA).is_file()
    assert {path.name for path in out.iterdir()} == {*ArtifactName, METADATA}


def _come(listed: Path) -> int:
    """Return how many ranges a list of them has."""
    return len(listed.read_bytes().splitlines()) - 1 if listed.exists() else 0


async def test_a_pull_that_fails_leaves_what_was_there(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    out = tmp_path / "out"
    pull_template(empty_bucket, BUILD, out, lambda *_: None)
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    rule = {"kind": "error_body", "operation": "download", "path": "memfile\\?", "count": None}
    with storage.faults(rule), pytest.raises(StorageCorruptionError):
        pull_template(empty_bucket, BUILD, out, lambda *_: None)
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("file", "cannot write to {}: File exists"),
        ("file/below", "cannot write to {}: Not a directory"),
        ("/proc/template", "cannot write to {}: No such file or directory"),
        ("/sys/template", "cannot write to {}: "),
        ("taken", "cannot write to {}/memfile: Is a directory"),
    ],
)
async def test_a_pull_to_where_nothing_can_be_written_is_wrong_usage(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path, target: str, told: str
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "memfile").mkdir(parents=True)
    where = tmp_path / target
    ended = await cli("pull", BUILD, str(where), "--bucket", empty_bucket.name)
    assert ended.code == 2, ended.err
    assert told.format(where) in ended.err  # TargetUnusableError
    assert "→ Name a directory that can be written to." in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["memfile"]


async def test_a_pull_to_a_full_disk_fetches_nothing(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    """In a mount namespace of its own, on a disk of 1 MiB."""
    await publish(held, empty_bucket, snapshot(held))
    command = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && "
        f"{sys.executable} -m api.cli.main pull {BUILD} {tmp_path}/out "
        f"--bucket {empty_bucket.name}; code=$?; ls -A {tmp_path}/out; exit $code"
    )
    process = await asyncio.create_subprocess_exec(
        "unshare",
        "--mount",
        "sh",
        "-c",
        command,
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (3, b"")
    assert "has no room for the template" in err.decode()
    assert "→ Free space there, or name a directory on another disk." in err.decode()


async def test_a_damaged_copy_is_to_be_pulled_again(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    pull_template(empty_bucket, BUILD, tmp_path, lambda *_: None)
    with (tmp_path / "memfile").open("r+b") as file:
        file.truncate(12_345)
    ended = await cli("run", str(tmp_path))
    assert ended.code == 1
    assert "is damaged: memfile has 12345 bytes, not 41943040" in ended.err
    assert "→ Pull it again: template-manager pull" in ended.err


async def test_a_run_says_what_this_machine_lacks(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held))
    pull_template(empty_bucket, BUILD, tmp_path, lambda *_: None)
    nowhere = {
        "TEMPLATE_MANAGER_KERNELS_DIR": "/nonexistent",
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": "/nonexistent",
    }
    ended = await cli("run", str(tmp_path), env=nowhere)
    assert (ended.code, "has no kernel at /nonexistent" in ended.err) == (2, True)
    ended = await cli("run", str(tmp_path / "nowhere"))
    assert (ended.code, "there is no " in ended.err) == (2, True)
    ended = await cli("run", "/")
    assert (ended.code, "/ has no metadata.json" in ended.err) == (2, True)


async def test_a_run_of_what_the_bucket_has_fetches_it_and_leaves_nothing(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    await publish(held, empty_bucket, snapshot(held, mebibytes=8))
    TenantNames(empty_bucket, "default").assign("web", BUILD, ("stable",), asked=utc_now())
    here = {
        "TEMPLATE_MANAGER_BUCKET": empty_bucket.name,
        "TEMPLATE_MANAGER_DATA_DIR": str(tmp_path / "data"),
        "TEMPLATE_MANAGER_KERNELS_DIR": "/nonexistent",
    }
    for template, told in (
        ("web:stable", "has no kernel at /nonexistent"),
        ("web:none", "there is no directory web:none, and there is no template web:none"),
    ):
        ended = await cli("run", template, env=here)
        assert (ended.code, ended.out, told in ended.err) == (2, "", True), ended.err
    assert list((tmp_path / "data" / "vms").iterdir()) == []


async def test_a_run_on_another_machine_than_it_was_made_for(
    held: HeldBuild, empty_bucket: Bucket, tmp_path: Path
) -> None:
    """MachineUnfitError: another Firecracker or processor would fail obscurely."""
    await publish(held, empty_bucket, snapshot(held))
    made = pull_template(empty_bucket, BUILD, tmp_path / "it", lambda *_: None)
    kernel = tmp_path / "kernels" / made.config.kernel_version / "vmlinux.bin"
    firecracker = tmp_path / "vmms" / made.config.firecracker_version / "firecracker"
    for path in (kernel, firecracker):
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
    here = {
        "TEMPLATE_MANAGER_KERNELS_DIR": str(tmp_path / "kernels"),
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(tmp_path / "vmms"),
    }
    for version, told in (
        ("0.0.1", f"was made by Firecracker {made.vmm.version}; {firecracker} is 0.0.1"),
        (made.vmm.version, f"made on the CPU model {made.vmm.cpu_model}; this machine's is "),
    ):
        firecracker.write_text(f"#!/bin/sh\necho Firecracker v{version}\n")
        ended = await cli("run", str(tmp_path / "it"), env=here)
        assert ended.code == 2
        assert told in ended.err
        assert "→ " in ended.err


async def test_a_download_rides_out_resets_and_truncations(
    held: HeldBuild, empty_bucket: Bucket, storage: Stack, tmp_path: Path
) -> None:
    what = snapshot(held)
    await publish(held, empty_bucket, what)
    cut = {"kind": "truncate", "operation": "download", "path": "memfile\\?", "after_bytes": 5000}
    reset = {"kind": "reset", "operation": "download", "path": "rootfs"}
    with storage.faults(cut, reset):
        pull_template(empty_bucket, BUILD, tmp_path / "out", lambda *_: None)
    source = held.store.file(what, ArtifactName.MEMFILE)
    assert (tmp_path / "out" / "memfile").read_bytes() == source.read_bytes()


def test_many_uploads_take_no_more_memory_than_the_room_they_share(empty_bucket: Bucket) -> None:
    chunk, workers, room = 64 * 1024, 2, Semaphore(3)
    data, seen, lock = random.Random(1).randbytes(chunk * 6), [0], Lock()

    class Counting(Bucket):
        def write_object(self, name: str, data: bytes, **more: Any) -> StoredObject:
            with lock:
                seen[0] = max(seen[0], 3 - room._value)
            return super().write_object(name, data, **more)

    def send(number: int) -> int:
        sender = PartSender(
            Counting(empty_bucket.name),
            f"x/.parts/{number}/",
            chunk_bytes=chunk,
            workers=workers,
            room=room,
            check=go_on,
            sent=lambda _: None,
        )
        try:
            sender.add(data)
            return len(sender.finish())
        finally:
            sender.close()

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(send, range(10))) == [6] * 10
    assert seen[0] <= 3
    assert room._value == 3


def test_a_template_that_does_not_exist_is_not_found(empty_bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(TemplateNotFoundError):
        pull_template(empty_bucket, BUILD, tmp_path, lambda *_: None)
