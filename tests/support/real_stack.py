"""The whole product on real parts, used through its command line as a user does."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from devstack.services import ALL_PARTS
from devstack.stack import Stack
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.client import Client, WorkflowExecutionDescription
from temporalio.service import RPCError

from activities.contract.names import build_workflow_id
from activities.disk.sparse_files import sha256_of
from activities.store.bucket import Bucket
from activities.store.objects import (
    LEASES,
    OWNERS,
    STORED,
    ObjectKind,
    is_layer_id,
    parse_object_name,
    template_prefix,
)
from api.cli.json_output import status_json
from api.client.client import TemplateClient
from api.client.files_upload import upload_files
from api.pb import template_manager_pb2 as pb
from api.pb import template_manager_pb2_grpc as pb_grpc
from tests.support.command_line import Ended
from tests.support.host_resources import HostResources
from tests.support.image_builders import forget_images
from tests.support.local_http import HTTPD, HTTPD_ANSWERS
from tests.support.otlp_collector import Collector

CLI = Path(sys.executable).with_name("template-manager")
PARTS = tuple(part for part in ALL_PARTS if part != "docker")
ASK_SECONDS = 30
REACH_SECONDS = 120
ARTIFACTS = ("rootfs.ext4", "memfile", "snapfile")
ENDED = ("completed", "failed", "cancelled")


class Product:
    """A stack with the product in it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.collector: Collector | None = None
        self.metrics: list[str] = []
        """Where Prometheus would look, when a test has asked for it."""
        self.health: list[str] = []
        """Health addresses, when a test has asked for them."""
        self.registry = stack.variables["TEMPLATE_MANAGER_REGISTRY"]
        self.data_dir = Path(stack.variables["TEMPLATE_MANAGER_DATA_DIR"])

    @property
    def bucket(self) -> Bucket:
        """The stack's bucket."""
        os.environ["STORAGE_EMULATOR_HOST"] = self.stack.variables["STORAGE_EMULATOR_HOST"]
        return Bucket(self.stack.environment.bucket)

    def objects(self, build_id: str = "") -> list[str]:
        """Names of the bucket's objects of a build, or of all of them.

        Without what stays of deleted builds: tombstones, until nothing can arrive any more, and to
        whom their ids are bound; and without what sweeps count.
        """
        bucket = self.bucket
        return sorted(
            stored.name
            for stored in bucket.list_objects(build_id)
            if not stored.name.startswith((OWNERS, STORED))
            if not (stored.name.startswith(LEASES) and _is_tombstone(bucket, stored.name))
        )

    def cli(self, *arguments: str, seconds: float = 180, without: Sequence[str] = ()) -> Ended:
        """Run a command to its end, in an environment that lacks the variables in `without`."""
        variables = {**os.environ, **self.stack.variables, "COLUMNS": "120"}
        done = subprocess.run(
            [CLI, *arguments],
            env={name: value for name, value in variables.items() if name not in without},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Have a command running for the length of a block."""
        process = subprocess.Popen(
            [CLI, *arguments],
            env={**os.environ, **self.stack.variables, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def build(self, image: str, *more: str, start: str = HTTPD, ready: str = HTTPD_ANSWERS) -> str:
        """Start a build of an image; returns its id."""
        return self.build_from("--image", image, *more, start=start, ready=ready)

    def build_from(self, *more: str, start: str = HTTPD, ready: str = HTTPD_ANSWERS) -> str:
        """Start a build of what the arguments say; returns its id."""
        arguments = ["--memory", "256", "--disk", "64", "--no-follow"]
        arguments += ["--start-command", start, "--ready-command", ready]
        if "--build-id" not in more:
            arguments += ["--build-id", str(uuid.uuid4())]
        ended = self.cli("build", *arguments, *more)
        assert ended.code == 0, ended.err
        return ended.out.strip().splitlines()[-1]

    def create(self, template: pb.TemplateConfig, files: Mapping[str, Path]) -> str:
        """Send the tars of a template's COPYs, by their SHA-256, and start its build."""
        return asyncio.run(self._create(template, files))

    async def _create(self, template: pb.TemplateConfig, files: Mapping[str, Path]) -> str:
        async with TemplateClient(self.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]) as client:
            for sha256, tar in files.items():
                await upload_files(client, template.template_id, tar, sha256, lambda _: None)
            return (await client.create(template)).build_id

    def status(self, build_id: str) -> dict[str, Any]:
        """What `status --json` tells. Raises grpc.RpcError.

        No process is started for it: tests ask often, and the builds need the CPUs.
        """
        request = pb.TemplateStatusRequest(build_id=build_id, limit=0)
        with grpc.insecure_channel(self.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]) as channel:
            stub = pb_grpc.TemplateServiceStub(channel)
            status = stub.TemplateBuildStatus(request, timeout=ASK_SECONDS)
            return dict(status_json(status))

    def ended(self, build_id: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until a build has ended; returns its status."""
        return self.until(build_id, lambda status: status["state"] in ENDED, seconds)

    def until(
        self, build_id: str, reached: Callable[[dict[str, Any]], bool], seconds: float = 120
    ) -> dict[str, Any]:
        """Wait until a status is as wanted; returns it."""
        deadline = time.monotonic() + seconds
        while not reached(status := self.status(build_id)):
            assert time.monotonic() < deadline, status
            assert status["state"] not in ENDED or reached(status), status
            time.sleep(0.2)
        return status

    def during(self, build_id: str, activity: str, act: Callable[[], None]) -> bool:
        """Act when that activity of a build is running; False if the build ended before."""
        return asyncio.run(self._during(build_id, activity, act))

    async def _during(self, build_id: str, activity: str, act: Callable[[], None]) -> bool:
        handle = (await self.temporal()).get_workflow_handle(build_workflow_id(build_id))
        deadline = time.monotonic() + REACH_SECONDS
        while time.monotonic() < deadline:
            try:
                description = await handle.describe()
            except RPCError:  # not created yet
                await asyncio.sleep(0.02)
                continue
            # A host that is asked first is held by `hold_host_if_free`.
            if any(name.startswith(activity) for name in _running_activities(description)):
                await asyncio.to_thread(act)
                return True
            if description.close_time is not None:
                return False
            await asyncio.sleep(0.01)
        raise AssertionError(f"build {build_id} neither reached {activity} nor ended")

    async def temporal(self) -> Client:
        """Connect to the stack's Temporal."""
        return await Client.connect(self.stack.variables["TEMPORAL_ADDRESS"])

    def require_template(self, build_id: str) -> None:
        """Pull the template; its files are those of the host's checkpoint, byte for byte."""
        with tempfile.TemporaryDirectory() as place:
            pulled = self.cli("pull", build_id, place)
            assert pulled.code == 0, pulled.err
            hashes = {name: sha256_of(Path(place) / name, lambda: None) for name in ARTIFACTS}
        manifests = (self.data_dir / "steps" / "boot_and_snapshot").glob("*/manifest.json")
        made = [json.loads(path.read_text())["files"] for path in manifests]
        kept = [{name: files[name]["sha256"] for name in ARTIFACTS} for files in made]
        assert hashes in kept

    @contextmanager
    def only_host_on(self, data_dir: Path) -> Iterator[None]:
        """Let another host, with that data directory, be the only one for a block."""
        self.stack.stop("host")
        try:
            small = {"DATA_DIR": str(data_dir), "MIN_FREE_DISK_MB": "0"}
            named = {f"TEMPLATE_MANAGER_{name}": value for name, value in small.items()}
            self.stack.start_app("host", "host-small", **named)
            yield
        finally:
            self.stack.stop("host-small")
            self.stack.restart("host")

    def log(self, build_id: str) -> list[str]:
        """The build's log, a message a line."""
        lines = self.cli("logs", build_id, "--json").out.splitlines()
        return [str(json.loads(line)["message"]) for line in lines]

    def process_log(self, name: str) -> list[dict[str, Any]]:
        """What a process of ours has written, a line each."""
        lines = self.stack.environment.files(name).log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def until_logged(self, build_id: str, text: str, seconds: float = 60) -> None:
        """Wait until the build's log on the host has a line."""
        path = self.data_dir / "logs" / f"{build_id}.jsonl"
        deadline = time.monotonic() + seconds
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, f"{text!r} is not logged"
            time.sleep(0.02)


def _running_activities(description: WorkflowExecutionDescription) -> set[str]:
    raw: Any = description.raw_description
    return {
        pending.activity_type.name
        for pending in raw.pending_activities
        if pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
    }


def _kept(name: str, prefixes: tuple[str, ...]) -> bool:
    named = parse_object_name(name)
    if named is not None and named.kind is ObjectKind.REFERENCE:
        return template_prefix(named.build_id).startswith(prefixes)
    return name.startswith(prefixes)


def _is_cached(name: str) -> bool:
    """Whether it is of a layer, or its reference to the one below; not a build's to a layer."""
    named = parse_object_name(name)
    if named is None or named.kind is not ObjectKind.REFERENCE:
        return named is not None and named.kind is ObjectKind.LAYER
    return is_layer_id(named.build_id)


def _is_tombstone(bucket: Bucket, name: str) -> bool:
    found = bucket.read_object(name)
    return found is None or "deleted" in json.loads(found[0])


@contextmanager
def running_product(
    apps: Sequence[str] = ("api", "worker", "host"), **env: str
) -> Iterator[Product]:
    """Run everything on free ports; `env` are further variables of the product's processes."""
    with Stack(only=PARTS, apps=apps, env=env) as stack:
        product = Product(stack)
        try:
            yield product
        finally:
            forget_images(product.registry)


@contextmanager
def nothing_left(product: Product, *data_dirs: Path, keep: tuple[str, ...] = ()) -> Iterator[None]:
    """Count the host's resources before and after the block: equal, or the test fails.

    `keep` are prefixes of objects that may be more; so may be layers, which the next build finds.
    """
    places = data_dirs or (product.data_dir,)
    before = [HostResources.count(place) for place in places]
    objects = [name for name in product.objects() if not _is_cached(name)]
    yield
    for place, counted in zip(places, before, strict=True):
        counted.assert_unchanged(place)
    left = [name for name in product.objects() if not _is_cached(name)]
    now = [name for name in left if name in objects or not _kept(name, keep)]
    assert now == objects, f"left in the bucket: {sorted(set(now) - set(objects))}"
