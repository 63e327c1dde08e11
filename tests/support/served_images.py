"""A registry made by hand: it serves what a real one would not take."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from devstack.registry import CONFIG, INDEX, LAYER, MANIFEST, Layer

from tests.support.local_http import QuietHandler, serving

Json = Mapping[str, object]
MIB = 1024 * 1024
HELD_SECONDS = 60.0


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def packed(tar: bytes) -> bytes:
    """Return a layer as registries mostly have it."""
    return gzip.compress(tar, 1, mtime=0)


@dataclass
class ServedImages:
    """Manifests and blobs under one repository's name; whatever has its digest is served."""

    contents: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Media type and content by tag or digest."""
    address: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path's end and User-Agent of each request."""
    paths: list[str] = field(default_factory=list)
    """The whole path of each request."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Where blobs are instead, by digest."""
    dripping: set[str] = field(default_factory=set)
    """Digests of blobs that are sent byte by byte."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """Digests of blobs that are not sent before that."""
    breaks: dict[str, int] = field(default_factory=dict)
    """How often a blob's connection still breaks, a MiB after it began."""
    ranges: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Which parts have been asked for, by digest."""

    def put(self, content: bytes, kind: str, tag: str = "") -> Json:
        """Serve this under its digest, and a tag; returns its descriptor."""
        digest = digest_of(content)
        for name in (digest, tag):
            if name:
                self.contents[name] = (kind, content)
        return {"mediaType": kind, "digest": digest, "size": len(content)}

    def document(self, fields: Json, tag: str = "") -> Json:
        """Serve a manifest or index; returns its descriptor."""
        return self.put(json.dumps(fields).encode(), str(fields["mediaType"]), tag)

    def image(
        self,
        tag: str,
        layers: Sequence[bytes] | None = None,
        *,
        types: tuple[str, str, str] = (MANIFEST, CONFIG, LAYER),
        pack: Callable[[bytes], bytes] = packed,
        **config: object,
    ) -> Json:
        """Serve an image of these layers (tars); `config` replaces fields, None leaves them out.

        `types` are of manifest, config and layers. By default it has one layer, with its tag in
        it, so that no two are alike.
        """
        if layers is None:
            layers = [Layer().directory("etc").add("etc/name", tag.encode()).tar()]
        manifest_type, config_type, layer_type = types
        fields: dict[str, object] = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": [f"TAG={tag}"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
            "history": [{"created_by": "test"} for _ in layers],
            **config,
        }
        told = {name: value for name, value in fields.items() if value is not None}
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self.put(json.dumps(told).encode(), config_type),
            "layers": [self.put(pack(layer), layer_type) for layer in layers],
        }
        return self.document(manifest, tag)

    def index(self, tag: str, *entries: Json, kind: str = INDEX) -> Json:
        """Serve an index over these."""
        fields = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
        return self.document(fields, tag)

    def image_id(self, tag: str) -> str:
        """Return the id that Docker gives to an image that is served."""
        manifest = json.loads(self.contents[tag][1])
        return str(manifest["config"]["digest"])

    def layers(self, tag: str) -> list[str]:
        """Return the digests of an image's layers."""
        manifest = json.loads(self.contents[tag][1])
        return [layer["digest"] for layer in manifest["layers"]]

    def times_fetched(self, digest: str) -> int:
        """Return how often a blob has been fetched, not only asked about."""
        return sum(method == "GET" and name == digest for method, name, _ in self.asked)

    def reference(self, tag: str) -> str:
        return f"{self.address}/odd:{tag}"


@contextmanager
def serving_images() -> Iterator[ServedImages]:
    """Serve for the length of a block."""
    images = ServedImages()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            images.asked.append((self.command, name, self.headers.get("User-Agent", "")))
            images.paths.append(self.path)
            images.ranges[name].append(self.headers.get("Range", ""))
            if name in images.held:
                images.held[name].wait(HELD_SECONDS)
            if name in ("", "v2"):
                self.answer(200, b"{}")
            elif name in images.redirects:
                self.answer(307, b"", Location=images.redirects[name])
            elif name in images.dripping or name in images.breaks:
                with contextlib.suppress(ConnectionError):
                    self.send_badly(name, images.contents[name][1])
            elif name in images.contents:
                kind, content = images.contents[name]
                headers = {"Content_Type": kind, "Docker_Content_Digest": digest_of(content)}
                self.answer(200, content, **headers)
            else:
                self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}')

        def send_badly(self, name: str, content: bytes) -> None:
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=")[:-1])
            self.send_response(206 if begin else 200)
            if begin:
                told = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", told)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            if name in images.dripping:
                for at in range(len(content)):
                    self.wfile.write(content[at : at + 1])
                    time.sleep(1)
            images.breaks[name] -= 1
            last = begin + MIB if images.breaks[name] >= 0 else len(content)
            self.wfile.write(content[begin:last])
            self.close_connection = True

        do_HEAD = do_GET

    with serving(Handler) as images.address:
        yield images
