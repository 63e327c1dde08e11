"""The program that fills a root file system with what is ours (`tree_program`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from activities.disk.tenant_tree import TenantTree
from activities.rootfs import tree_program
from activities.rootfs.guest_root import add_request, add_to_root


class FillTask(TypedDict):
    """What `fill` and `finish` are asked: to put what is in `staged` into the tree `root`."""

    root: str
    staged: str
    workdir: str
    """Of `finish`."""
    dns_server: str
    """Of `fill`."""


def fill(task: FillTask) -> Mapping[str, object]:
    """Return what was added to the tree of an image."""
    with TenantTree(Path(task["root"])) as tree:
        return {"added": add_to_root(tree, Path(task["staged"]), task["dns_server"])}


def finish(task: FillTask) -> Mapping[str, object]:
    """Return what was added to a tree that `fill` has filled."""
    with TenantTree(Path(task["root"])) as tree:
        return {"added": add_request(tree, Path(task["staged"]), task["workdir"])}


if __name__ == "__main__":
    tree_program.run({"fill": fill, "finish": finish})
