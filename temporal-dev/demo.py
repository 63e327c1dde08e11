"""The main job, end to end, on real parts: `make demo`.

Starts the stack, pushes two images to the local registry (Debian with systemd, and one static
busybox without any init), builds a template of each through the gRPC API while following its log,
and ends with a table. Everything stays up for a look around; `make demo-down` stops it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images
from devstack.processes import ServiceError
from devstack.stack import start_apps, start_services
from rich.console import Console
from rich.table import Table

CLI = str(Path(sys.executable).with_name("template-manager"))
MIB = 1024 * 1024

console = Console()


@dataclass(frozen=True)
class Demo:
    """One template to build."""

    image: str
    start_command: str
    ready_command: str


DEMOS = (
    Demo(
        image="debian",
        start_command="busybox httpd -f -p 8080 -h /srv",
        ready_command="busybox wget -q -O /dev/null http://127.0.0.1:8080/index.html",
    ),
    Demo(
        image="busybox",
        start_command="/bin/busybox httpd -f -p 8080 -h /srv",
        ready_command="/bin/busybox wget -q -O /dev/null http://127.0.0.1:8080/index.html",
    ),
)


def say(message: str) -> None:
    """Tell what happens next."""
    console.print(f"[bold cyan]»[/] {message}", highlight=False)


def build(demo: Demo, reference: str, environment: Mapping[str, str]) -> str:
    """Build one template through the API, its log on the terminal. Returns the build id."""
    build_id = str(uuid.uuid4())
    say(f"building a template of {reference}")
    command = [CLI, "build", "--image", reference, "--template-id", f"demo-{demo.image}"]
    command += ["--build-id", build_id, "--memory", "512", "--vcpu", "1", "--disk", "512"]
    command += ["--start-command", demo.start_command, "--ready-command", demo.ready_command]
    subprocess.run([*command, "--follow"], env=dict(environment), check=True)
    return build_id


def status_of(build_id: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ask the API for everything about a build."""
    command = [CLI, "status", build_id, "--json"]
    answer = subprocess.run(
        command, env=dict(environment), check=True, capture_output=True, text=True
    )
    status: dict[str, Any] = json.loads(answer.stdout)
    return status


def show(statuses: list[dict[str, Any]], web_ui: str) -> None:
    """Print what was built, a block of lines each: digests and ids stay whole at any width."""
    for status in statuses:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for heading, told in _rows(status):
            table.add_row(heading, told)
        console.print(table)
        console.print()
    console.print(f"Temporal Web UI: {web_ui}", highlight=False)


def _rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "template", status["template_id"]
    yield "build", status["build_id"]
    yield "image", status["image_digest"]
    steps = [f"{step['step']:<17} {step['seconds']:.1f} s" for step in status["timeline"]]
    yield "steps", "\n".join(steps)
    sent = [
        f"{each['name']:<11} {each['sent_bytes'] / MIB:.1f} MiB of {each['size_bytes'] / MIB:.1f}"
        for each in status["artifacts"]
    ]
    yield "sent", "\n".join(sent)
    yield "objects", f"gs://{status['bucket']}/{status['build_id']}/"


def main() -> int:
    """Run the demo. Returns the exit code."""
    stack = start_services(progress=say)
    start_apps(stack, progress=say)
    environment = {**os.environ, **stack.variables()}
    references = [
        images.make_and_push(demo.image, f"127.0.0.1:{stack.ports.registry}", progress=say)
        for demo in DEMOS
    ]
    builds = [build(demo, ref, environment) for demo, ref in zip(DEMOS, references, strict=True)]
    show(
        [status_of(build_id, environment) for build_id in builds],
        f"http://127.0.0.1:{stack.ports.temporal_ui}",
    )
    say("everything is still running: `make demo-down` stops it")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {' '.join(error.cmd[:3])}… ended with exit code {error.returncode}")
    except ServiceError as error:
        sys.exit(f"demo: {error}")
