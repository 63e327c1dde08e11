"""Random file trees go into an ext4 and come out the same."""

from __future__ import annotations

import asyncio
import os
import shutil
import tarfile
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import workbench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.file_trees import difference, tree_of_ext4, tree_of_image

pytestmark = pytest.mark.counts_host

EXAMPLES = 15
# Of `trusted` and `security` only capabilities are kept: what copies has no right to set others.
XATTR_NAMES = ("user.a", "user.colour", "user.ünïcode")


@dataclass(frozen=True)
class Node:
    """An entry to be; `choice` picks a parent or a link's target among what is there."""

    kind: str
    name: bytes
    mode: int
    uid: int
    gid: int
    mtime: str
    content: bytes
    choice: int
    xattrs: dict[str, str] = field(default_factory=dict)


def _is_a_name(name: bytes) -> bool:
    return name not in (b".", b"..") and not name.startswith(b".wh.")


names = st.binary(min_size=1, max_size=60).map(
    lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"0")
)
contents = st.one_of(
    st.just(b""),
    st.binary(max_size=200),
    st.tuples(st.integers(0, 40_000), st.binary(min_size=1, max_size=20)).map(
        lambda parts: bytes(parts[0]) + parts[1]
    ),
)
seconds = st.integers(0, 2**33)
nodes = st.builds(
    Node,
    kind=st.sampled_from(("file", "directory", "symlink", "hard link", "fifo", "device")),
    name=names.filter(_is_a_name),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    mtime=st.tuples(seconds, st.integers(0, 999_999_999)).map(
        lambda parts: f"{parts[0]}.{parts[1]:09}"
    ),
    content=contents,
    choice=st.integers(0, 1000),
    xattrs=st.dictionaries(
        st.sampled_from(XATTR_NAMES),
        st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=80),
        max_size=2,
    ),
)


def layer_of(entries: list[Node]) -> Layer:
    """Put the entries under directories that are there, each name once."""
    layer, directories, taken = Layer(), [b""], {b".template"}
    files: list[bytes] = []
    for node in entries:
        parent = directories[node.choice % len(directories)]
        path = parent + b"/" + node.name if parent else node.name
        if path in taken or len(path) > 3000:
            continue
        taken.add(path)
        name = os.fsdecode(path)
        shared = {"mode": node.mode, "uid": node.uid, "gid": node.gid, "mtime": node.mtime}
        if node.kind == "directory":
            layer.add(name, kind=tarfile.DIRTYPE, **shared)  # type: ignore[arg-type] # one type for all four
            directories.append(path)
        elif node.kind == "symlink":
            target = os.fsdecode(node.content.replace(b"\0", b"0")[:500] or b"nowhere")
            layer.symlink(name, target, uid=node.uid, gid=node.gid, mtime=node.mtime)
        elif node.kind == "hard link" and files:
            layer.hard_link(name, os.fsdecode(files[node.choice % len(files)]))
        elif node.kind == "fifo":
            layer.add(name, kind=tarfile.FIFOTYPE, **shared)  # type: ignore[arg-type] # one type for all four
        elif node.kind == "device":
            device = (node.choice % 200 + 1, node.choice % 256)
            layer.add(name, kind=tarfile.CHRTYPE, device=device, **shared)  # type: ignore[arg-type] # one type for all four
        else:
            layer.add(name, node.content, xattrs=node.xattrs, **shared)  # type: ignore[arg-type] # one type for all four
            files.append(path)
    return layer


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layers=st.lists(st.lists(nodes, max_size=25), min_size=1, max_size=3))
def test_any_tree_is_kept(layers: list[list[Node]], registry: Registry) -> None:
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(_keeps(layers, registry, Path(place)))


async def _keeps(layers: list[list[Node]], registry: Registry, place: Path) -> None:
    name = f"random-{uuid.uuid4().hex[:12]}"
    registry.push(name, [layer_of(entries).tar() for entries in layers])
    host = workbench(place / "data")
    image = await host.pull(f"{registry.address}/{name}")
    try:
        rootfs = await host.build_rootfs(image)
        expected = tree_of_image(host.client, image.image_id, place / "image")
        assert difference(expected, tree_of_ext4(rootfs, place / "ext4")) == {}
    finally:
        host.remove_images()
        shutil.rmtree(host.settings.data_dir, ignore_errors=True)
