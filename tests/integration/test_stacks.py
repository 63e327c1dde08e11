"""Disks that lie in the bucket as layers, put together from a real emulator of it."""

from __future__ import annotations

import os
import random
import uuid
from pathlib import Path

import pytest
from devstack.stack import Stack

from activities.contract.errors import (
    StorageCorruptionError,
    TargetUnusableError,
    TemplateDamagedError,
    TemplateManagerError,
)
from activities.contract.names import ArtifactName
from activities.contract.results import UploadedArtifact
from activities.store.bucket import Bucket
from activities.store.download import DiskHere, pull_artifact
from activities.store.headers import BLOCK_BYTES, Extent, Header, parse_header
from activities.store.metadata import wrong_objects
from activities.store.stacks import GAP_BYTES, RANGE_BYTES, stored_ranges
from tests.support.example_template import metadata
from tests.support.stacked_disks import changed_disks, store_stack

pytestmark = pytest.mark.counts_nothing


def pull(bucket: Bucket, artifact: UploadedArtifact, target: Path) -> bytes:
    told = [(0, 0)]
    pull_artifact(bucket, artifact, target, lambda _, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    return target.read_bytes()


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_disk_is_put_together_from_its_layers(
    empty_bucket: Bucket, tmp_path: Path, layers: int
) -> None:
    disks = changed_disks(tmp_path, layers)
    top = store_stack(empty_bucket, disks)
    assert len(top.layers) == layers - 1
    assert pull(empty_bucket, top, tmp_path / "pulled") == disks[-1].read_bytes()
    assert (tmp_path / "pulled").stat().st_blocks * 512 < disks[-1].stat().st_size


def test_only_what_the_disk_needs_is_fetched_and_none_of_it_twice(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    top = store_stack(empty_bucket, changed_disks(tmp_path, 4))
    ranges = stored_ranges(empty_bucket, top)
    header = empty_bucket.read_object(top.objects["header"].name)
    assert header is not None
    records = [e for e in parse_header(header[0]).extents if e.storage_offset is not None]
    pieces = sorted((e for r in ranges for e in r.extents), key=lambda piece: piece.offset)
    assert sum(piece.length for piece in pieces) == sum(record.length for record in records)
    assert all(r.length <= RANGE_BYTES for r in ranges)
    wanted = sum(r.length for r in ranges)
    assert wanted <= sum(piece.length for piece in pieces) + GAP_BYTES * len(pieces)
    storage.traffic(clear=True)
    pull(empty_bucket, top, tmp_path / "pulled")
    assert storage.traffic()["operations"]["download"]["requests"] == len(ranges) + 1


def test_what_is_here_already_is_copied(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack
) -> None:
    disks = changed_disks(tmp_path, 4)
    top = store_stack(empty_bucket, disks)
    below = frozenset(layer.objects["data"] for layer in top.layers[:3])
    ranges = [each for each in stored_ranges(empty_bucket, top) if each.stored not in below]
    for here, requests in ((disks[2], len(ranges) + 1), (disks[1], None), (tmp_path / "no", None)):
        storage.traffic(clear=True)
        has = DiskHere(here, below)
        pull_artifact(empty_bucket, top, tmp_path / "pulled", lambda *_: None, has)
        assert (tmp_path / "pulled").read_bytes() == disks[-1].read_bytes()
        downloads = storage.traffic()["operations"]["download"]["requests"]
        assert requests is None or downloads == requests


def interrupted_pull(bucket: Bucket, artifact: UploadedArtifact, target: Path) -> Path:
    """Begin to pull, and end it when some has come; return what of it is there."""

    def stop(_: str, done: int, total: int) -> None:
        if total > done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_artifact(bucket, artifact, target, stop)
    return target.with_name(f".{target.name}.part")


@pytest.mark.parametrize("harm", ["none", "other bytes", "shorter", "gone", "no list", "torn list"])
def test_what_has_come_before_is_not_fetched_again(
    empty_bucket: Bucket, tmp_path: Path, storage: Stack, harm: str
) -> None:
    disks = changed_disks(tmp_path, 4)
    top = store_stack(empty_bucket, disks)
    part = interrupted_pull(empty_bucket, top, tmp_path / "pulled")
    listed = part.with_name(f"{part.name}.list")
    if harm == "other bytes":
        part.write_bytes(random.Random(1).randbytes(part.stat().st_size))
    elif harm == "shorter":
        os.truncate(part, 5)
    elif harm == "gone":
        part.unlink()
    elif harm == "no list":
        listed.unlink()
    elif harm == "torn list":
        os.truncate(listed, listed.stat().st_size - 3)
    storage.traffic(clear=True)
    assert pull(empty_bucket, top, tmp_path / "pulled") == disks[-1].read_bytes()
    downloads = storage.traffic()["operations"]["download"]["requests"] - 1
    assert (downloads < len(stored_ranges(empty_bucket, top))) == (harm in {"none", "torn list"})
    assert not part.exists() and not listed.exists()


def test_of_another_file_nothing_is_gone_on_with(empty_bucket: Bucket, tmp_path: Path) -> None:
    disks = changed_disks(tmp_path, 4)
    part = interrupted_pull(empty_bucket, store_stack(empty_bucket, disks), tmp_path / "pulled")
    other = store_stack(empty_bucket, disks[:2])
    assert pull(empty_bucket, other, tmp_path / "pulled") == disks[1].read_bytes()
    assert not part.exists()


def test_two_do_not_write_one_file_at_once(empty_bucket: Bucket, tmp_path: Path) -> None:
    disks, told = changed_disks(tmp_path, 2), list[str]()
    top = store_stack(empty_bucket, disks)

    def second(*_: object) -> None:
        if not told:
            with pytest.raises(TargetUnusableError) as caught:
                pull_artifact(empty_bucket, top, tmp_path / "pulled", lambda *_: None)
            told.append(caught.value.message)

    pull_artifact(empty_bucket, top, tmp_path / "pulled", second)
    assert told == [f"another process is writing {tmp_path / 'pulled'}"]
    assert (tmp_path / "pulled").read_bytes() == disks[-1].read_bytes()


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_is_in_the_way_is_not_written_through(
    empty_bucket: Bucket, tmp_path: Path, kind: str
) -> None:
    top, place = store_stack(empty_bucket, changed_disks(tmp_path, 2)), tmp_path / ".pulled.part"
    (tmp_path / "mine").write_text("mine")
    if kind == "link":
        place.symlink_to("mine")
    elif kind == "directory":
        place.mkdir()
    else:
        os.mkfifo(place)
    with pytest.raises(TargetUnusableError):
        pull_artifact(empty_bucket, top, tmp_path / "pulled", lambda *_: None)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_a_layer_lacks_is_told_and_nothing_is_left(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    top = store_stack(empty_bucket, changed_disks(tmp_path, 3))
    (tmp_path / "out").mkdir()
    lowest = top.layers[0]
    short = lowest.objects["data"].model_copy(update={"size_bytes": 4096})
    cut = lowest.model_copy(update={"objects": {**lowest.objects, "data": short}})
    other = top.objects | {"data": top.layers[1].objects["data"]}
    cases: list[tuple[dict[str, object], type[TemplateManagerError], str]] = [
        ({"layers": top.layers[1:]}, TemplateDamagedError, "blocks of other builds"),
        ({"layers": (cut, *top.layers[1:])}, TemplateDamagedError, "ends before a block"),
        ({"size_bytes": top.size_bytes + 4096}, TemplateDamagedError, "not of"),
        ({"objects": other}, TemplateManagerError, "."),
        ({"sha256": "0" * 64}, StorageCorruptionError, "did not arrive"),
    ]
    for changes, kind, why in cases:
        with pytest.raises(kind, match=why):
            pull(empty_bucket, top.model_copy(update=changes), tmp_path / "out" / "pulled")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_header_that_tells_of_endless_blocks_is_refused_at_once(
    empty_bucket: Bucket, tmp_path: Path
) -> None:
    top = store_stack(empty_bucket, changed_disks(tmp_path, 2))
    own, size = uuid.UUID(int=1), 1 << 62
    lie = Header(BLOCK_BYTES, size, own, own, (Extent(0, size, 0),))
    header = empty_bucket.write_object("lie.header", lie.to_bytes())
    objects = {**top.objects, "header": header}
    told = top.model_copy(update={"objects": objects, "size_bytes": size})
    with pytest.raises(TemplateDamagedError, match="ends before a block"):
        stored_ranges(empty_bucket, told)


def test_a_template_is_whole_while_its_layers_are(empty_bucket: Bucket, tmp_path: Path) -> None:
    top = store_stack(empty_bucket, changed_disks(tmp_path, 3, mebibytes=2))
    made = metadata()
    made = made.model_copy(update={"artifacts": {**made.artifacts, ArtifactName.ROOTFS: top}})
    assert made.layers == top.layers
    of_layers = {stored.name for layer in top.layers for stored in layer.objects.values()}
    assert of_layers.isdisjoint(wrong_objects(empty_bucket, made))
    gone, replaced = top.layers[0].objects["header"], top.layers[1].objects["data"]
    empty_bucket.delete_object(gone.name, gone.generation)
    empty_bucket.write_object(replaced.name, b"another")
    assert of_layers.intersection(wrong_objects(empty_bucket, made)) == {gone.name, replaced.name}
