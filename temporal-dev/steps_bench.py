"""What the steps of a request cost, for `make bench`: beside a container, in the same run.

Everything is real: API, workflow, host, VMs. Times of steps are those of the build's log.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import docker
import images
from devstack.environment import REPOSITORY
from devstack.services import ALL_PARTS, Progress
from devstack.stack import APPS, Stack
from rich.console import Console

sys.path.insert(0, str(REPOSITORY))

from activities.contract.names import Step
from activities.contract.units import MIB
from api.client.client import TemplateClient
from api.client.files_upload import upload_files
from api.pb import template_manager_pb2 as pb

STEPS = 10
MOST_OF_CONTAINER = 1.5
TOLD = re.compile(r"^measured (?P<what>\w+) (?P<seconds>[0-9.]+)$")
# Run both ways: what a machine without KVM, or with another disk, makes slower. A step ends on the
# disk, a container does not; and there a sync is one of all that this machine has to write.
MEASURE = """\
import os, subprocess, sys, time
def measured(what, work):
    began = time.monotonic()
    work()
    print("measured", what, f"{time.monotonic() - began:.3f}", flush=True)
def loop():
    total = 0
    for number in range(3_000_000):
        total += number * number % 7
def write():
    os.makedirs("/written", exist_ok=True)
    for number in range(2000):
        with open(f"/written/{number}", "wb") as file:
            file.write(b"x" * 8192)
def pip():
    command = ["/venv/bin/pip", "install", "--quiet", "--no-index", "--no-compile", sys.argv[1]]
    subprocess.run(command, check=True)
measured("loop", loop)
measured("write", write)
subprocess.run([sys.executable, "-m", "venv", "/venv"], check=True)
if "in-step" in sys.argv:
    os.sync()
measured("pip", pip)
if "in-step" in sys.argv:
    measured("sync", os.sync)
"""
WHEEL = "measured-1.0-py3-none-any.whl"


@dataclass(frozen=True)
class DoneStep:
    """A piece of the steps' work, by the log: seconds until its guest was up, and to its end."""

    name: str
    boot: float
    seconds: float


def bench_steps(console: Console, small: bool, say: Progress) -> None:
    """Measure the steps of builds on an image with Python."""
    only = [part for part in ALL_PARTS if part != "docker"]
    with Stack(only=only, apps=APPS) as stack, tempfile.TemporaryDirectory() as place:
        image = images.make_and_push("python", stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
        address = stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]
        tell_steps(console, address, image, say)
        tell_pip(console, address, image, Path(place), 2 if small else 20, say)


def tell_steps(console: Console, address: str, image: str, say: Progress) -> None:
    """Tell what a step costs that does nothing, and what a changed one of ten costs."""
    salt = uuid.uuid4().hex
    commands = [f": {salt} {number}" for number in range(STEPS)]
    say(f"a build of {STEPS} steps that do nothing")
    first = asyncio.run(built(address, image, [run(command) for command in commands]))
    nothing = [step for step in first if step.name.startswith("step ")]
    boot = sum(step.boot for step in nothing) / len(nothing)
    each = sum(step.seconds for step in nothing) / len(nothing)
    console.print(f"a step that does nothing: {each:.1f} s, of them {boot:.1f} s to boot its guest")
    say("the same, but for the last one")
    again = asyncio.run(built(address, image, [run(c) for c in [*commands[:-1], "sleep 5"]]))
    changed = sum(step.seconds for step in again)
    console.print(
        f"one changed RUN of {STEPS}, of 5 s: {changed:.1f} s; with two boots it may cost "
        f"{5 + 2 * each:.1f} s; all of them were {sum(step.seconds for step in first):.1f} s; "
        f"{len(again)} pieces of work were done"
    )


def tell_pip(
    console: Console, address: str, image: str, place: Path, mebibytes: int, say: Progress
) -> None:
    """Tell how long pip takes in a RUN, beside a container of the same image."""
    make_files(place, mebibytes)
    say("pip, in a container")
    inside = in_container(image, place)
    say("pip, in a RUN")
    tar = place / "files.tar"
    with tarfile.open(tar, "w") as packed:
        for name in (WHEEL, "measure.py"):
            packed.add(place / name, arcname=name)
    steps = [copy(tar), run(f"python3 /m/measure.py /m/{WHEEL} in-step")]
    log = asyncio.run(log_of(address, image, steps, tar))
    in_step = measured([entry.message for entry in log])
    factor = (in_step["loop"] + in_step["write"]) / (inside["loop"] + inside["write"])
    ratio = (in_step["pip"] + in_step["sync"]) / (inside["pip"] * factor)
    for where, took in (("container", inside), ("RUN", in_step)):
        told = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in took.items())
        console.print(f"in a {where}: {told}")
    console.print(
        f"pip install of a wheel of {mebibytes} MiB: {ratio:.2f} of its time in a container × this "
        f"machine's factor for guests ({factor:.2f}); the limit is {MOST_OF_CONTAINER}"
    )


