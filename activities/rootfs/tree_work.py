"""The program that looks into an image's tree, and the one that fills a root file system.

A child of the host's worker (`limited_child`), so that what a tenant's tree makes it do ends with
it. Each piece of WORK takes one JSON document on standard input and gives one on standard output:
the answer, or `{"refused": {…}}` with what is wrong with the tree. Imports nothing heavy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from activities.disk.tenant_tree import TenantTree
from activities.disk.tree_content import TreeLimitError, TreeLimits, measure
from activities.rootfs.guest_root import WorkdirError, add_request, add_to_root
from activities.rootfs.image_look import LookError, look_at


class SurveyTask(TypedDict):
    """What `survey` is asked: about an image's tree and its config."""

    root: str
    user: str
    workdir: str
    command: Sequence[str]
    path: str
    max_entries: int
    max_path_bytes: int


class FillTask(TypedDict):
    """What `fill` and `finish` are asked: to put what is in `staged` into the tree `root`."""

    root: str
    staged: str
    workdir: str
    """Of `finish`."""
    dns_server: str
    """Of `fill`."""


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


def fill(task: FillTask) -> Mapping[str, object]:
    """Return what was added to the tree of an image."""
    with TenantTree(Path(task["root"])) as tree:
        return {"added": add_to_root(tree, Path(task["staged"]), task["dns_server"])}


def finish(task: FillTask) -> Mapping[str, object]:
    """Return what was added to a tree that `fill` has filled."""
    with TenantTree(Path(task["root"])) as tree:
        return {"added": add_request(tree, Path(task["staged"]), task["workdir"])}


WORK: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "survey": survey,
    "look": look,
    "fill": fill,
    "finish": finish,
}


def main(what: str) -> Mapping[str, object]:
    """Do it; what is wrong with the tree is an answer too."""
    try:
        return WORK[what](json.load(sys.stdin))
    except TreeLimitError as error:
        return {"refused": {"why": str(error), "limit": error.limit}}
    except (LookError, WorkdirError) as error:
        return {"refused": {"why": str(error)}}
    except MemoryError:
        return {"refused": {"why": "looking at it takes more memory", "limit": "memory"}}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))
