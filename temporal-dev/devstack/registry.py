"""Real images for tests and the bench, made here layer by layer, in a registry of their own."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from devstack.ports import free_port

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
BUSYBOX = Path("/bin/busybox")


class Layer:
    """One layer, as a tar in PAX form; entries come in the order in which they are added."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(  # noqa: SIM115 # it lives as long as the layer
            fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT
        )

    def add(
        self,
        name: str,
        content: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        uid: int = 0,
        gid: int = 0,
        mtime: str = "1700000000.123456789",
        link: str = "",
        device: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, str] | None = None,
    ) -> Layer:
        """Add an entry. `mtime` is decimal text: a float would lose nanoseconds."""
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.uid, entry.gid = kind, mode, uid, gid
        entry.linkname = link
        entry.devmajor, entry.devminor = device
        entry.size = len(content)
        entry.pax_headers = {"mtime": mtime}
        entry.pax_headers |= {f"SCHILY.xattr.{k}": v for k, v in (xattrs or {}).items()}
        self._tar.addfile(entry, io.BytesIO(content) if content else None)
        return self

    def directory(self, name: str, mode: int = 0o755, **more: Any) -> Layer:
        """Add a directory."""
        return self.add(name, kind=tarfile.DIRTYPE, mode=mode, **more)

    def symlink(self, name: str, target: str, **more: Any) -> Layer:
        """Add a symbolic link."""
        return self.add(name, kind=tarfile.SYMTYPE, link=target, mode=0o777, **more)

    def hard_link(self, name: str, target: str, **more: Any) -> Layer:
        """Add a hard link to an entry that is there."""
        return self.add(name, kind=tarfile.LNKTYPE, link=target, **more)

    def busybox(self, name: str = "bin/busybox") -> Layer:
        """Add the static busybox."""
        return self.add(name, BUSYBOX.read_bytes(), mode=0o755)

    def tar(self) -> bytes:
        """Return the tar."""
        self._tar.close()
        return self._buffer.getvalue()


@dataclass
class Registry:
    """A docker-registry on a free port of this machine."""

    address: str
    log: Path
    directory: Path
    login: tuple[str, str] | None = None

    def push(
        self,
        name: str,
        layers: Sequence[bytes],
        *,
        tag: str = "latest",
        architecture: str = "amd64",
        config: Mapping[str, Any] | None = None,
    ) -> str:
        """Put an image of these layers (tars) there; return its manifest's digest."""
        packed = [gzip.compress(layer, 1, mtime=0) for layer in layers]
        image = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            "history": [{"created_by": "test"} for _ in layers],
        }
        body = json.dumps(image).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._blob(name, body, CONFIG),
            "layers": [self._blob(name, layer, LAYER) for layer in packed],
        }
        return self.put_manifest(name, tag, manifest)

    def put_manifest(self, name: str, tag: str, manifest: Mapping[str, Any]) -> str:
        """Put a manifest or index under a tag; return its digest."""
        body = json.dumps(manifest).encode()
        answer = requests.put(
            f"http://{self.address}/v2/{name}/manifests/{tag}",
            data=body,
            headers={"Content-Type": manifest["mediaType"]},
            timeout=10,
            auth=self.login,
        )
        answer.raise_for_status()
        return _digest(body)

    def damage_layer(self, name: str, digest: str) -> None:
        """Flip bytes in the stored blob of an image's first layer."""
        url = f"http://{self.address}/v2/{name}/manifests/{digest}"
        manifest = requests.get(
            url, headers={"Accept": MANIFEST}, timeout=10, auth=self.login
        ).json()
        blob = manifest["layers"][0]["digest"].removeprefix("sha256:")
        stored = self.directory / "blobs/docker/registry/v2/blobs/sha256" / blob[:2] / blob / "data"
        content = bytearray(stored.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 16] = bytes(byte ^ 0xFF for byte in content[middle : middle + 16])
        stored.write_bytes(content)

    def push_index(self, name: str, digests: Mapping[str, str], tag: str = "latest") -> str:
        """Put an index over manifests (architecture to digest) under a tag."""
        entries = [
            {
                "mediaType": MANIFEST,
                "digest": digest,
                "size": self._size(name, digest),
                "platform": {"os": "linux", "architecture": architecture},
            }
            for architecture, digest in digests.items()
        ]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
        return self.put_manifest(name, tag, index)

    def _size(self, name: str, digest: str) -> int:
        url = f"http://{self.address}/v2/{name}/manifests/{digest}"
        answer = requests.head(url, headers={"Accept": MANIFEST}, timeout=10, auth=self.login)
        return int(answer.headers["Content-Length"])

    def _blob(self, name: str, content: bytes, kind: str) -> dict[str, Any]:
        digest = _digest(content)
        url = f"http://{self.address}/v2/{name}/blobs/"
        if requests.head(url + digest, timeout=10, auth=self.login).status_code != 200:
            session = requests.post(url + "uploads/", timeout=10, auth=self.login)
            place = session.headers["Location"]
            requests.put(
                place, params={"digest": digest}, data=content, timeout=60, auth=self.login
            ).raise_for_status()
        return {"mediaType": kind, "digest": digest, "size": len(content)}


@contextmanager
def running_registry(directory: Path, *, htpasswd: str = "") -> Iterator[Registry]:
    """Run a registry with deletion enabled; with `htpasswd` (file content) it wants a login."""
    port = free_port()
    settings: dict[str, Any] = {
        "version": "0.1",
        "storage": {
            "filesystem": {"rootdirectory": str(directory / "blobs")},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"127.0.0.1:{port}"},
        "log": {"level": "error"},
    }
    if htpasswd:
        (directory / "htpasswd").write_text(htpasswd)
        settings["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    (directory / "registry.json").write_text(json.dumps(settings))
    log = directory / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "registry.json")],
            stdout=output,
            stderr=output,
        )
    try:
        _wait_for(port)
        yield Registry(f"127.0.0.1:{port}", log, directory)
    finally:
        process.terminate()
        process.wait(10)


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        with contextlib.suppress(OSError):
            connection.request("GET", "/v2/")
            connection.getresponse()
            return
        time.sleep(0.05)
    raise AssertionError("the registry does not answer")
