"""The user's own image builder: docker with BuildKit, docker buildx, podman or buildah.

What a Dockerfile means is theirs to say, and so are the context, its ignored files and the login at
the registry. The programs are found on PATH; the first that answers is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from activities.contract.image_reference import ImageReference

ASK_SECONDS = 30.0
BOOTSTRAP_SECONDS = 300.0  # buildx may fetch the image of its builder first
STOP_SECONDS = 10.0
STANDARD_ERROR = 2
OURS = "TEMPLATE_MANAGER_"
INSTALL_HINT = (
    "Install docker with BuildKit (packages docker.io and, beside newer ones, docker-buildx), "
    "podman or buildah. Or push an image yourself, and give it with --image."
)
BUILD_HINT = "What it says stands above. No build of a template was started."
PUSH_HINT = (
    "Log in to the registry with that builder, or name another one with --registry. "
    "No build of a template was started."
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# The last words of `docker push`; `docker image inspect` knows all digests, not which is this one.
PUSHED = re.compile(rf"digest: ({DIGEST.pattern})")
# As `docker buildx inspect` tells of its nodes.
RUNNING = re.compile(r"^Status: +running$", re.MULTILINE)
WARNING = re.compile(r"warning\b|time=\S+ level=warn", re.IGNORECASE)
ERROR = re.compile(r"^Error: +(.+)$", re.MULTILINE)


class BuilderName(StrEnum):
    """The builders, in the order in which they are looked for."""

    DOCKER = "docker"
    BUILDX = "buildx"
    PODMAN = "podman"
    BUILDAH = "buildah"


@dataclass
class BuilderError(Exception):
    """No image has come of it. In words for a person."""

    message: str
    hint: str

    def __str__(self) -> str:
        return self.message


class NoBuilderError(BuilderError):
    """No builder on this machine answers."""


@dataclass(frozen=True)
class ImageBuild:
    """What is to be built, and where it goes."""

    context: Path
    dockerfile: Path
    image: str
    """With its tag: `registry/repository:tag`."""
    build_args: tuple[str, ...] = ()
    """`NAME=VALUE`, or NAME alone for the value that this process's environment has."""
    options: tuple[str, ...] = ()
    """What the user passes on to the builder."""

    def arguments(self) -> list[str]:
        """Return what all builders take alike. The user's options come last, and so win."""
        named = [f"--tag={self.image}", f"--file={self.dockerfile}"]
        named += [f"--build-arg={each}" for each in self.build_args]
        context = str(self.context)
        # Else a directory of such a name would be an option of the builder's.
        return [*named, *self.options, f"./{context}" if context.startswith("-") else context]

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine, where it need not speak TLS."""
        host = ImageReference.parse(self.image).registry.partition(":")[0]
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def pushed(self, told: str, config: object) -> PushedImage:
        """Return the image at the digest that a builder tells of its push, with its config.

        Raises BuilderError when it tells none: a tag alone may be another image by now.
        """
        digests: list[str] = DIGEST.findall(told)
        if not digests:
            raise BuilderError(f"no digest is told of the push of {self.image}", BUILD_HINT)
        return PushedImage(f"{self.image}@{digests[-1]}", _has_command(config))


@dataclass(frozen=True)
class PushedImage:
    """An image in its registry."""

    reference: str
    """Its name at the digest that was pushed."""
    has_command: bool
    """Whether it has an ENTRYPOINT or a CMD."""


class ImageBuilder(ABC):
    """A builder that is installed here, at `path`."""

    name: ClassVar[BuilderName]
    program: ClassVar[str]

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    async def why_not(self) -> str:
        """Return why it cannot build anything here, or '' when it can."""

    @abstractmethod
    async def build_and_push(self, build: ImageBuild, place: Path) -> PushedImage:
        """Build the image and push it; how that goes is shown on standard error.

        `place` is an empty directory for what the builder tells of its results. Raises
        BuilderError; then the registry has no such tag.
        """

    async def _build(self, *arguments: str) -> None:
        code = await _run_shown(self._command(arguments))
        if code:
            raise BuilderError(f"{self.name} could not build it (exit code {code})", BUILD_HINT)

    async def _push(self, build: ImageBuild, *arguments: str) -> str:
        """Push; returns what the builder has said on standard output."""
        code, told = await _run_copied(self._command(arguments))
        if code:
            raise BuilderError(
                f"{self.name} could not push {build.image} (exit code {code})", PUSH_HINT
            )
        return told

    async def _ask(self, *arguments: str) -> str:
        answer = await _run_quietly(self._command(arguments))
        if answer.failure:
            raise BuilderError(f"{self.name} {arguments[0]}: {answer.failure}", BUILD_HINT)
        return answer.out

    async def _failure_of(self, *arguments: str, seconds: float = ASK_SECONDS) -> str:
        return (await _run_quietly(self._command(arguments), seconds)).failure

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [self.path, *arguments]


class Docker(ImageBuilder):
    """`docker build` with BuildKit, which clients up to 20.10 have in them, later ones in buildx.

    Never the legacy builder: it is not what Dockerfiles are written for any more.
    """

    name = BuilderName.DOCKER
    program = "docker"

    async def why_not(self) -> str:
        """Ask for the daemon, and for BuildKit: without its plugin docker has no `build` then."""
        return (
            await self._is_podman()
            or await self._failure_of("version", "--format", "{{.Server.Version}}")
            or await self._failure_of("build", "--help")
        )

    async def build_and_push(self, build: ImageBuild, place: Path) -> PushedImage:
        """Build into the daemon's images, and push from there."""
        iidfile = place / "id"
        await self._build("build", f"--iidfile={iidfile}", *await self._load(), *build.arguments())
        [inspected] = json.loads(await self._ask("image", "inspect", iidfile.read_text().strip()))
        told = await self._push(build, "push", build.image)
        return build.pushed(" ".join(PUSHED.findall(told)), inspected["Config"])

    async def _is_podman(self) -> str:
        """Tell of podman's `docker` command: it is looked for by its own name."""
        told = await _run_quietly(self._command(["--version"]))
        return "it is podman" if "podman" in told.out else ""

    async def _load(self) -> list[str]:
        """Have buildx give the image to the daemon, whichever of its builders is chosen."""
        return [] if await self._failure_of("buildx", "version") else ["--load"]


