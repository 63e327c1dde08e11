"""Only `tenant_tree` opens what a tenant has made; every other call by path says what it opens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from devstack.environment import REPOSITORY

ACTIVITIES = REPOSITORY / "activities"
# What opens, lists or changes a file by its path, and what would follow a link to it.
BY_PATH = frozenset(
    {
        *("open", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "truncate"),
        *("mkdir", "makedirs", "rmdir", "unlink", "remove", "rename", "replace", "rmtree"),
        *("symlink_to", "hardlink_to", "symlink", "link", "chmod", "chown", "utime", "mknod"),
        *("iterdir", "glob", "rglob", "scandir", "listdir", "walk", "fwalk"),
        *("copyfile", "copy", "copy2", "copytree", "move", "chroot", "setxattr", "mkfifo"),
    }
)
# Where such a call opens something of ours, and what.
OURS = {
    "rootfs/copying.py::copy_tree": "our file of messages",
    "rootfs/copying.py::_last_lines": "our file of messages",
    "rootfs/guest_files.py::guest_files_sha256": "our scripts, the host's programs",
    "rootfs/guest_files.py::stage_programs": "our directory of staged files",
    "rootfs/guest_files.py::_own_files": "our scripts",
    "rootfs/guest_files.py::write_value": "our directory of staged files",
    "rootfs/guest_files.py::copy_in": "our directory of staged files",
    "rootfs/guest_files.py::_add_applets": "our directory of staged files",
    "rootfs/guest_root.py::_add_staged": "our directory of staged files",
    "rootfs/guest_root.py::add_request": "our directory of staged files",
    "rootfs/rootfs.py::_finish": "our directory of staged files",
    "rootfs/rootfs.py::_make": "our work directory",
    "rootfs/rootfs.py::_flatten": "the lost+found of an ext4 that is empty",
    "rootfs/rootfs.py::image_layers": "dockerd's own names of its layers",
    "rootfs/rootfs.py::_attempts_until": "our work directory",
}


def calls_by_path(path: Path) -> Iterator[str]:
    """Yield the functions of a module that call one of BY_PATH, as `room/module.py::function`."""
    name = f"{path.parent.name}/{path.name}"
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and any(
            isinstance(node, ast.Call) and called(node) in BY_PATH for node in own_nodes(function)
        ):
            yield f"{name}::{function.name}"


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield what is in a function, but not in functions within it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from own_nodes(node)


def called(call: ast.Call) -> str:
    """Return the name of what is called; '' for a method of a TenantTree."""
    match call.func:
        case ast.Name(id="open"):
            return "open"
        case ast.Attribute(value=ast.Name(id="tree")):
            return ""
        case ast.Attribute(attr=name):
            return name
    return ""


def test_nothing_else_opens_what_is_in_a_tenants_tree() -> None:
    found = {call for path in (ACTIVITIES / "rootfs").glob("*.py") for call in calls_by_path(path)}
    assert found == OURS.keys()


def test_a_tenants_tree_is_mounted_in_known_places_only() -> None:
    mounting = {"merged_layers", "mounted_image"}
    found = {
        str(path.relative_to(ACTIVITIES))
        for path in ACTIVITIES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in mounting
    }
    assert found == {"rootfs/rootfs.py"}


def test_a_call_by_path_is_found(tmp_path: Path) -> None:
    module = tmp_path / "bad.py"
    module.write_text("def f(root):\n    with (root / 'etc/hosts').open('w') as file: pass\n")
    assert list(calls_by_path(module)) == [f"{tmp_path.name}/bad.py::f"]
