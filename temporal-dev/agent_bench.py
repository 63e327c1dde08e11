"""How soon a guest agent answers after a resume, for `make bench`.

Beside it is the guest's own first answer on the network, which the agent's cannot come before, and
the agent's second answer, which has nothing to read from the snapshot any more. The agent is a
small one: how much memory E2B's own needs first is not in it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
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

CLI = str(Path(sys.executable).with_name("template-manager"))
LINES_TOLD = 5  # of `run --json`


class Answers(NamedTuple):
    """One resume, in ms: until the guest answered, and how long its agent took, twice."""

    guest: float
    first: float
    second: float


def bench_agent(place: Path, small: bool, console: Console, say: Progress) -> None:
    """Tell how soon an agent answers, by many resumes of one template."""
    found = answers_of_resumes(place, 3 if small else 20, say)
    table = Table(title=f"{len(found)} resumes: each time the agent answered its first request")
    for column in ("ms", "median", "slowest"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name, values in zip(
        ("until the guest answers a ping", "the agent's first answer", "its second answer"),
        zip(*found, strict=True),
        strict=True,
    ):
        table.add_row(name, f"{statistics.median(values):.1f}", f"{max(values):.1f}")
    console.print(table)


def answers_of_resumes(place: Path, times: int, say: Progress) -> list[Answers]:
    """Build a template with an agent, resume it again and again, and ask the agent each time.

    Raises OSError and RuntimeError when it does not answer at once.
    """
    place.mkdir()
    agent = write_agent(place / "agent")
    only = [part for part in ALL_PARTS if part != "docker"]
    with Stack(
        only=only, apps=APPS, env={"TEMPLATE_MANAGER_GUEST_AGENT_PATH": str(agent)}
    ) as stack:
        registry = stack.variables["TEMPLATE_MANAGER_REGISTRY"]
        image = images.make_and_push("alpine-like", registry, say)
        say("building a template with an agent that takes 4 s to listen")
        _call(stack, "build", "--image", image, "--name", "agent", "--memory", "256", "--follow")
        template = place / "template"
        _call(stack, "pull", "agent", str(template))
        say("resuming it")
        return [_resumed(stack, template) for _ in range(times)]


def _resumed(stack: Stack, template: Path) -> Answers:
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
