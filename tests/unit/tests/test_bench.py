from __future__ import annotations

import os
import shutil
from pathlib import Path

from bench import Measured, lost

from tests.support.file_trees import read_tree


def test_a_peer_is_marked_with_what_its_copy_has_lost(tmp_path: Path) -> None:
    image, copy = tmp_path / "image", tmp_path / "copy"
    (image / "d").mkdir(parents=True)
    (image / "d" / "f").write_text("f")
    os.utime(image / "d" / "f", ns=(1, 1_000_000_001))
    shutil.copytree(image, copy)
    os.utime(copy, ns=(0, image.stat().st_mtime_ns))
    assert lost(read_tree(image), read_tree(copy)) == set()

    os.utime(copy / "d" / "f", ns=(1, 1_000_000_000))  # as mke2fs -d of 1.47.0
    assert lost(read_tree(image), read_tree(copy)) == {"mtime_ns"}

    (copy / "more").touch()
    os.utime(copy, ns=(0, image.stat().st_mtime_ns))
    marked = lost(read_tree(image), read_tree(copy))
    assert str(Measured.of([Measured(0.25, 1), Measured(0.25, 2, marked)])) == (
        "0.25 (−mtime_ns, names)"
    )
