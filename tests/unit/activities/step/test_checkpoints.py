from __future__ import annotations

import threading
from pathlib import Path

import pytest

from activities.contract.checkpoints import RootfsCheckpoint, RootfsFacts
from activities.contract.errors import CheckpointLostError
from activities.contract.names import ArtifactName, Step
from activities.contract.scope import BuildScope, HostLease, VmShape
from activities.disk.data_dir import DataDir
from activities.step.checkpoints import C, CheckpointStore, FailedStep, fingerprint
from tests.support.step_checks import go_on

BUILD = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
KEY = fingerprint(Step.ROOTFS, image="sha256:1")
EMPTY = RootfsCheckpoint(fingerprint=KEY, host="h1", facts=RootfsFacts(files=7))


def scope(build_id: str = BUILD) -> BuildScope:
    return BuildScope(build_id=build_id, template_id="web", lease=HostLease(host="h1", number=1))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(DataDir(tmp_path), "h1")


def make(store: CheckpointStore, content: bytes = b"content") -> RootfsCheckpoint:
    with store.making(Step.ROOTFS, KEY, scope(), 1, go_on) as work:
        (work / "rootfs.ext4").write_bytes(content)
        return store.publish(work, EMPTY, scope(), names=(ArtifactName.ROOTFS,), check=go_on)


def test_a_fingerprint_depends_on_every_input_and_not_on_their_order() -> None:
    assert fingerprint(Step.ROOTFS, a=1, b=2) == fingerprint(Step.ROOTFS, b=2, a=1)
    assert fingerprint(Step.ROOTFS, a=1) != fingerprint(Step.BOOT, a=1)
    assert fingerprint(Step.ROOTFS, a=1) != fingerprint(Step.ROOTFS, a=2)


def test_one_sees_that_a_checkpoint_is_being_made(store: CheckpointStore) -> None:
    assert not store.is_being_made(Step.ROOTFS, KEY)
    with store.making(Step.ROOTFS, KEY, scope(), 1, go_on):
        assert store.is_being_made(Step.ROOTFS, KEY)
        assert not store.is_there(RootfsCheckpoint, KEY)
    assert not store.is_being_made(Step.ROOTFS, KEY)
    make(store)
    assert store.is_there(RootfsCheckpoint, KEY)


def test_what_is_published_is_found_by_another_build(store: CheckpointStore) -> None:
    made = make(store)
    found = store.find(RootfsCheckpoint, KEY, OTHER, go_on)
    assert found == made.model_copy(update={"reused": True})
    assert found.facts.files == 7
    refs = {path.name for path in (store.path(Step.ROOTFS, KEY) / "refs").iterdir()}
    assert refs == {BUILD, OTHER}


def test_a_look_takes_a_reference_and_leaves_the_hashing_to_the_reader(
    store: CheckpointStore,
) -> None:
    made = make(store)
    assert store.look(RootfsCheckpoint, KEY, OTHER) == made
    refs = {path.name for path in (store.path(Step.ROOTFS, KEY) / "refs").iterdir()}
    assert refs == {BUILD, OTHER}
    store.file(made, ArtifactName.ROOTFS).unlink()
    assert store.look(RootfsCheckpoint, KEY, OTHER) is None
    assert store.path(Step.ROOTFS, KEY).exists()
    assert store.look(RootfsCheckpoint, "0" * 64, OTHER) is None


class EvictedAtOnce(CheckpointStore):
    """A store whose checkpoints are evicted when their manifest has just been read."""

    def _manifest(self, kind: type[C], key: str) -> C | None:
        found = super()._manifest(kind, key)
        assert self.evict(self.path(kind.STEP, key), [BUILD])
        return found


def test_a_checkpoint_that_is_evicted_at_this_moment_is_not_found(tmp_path: Path) -> None:
    store = EvictedAtOnce(DataDir(tmp_path), "h1")
    make(store)
    assert store.find(RootfsCheckpoint, KEY, OTHER, go_on) is None
    make(store)
    assert store.look(RootfsCheckpoint, KEY, OTHER) is None
    with pytest.raises(CheckpointLostError, match="evicted"):
        store.require(EMPTY, OTHER)  # of its files nothing is missing


def test_a_damaged_checkpoint_is_not_found_and_removed(store: CheckpointStore) -> None:
    made = make(store)
    path = store.file(made, ArtifactName.ROOTFS)
    before = path.stat()
    path.write_bytes(b"CONTENT")
    import os

    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only its bytes tell
    assert store.find(RootfsCheckpoint, KEY, OTHER, go_on) is None
    assert not store.path(Step.ROOTFS, KEY).exists()


def test_a_checkpoint_that_is_gone_names_the_step_to_go_back_to(store: CheckpointStore) -> None:
    made = make(store)
    store.file(made, ArtifactName.ROOTFS).unlink()
    with pytest.raises(CheckpointLostError) as caught:
        store.require(made, BUILD)
    assert caught.value.step is Step.ROOTFS


