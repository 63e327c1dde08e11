"""What is asked of a tenant's tree, by child processes that do it (`tree_program`)."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from activities.contract.errors import (
    FilesystemToolError,
    HostDiskFullError,
    ImageBeyondLimitError,
    ProvisioningError,
)
from activities.contract.model import Model
from activities.contract.results import ImageConfig
from activities.disk.limited_child import (
    MAKES_ANY,
    READS_ANY,
    ChildEnd,
    ChildLimits,
    ChildTimeoutError,
    run_limited,
)
from activities.disk.tree_content import Content
from activities.process.settings import Settings
from activities.rootfs import tree_fill, tree_look
from activities.rootfs.image_look import Look

SOURCE = Path(__file__).resolve().parents[2]
MAX_ANSWER_BYTES = 8 * 1024 * 1024
# Which setting is behind a limit, and what the limit is called to people.
SETTINGS = {
    "entries": "TEMPLATE_MANAGER_MAX_IMAGE_ENTRIES",
    "path_bytes": "TEMPLATE_MANAGER_MAX_IMAGE_PATH_BYTES",
    "memory": "TEMPLATE_MANAGER_TREE_MEMORY_MB",
}


class Program(NamedTuple):
    """A program of ours that works on trees, and what it may do."""

    module: str
    capabilities: tuple[str, ...]


LOOKS = Program(tree_look.__name__, READS_ANY)
FILLS = Program(tree_fill.__name__, MAKES_ANY)


class Refused(Model):
    """Why a tree is not taken."""

    why: str
    limit: str = ""


class Looked(Model):
    """What is in an image's tree."""

    look: Look


class Survey(Looked):
    """What is in an image's tree, and how much."""

    content: Content


class Filled(Model):
    """What was added to a root file system."""

    added: list[str]


class _Answer(Model):
    refused: Refused | None = None


@dataclass(frozen=True)
class TreeChildren:
    """Starts the children of one build's step. Call it in the thread that has made the mounts."""

    settings: Settings
    seconds: float
    """How long each may take."""
    check: Callable[[], None]

    def survey(
        self, root: Path, config: ImageConfig, command: Sequence[str] = (), path: str = ""
    ) -> Survey:
        """Look at an image's tree, and measure it. `command` is found by the PATH `path`.

        Raises ImageBeyondLimitError, ProvisioningError with what the image lacks or when it takes
        too long, and FilesystemToolError.
        """
        task = self._survey_task(root, config, command, path)
        return Survey.model_validate_json(self._ask(LOOKS, "survey", task))

    def look(
        self, root: Path, config: ImageConfig, command: Sequence[str] = (), path: str = ""
    ) -> Look:
        """Look at a tree that has been measured; raises as `survey`."""
        task = self._survey_task(root, config, command, path)
        return Looked.model_validate_json(self._ask(LOOKS, "look", task)).look

    def fill(self, root: Path, staged: Path) -> list[str]:
        """Put what all guests of an image need, staged, into its root file system.

        Returns the paths that were added. Raises ProvisioningError, HostDiskFullError and
        FilesystemToolError.
        """
        task = self._fill_task(root, staged, "/")
        return Filled.model_validate_json(self._ask(FILLS, "fill", task)).added

    def finish(self, root: Path, staged: Path, workdir: str) -> list[str]:
        """Add what a request gives, staged, to what `fill` has filled; otherwise as `fill`."""
        task = self._fill_task(root, staged, workdir)
        return Filled.model_validate_json(self._ask(FILLS, "finish", task)).added

    def _survey_task(
        self, root: Path, config: ImageConfig, command: Sequence[str], path: str
    ) -> tree_look.SurveyTask:
        return tree_look.SurveyTask(
            root=str(root),
            user=config.user,
            workdir=config.working_dir or "/",
            command=command,
            path=path,
            max_entries=self.settings.max_image_entries,
            max_path_bytes=self.settings.max_image_path_bytes,
        )

    def _fill_task(self, root: Path, staged: Path, workdir: str) -> tree_fill.FillTask:
        return tree_fill.FillTask(
            root=str(root),
            staged=str(staged),
            workdir=workdir,
            dns_server=self.settings.dns_server,
        )

    def _ask(self, program: Program, what: str, task: Mapping[str, object]) -> bytes:
        command = [sys.executable, "-S", "-P", "-B", "-m", program.module, what]
        limits = ChildLimits(seconds=self.seconds, memory_mb=self.settings.tree_memory_mb)
        with tempfile.TemporaryFile() as asked:
            asked.write(json.dumps(task).encode())
            asked.seek(0)
            try:
                end = run_limited(
                    command,
                    limits,
                    self.check,
                    capabilities=program.capabilities,
                    environment={"PYTHONPATH": str(SOURCE)},
                    stdin=asked,
                    max_output_bytes=MAX_ANSWER_BYTES,
                )
            except ChildTimeoutError as error:
                raise ProvisioningError(f"looking at the image's files: {error}") from None
        return self._answer_of(what, end)

    def _answer_of(self, what: str, end: ChildEnd) -> bytes:
        last = end.last_lines[-1] if end.last_lines else f"exit code {end.code}"
        if end.code != 0:
            kind = HostDiskFullError if "No space left" in last else FilesystemToolError
            raise kind(f"the {what} of the file tree failed: {last}", log_tail=end.last_lines)
        try:
            refused = _Answer.model_validate_json(end.output).refused
        except ValidationError as error:
            raise FilesystemToolError(f"the {what} of the file tree gave no answer") from error
        if refused is None:
            return end.output
        if not refused.limit:
            raise ProvisioningError(refused.why)
        raise ImageBeyondLimitError(
            f"the image is not taken: {self._in_words(refused)} ({SETTINGS[refused.limit]})"
        )

    def _in_words(self, refused: Refused) -> str:
        if refused.limit == "memory":
            return f"{refused.why} than {self.settings.tree_memory_mb} MiB"
        return refused.why
