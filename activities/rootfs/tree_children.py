"""What is asked of a tenant's tree, by a child process that does it (`tree_work`)."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from activities.rootfs.image_look import Look
from activities.rootfs.tree_work import FillTask, SurveyTask

SOURCE = Path(__file__).resolve().parents[2]
MAX_ANSWER_BYTES = 8 * 1024 * 1024
# Which setting is behind a limit, and what the limit is called to people.
SETTINGS = {
    "entries": "TEMPLATE_MANAGER_MAX_IMAGE_ENTRIES",
    "path_bytes": "TEMPLATE_MANAGER_MAX_IMAGE_PATH_BYTES",
    "memory": "TEMPLATE_MANAGER_TREE_MEMORY_MB",
}


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
        return Survey.model_validate_json(self._ask("survey", task, READS_ANY))

    def look(
        self, root: Path, config: ImageConfig, command: Sequence[str] = (), path: str = ""
    ) -> Look:
        """Look at a tree that has been measured; raises as `survey`."""
        task = self._survey_task(root, config, command, path)
        return Looked.model_validate_json(self._ask("look", task, READS_ANY)).look

    def fill(self, root: Path, staged: Path) -> list[str]:
        """Put what all guests of an image need, staged, into its root file system.

        Returns the paths that were added. Raises ProvisioningError, HostDiskFullError and
        FilesystemToolError.
        """
        task = self._fill_task(root, staged, "/")
        return Filled.model_validate_json(self._ask("fill", task, MAKES_ANY)).added

    def finish(self, root: Path, staged: Path, workdir: str) -> list[str]:
        """Add what a request gives, staged, to what `fill` has filled; otherwise as `fill`."""
        task = self._fill_task(root, staged, workdir)
        return Filled.model_validate_json(self._ask("finish", task, MAKES_ANY)).added

    def _survey_task(
        self, root: Path, config: ImageConfig, command: Sequence[str], path: str
    ) -> SurveyTask:
        return SurveyTask(
            root=str(root),
            user=config.user,
            workdir=config.working_dir or "/",
            command=command,
            path=path,
            max_entries=self.settings.max_image_entries,
            max_path_bytes=self.settings.max_image_path_bytes,
        )

    def _fill_task(self, root: Path, staged: Path, workdir: str) -> FillTask:
        return FillTask(
            root=str(root),
            staged=str(staged),
            workdir=workdir,
            dns_server=self.settings.dns_server,
        )

    def _ask(self, what: str, task: Mapping[str, object], capabilities: tuple[str, ...]) -> bytes:
        command = [sys.executable, "-P", "-B", "-m", "activities.rootfs.tree_work", what]
        limits = ChildLimits(seconds=self.seconds, memory_mb=self.settings.tree_memory_mb)
        with tempfile.TemporaryFile() as asked:
            asked.write(json.dumps(task).encode())
            asked.seek(0)
            try:
                end = run_limited(
                    command,
                    limits,
                    self.check,
                    capabilities=capabilities,
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