def test_a_condemned_checkpoint_is_lost_until_it_is_made_again(store: CheckpointStore) -> None:
    made = make(store)
    store.condemn(made)
    assert store.find(RootfsCheckpoint, KEY, OTHER, go_on) is None
    with pytest.raises(CheckpointLostError, match="of no use") as caught:
        store.require(made, BUILD)
    assert caught.value.step is Step.ROOTFS
    again = make(store)
    assert store.require(again, BUILD) == store.path(Step.ROOTFS, KEY)
    assert store.find(RootfsCheckpoint, KEY, OTHER, go_on) is not None


def test_a_checkpoint_of_another_host_is_lost_here(store: CheckpointStore) -> None:
    made = make(store).model_copy(update={"host": "h2"})
    with pytest.raises(CheckpointLostError, match="h2"):
        store.require(made, BUILD)


def test_work_that_is_not_published_leaves_nothing(store: CheckpointStore, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="crash"),
        store.making(Step.ROOTFS, KEY, scope(), 1, go_on) as work,
    ):
        (work / "rootfs.ext4").write_bytes(b"half")
        raise RuntimeError("crash")
    assert list((tmp_path / "steps" / Step.ROOTFS).iterdir()) == []


def test_two_attempts_at_once_take_turns(store: CheckpointStore) -> None:
    inside: list[int] = []
    most: list[int] = []

    def attempt(number: int) -> None:
        with store.making(Step.ROOTFS, KEY, scope(), number, go_on) as work:
            inside.append(number)
            most.append(len(inside))
            (work / "rootfs.ext4").write_bytes(b"x" * number)
            store.publish(work, EMPTY, scope(), names=(ArtifactName.ROOTFS,), check=go_on)
            inside.remove(number)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert max(most) == 1
    assert store.find(RootfsCheckpoint, KEY, BUILD, go_on) is not None


def test_releasing_a_build_drops_its_references_and_unfinished_work(
    store: CheckpointStore, tmp_path: Path
) -> None:
    make(store)
    store.find(RootfsCheckpoint, KEY, OTHER, go_on)
    (tmp_path / "steps" / Step.ROOTFS / f"{KEY}.tmp.{BUILD}.1.1").mkdir()
    store.release(BUILD)
    names = sorted(path.name for path in (tmp_path / "steps" / Step.ROOTFS).iterdir())
    assert names == [KEY]
    assert [p.name for p in (store.path(Step.ROOTFS, KEY) / "refs").iterdir()] == [OTHER]


def test_a_fenced_attempt_publishes_nothing(store: CheckpointStore) -> None:
    def fenced() -> None:
        raise InterruptedError

    with store.making(Step.ROOTFS, KEY, scope(), 1, go_on) as work:
        (work / "rootfs.ext4").write_bytes(b"late")
        with pytest.raises(InterruptedError):
            store.publish(
                work,
                EMPTY,
                scope(),
                names=(ArtifactName.ROOTFS,),
                check=fenced,
                hashes={ArtifactName.ROOTFS: "0" * 64},
            )
    assert not store.path(Step.ROOTFS, KEY).exists()


FAILED = FailedStep(
    what="step 1: RUN false: ended with exit code 1",
    user="web",
    working_dir="/srv",
    variables={"A": "1"},
    shape=VmShape(memory_mb=1, vcpu_count=1, kernel_version="k", firecracker_version="f"),
)


def keep_failed(store: CheckpointStore, place: Path, content: bytes = b"left") -> None:
    disk = place / "disk"
    disk.write_bytes(content)
    store.keep_failed(disk, FAILED, scope())


def test_the_disk_of_a_failed_step_is_kept_for_its_build(
    store: CheckpointStore, tmp_path: Path
) -> None:
    assert store.failed(BUILD) is None
    for content in (b"left", b"left by another run of the build"):
        keep_failed(store, tmp_path, content)
        kept = store.failed(BUILD)
        assert kept is not None
        assert (kept[0].read_bytes(), kept[1]) == (content, FAILED)
        assert kept[0].stat().st_mode & 0o777 == 0o600
    assert store.failed(OTHER) is None
    assert list(store.unfinished()) == []
    store.forget_failed(BUILD)
    assert store.failed(BUILD) is None


def test_the_disk_of_a_failed_step_goes_with_its_build_or_by_its_age(
    store: CheckpointStore, tmp_path: Path
) -> None:
    keep_failed(store, tmp_path)
    store.release(OTHER)
    assert store.failed(BUILD) is not None
    store.release(BUILD)
    assert store.failed(BUILD) is None
    keep_failed(store, tmp_path)
    [kept] = store.all()
    assert kept.users == (BUILD,)
    far = kept.used_at + 1
    assert list(store.evictable([kept], [], max_bytes=1 << 30, unused_since=kept.used_at)) == []
    assert list(store.evictable([kept], [BUILD], max_bytes=0, unused_since=far)) == []
    [leftover] = store.evictable([kept], [], max_bytes=1 << 30, unused_since=far)
    leftover.remove()
    assert store.failed(BUILD) is None
    assert store.all() == []