class Buildx(ImageBuilder):
    """`docker buildx build`, which needs no daemon of this machine: it pushes by itself."""

    name = BuilderName.BUILDX
    program = "docker"

    async def why_not(self) -> str:
        """Ask for the plugin, and have its builder answer."""
        missing = await self._failure_of("buildx", "version")
        if missing:
            return missing
        inspect = self._command(["buildx", "inspect", "--bootstrap"])
        told = await _run_quietly(inspect, BOOTSTRAP_SECONDS)
        if told.failure or RUNNING.search(told.out):
            return told.failure
        # It ends well without any node, too.
        error = ERROR.search(told.out)
        return error[1] if error else "its builder does not run"

    async def build_and_push(self, build: ImageBuild, place: Path) -> PushedImage:
        """Build and push in one go; the registry is asked for the config."""
        results = place / "results.json"
        own = ("--push", f"--metadata-file={results}")
        await self._build("buildx", "build", *own, *build.arguments())
        digest = str(json.loads(results.read_text()).get("containerimage.digest"))
        pushed = f"{build.image}@{digest}"
        image = json.loads(
            await self._ask("buildx", "imagetools", "inspect", pushed, "--format={{json .Image}}")
        )
        # Of several platforms: an image by each one's name.
        one = image if "architecture" in image else next(iter(image.values()))
        return build.pushed(digest, one.get("config") or {})


