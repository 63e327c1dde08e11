"""Another caller's builds, beside attacks: a host's own, in a process of its own.

`python -m tests.support.neighbour DIRECTORY` says what its pid is. Then it takes each line that it
is sent for the content of a file in a small image, and builds its root file system. It answers by a
line of JSON: what that file has in the template, and how long it took. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from devstack.environment import REPOSITORY
from devstack.registry import Layer
from devstack.workbench import workbench

from activities.disk.ext4 import check_filesystem
from tests.support.served_images import serving_images

SECONDS = 240
"""In which a build is done, however busy the machine is; alone it takes one or two."""
ENDING_SECONDS = 10
DIRECTORY = "neighbour"
"""What its data directories are beneath: by this its containers are known."""


class Neighbour:
    """Builds whenever it is asked to. Its process begins with the first build."""

    def __init__(self, place: Path) -> None:
        """Have it work in a directory that is called `DIRECTORY`."""
        self._place = place
        self._words = place / "words"
        self._process: _Process | None = None
        self._builds = 0

    @contextmanager
    def building(self) -> Iterator[None]:
        """Have it build while the block runs; after it, what was asked for must be built in time.

        Outside of such blocks nothing of a build is on the machine.
        """
        process = self._process = self._process or self._begin()
        self._builds += 1
        content = f"build {self._builds} of a caller who attacks nobody"
        began = time.monotonic()
        try:
            process.asked.write(content.encode() + b"\n")
            yield
        except BaseException:
            if not _heard(process.answers, ENDING_SECONDS):
                self.end()
            raise
        told = _heard(process.answers, began + SECONDS - time.monotonic())
        if not told:
            self.end()
        assert told, f"no build within {SECONDS} s: {self._said()}"
        assert (told["content"], told["seconds"] < SECONDS) == (content, True), (told, self._said())

    def end(self) -> None:
        """Have it ended; the next build begins another."""
        if self._process:
            self._process.end()
        self._process = None

    def _begin(self) -> _Process:
        with self._words.open("ab") as words:
            # Nobody's child: attacks look at what this process has started.
            forked = subprocess.Popen(
                ["setsid", "--fork", sys.executable, "-m", __name__, str(self._place)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        forked.wait()
        assert forked.stdin
        assert forked.stdout
        first = _heard(forked.stdout, SECONDS)
        assert first, self._said()
        return _Process(first["pid"], forked.stdin, forked.stdout)

    def _said(self) -> str:
        return self._words.read_text(errors="replace")


@dataclass(frozen=True)
class _Process:
    pid: int
    asked: IO[bytes]
    answers: IO[bytes]

    def end(self) -> None:
        """Have it ended, also where it hangs."""
        with self.asked, self.answers:
            self.asked.close()
            # What it has not answered yet may come before its end.
            while (said := _heard(self.answers, ENDING_SECONDS)) is not None:
                if not said:
                    return
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def _heard(answers: IO[bytes], seconds: float) -> dict[str, Any] | None:
    """Return the next answer: none if it does not come in time, an empty one if nothing will."""
    if not select.select([answers], [], [], max(0.0, seconds))[0]:
        return None
    return dict(json.loads(answers.readline() or b"{}"))


async def build(place: Path, content: str) -> str:
    """Build it; returns the content of the file in it."""
    with TemporaryDirectory(dir=place) as directory, serving_images() as images:
        host = workbench(Path(directory, "data"))
        layer = Layer().busybox().directory("etc").add("etc/of", content.encode())
        images.image("plain", [layer.tar()])
        with closing(host.client):
            try:
                pulled = await host.pull(images.reference("plain"), timeout_seconds=SECONDS)
                made = await host.build_rootfs(pulled, provision_timeout_seconds=SECONDS)
                check_filesystem(made, lambda: None)
            finally:
                host.remove_images()
        command = ["debugfs", "-R", "cat /etc/of", str(made)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def answer(place: Path, content: str) -> dict[str, object]:
    """Build it; returns what is told of that."""
    began = time.monotonic()
    try:
        built = asyncio.run(build(place, content))
    except Exception:
        built = traceback.format_exc()
    return {"content": built, "seconds": round(time.monotonic() - began, 1)}


def main(place: Path) -> None:
    """Be the process."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # of whatever else is printed
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(place, line.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
