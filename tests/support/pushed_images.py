"""What an image in a registry is, read from the registry alone: its config and its files."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import requests

from activities.contract.image_reference import ImageReference

MANIFESTS = ", ".join(
    (
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
    )
)
DELETED = ".wh."
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Node:
    """A name in an image's file system."""

    kind: bytes
    content: bytes
    """A file's content, or where a link points to."""
    mode: int
    owner: tuple[int, int]


class StoredImage:
    """An image in a registry that speaks plain HTTP and wants no login."""

    def __init__(self, reference: str) -> None:
        parsed = ImageReference.parse(reference)
        self._base = f"http://{parsed.registry}/v2/{parsed.repository}"
        answer = requests.get(
            f"{self._base}/manifests/{parsed.version}", headers={"Accept": MANIFESTS}, timeout=10
        )
        answer.raise_for_status()
        self._manifest = answer.json()
        self.config: dict[str, Any] = json.loads(self._blob(self._manifest["config"]))["config"]

    def _blob(self, descriptor: dict[str, Any]) -> bytes:
        answer = requests.get(f"{self._base}/blobs/{descriptor['digest']}", timeout=60)
        answer.raise_for_status()
        return answer.content

    def environment(self) -> dict[str, str]:
        """Return the image's ENV."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    def nodes(self) -> dict[str, Node]:
        """Return what its layers make of each other, by path without the leading slash."""
        found: dict[str, Node] = {}
        for descriptor in self._manifest["layers"]:
            packed = self._blob(descriptor)
            layer = gzip.decompress(packed) if packed.startswith(GZIP) else packed
            with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
                for member in archive:
                    _apply(found, archive, member)
        return found

    def files(self) -> dict[str, bytes]:
        """Return the contents of its regular files."""
        return {
            path: node.content
            for path, node in self.nodes().items()
            if node.kind == tarfile.REGTYPE
        }


def _apply(found: dict[str, Node], archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.name.startswith(DELETED):
        gone = str(path.with_name(path.name.removeprefix(DELETED)))
        for name in [name for name in found if name == gone or name.startswith(f"{gone}/")]:
            del found[name]
        return
    file = archive.extractfile(member) if member.isreg() else None
    content = file.read() if file else member.linkname.encode()
    found[str(path)] = Node(member.type, content, member.mode, (member.uid, member.gid))


def tags_of(registry: str, repository: str) -> list[str]:
    """Return the tags of a repository; of one that is not there, too."""
    answer = requests.get(f"http://{registry}/v2/{repository}/tags/list", timeout=10)
    return list(answer.json().get("tags") or ()) if answer.ok else []