class Podman(ImageBuilder):
    """`podman build`. In Docker's format: OCI's has no SHELL, ONBUILD and HEALTHCHECK."""

    name = BuilderName.PODMAN
    program = "podman"

    async def why_not(self) -> str:
        """Ask for its storage, or for the machine that it runs on elsewhere."""
        return await self._failure_of("info")

    async def build_and_push(self, build: ImageBuild, place: Path) -> PushedImage:
        """Build into the user's images, and push from there."""
        iidfile, digestfile = place / "id", place / "digest"
        await self._build("build", "--format=docker", f"--iidfile={iidfile}", *build.arguments())
        config = await self._config(iidfile.read_text().strip())
        # Else only what its own configuration names may speak plain HTTP.
        plain = ["--tls-verify=false"] if build.is_local else []
        await self._push(build, "push", f"--digestfile={digestfile}", *plain, build.image)
        return build.pushed(digestfile.read_text(), config)

    async def _config(self, image_id: str) -> object:
        [inspected] = json.loads(await self._ask("image", "inspect", image_id))
        return inspected["Config"]


class Buildah(Podman):
    """`buildah build`, the same without containers to run."""

    name = BuilderName.BUILDAH
    program = "buildah"

    async def _config(self, image_id: str) -> object:
        inspected = json.loads(await self._ask("inspect", "--type=image", image_id))
        return inspected["Docker"]["config"]


BUILDERS: tuple[type[ImageBuilder], ...] = (Docker, Buildx, Podman, Buildah)


async def find_builder(
    wanted: BuilderName | None = None, tell: Callable[[str], None] = lambda line: None
) -> ImageBuilder:
    """Return the first builder that answers, or the wanted one. Raises NoBuilderError.

    Of several programs of one name on PATH each is asked; `tell` hears why one is not taken.
    """
    refused: list[str] = []
    for kind in BUILDERS:
        if wanted not in (None, kind.name):
            continue
        for path in _programs(kind.program):
            builder = kind(path)
            why_not = await builder.why_not()
            if not why_not:
                return builder
            refused.append(f"{kind.name} ({path}): {why_not}")
            tell(f"not taken: {refused[-1]}")
    which = f"{wanted} " + ("does not answer" if refused else "is not on PATH")
    none = "no image builder " + ("answers" if refused else "is on PATH")
    raise NoBuilderError("; ".join([which if wanted else none, *refused]), INSTALL_HINT)


def _programs(name: str) -> Iterator[str]:
    """Yield each program of that name on PATH, in its order."""
    seen = set()
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = shutil.which(name, path=directory)
        if found and (real := Path(found).resolve()) not in seen:
            seen.add(real)
            yield found


def _has_command(config: object) -> bool:
    assert isinstance(config, dict)
    words = [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
    return any(words)  # [""] is how a base's ENTRYPOINT is taken away


# ---- Running them


@dataclass(frozen=True)
class _Answer:
    out: str
    failure: str
    """Its last line of error when it has failed, else ''."""


async def _run_shown(command: Sequence[str]) -> int:
    """Run a program with the user's terminal; standard output is for what the command is for."""
    async with _started(command, stdout=STANDARD_ERROR) as process:
        return await process.wait()


async def _run_copied(command: Sequence[str]) -> tuple[int, str]:
    """Run a program, show what it says line by line, and return it."""
    told = []
    async with _started(command, stdout=asyncio.subprocess.PIPE) as process:
        assert process.stdout is not None
        async for line in process.stdout:
            told.append(line.decode(errors="replace"))
            sys.stderr.write(told[-1])
            sys.stderr.flush()
        return await process.wait(), "".join(told)


async def _run_quietly(command: Sequence[str], seconds: float = ASK_SECONDS) -> _Answer:
    pipe = asyncio.subprocess.PIPE
    async with _started(
        command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    ) as process:
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        except TimeoutError:
            return _Answer("", f"no answer within {seconds:.0f} s")
    lines = err.decode(errors="replace").strip().splitlines()
    # docker warns, then tells in a line what is wrong, and then how to install it.
    told = [line for line in lines if not WARNING.match(line)] or [
        f"exit code {process.returncode}"
    ]
    return _Answer(out.decode(errors="replace"), told[0] if process.returncode else "")


@contextlib.asynccontextmanager
async def _started(
    command: Sequence[str], *, stdin: int | None = None, stdout: int, stderr: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Have a program run for a block; one that is left early is stopped."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=_builders_environment(),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            await _stop(process)


def _builders_environment() -> dict[str, str]:
    """Return the user's own environment, without what is there for us."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**kept, "DOCKER_BUILDKIT": "1"}


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
