"""A Dockerfile as the steps of a template: what it says, on top of its FROM.

The parser is `dockerfile-parse`; `.dockerignore` is read as Docker's own SDK reads it. What cannot
be done is refused by name and line.
"""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter, extract_key_values

from activities.store.files import tar_of_context
from api.cli.build_request import OptionError
from api.pb import template_manager_pb2 as pb

NAME = "Dockerfile"
# They say nothing about the files of the image, nor about how its commands run.
WITHOUT_EFFECT = frozenset({"COMMENT", "LABEL", "MAINTAINER", "EXPOSE", "STOPSIGNAL"})
PREDEFINED_ARGUMENTS = frozenset(
    {"HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"}
)


@dataclass
class Translated:
    """What a Dockerfile asks for."""

    image: str = ""
    steps: list[pb.TemplateStep] = field(default_factory=list)
    start_command: str = ""
    """Of its ENTRYPOINT and CMD, or ''."""
    files: dict[str, Path] = field(default_factory=dict)
    """The tars that its COPYs take, by their SHA-256: they must be in the bucket before the build
    starts."""


@dataclass
class _State:
    arguments: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: str | list[str] | None = None
    command: str | list[str] | None = None


def translate(directory: Path, build_arguments: dict[str, str], tars: Path) -> Translated:
    """Read `Dockerfile` in a directory, which is also the context of its COPYs; their files go
    into tars in the directory `tars`.

    Raises OptionError naming the instruction and its line.
    """
    path = directory / NAME
    try:
        content = path.open("rb")
    except OSError as error:
        raise OptionError(f"--dockerfile: cannot read {path}: {error.strerror}") from None
    with content:
        structure = DockerfileParser(fileobj=content, env_replace=False).structure
    return _Translation(directory, build_arguments, tars).run(structure)


class _Entry(TypedDict):
    """An instruction as the parser gives it. Lines are counted from 0."""

    instruction: str
    startline: int
    value: str


