"""How soon a guest agent answers after a resume, for `make bench`.

Beside it is the guest's own first answer on the network, which the agent's cannot come before, and
the agent's second answer, which has nothing to read from the snapshot any more. The agent is a
small one, which starts a shell for each answer: how much memory E2B's own needs first is not in it.

It is an idle Debian. Before each resume its files are dropped from the page cache: in turns those
of the template as it is built, of one whose guest kept its memory as it was when it was ready,
and, where the VMM tells what a guest uses first, of the first one without that. Each round has
another order, so that none always comes after the same.

Where `FIRECRACKER_BINARY` and `GUEST_KERNEL_DIR` are set (docs/firecracker.md), it is a small guest
on real Firecracker, whose agent fills some MiB, frees them and reads its disk before it listens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import NamedTuple

import images
from devstack.environment import REPOSITORY
from devstack.given_firecracker import SLOW_SECONDS, GivenFirecracker
from devstack.services import ALL_PARTS, Progress
from devstack.stack import APPS, Stack
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

from devstack.small_agent import ANSWER, init_agent, write_agent

from activities.microvm.network import in_network
from activities.store.objects import METADATA

CLI = str(Path(sys.executable).with_name("template-manager"))
LINES_TOLD = 5  # of `run --json`
AS_BUILT = "as it is built"
KEPT = "memory kept as it was"
MIB = 1 << 20


class Guest(NamedTuple):
    """What the templates are made of."""

    image: str
    options: Sequence[str]
    memories: dict[str, str]
    """What is done to its memory, by the template's name: words for its kernel."""
    settings: dict[str, str]
    agent: dict[str, str]
    """How its agent differs; see `write_agent`."""


DEBIAN = Guest("debian", ("--memory", "512"), {KEPT: "template.memory=kept", AS_BUILT: ""}, {}, {})
# The text is written in user mode, which is quick also where KVM emulates the guest's kernel.
FILL = "while (n < 100000) made[n] = n++"  # 12 MiB, no page as another
BUSY = f"/.template/busybox awk 'BEGIN {{ {FILL} }}'"
READS = "/.template/busybox dd if=/dev/vda of=/dev/null bs=1M count=8"


class Template(NamedTuple):
    """A template in a directory, and what its build took."""

    directory: Path
    stored_mb: float
    """Of its memory file."""


class Answers(NamedTuple):
    """One resume, in ms: until the guest answered, and how long its agent took, twice."""

    guest: float
    first: float
    second: float


def bench_agent(place: Path, small: bool, console: Console, say: Progress) -> None:
    """Tell how soon an agent answers, by many resumes of each template."""
    given = GivenFirecracker.named()
    guest = _real_guest(given, place / "given") if given else DEBIAN
    times = 3 if small else 6 if given else 10
    templates, found = resume_in_turns(place / "of", times, say, guest)
    table = Table(title=f"Nothing in the page cache: ms until the agent of {_what(given)} answers")
    numbers = ("stored MiB", "resumes", "ping", "slowest", "then agent", "slowest", "2nd answer")
    table.add_column("template")
    for column in numbers:
        table.add_column(column, justify="right")
    for name, answers in found.items():
        ping, first, second = zip(*answers, strict=True)
        took = (median(ping), max(ping), median(first), max(first), median(second))
        stored = f"{templates[name].stored_mb:.1f}"
        table.add_row(name, stored, str(len(answers)), *(f"{number:.1f}" for number in took))
    console.print(table)


def _what(given: GivenFirecracker | None) -> str:
    return f"a small guest on {given.binary.name}" if given else "an idle Debian on the stand-in"


def _real_guest(given: GivenFirecracker, place: Path) -> Guest:
    return Guest(
        "busybox",
        ("--memory", "128", "--disk", "64", "--ready-timeout", str(int(SLOW_SECONDS))),
        DEBIAN.memories,
        given.settings(place),
        # Its init gives the agent what its glibc needs; few processes, which take long to start.
        {"shell": "/bin/busybox sh", "first": f"{BUSY}; {READS}"},
    )


