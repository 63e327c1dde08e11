"""How soon a guest agent answers after a resume, for `make bench`.

Beside it is the guest's own first answer on the network, which the agent's cannot come before, and
the agent's second answer, which has nothing to read from the snapshot any more. The agent is a
small one, which starts a shell for each answer: how much memory E2B's own needs first is not in it.

It is an idle Debian. Before each resume its files are dropped from the page cache: in turns those
of the template as it is built, of one whose guest kept its memory as it was when it was ready,
and, where the VMM tells what a guest uses first, of the first one without that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import images
from devstack.environment import REPOSITORY
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
KEEP_MEMORY = "template.memory=kept"
AS_BUILT = "as it is built"


class Answers(NamedTuple):
    """One resume, in ms: until the guest answered, and how long its agent took, twice."""

    guest: float
    first: float
    second: float


def bench_agent(place: Path, small: bool, console: Console, say: Progress) -> None:
    """Tell how soon an agent answers, by many resumes of each template."""
    found = answers_of_resumes(place, 3 if small else 10, say)
    table = Table(title="Nothing in the page cache: ms until a guest's agent answers first")
    for column in ("template", "resumes", "ping", "slowest", "then agent", "slowest", "2nd answer"):
        table.add_column(column, justify="left" if column == "template" else "right")
    for name, answers in found.items():
        guest, first, second = zip(*answers, strict=True)
        numbers = (median(guest), max(guest), median(first), max(first), median(second))
        table.add_row(name, str(len(answers)), *(f"{number:.1f}" for number in numbers))
    console.print(table)


def answers_of_resumes(
    place: Path, times: int, say: Progress, image: str = "debian"
) -> dict[str, list[Answers]]:
    """Build templates with an agent, resume each again and again, and ask the agent each time.

    Raises OSError and RuntimeError when it does not answer at once.
    """
    place.mkdir()
    with _stack(place, KERNEL_ARGUMENTS=KEEP_MEMORY) as stack:
        kept = _built(stack, image, place / "kept", say)
    with _stack(place) as stack:
        templates = {
            AS_BUILT: _built(stack, image, place / "built", say),
            "memory kept as it was": kept,
        }
        if (plain := _without_prefetch(templates[AS_BUILT], place / "plain")) is not None:
            templates["not told what is used first"] = plain
        found: dict[str, list[Answers]] = {name: [] for name in templates}
        for number in range(times):
            for name, template in templates.items():
                say(f"resuming it, {number + 1} of {times}: {name}")
                found[name].append(_resumed(stack, template))
    return found


def _stack(place: Path, **settings: str) -> Stack:
    """Return a stack whose templates have an agent."""
    agent = write_agent(place / "agent")
    only = [part for part in ALL_PARTS if part != "docker"]
    settings["GUEST_AGENT_PATH"] = str(agent)
    env = {f"TEMPLATE_MANAGER_{name}": value for name, value in settings.items()}
    return Stack(only=only, apps=APPS, env=env)


def _built(stack: Stack, name: str, target: Path, say: Progress) -> Path:
    """Build a template, and have it in a directory."""
    image = images.make_and_push(name, stack.variables["TEMPLATE_MANAGER_REGISTRY"], say)
    say("building a template with an agent that takes 4 s to listen")
    _call(stack, "build", "--image", image, "--name", "agent", "--memory", "512", "--follow")
    _call(stack, "pull", "agent", str(target))
    return target


def _without_prefetch(template: Path, target: Path) -> Path | None:
    """Make the same template that does not say what is used first; None where none does."""
    told = json.loads((template / METADATA).read_text())
    if not told["verification"].pop("prefetch", None):
        return None
    target.mkdir()
    for path in template.iterdir():
        if path.name != METADATA:
            (target / path.name).hardlink_to(path)
    (target / METADATA).write_text(json.dumps(told))
    return target


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
