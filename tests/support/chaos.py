"""Killing processes of the product and of what it stands on, at chosen moments of a build."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import images
import psutil
from devstack.environment import environment
from devstack.processes import ServiceError
from devstack.stack import APPS, Stack, start_services

from activities.image.docker_daemon import make_docker_client
from api.pb import template_manager_pb2 as pb
from tests.support.real_stack import ENDED, PARTS, Product

OPTIONS = {
    "heartbeat_timeout_seconds": 3,
    "lease_grace_seconds": 12,
    "retry_attempts": 12,
    "retry_initial_seconds": 0.3,
    "retry_maximum_seconds": 2,
    "teardown_timeout_seconds": 60,
    "ready_timeout_seconds": 90,
}
# A step of the table, and the activity that is running when it is hit.
STEPS = {
    "lease": "hold_host",
    "pull": "pull_image",
    "rootfs": "build_rootfs",
    "steps": "run_steps",
    "sending": "send_layers",
    "start": "start_vm",
    "ready": "wait_until_ready",
    "snapshot": "snapshot_vm",
    "verify": "verify_snapshot",
    "upload": "upload_artifacts",
    "publish": "publish_template",
    "release": "release_host",
}
PROCESSES = (
    "host",
    "worker",
    "api",
    "firecracker",
    "docker",
    "gcs-emulator",
    "registry",
    "temporal",
)
STEPS_WITH_A_VM = ("steps", "sending", "ready", "snapshot", "verify")
SHORT = {
    ("host", "ready"),
    ("temporal", "ready"),
    ("firecracker", "ready"),
    ("gcs-emulator", "upload"),
}
# What a build may fail with when this was killed, because it is the truth.
TRUE_CAUSES = {
    "firecracker": {"VmmEndedError", "VmmError", "SnapshotNotResumableError"},
}


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    process: str
    step: str
    not_run: str = ""
    """Why it is not run, or ''."""

    @property
    def name(self) -> str:
        """`process-step`."""
        return f"{self.process}-{self.step}"

    @property
    def short(self) -> bool:
        """Whether it is in the short form."""
        return (self.process, self.step) in SHORT


def _not_run(process: str, step: str) -> str:
    if process == "firecracker" and step not in STEPS_WITH_A_VM:
        return "not run: no VM runs in this step"
    if step == "release" and process != "temporal":
        return "not run: too short to be hit; all that can be lost is a slot, see the frozen host"
    return ""


CELLS = [Cell(process, step, _not_run(process, step)) for process in PROCESSES for step in STEPS]


class ChaosProduct(Product):
    """The product, and ways to hurt it."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.image = images.make_and_push("busybox", self.registry, lambda _: None)

    def new_build(self, *more: str, **commands: str) -> str:
        """Start a build that no earlier checkpoint fits."""
        return self.build(self.image, "--env", f"CASE={uuid.uuid4()}", *more, **commands)

    def new_build_for(self, step: str) -> str:
        """Start a build that comes by this step of the table, and fits no earlier checkpoint."""
        if step == "pull":
            self.forget_image()
        if step not in ("steps", "sending"):
            return self.new_build()
        run = pb.TemplateStep(type="RUN", args=["sleep 3; echo $CASE >/made"])
        return self.build_with_steps(run)

    def build_with_steps(self, *steps: pb.TemplateStep, case: str = "") -> str:
        """Start a build with steps, on an image with a shell.

        It fits no checkpoint but those of builds with the same steps and the same `case`.
        """
        image = images.make_and_push("alpine-like", self.registry, lambda _: None)
        env = pb.TemplateStep(type="ENV", args=["CASE", case or str(uuid.uuid4())])
        template = pb.TemplateConfig(
            template_id="steps",
            build_id=str(uuid.uuid4()),
            from_image=image,
            steps=[env, *steps],
            memory_mb=256,
            vcpu_count=1,
            disk_size_mb=32,
        )
        return self.create(template, {})

    def forget_image(self) -> None:
        """Remove the image from dockerd, so that it must be pulled."""
        client = make_docker_client()
        for found in client.images(name=self.image.rsplit(":", 1)[0]):
            with suppress(Exception):
                client.remove_image(found["Id"], force=True)

    def kill(self, process: str) -> None:
        """SIGKILL a process, wherever it comes from."""
        if process == "firecracker":
            self._kill_vmm()
        elif process == "docker":
            os.kill(int(Path("/var/run/docker.pid").read_text()), signal.SIGKILL)
        else:
            self.stack.kill(process)

    def bring_back(self, process: str) -> None:
        """Start it again, as an init system would."""
        if process == "docker":
            bring_back_docker()
        elif process != "firecracker":
            self.stack.restart(process)

    def _kill_vmm(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            for path in (self.data_dir / "vms").glob("*/vmm.json"):
                with suppress(FileNotFoundError, ValueError, ProcessLookupError):
                    os.kill(json.loads(path.read_text())["vmm"][0], signal.SIGKILL)
                    return
            assert time.monotonic() < deadline, "no VMM runs"
            time.sleep(0.005)

    def hit(self, build_id: str, step: str, act: Callable[[], None]) -> bool:
        """Act when the build's activity of that step is running; False if it ended before."""
        return self.during(build_id, STEPS[step], act)

    def ended_somehow(self, build_id: str, seconds: float = 180) -> dict[str, Any]:
        """Wait for the end of a build, whatever is away meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                told = self.status(build_id)
            except grpc.RpcError as error:
                told = {"error": str(error)}
            if told.get("state") in ENDED:
                return told
            assert time.monotonic() < deadline, told
            time.sleep(0.3)


def bring_back_docker() -> None:
    """Start the machine's dockerd again, as often as it takes, and wait for it."""
    Path("/var/run/docker.pid").unlink(missing_ok=True)
    # Its containerd dies with it, a moment later; found alive, it would be waited for in vain.
    with suppress(FileNotFoundError, ValueError, psutil.Error):
        old = int(Path("/var/run/docker/containerd/containerd.pid").read_text())
        psutil.Process(old).wait(20)
    for tries_left in (2, 1, 0):
        try:
            start_services(stack=environment(), only=("docker",), progress=lambda _: None)
        except ServiceError:
            if not tries_left:
                raise


@contextmanager
def running_chaos_product(**env: str) -> Iterator[ChaosProduct]:
    """Run everything with short time limits."""
    values = {
        "TEMPLATE_MANAGER_BUILD": json.dumps(OPTIONS),
        "TEMPLATE_MANAGER_SWEEP_INTERVAL_SECONDS": "5",
        "TEMPLATE_MANAGER_RESTART_GRACE_SECONDS": "1",
        # What a step writes goes up in more parts than are sent at a time.
        "TEMPLATE_MANAGER_UPLOAD_CHUNK_MB": "2",
        **env,
    }
    with Stack(only=PARTS, apps=APPS, env=values) as stack:
        yield ChaosProduct(stack)
