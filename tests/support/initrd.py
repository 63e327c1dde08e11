"""A guest kernel's first file system, made of a directory."""

from __future__ import annotations

import subprocess
from pathlib import Path


def pack_initrd(tree: Path, initrd: Path) -> None:
    """Write all that is in a directory as a cpio, as kernels unpack it."""
    names = "\0".join(str(path.relative_to(tree)) for path in tree.rglob("*"))
    with initrd.open("wb") as file:
        subprocess.run(
            ["cpio", "--null", "--create", "--format=newc", "--quiet"],
            input=names.encode(),
            cwd=tree,
            stdout=file,
            check=True,
        )