def run(command: str) -> pb.TemplateStep:
    """Return a RUN."""
    return pb.TemplateStep(type="RUN", args=[command])


def copy(tar: Path) -> pb.TemplateStep:
    """Return a COPY of all files of a tar."""
    return pb.TemplateStep(type="COPY", args=[".", "/m/"], files_hash=sha256_of(tar))


async def built(address: str, image: str, steps: Sequence[pb.TemplateStep]) -> list[DoneStep]:
    """Build with these steps; returns what each piece of their work has taken."""
    return done_steps(await log_of(address, image, steps))


def done_steps(log: Sequence[pb.TemplateBuildLogEntry]) -> list[DoneStep]:
    """Return what each piece of the steps' work has taken, by the log of a build."""
    pieces = [
        entry
        for entry in log
        if entry.message.startswith(("step ", "the template's own"))
        and " used " not in entry.message
    ]
    ups = [time_of(entry) for entry in log if entry.message.startswith("guest is up")]
    rest = [e for e in log if e.fields.get("pipeline_step") == Step.BOOT]
    ends = [*(time_of(piece) for piece in pieces), time_of(rest[0])][1:]  # none of no work
    done = []
    for piece, end in zip(pieces, ends, strict=True):
        began = time_of(piece)
        up = next((up for up in ups if began <= up <= end), began)
        done.append(
            DoneStep(piece.message, (up - began).total_seconds(), (end - began).total_seconds())
        )
    return done


async def log_of(
    address: str, image: str, steps: Sequence[pb.TemplateStep], tar: Path | None = None
) -> list[pb.TemplateBuildLogEntry]:
    """Build to the end; returns the log. Raises RuntimeError when the build fails."""
    template = pb.TemplateConfig(
        template_id="bench-steps",
        build_id=str(uuid.uuid4()),
        from_image=image,
        steps=steps,
        memory_mb=1024,
        vcpu_count=1,
        disk_size_mb=512,
    )
    async with TemplateClient(address) as client:
        if tar is not None:
            await upload_files(client, template.template_id, tar, sha256_of(tar), lambda _: None)
        log = await built_to_end(client, template)
        await client.delete(template.build_id)
    return log


async def built_to_end(
    client: TemplateClient, template: pb.TemplateConfig
) -> list[pb.TemplateBuildLogEntry]:
    """Build; returns the log. Raises RuntimeError when the build fails."""
    build_id = (await client.create(template)).build_id
    log = [line.entry async for line in client.logs(build_id, follow=True)]
    status = await client.status(build_id)
    if status.state != "completed":
        raise RuntimeError(f"the build has {status.state}: {status.reason.message}")
    return log


def time_of(entry: pb.TemplateBuildLogEntry) -> datetime:
    """Return when a line was logged."""
    return entry.timestamp.ToDatetime()


def in_container(image: str, place: Path) -> Mapping[str, float]:
    """Return what is measured in a container, on its writable layer as a RUN of Docker's is."""
    with closing(docker.from_env(timeout=600)) as client:
        said = client.containers.run(
            image,
            ["python3", "/m/measure.py", f"/m/{WHEEL}"],
            volumes={str(place): {"bind": "/m", "mode": "ro"}},
            network_mode="none",
            remove=True,
        )
    return measured(said.decode().splitlines())


def measured(lines: Sequence[str]) -> dict[str, float]:
    """Return the seconds that the measuring script has told."""
    found = [told for line in lines if (told := TOLD.match(line))]
    return {told["what"]: float(told["seconds"]) for told in found}


def make_files(place: Path, mebibytes: int) -> None:
    """Write the measuring script, and a wheel of so many MiB that no packing makes smaller."""
    (place / "measure.py").write_text(MEASURE)
    noise = random.Random(1)  # the same every time
    info = "measured-1.0.dist-info"
    with zipfile.ZipFile(place / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        for number in range(mebibytes * 4):
            wheel.writestr(f"measured/{number}.bin", noise.randbytes(MIB // 4))
        wheel.writestr("measured/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: measured\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
