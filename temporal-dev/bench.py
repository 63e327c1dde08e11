"""Where the time goes: `make bench`.

Ten parts, each beside a peer or the machine's own limit, measured in the same run:

- `build`: one build of the busybox image, split into Docker, copying, booting, storage, and the
  product's own overhead, beside the disk's speed;
- `rootfs`: image to ext4 for four kinds of images, beside `cp -a` into a loop mount, `mke2fs -d`
  and `docker export | tar -x`, with the peak of extra disk; each copy is compared with the image,
  and marked with what it has lost;
- `pull`: an image of this machine's own files through our checks, beside `docker pull` of it;
- `steps`: what a step costs that does nothing, and a changed one of ten; `pip install` in a RUN,
  beside a container;
- `layers`: what a second template of an image and one on a template send, beside the first; a build
  on a fresh host whose steps are stored, beside the host that has made them; a step while the
  layer below it goes up, beside the same one with nothing to send;
- `memory`: what the memory of an idle guest takes in its template, beside what the guest counts;
- `upload`: a sparse file to the bucket, by phases, beside one plain stream and parallel PUTs;
- `network`: a guest's way to the internet, beside the host's own;
- `agent`: the first answer of a guest agent after a resume, beside the guest's own;
- `fleet`: 200 builds of three tenants on 20 hosts whose steps sleep, beside what they would take if
  no slot ever waited; with `--whole` 1,000 builds on 100 hosts.

`python temporal-dev/bench.py [--small] [--whole] [--seconds N] [PART…]`. Times are wall time in
seconds; machines are noisy, so ratios are what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import agent_bench
import docker
import fleet
import images
import layers_bench
import memory_bench
import network_bench
import steps_bench
from devstack.environment import REPOSITORY, environment
from devstack.services import ALL_PARTS
from devstack.stack import APPS, Stack, borrowed
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

import requests
from devstack.registry import Layer, Registry, running_registry
from devstack.workbench import Workbench, workbench
from google.cloud import storage
from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import SnapshotCheckpoint
from activities.contract.inputs import UploadArtifactInput
from activities.contract.names import ArtifactName, Step
from activities.contract.results import ImageConfig, PulledImage
from activities.disk import mounts
from activities.disk.namespaces import in_mount_namespace
from activities.image.docker_daemon import find_image
from activities.rootfs.rootfs import image_layers
from activities.store.bucket import Bucket
from activities.store.headers import BLOCK_BYTES
from activities.store.lease_numbers import LeaseObjects
from activities.template.artifacts import BucketArtifactActivities
from activities.template.upload import scan
from tests.support.file_trees import Entry, difference, tree_of_ext4, tree_of_image

MIB = 1024 * 1024
PARTS = (
    "build",
    "rootfs",
    "pull",
    "steps",
    "layers",
    "memory",
    "upload",
    "network",
    "agent",
    "fleet",
)
CLI = str(Path(sys.executable).with_name("template-manager"))
SAMPLE_SECONDS = 0.05
UPLOAD_ROUNDS = 3
UPLOAD_LIMIT = 0.6  # of what parallel PUTs reach
# Which activity is whose work; what is in none of them is the product's own.
KINDS = {
    "pull_image": "Docker",
    "build_rootfs": "copying",
    "start_vm": "booting",
    "wait_until_ready": "booting",
    "snapshot_vm": "booting",
    "verify_snapshot": "booting",
    "upload_artifacts": "storage",
    "publish_template": "storage",
}

console = Console(width=110)


def say(message: str) -> None:
    """Tell what happens next."""
    print(f"» {message}", file=sys.stderr, flush=True)


# The disk


def disk_speed(directory: Path, mebibytes: int = 512) -> tuple[float, float]:
    """Return MiB/s of writing (with fsync) and of reading a file past the page cache."""
    path = directory / "disk-speed"
    block = os.urandom(4 * MIB)
    began = time.monotonic()
    with path.open("wb") as file:
        for _ in range(mebibytes // 4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = mebibytes / (time.monotonic() - began)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while file.read(4 * MIB):
            pass
    read = mebibytes / (time.monotonic() - began)
    path.unlink()
    return written, read


# One build, end to end


def bench_build(directory: Path) -> None:
    """Build the busybox image twice from nothing and split the better run's time."""
    say("starting the stack")
    only = [part for part in ALL_PARTS if part != "docker"]
    with Stack(only=only, apps=APPS) as stack:
        image = images.make_and_push("busybox", stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
        runs = [_one_build(stack, image) for _ in range(2)]
    write, read = disk_speed(directory)
    best = min(runs, key=lambda run: run["total"])
    table = Table(title="One build of the busybox image (512 MiB memory, 512 MiB disk)")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in best.items():
        table.add_row(part, f"{seconds:.2f}", f"{100 * seconds / best['total']:.0f} %")
    console.print(table)
    console.print(f"disk in the same run: {write:.0f} MiB/s written, {read:.0f} MiB/s read")
    console.print(
        f"limits: total {best['total']:.1f} of 20 s, the product's own {best['own']:.2f} of 2 s"
    )


def _one_build(stack: Stack, image: str) -> dict[str, float]:
    build_id = str(uuid.uuid4())
    command = [CLI, "build", "--image", image, "--build-id", build_id, "--force", "--follow"]
    command += ["--memory", "512", "--vcpu", "1", "--disk", "512"]
    command += ["--start-command", images.START_COMMAND]
    command += ["--ready-command", "/bin/busybox wget -q -O /dev/null http://127.0.0.1:8080/"]
    say(f"building {build_id}")
    environment = {**os.environ, **stack.variables}
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    total = time.monotonic() - began
    history = subprocess.run(
        ["temporal", "workflow", "show", "-w", f"template-build-{build_id}", "--output", "json"],
        env=environment,
        check=True,
        capture_output=True,
    ).stdout
    spent = _spent(json.loads(history)["events"])
    return {**spent, "own": total - sum(spent.values()), "total": total}


def _spent(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds in which activities of each kind ran, counting overlaps once."""
    names, started, intervals = {}, {}, []
    for event in events:
        when = datetime.fromisoformat(event["eventTime"][:26].rstrip("Z") + "+00:00").timestamp()
        if scheduled := event.get("activityTaskScheduledEventAttributes"):
            names[event["eventId"]] = scheduled["activityType"]["name"]
        elif begun := event.get("activityTaskStartedEventAttributes"):
            started[begun["scheduledEventId"]] = when
        elif done := event.get("activityTaskCompletedEventAttributes"):
            key = done["scheduledEventId"]
            intervals.append((started[key], when, KINDS.get(names[key], "")))
    spent = dict.fromkeys(KINDS.values(), 0.0)
    reached = 0.0
    for begin, end, kind in sorted(intervals):
        if kind:
            spent[kind] += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
    return spent


# Image to root file system


@dataclass(frozen=True)
class Workload:
    """An image to flatten."""

    name: str
    about: str
    make: Callable[[Path], str]
    """Makes the image in dockerd; returns its name. It may write to the directory."""
    rounds: int = 3


def workloads(small: bool) -> list[Workload]:
    """Return the four kinds; small ones take a tenth."""
    part = 10 if small else 1
    files, in_one, size = 60_000 // part, 18_000 // part, 5000 // part
    return [
        Workload("W1", "Debian base", _make_debian),
        Workload(
            "W2",
            f"{files} files, {in_one} in one directory",
            lambda place: _import(place, "many", lambda tree: _many(tree, files, in_one)),
        ),
        Workload(
            "W3",
            f"one file of {size} MiB",
            lambda place: _import(place, "large", lambda tree: _noise(tree / "large", size)),
            rounds=1,  # each leaves as much on the disk
        ),
        Workload("W4", "20 layers with whiteouts", _make_layers),
    ]


def _make_debian(place: Path) -> str:
    with _registry(place) as registry:
        return images.make_and_push("debian", registry.address, say)


def _import(place: Path, name: str, fill: Callable[[Path], None]) -> str:
    tree = place / name
    tree.mkdir()
    fill(tree)
    archive = subprocess.Popen(["tar", "-C", tree, "-cf", "-", "."], stdout=subprocess.PIPE)
    image = f"template-manager-bench/{name}"
    subprocess.run(
        ["docker", "import", "-", image], stdin=archive.stdout, check=True, capture_output=True
    )
    archive.wait()
    shutil.rmtree(tree)
    return image


def _many(tree: Path, files: int, in_one: int) -> None:
    for number in range(files):
        directory = tree / ("large" if number < in_one else f"d{number % 997}")
        directory.mkdir(exist_ok=True)
        (directory / f"file-{number:06}").write_bytes(b"x" * (number % 3000))


def _noise(path: Path, mebibytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(mebibytes // 10):
            file.write(os.urandom(10 * MIB))


def _make_layers(place: Path) -> str:
    layers = []
    for number in range(20):
        layer = Layer()
        for index in range(500):
            layer.add(f"d{index % 50}/l{number}-{index}", os.urandom(4000))
            if number and index % 3 == 0:
                layer.add(f"d{index % 50}/.wh.l{number - 1}-{index}")
        layers.append(layer.tar())
    with _registry(place) as registry:
        registry.push("layers", layers)
        image = f"{registry.address}/layers"
        subprocess.run(["docker", "pull", "-q", image], check=True, capture_output=True)
        return image


@dataclass(frozen=True)
class Measured:
    """One way from an image to an ext4; of several rounds, the medians and the highest peak."""

    seconds: float
    peak_bytes: int
    lost: frozenset[str] = frozenset()
    """In what the copy is not the image: fields of `Entry`, or `names`."""

    @classmethod
    def of(cls, rounds: Sequence[Measured]) -> Measured:
        """Return what several rounds of one way give."""
        return cls(
            median(each.seconds for each in rounds),
            max(each.peak_bytes for each in rounds),
            frozenset().union(*(each.lost for each in rounds)),
        )

    def __str__(self) -> str:
        """Return the seconds, and in brackets what is lost."""
        return f"{self.seconds:.2f}" + (f" (−{', '.join(sorted(self.lost))})" if self.lost else "")


def bench_rootfs(directory: Path, small: bool, wanted: Sequence[str]) -> None:
    """Flatten each workload in four ways; ratios against the best peer, and the best exact one."""
    table = Table(
        title="Image to rootfs.ext4, in seconds, medians",
        caption="(−…): what the copy has lost of the image; whole: with looks, staging, fsck",
    )
    for heading in ("", "content", "ours", "× best", "× best exact", "ours, whole"):
        table.add_column(heading, justify="right" if heading else "left")
    for heading in (*PEERS, "peak disk ÷ content"):
        table.add_column(heading, justify="right")
    for workload in [each for each in workloads(small) if each.name in wanted]:
        say(f"{workload.name}: {workload.about}")
        with tempfile.TemporaryDirectory(dir=directory) as place:
            bench = workbench(Path(place) / "data")
            name = workload.make(Path(place))
            try:
                table.add_row(workload.name, *_compare(bench, name, Path(place), workload.rounds))
            finally:
                bench.client.remove_image(name, force=True)
    console.print(table)
    write, read = disk_speed(directory)
    console.print(f"disk in the same run: {write:.0f} MiB/s written, {read:.0f} MiB/s read")


@contextmanager
def _registry(directory: Path) -> Iterator[Registry]:
    with (
        tempfile.TemporaryDirectory(dir=directory) as place,
        running_registry(Path(place)) as registry,
    ):
        yield registry


def _compare(bench: Workbench, name: str, place: Path, rounds: int) -> list[str]:
    image = _described(bench, name)
    size, content = _content(bench, image, place)
    tree = tree_of_image(bench.client, image.image_id, place / "compare")
    ours, whole = [], []
    by_peer: dict[str, list[Measured]] = {peer: [] for peer in PEERS}
    for _ in range(rounds):
        for peer, make in PEERS.items():
            measured = _measured(place, partial(make, bench, image, place, size))
            by_peer[peer].append(replace(measured, lost=_lost(tree, place / "peer.ext4", place)))
        (place / "peer.ext4").unlink()
        step, flattened, rootfs = _ours(bench, image, place)
        whole.append(step.seconds)
        ours.append(replace(step, seconds=flattened, lost=_lost(tree, rootfs, place)))
    peers = [Measured.of(each) for each in by_peer.values()]
    our = Measured.of(ours)
    best = min(peer.seconds for peer in peers)
    best_exact = min((peer.seconds for peer in peers if not peer.lost), default=math.nan)
    return [
        f"{content / MIB:.0f} MiB",
        str(our),
        f"×{our.seconds / best:.2f}",
        f"×{our.seconds / best_exact:.2f}",
        f"{median(whole):.2f}",
        *map(str, peers),
        f"{our.peak_bytes / max(content, 1):.2f}",
    ]


def _lost(tree: dict[str, Entry], copy: Path, place: Path) -> frozenset[str]:
    found = tree_of_ext4(copy, place / "compare" / "copy")
    found.pop("/lost+found", None)
    return lost(tree, found)


def lost(tree: dict[str, Entry], found: dict[str, Entry]) -> frozenset[str]:
    """Say in what a copy of an image's tree differs from it: fields of `Entry`, or `names`."""
    fields: set[str] = set()
    for name in difference(tree, found):
        before, after = tree.get(name), found.get(name)
        if before is None or after is None:
            fields.add("names")
        else:
            names = (field.name for field in dataclasses.fields(Entry))
            fields |= {each for each in names if getattr(before, each) != getattr(after, each)}
    return frozenset(fields)


def _described(bench: Workbench, name: str) -> PulledImage:
    """Describe an image that dockerd has, as a pull would have done."""
    found = bench.client.inspect_image(name)  # type: ignore[no-untyped-call] # untyped upstream
    return PulledImage(
        reference=f"{name}@{found['Id']}",
        digest=found["Id"],
        image_id=found["Id"],
        architecture=found["Architecture"],
        size_bytes=found["Size"],
        layer_count=len(found["RootFS"]["Layers"]),
        config=ImageConfig(),
    )


def _ours(bench: Workbench, image: PulledImage, place: Path) -> tuple[Measured, float, Path]:
    """Return the whole step, the seconds of the part that makes the ext4, and where that is."""
    scope = bench.scope()
    made: list[Path] = []

    def build() -> None:
        asked = bench.build_rootfs(image, scope, disk_size_mb=64, force=True)
        made.append(asyncio.run(asked))

    measured = _measured(place, build)
    times = {}
    for line in bench.log_of(scope).splitlines():
        entry = json.loads(line)
        times[entry["message"].split(" ")[0]] = datetime.fromisoformat(entry["timestamp"])
    provisioned = next(value for name, value in times.items() if name.startswith("provisioned"))
    flattened = (times["flattened"] - provisioned).total_seconds()
    return measured, flattened, made[0]


def _content(bench: Workbench, image: PulledImage, place: Path) -> tuple[int, int]:
    """Return a size that holds the image, and how much its files take; warms the cache."""

    def read(merged: Path) -> int:
        subprocess.run(["tar", "-cf", "/dev/zero", "-C", merged, "."], check=True)
        told = subprocess.run(["du", "-sxB1", merged], check=True, capture_output=True, text=True)
        return int(told.stdout.split()[0])

    content = _with_merged(bench, image, place, read)
    return (content * 13 // 10 + 200 * MIB) // MIB * MIB, content


def _with_merged(
    bench: Workbench, image: PulledImage, place: Path, function: Callable[[Path], Any]
) -> Any:
    inspected = find_image(bench.client, image.image_id)
    assert inspected is not None
    root, layers = image_layers(inspected)
    merged, empty = place / "merged", place / "empty"
    merged.mkdir(exist_ok=True)
    empty.mkdir(exist_ok=True)

    def run() -> Any:
        with mounts.merged_layers(root, [*layers, str(empty)], merged):
            return function(merged)

    return in_mount_namespace(run)


def _by_cp(bench: Workbench, image: PulledImage, place: Path, size: int) -> None:
    def copy(merged: Path) -> None:
        _make_ext4(place / "peer.ext4", size)
        (place / "peer").mkdir(exist_ok=True)
        with mounts.mounted_image(place / "peer.ext4", place / "peer"):
            subprocess.run(["cp", "-a", f"{merged}/.", place / "peer"], check=True)

    _with_merged(bench, image, place, copy)


def _by_mke2fs(bench: Workbench, image: PulledImage, place: Path, size: int) -> None:
    def make(merged: Path) -> None:
        _make_ext4(place / "peer.ext4", size, "-d", str(merged))
        with (place / "peer.ext4").open("rb") as file:
            os.fsync(file.fileno())

    _with_merged(bench, image, place, make)


def _by_export(bench: Workbench, image: PulledImage, place: Path, size: int) -> None:
    container = bench.client.create_container(image.image_id, command=["/none"])["Id"]
    (place / "peer").mkdir(exist_ok=True)

    def unpack() -> None:
        _make_ext4(place / "peer.ext4", size)
        with mounts.mounted_image(place / "peer.ext4", place / "peer"):
            export = subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE)
            subprocess.run(
                ["tar", "-xpf", "-", "-C", place / "peer"], stdin=export.stdout, check=True
            )
            export.wait()

    try:
        in_mount_namespace(unpack)
    finally:
        with contextlib.suppress(docker.errors.NotFound):
            bench.client.remove_container(container, force=True)


PEERS: dict[str, Callable[[Workbench, PulledImage, Path, int], None]] = {
    "cp -a": _by_cp,
    "mke2fs -d": _by_mke2fs,
    "export|tar": _by_export,
}


def _make_ext4(path: Path, size: int, *more: str) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.truncate(size)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-N", "200000", "-m", "0", *more, str(path)]
    subprocess.run(command, check=True)


def _measured(place: Path, run: Callable[[], object]) -> Measured:
    """Run and watch how much the directory takes on the disk. A peer's file is left there."""
    peer = place / "peer.ext4"
    peer.unlink(missing_ok=True)
    subprocess.run(["sync", "-f", place], check=True)
    before = _allocated(place)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _allocated(place) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        run()
    finally:
        seconds = time.monotonic() - began
        done.set()
        watcher.join()
    allocated = _allocated(place) - before
    return Measured(seconds, max(peak[0], allocated))


def _allocated(directory: Path) -> int:
    """What the files take that have no name outside of the directory."""
    files: dict[int, os.stat_result] = {}
    names: Counter[int] = Counter()
    for root, _, found in os.walk(directory):
        if root.startswith((f"{directory}/merged", f"{directory}/peer/")):
            continue
        for name in found:
            with contextlib.suppress(OSError):
                status = os.lstat(f"{root}/{name}")
                files[status.st_ino] = status
                names[status.st_ino] += 1
    own = (status for inode, status in files.items() if names[inode] >= status.st_nlink)
    return sum(status.st_blocks * 512 for status in own)


# Registry to dockerd

PULLED = ("usr/bin", "usr/lib/x86_64-linux-gnu", "usr/share")


def bench_pull(directory: Path, small: bool) -> None:
    """Pull an image of three layers of programs, libraries and documents, in turns."""
    say("making an image of this machine's files")
    bench = workbench(directory / "pull-data")
    with _registry(directory) as registry:
        layers = [_packed_files(place, small) for place in PULLED]
        registry.push("files", layers)
        image = f"{registry.address}/files:latest"
        docker_pulls, ours = _pulls_in_turns(bench, image)
    table = Table(title=f"Pull of {sum(map(len, layers)) // MIB} MiB unpacked, from this machine")
    for column in ("", "best", "all"):
        table.add_column(column)
    for name, seconds in (("docker pull", docker_pulls), ("ours", ours)):
        table.add_row(name, f"{min(seconds):.1f} s", " ".join(f"{one:.1f}" for one in seconds))
    console.print(table)
    console.print(f"ours is {min(ours) / min(docker_pulls):.2f} of docker pull (limit 1.25)")


def _packed_files(place: str, small: bool) -> bytes:
    command = ["tar", "-C", "/", "--sort=name", "--ignore-failed-read", "-cf", "-", place]
    limit = (30 if small else 300) * MIB
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
        assert tar.stdout is not None
        part = tar.stdout.read(limit)
        tar.kill()
    with tarfile.open(fileobj=io.BytesIO(part)) as archive:
        end = 0
        with contextlib.suppress(tarfile.ReadError):
            for member in archive:
                if member.offset_data + member.size > len(part):
                    break
                end = member.offset_data + -(-member.size // 512) * 512
    return part[:end] + bytes(1024)


def _pulls_in_turns(bench: Workbench, image: str) -> tuple[list[float], list[float]]:
    """Time each way four times: either is the first twice, and finds nothing left to be written."""
    docker_pulls: list[float] = []
    ours: list[float] = []
    ways = [(_docker_pull, docker_pulls), (_our_pull, ours)]
    for number in range(4):
        for pull, seconds in ways if number % 2 else reversed(ways):
            os.sync()
            seconds.append(pull(bench, image))
    return docker_pulls, ours


def _docker_pull(_: Workbench, image: str) -> float:
    began = time.monotonic()
    subprocess.run(["docker", "pull", "-q", image], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    _remove(image)
    return seconds


def _our_pull(bench: Workbench, image: str) -> float:
    began = time.monotonic()
    pulled = asyncio.run(bench.pull(image, timeout_seconds=600))
    seconds = time.monotonic() - began
    _remove(pulled.image_id)
    return seconds


def _remove(image: str) -> None:
    # By the program, which waits for as long as it takes.
    subprocess.run(["docker", "rmi", "-f", image], check=True, stdout=subprocess.DEVNULL)


# Upload


class UploadRound(NamedTuple):
    """Seconds of the ways to send the same bytes, one after the other."""

    ours: float
    sent: float
    """Of ours: until all parts were in the bucket."""
    compose: float
    """Of ours: what the emulator took for it."""
    tidied: float
    """Of ours: from then on until no part was left."""
    puts: float
    composing: float
    """Of the PUTs' objects into one, as ours are."""
    ceiling: float


def bench_upload(directory: Path, small: bool) -> None:
    """Send a memory file of which a third is data, in our way and as others would."""
    mebibytes = 128 if small else 1024
    with (
        tempfile.TemporaryDirectory(dir=directory) as place,
        Stack(only=("gcs-emulator", "gcs", "bucket")) as stack,
    ):
        os.environ.update(STORAGE_EMULATOR_HOST=stack.variables["STORAGE_EMULATOR_HOST"])
        bench = workbench(Path(place))
        size = mebibytes // 3 * MIB
        _upload_round(bench, stack, mebibytes)  # the emulator has no memory yet: it counts for none
        rounds = [
            _upload_round(bench, stack, mebibytes) for _ in range(1 if small else UPLOAD_ROUNDS)
        ]
        reading = _reading(Path(place), mebibytes)
        plain = _plain_upload(stack, size)
    _tell_upload(UploadRound(*map(median, zip(*rounds, strict=True))), size, plain)
    apart = ", ".join(f"{each.puts / each.ours:.2f}" for each in rounds)
    console.print(f"reading and hashing alone {reading:.1f} s; with compose in each round: {apart}")


def _tell_upload(seconds: UploadRound, size: int, plain: float) -> None:
    without = seconds.ours - seconds.compose
    composed = seconds.puts + seconds.composing
    header = without - seconds.sent - seconds.tidied
    table = Table(title=f"Upload of a memfile with {size / MIB:.0f} MiB of data, medians")
    for heading in ("way", "seconds", "MiB/s", "× plain"):
        table.add_column(heading, justify="right" if heading != "way" else "left")
    for name, spent in (
        ("ours", seconds.ours),
        ("  found, hashed and sent: parts in parallel", seconds.sent),
        ("  composed and checked: a copy in the emulator", seconds.compose),
        ("  parts removed", seconds.tidied),
        ("  header written", max(header, 0.001)),
        ("ours without compose", without),
        ("plain: the same bytes in one stream", plain),
        ("puts: parallel PUTs, by the same way as ours", seconds.puts),
        ("puts, composed into one object as ours are", composed),
        ("ceiling: parallel PUTs to the emulator itself", seconds.ceiling),
    ):
        table.add_row(name, f"{spent:.2f}", f"{size / MIB / spent:.0f}", f"{plain / spent:.2f}")
    console.print(table)
    console.print(
        f"of parallel PUTs: {seconds.puts / seconds.ours:.2f} with compose (limit {UPLOAD_LIMIT}), "
        f"{seconds.puts / without:.2f} without ours, {composed / seconds.ours:.2f} with both"
    )
    bare = seconds.puts / (seconds.puts + seconds.compose)
    left = seconds.puts / UPLOAD_LIMIT - seconds.compose
    console.print(
        f"with our compose the PUTs themselves would reach {bare:.2f}: {UPLOAD_LIMIT} leaves "
        f"{seconds.puts:.2f} / {UPLOAD_LIMIT} - {seconds.compose:.2f} = {left:.2f} s to the rest"
    )


def _upload_round(bench: Workbench, stack: Stack, mebibytes: int) -> UploadRound:
    stack.traffic(clear=True)
    sent, began, ours = asyncio.run(_our_upload(bench, stack, mebibytes))
    phases = _phases(stack, began)
    if sent != mebibytes // 3 * MIB:
        raise RuntimeError(f"{sent} bytes were sent, not the {mebibytes // 3} MiB that are data")
    _empty(stack)
    puts = _parallel_puts(stack, sent)
    _empty(stack)
    ceiling = _ceiling(stack, sent)
    _empty(stack)
    return UploadRound(ours, *phases, *puts, ceiling)


def _empty(stack: Stack) -> None:
    """Remove what one way has stored: the next one is not to wait for the disk to take it."""
    bucket = Bucket(stack.environment.bucket)
    bucket.delete_objects(bucket.list_objects(""))


def _phases(stack: Stack, began: float) -> tuple[float, float, float]:
    """Return the seconds of an upload's sending, composing and tidying up, as the proxy saw them.

    `began` is when the upload did, by the wall clock.
    """
    times: dict[str, list[tuple[float, float]]] = {"compose": [], "delete": []}
    for each in stack.traffic()["requests"]:
        times.setdefault(each["operation"], []).append((each["began"], each["seconds"]))
    composing = min(start for start, _ in times["compose"])
    composed, tidied = (max(map(sum, times[name])) for name in ("compose", "delete"))
    return composing - began, composed - composing, tidied - composed


def _reading(place: Path, mebibytes: int) -> float:
    """Return the seconds that one pass over the same file takes, with nobody to send to."""
    _sparse_file(place / "read", mebibytes)
    began = time.monotonic()
    scan(place / "read", BLOCK_BYTES, lambda _: None, lambda: None)
    return time.monotonic() - began


async def _our_upload(bench: Workbench, stack: Stack, mebibytes: int) -> tuple[int, float, float]:
    """Return the bytes that were sent, when that began by the wall clock, and its seconds."""
    bucket = Bucket(stack.environment.bucket)
    leases = LeaseObjects(bucket)
    build_id = str(uuid.uuid4())
    number = leases.take(build_id, bench.settings.host, "workflow", None)
    scope = bench.scope(build_id, number)
    with bench.store.making(Step.BOOT, "f" * 64, scope, 1, lambda: None) as work:
        _sparse_file(work / "memfile", mebibytes)
        made = bench.store.publish(
            work,
            SnapshotCheckpoint(fingerprint="f" * 64, host=bench.settings.host),
            scope,
            names=(ArtifactName.MEMFILE,),
            check=lambda: None,
        )
    activities = BucketArtifactActivities(bench.settings, bucket, bench.ledger, bench.store, leases)
    began = time.time()
    uploaded = await ActivityEnvironment().run(
        activities.upload_artifact,
        UploadArtifactInput(scope=scope, snapshot=made, name=ArtifactName.MEMFILE),
    )
    return uploaded.sent_bytes, began, time.time() - began


def _sparse_file(path: Path, mebibytes: int) -> None:
    """Every third MiB is data, the next zeros that are written, the third a hole."""
    with path.open("wb") as file:
        for start in range(0, mebibytes - 2, 3):
            file.seek(start * MIB)
            file.write(os.urandom(MIB) + bytes(MIB))
        file.truncate(mebibytes * MIB)


def _plain_upload(stack: Stack, size: int) -> float:
    data = os.urandom(MIB) * (size // MIB)
    client = storage.Client(project="dev")
    blob = client.bucket(stack.environment.bucket).blob("plain")
    began = time.monotonic()
    blob.upload_from_string(data, timeout=600)
    return time.monotonic() - began


def _parallel_puts(stack: Stack, size: int) -> tuple[float, float]:
    """Return the seconds of PUTs as the library makes them, by the proxy, and of their compose."""
    bucket = storage.Client(project="dev").bucket(stack.environment.bucket)
    name = f"puts-{uuid.uuid4()}"

    def put(number: int, part: bytes) -> None:
        blob = bucket.blob(f"{name}/{number:03d}", chunk_size=len(part))
        blob.upload_from_string(part, timeout=600)

    puts = _in_parallel(put, size)
    sources = list(bucket.list_blobs(prefix=f"{name}/"))
    began = time.monotonic()
    bucket.blob(f"{name}-all").compose(sources, timeout=600)
    seconds = time.monotonic() - began
    return puts, seconds * size / sum(blob.size for blob in sources)


def _ceiling(stack: Stack, size: int) -> float:
    url = f"http://127.0.0.1:{stack.environment.ports.gcs_emulator}/upload/storage/v1/b/"
    url += f"{stack.environment.bucket}/o?uploadType=media&name=ceiling-"

    def put(number: int, part: bytes) -> None:
        requests.post(f"{url}{number}", data=part, timeout=600).raise_for_status()

    return _in_parallel(put, size)


def _in_parallel(put: Callable[[int, bytes], None], size: int) -> float:
    """Return the seconds of putting so much in parts of 32 MiB, four at a time."""
    part = os.urandom(32 * MIB)
    count = max(1, size // len(part))
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: put(number, part), range(count)))
    return (time.monotonic() - began) * size / (count * len(part))


# A fleet


def bench_fleet(small: bool, whole: bool, seconds: float | None) -> None:
    """Let a fleet build, each build for so many `seconds`."""
    size = fleet.SMALL if small else fleet.WHOLE if whole else fleet.USUAL
    size = replace(size, seconds=seconds or size.seconds)
    say(f"{sum(size.builds.values())} builds on {size.hosts} hosts")
    fleet.tell(fleet.run_fleet(size), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description="Measure the product beside its peers.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all of them")
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help="of rootfs; default: all")
    parser.add_argument("--small", action="store_true", help="a tenth of the data")
    parser.add_argument("--whole", action="store_true", help="a fleet of 100 hosts")
    parser.add_argument("--seconds", type=float, help="what a build of the fleet takes")
    asked = parser.parse_args(arguments)
    parts = asked.parts or PARTS
    if "fleet" in parts:
        bench_fleet(asked.small, asked.whole, asked.seconds)
    if set(parts) == {"fleet"}:  # which needs no Docker
        return 0
    with (
        borrowed(environment(), ("docker", "kernel", "firecracker"), say),
        tempfile.TemporaryDirectory(prefix="template-manager-bench-") as place,
    ):
        if "build" in parts:
            bench_build(Path(place))
        if "rootfs" in parts:
            bench_rootfs(Path(place), asked.small, asked.workloads.split(","))
        if "pull" in parts:
            bench_pull(Path(place), asked.small)
        if "steps" in parts:
            steps_bench.bench_steps(console, asked.small, say)
        if "layers" in parts:
            layers_bench.bench_layers(console, asked.small, say)
        if "memory" in parts:
            memory_bench.bench_memory(Path(place), console, say)
        if "upload" in parts:
            bench_upload(Path(place), asked.small)
        if "network" in parts:
            network_bench.bench_network(Path(place), asked.small, console)
        if "agent" in parts:
            agent_bench.bench_agent(Path(place) / "agent", asked.small, console, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