class _Translation:
    def __init__(self, directory: Path, given: dict[str, str], tars: Path) -> None:
        self._directory = directory
        self._given = given
        self._tars = tars
        self._done = Translated()
        self._state = _State({})
        self._line = 0
        self._instruction = ""

    def run(self, structure: list[_Entry]) -> Translated:
        """Translate every instruction, in order."""
        for entry in structure:
            self._line, self._instruction = entry["startline"] + 1, entry["instruction"].upper()
            if self._instruction in WITHOUT_EFFECT:
                continue
            handler = getattr(self, f"_take_{self._instruction.lower()}", None)
            if handler is None:
                raise self._refused("is not supported")
            if not self._done.image and self._instruction not in ("FROM", "ARG"):
                raise self._refused("must come after FROM")
            handler(entry["value"])
        if not self._done.image:
            raise OptionError(f"{self._directory / NAME} has no FROM")
        self._done.start_command = self._start_command()
        return self._done

    def _refused(self, why: str) -> OptionError:
        return OptionError(
            f"{self._directory / NAME}, line {self._line}: {self._instruction} {why}"
        )

    def _words(self, value: str) -> list[str]:
        variables = {"args": self._state.arguments, "envs": self._state.environment}
        return [str(word) for word in WordSplitter(value, **variables).split()]

    def _add(self, *args: str, files: str = "") -> None:
        step = pb.TemplateStep(type=self._instruction, args=args)
        if files:
            step.files_hash = files
        self._done.steps.append(step)

    # ---- Instructions

    def _take_from(self, value: str) -> None:
        words = self._words(value)
        if self._done.image:
            raise self._refused(
                "is there twice: build several stages with docker, and use the image"
            )
        if words and words[0].startswith("--"):
            raise self._refused(f"{words[0]} is not supported")
        if not words or words[0].lower() == "scratch":
            raise self._refused("must name an image")
        self._done.image = words[0]
        self._state.arguments = {}  # those before FROM are for FROM alone

    def _take_arg(self, value: str) -> None:
        for word in self._words(value):
            name, sign, default = word.partition("=")
            given = self._given.get(name)
            if given is None and not sign:
                continue
            self._state.arguments[name] = default if given is None else given
            if self._done.image and name.upper() not in PREDEFINED_ARGUMENTS:
                self._add(name, self._state.arguments[name])

    def _take_env(self, value: str) -> None:
        pairs = extract_key_values(True, self._state.arguments, self._state.environment, value)
        for name, text in pairs:
            self._state.environment[name] = text
        self._add(*(part for pair in pairs for part in pair))

    def _take_workdir(self, value: str) -> None:
        self._add(" ".join(self._words(value)))

    def _take_user(self, value: str) -> None:
        self._add(" ".join(self._words(value)))

    def _take_run(self, value: str) -> None:
        if value.lstrip().startswith("--"):
            raise self._refused(f"{value.split(maxsplit=1)[0]} is not supported")
        if "<<" in value and value.rstrip().split()[0].startswith("<<"):
            raise self._refused("with a here-document is not supported; write a script and COPY it")
        command = _exec_form(value)
        self._add(f"exec {shlex.join(command)}" if command else value)

    def _take_copy(self, value: str) -> None:
        owner, mode = "", ""
        rest = value.strip()
        while rest.startswith("--"):
            flag, _, rest = rest.partition(" ")
            name, _, text = flag.partition("=")
            if name == "--chown":
                owner = text
            elif name == "--chmod" and text.isdigit():
                mode = text
            else:
                raise self._refused(f"{name} is not supported")
            rest = rest.strip()
        words = _exec_form(rest) or self._words(rest)
        if len(words) < 2:
            raise self._refused("needs a source and a destination")
        *sources, destination = words
        if len(sources) > 1 and not destination.endswith("/"):
            raise self._refused("of several sources needs a destination that ends with /")
        for source in sources:
            self._add(source, destination, owner, mode, files=self._files_of(source))

    def _files_of(self, source: str) -> str:
        names = sorted(self._context(source))
        if not names:
            raise self._refused(f"{source}: there is no such file in {self._directory}")
        tar = self._tars / f"{uuid.uuid4()}.tar"
        sha256 = tar_of_context(self._directory, names, tar)
        self._done.files[sha256] = tar.rename(self._tars / f"{sha256}.tar")
        return sha256

    def _context(self, source: str) -> Iterator[str]:
        """Yield the files below the context that a source means, without the ignored ones."""
        wanted = source.strip("/")
        if ".." in Path(wanted).parts:
            raise self._refused(f"{source} is outside of the context {self._directory}")
        if wanted in ("", "."):
            yield from self._not_ignored()
            return
        roots = {str(path.relative_to(self._directory)) for path in self._directory.glob(wanted)}
        for name in self._not_ignored():
            if any(name == root or name.startswith(f"{root}/") for root in roots):
                yield name

    def _not_ignored(self) -> list[str]:
        try:
            lines = (self._directory / ".dockerignore").read_text().splitlines()
        except OSError:
            lines = []
        patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        found: set[str] = exclude_paths(str(self._directory), patterns)
        return [name for name in found if name]

    def _take_entrypoint(self, value: str) -> None:
        self._state.entrypoint = _exec_form(value) or value
        self._state.command = None  # as Docker: it belonged to the base's ENTRYPOINT

    def _take_cmd(self, value: str) -> None:
        self._state.command = _exec_form(value) or value

    def _start_command(self) -> str:
        entrypoint, command = self._state.entrypoint, self._state.command
        if isinstance(entrypoint, str):
            return entrypoint
        if isinstance(entrypoint, list):
            rest = command if isinstance(command, list) else []
            if isinstance(command, str):
                rest = ["/bin/sh", "-c", command]
            return f"exec {shlex.join([*entrypoint, *rest])}"
        if isinstance(command, list):
            return f"exec {shlex.join(command)}"
        return command or ""


def _exec_form(value: str) -> list[str] | None:
    """Return the words of `["…", "…"]`, or None when it is shell text."""
    if not value.lstrip().startswith("["):
        return None
    try:
        words = json.loads(value)
    except ValueError:
        return None
    is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return words if is_list and words else None
