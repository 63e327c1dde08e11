"""A registry made by hand: it serves what a real one would not take."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from devstack.registry import CONFIG, INDEX, LAYER, MANIFEST, Layer

from tests.support.local_http import QuietHandler, serving

Json = Mapping[str, object]


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

    def reference(self, tag: str) -> str:
        return f"{self.address}/odd:{tag}"


@contextmanager
def serving_images() -> Iterator[ServedImages]:
    """Serve for the length of a block."""
    images = ServedImages()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            if name in ("", "v2"):
                self.answer(200, b"{}")
            elif name in images.contents:
                kind, content = images.contents[name]
                headers = {"Content_Type": kind, "Docker_Content_Digest": digest_of(content)}
                self.answer(200, content, **headers)
            else:
                self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}')

        do_HEAD = do_GET

    with serving(Handler) as images.address:
        yield images
