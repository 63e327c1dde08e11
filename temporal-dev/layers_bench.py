"""What layers of disks spare, for `make bench`: bytes to the bucket, and time on a fresh host; and
what a step loses by a layer that goes up beside it.

Everything is real: API, workflow, hosts, VMs. Bytes are those that reached the bucket, by its
proxy, less what the build's log says of its memory, to 0.1 MiB. Each time is the better one of two
builds. The fresh host pulls the image, too: a layer does not spare that. And it is the worst case:
the host that has the layers is asked first, and has just died.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import docker
import images
from devstack.environment import REPOSITORY
from devstack.services import ALL_PARTS, Progress
from devstack.stack import APPS, Stack
from rich.console import Console
from rich.table import Table
from steps_bench import DoneStep, built_to_end, done_steps, run

sys.path.insert(0, str(REPOSITORY))

from activities.contract.units import MIB
from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb

MOST_OF_FIRST = 10  # % of the disk of an image's first template
MOST_OF_CHANGE = 10_000_000  # bytes, without the memfile, of a template on another
MOST_OF_SAME_HOST = 1.5
MOST_BY_SENDING = 1.1
ROUNDS = 2
ROUNDS_OF_SENDING = 5
CHANGE = "dd if=/dev/urandom of=/changed bs=1000000 count=1"
MADE = "dd if=/dev/urandom of=/made bs=1000000 count=32"
COMPUTES = "dd if=/dev/zero bs=1000000 count=300 | sha256sum"
SENT = re.compile(r"^(?P<what>memfile|snapfile): sent (?P<mebibytes>[0-9.]+) MiB ")


class Built(NamedTuple):
    """A build: how long it took, and what it has sent to the bucket."""

    build_id: str
    seconds: float
    sent_bytes: int
    memfile_bytes: int
    snapfile_bytes: int
    steps: Sequence[DoneStep]

    @property
    def disk_bytes(self) -> int:
        """Bytes of the disk with its layers; headers, log and metadata count to it."""
        return self.besides_memfile - self.snapfile_bytes

    @property
    def besides_memfile(self) -> int:
        """Bytes of all but the memfile."""
        return self.sent_bytes - self.memfile_bytes


@dataclass(frozen=True)
class Builder:
    """Builds on an image, one after the other."""

    stack: Stack
    image: str
    say: Progress

    def build(self, what: str, *steps: pb.TemplateStep, start: str = "", on: str = "") -> Built:
        """Build on the image, or on the template that is named."""
        self.say(what)
        template = pb.TemplateConfig(
            template_id="bench-layers",
            build_id=str(uuid.uuid4()),
            from_image=None if on else self.image,
            from_template=pb.FromTemplateConfig(build_id=on) if on else None,
            steps=steps,
            start_command=start,
            memory_mb=512,
            vcpu_count=1,
            disk_size_mb=256,
        )
        self.stack.traffic(clear=True)
        began = time.monotonic()
        log = asyncio.run(self._built(template))
        seconds = time.monotonic() - began
        told = [found for entry in log if (found := SENT.match(entry.message))]
        sent = {found["what"]: round(float(found["mebibytes"]) * MIB) for found in told}
        built = Built(
            template.build_id,
            seconds,
            self._sent_bytes(),
            sent["memfile"],
            sent["snapfile"],
            done_steps(log),
        )
        self.say(f"{seconds:.1f} s, {megabytes(built.besides_memfile)} sent besides the memfile")
        return built

    async def _built(self, template: pb.TemplateConfig) -> Sequence[pb.TemplateBuildLogEntry]:
        async with TemplateClient(self.stack.variables["TEMPLATE_MANAGER_API_ADDRESS"]) as client:
            return await built_to_end(client, template)

    def _sent_bytes(self) -> int:
        operations = self.stack.traffic()["operations"]
        return sum(
            operations.get(name, {"bytes_in": 0})["bytes_in"]
            for name in ("upload", "resumable-chunk")
        )

    @contextlib.contextmanager
    def only_host(self, name: str) -> Iterator[None]:
        """Let a host be the only one that has an empty data directory, and not the image."""
        self.stack.stop("host")
        with contextlib.closing(docker.from_env(timeout=600)) as client:
            for found in client.images.list(name=self.image.rpartition(":")[0]):
                client.images.remove(str(found.id), force=True)
        self.stack.start_app("host", name)
        try:
            yield
        finally:
            self.stack.stop(name)
            self.stack.restart("host")


def bench_layers(console: Console, small: bool, say: Progress) -> None:
    """Measure what is sent, and how much longer a host takes that has nothing yet."""
    only = [part for part in ALL_PARTS if part != "docker"]
    with Stack(only=only, apps=APPS) as stack:
        image = images.make_and_push("python", stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
        builder = Builder(stack, image, say)
        table = Table(title="Layers of disks")
        for column in ("what", "measured", "limit"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for row in (
            *tell_bytes(builder),
            *tell_times(builder, 1 if small else ROUNDS),
            *tell_sending(builder, 1 if small else ROUNDS_OF_SENDING),
        ):
            table.add_row(*row)
    console.print(table)


def tell_bytes(builder: Builder) -> Iterator[tuple[str, str, str]]:
    """Tell what a second template of an image sends, and one on a template."""
    first = builder.build("the first template of an image", start="sleep 1000")
    second = builder.build("the second one", start="sleep 2000")
    child = builder.build("a change of 1 MB", run(CHANGE), on=first.build_id)
    share = 100 * second.disk_bytes / first.disk_bytes
    yield "first template of an image: its disk", megabytes(first.disk_bytes), ""
    yield (
        "second one: its disk",
        f"{megabytes(second.disk_bytes)}, {share:.1f} %",
        f"{MOST_OF_FIRST} %",
    )
    yield (
        "on a template, 1 MB changed: all but the memfile",
        megabytes(child.besides_memfile),
        megabytes(MOST_OF_CHANGE),
    )


def tell_times(builder: Builder, rounds: int) -> Iterator[tuple[str, str, str]]:
    """Tell how long a build takes whose steps are stored, on a host that has made them or not.

    Its start command is another each time: memory is no layer, and is made on either host.
    """
    made = run(MADE)

    def rebuild(where: str) -> float:
        return builder.build(f"again, {where}", made, start=f": {uuid.uuid4()}; sleep 1000").seconds

    first = builder.build("a build with a step of 32 MB", made, start="sleep 3000")
    same, fresh = [], []
    for number in range(rounds):
        same.append(rebuild("on the same host"))
        with builder.only_host(f"host-fresh{number}"):
            fresh.append(rebuild("on a fresh host"))
    ratio = min(fresh) / min(same)
    yield "a build with a step of 32 MB", f"{first.seconds:.1f} s", ""
    yield "with another start command, on the same host", f"{min(same):.1f} s", ""
    yield (
        "with another start command, on a fresh host",
        f"{min(fresh):.1f} s, × {ratio:.2f}",
        f"× {MOST_OF_SAME_HOST}",
    )


def tell_sending(builder: Builder, rounds: int) -> Iterator[tuple[str, str, str]]:
    """Tell how much longer a step takes that computes, while the layer below it goes up.

    It does so in the first of two builds; the second one finds the disk on the host and its layer
    in the bucket, so that there is nothing to send.
    """
    while_sent: list[DoneStep] = []
    alone: list[DoneStep] = []
    for number in range(rounds):
        made = run(f"{MADE}; : {uuid.uuid4()}")
        for took in (while_sent, alone):
            what = "while its layer goes up" if took is while_sent else "with its layer sent"
            computes = run(f"{COMPUTES}; : {uuid.uuid4()}")
            built = builder.build(f"a step on 32 MB, {what}, {number + 1}", made, computes)
            took.append(built.steps[-2])  # the last are the template's own files
            builder.say(f"{took[-1].seconds:.1f} s, of them {took[-1].boot:.1f} s to boot")
    for what, took in (("sent before", alone), ("sent meanwhile", while_sent)):
        yield f"a step on a disk of 32 MB, {what}", _of_step(took), ""
    ratio = _median(while_sent) / _median(alone)
    yield "the latter, beside the former", f"× {ratio:.2f}", f"× {MOST_BY_SENDING}"


def _median(took: Sequence[DoneStep]) -> float:
    return statistics.median(step.seconds for step in took)


def _of_step(took: Sequence[DoneStep]) -> str:
    boot = statistics.median(step.boot for step in took)
    return f"{_median(took):.1f} s, {boot:.1f} s to boot"


def megabytes(size_bytes: int) -> str:
    """Write a size in MB."""
    return f"{size_bytes / 1e6:.1f} MB"
