"""The program that looks into an image's tree and measures it (`tree_program`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from activities.disk.tenant_tree import TenantTree
from activities.disk.tree_content import TreeLimits, measure
from activities.rootfs import tree_program
from activities.rootfs.image_look import look_at


class SurveyTask(TypedDict):
    """What `survey` is asked: about an image's tree and its config."""

    root: str
    user: str
    workdir: str
    command: Sequence[str]
    path: str
    max_entries: int
    max_path_bytes: int


def survey(task: SurveyTask) -> Mapping[str, object]:
    """Return what is in the tree (`look`), and how much (`content`)."""
    limits = TreeLimits(task["max_entries"], task["max_path_bytes"])
    content = measure(Path(task["root"]), limits)
    return {**look(task), "content": asdict(content)}


def look(task: SurveyTask) -> Mapping[str, object]:
    """Return what is in the tree (`look`)."""
    with TenantTree(Path(task["root"])) as tree:
        found = look_at(tree, task["user"], task["workdir"], task["command"], task["path"])
    return {"look": asdict(found)}


if __name__ == "__main__":
    tree_program.run({"survey": survey, "look": look})