def answers_of_resumes(
    place: Path, times: int, say: Progress, image: str = "debian"
) -> dict[str, list[Answers]]:
    """Build templates with an agent, resume each again and again, and ask the agent each time.

    Raises OSError and RuntimeError when it does not answer at once.
    """
    return resume_in_turns(place, times, say, DEBIAN._replace(image=image))[1]


def resume_in_turns(
    place: Path, times: int, say: Progress, guest: Guest
) -> tuple[dict[str, Template], dict[str, list[Answers]]]:
    """Return the templates and their answers, by what they are; see `answers_of_resumes`."""
    place.mkdir(parents=True)
    templates = {}
    for number, (name, word) in enumerate(guest.memories.items()):
        words = f"{guest.settings.get('KERNEL_ARGUMENTS', '')} {word}".strip()
        with _stack(place, guest, KERNEL_ARGUMENTS=words) as stack:
            say(f"building a template with an agent that takes 4 s to listen: {name}")
            templates[name] = _built(stack, guest, place / str(number), say)
    if plain := _without_prefetch(templates[AS_BUILT], place / "plain"):
        templates["not told what is used first"] = plain
    found: dict[str, list[Answers]] = {name: [] for name in templates}
    orders = list(permutations(templates))
    with _stack(place, guest) as stack:
        for number in range(times):
            for name in orders[number % len(orders)]:
                found[name].append(_resumed(stack, templates[name].directory))
                took = ", ".join(f"{ms:.0f}" for ms in found[name][-1])
                say(f"resumed, {number + 1} of {times}: {name}: {took} ms")
    return templates, found


def _stack(place: Path, guest: Guest, **settings: str) -> Stack:
    """Return a stack whose templates have an agent."""
    agent = write_agent(place / "agent", **guest.agent)
    only = [part for part in ALL_PARTS if part != "docker"]
    settings = guest.settings | {"GUEST_AGENT_PATH": str(agent)} | settings
    env = {f"TEMPLATE_MANAGER_{name}": value for name, value in settings.items()}
    return Stack(only=only, apps=APPS, env=env)


def _built(stack: Stack, guest: Guest, target: Path, say: Progress) -> Template:
    """Build a template, and have it in a directory."""
    image = images.make_and_push(guest.image, stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
    _call(stack, "build", "--image", image, "--name", "agent", *guest.options, "--follow")
    _call(stack, "pull", "agent", str(target))
    told = json.loads((target / METADATA).read_text())
    stored = told["artifacts"]["memfile"]["objects"]["data"]["size_bytes"]
    return Template(target, stored / MIB)


def _without_prefetch(template: Template, target: Path) -> Template | None:
    """Make the same template that does not say what is used first; None where none does."""
    told = json.loads((template.directory / METADATA).read_text())
    if not told["verification"].pop("prefetch", None):
        return None
    target.mkdir()
    for path in template.directory.iterdir():
        if path.name != METADATA:
            (target / path.name).hardlink_to(path)
    (target / METADATA).write_text(json.dumps(told))
    return template._replace(directory=target)


def _forget(template: Path) -> None:
    """Drop a template's files from the page cache."""
    for path in template.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resumed(stack: Stack, template: Path) -> Answers:
    _forget(template)
    command = [CLI, "run", str(template), "--no-check", "--json"]
    with subprocess.Popen(command, env=_variables(stack), stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            told = json.loads(b"".join(running.stdout.readline() for _ in range(LINES_TOLD)))
            return Answers(told["resume_ms"], *in_network(told["network"], _ask_twice))
        finally:
            running.send_signal(signal.SIGINT)


def _ask_twice() -> Sequence[float]:
    """Return how long each of two requests took, in ms: neither is tried again."""
    taken = []
    for _ in range(2):
        began = time.monotonic()
        if (answer := init_agent()) != ANSWER:
            raise RuntimeError(f"the agent answers {answer!r}")
        taken.append((time.monotonic() - began) * 1000)
    return taken


def _call(stack: Stack, *arguments: str) -> None:
    command = [CLI, *arguments]
    subprocess.run(command, env=_variables(stack), check=True, stdout=subprocess.DEVNULL)


def _variables(stack: Stack) -> dict[str, str]:
    return {**os.environ, **stack.variables}
