"""Another caller's build, beside an attack: a host's own, in a process of its own.

`python -m tests.support.neighbour DIRECTORY` builds a root file system of a small image, and writes
`result.json` there: how long it took, and what the template has in a file of the image.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from devstack.environment import REPOSITORY
from devstack.registry import Layer
from devstack.workbench import workbench

from activities.disk.ext4 import check_filesystem
from tests.support.served_images import serving_images

SECONDS = 240
"""In which it is done, however busy the machine is; alone it takes about two."""
CONTENT = b"of a caller who attacks nobody\n"
PID, RESULT, WORDS = "pid", "result.json", "words"


@contextmanager
def neighbour_that_builds(place: Path) -> Iterator[None]:
    """Have it build while the block runs; at the end it must have built what was asked for."""
    place.mkdir()
    began = time.monotonic()
    with (place / WORDS).open("wb") as words:
        # Nobody's child: attacks look at what this process has started.
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-m", __name__, str(place)],
            stdout=words,
            stderr=words,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
    try:
        yield
        while not (place / RESULT).exists() and time.monotonic() - began < SECONDS:
            time.sleep(0.05)
        assert (place / RESULT).exists(), (place / WORDS).read_text()
    finally:
        _end(place)
    told = json.loads((place / RESULT).read_text())
    assert told["content"].encode() == CONTENT, (told, (place / WORDS).read_text())


def _end(place: Path) -> None:
    """Have it ended, also where it hangs, or has hardly begun because the attack failed."""
    begun = time.monotonic() + 60
    while not (place / PID).exists() and time.monotonic() < begun:
        time.sleep(0.05)
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = int((place / PID).read_text())
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)


async def build(place: Path) -> str:
    """Build it; returns the content of the file in it."""
    host = workbench(place / "data")
    with serving_images() as images:
        images.image("plain", [Layer().busybox().directory("etc").add("etc/of", CONTENT).tar()])
        try:
            pulled = await host.pull(images.reference("plain"), timeout_seconds=SECONDS)
            made = await host.build_rootfs(pulled, provision_timeout_seconds=SECONDS)
            check_filesystem(made, lambda: None)
        finally:
            host.remove_images()
    command = ["debugfs", "-R", "cat /etc/of", str(made)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def main(place: Path) -> None:
    """Be the process."""
    _tell(place / PID, str(os.getpid()))
    began = time.monotonic()
    try:
        content = asyncio.run(build(place))
    except Exception:
        content = traceback.format_exc()
    told = {"content": content, "seconds": round(time.monotonic() - began, 1)}
    _tell(place / RESULT, json.dumps(told))


def _tell(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
