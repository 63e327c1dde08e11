"""A registry on loopback for one pull: dockerd takes an image from us, and calls nobody else.

It has one image, whose layers are not packed: their digests are those that the image's config has.
What dockerd asks for is fetched from the real registry by `RegistryConversation`, and passed on as
soon as `required_layer` has looked at it. Nothing is kept. So dockerd, which has programs unpack as
root (xz, pigz), is given nothing to unpack, and layers may be packed in ways that it does not know.

Two pulls that want the same layer at the same time share what dockerd gets of one relay. So what
dockerd says of a layer may be of another image's registry: it is this image's fault only when this
relay says so, too.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import secrets
import threading
from collections.abc import Iterable
from http import HTTPStatus

from activities.contract.errors import TemplateManagerError
from activities.image.layer_check import ImageBudget, required_layer
from activities.image.manifests import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST
from activities.image.registry import Credentials, RegistryConversation, RemoteImage

PATH = re.compile(r"/v2/.+/(manifests|blobs)/(sha256:[0-9a-f]{64})")
USER = "template-manager"
BLOB = "application/octet-stream"


class ImageRelay:
    """Serves one image to this host's dockerd for the length of a block."""

    def __init__(
        self, remote: RemoteImage, registry: RegistryConversation, budget: ImageBudget
    ) -> None:
        self._remote = remote
        self._registry = registry
        self._budget = budget
        self._manifest = unpacked_manifest(remote)
        self._packed = {layer.diff_id: layer.digest for layer in remote.layers}
        self.login = Credentials(USER, secrets.token_urlsafe(32))
        self.error: TemplateManagerError | None = None
        """Why dockerd did not get what it has asked for: the first reason."""
        self.passed: set[tuple[str, str]] = set()
        """The layers that dockerd has been given whole: packed and unpacked digest."""
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    def __enter__(self) -> ImageRelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def name(self) -> str:
        """The image's name without a version, as dockerd is to know it for now."""
        return f"127.0.0.1:{self._server.server_port}/{self._remote.reference.repository}"

    @property
    def digest(self) -> str:
        """What dockerd is to ask for: the digest of the image's manifest as it is here."""
        return f"sha256:{hashlib.sha256(self._manifest).hexdigest()}"

    @property
    def fetched_bytes(self) -> int:
        """How many bytes of layers the registry has sent."""
        return self._budget.fetched_bytes

    def answer(self, request: _Handler, kind: str, digest: str) -> None:
        """Answer a request for a manifest or blob."""
        if kind == "manifests" and digest == self.digest:
            request.answer(DOCKER_MANIFEST, self._manifest)
        elif kind == "blobs" and digest == self._remote.config_digest:
            request.answer(BLOB, self._registry.config(digest))
        elif kind == "blobs" and digest in self._packed:
            self._pass(request, digest)
        else:
            request.send_error(HTTPStatus.NOT_FOUND)

    def _pass(self, request: _Handler, diff_id: str) -> None:
        image, digest = str(self._remote.reference), self._packed[diff_id]
        parts = self._registry.blob(digest)
        request.stream(required_layer(image, digest, diff_id, parts, self._budget))
        self.passed.add((digest, diff_id))


def unpacked_manifest(remote: RemoteImage) -> bytes:
    """Return an image's manifest with its layers as they are unpacked, in Docker's own form.

    How long they are then is not known, and not asked.
    """
    digests = [layer.diff_id for layer in remote.layers]
    layers = [{"mediaType": DOCKER_LAYER, "digest": digest, "size": 0} for digest in digests]
    config = {
        "mediaType": DOCKER_CONFIG,
        "digest": remote.config_digest,
        "size": remote.config_bytes,
    }
    told = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": layers}
    return json.dumps(told).encode()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, relay: ImageRelay) -> None:
        self.relay = relay
        token = f"{relay.login.username}:{relay.login.password}".encode()
        self.authorization = f"Basic {base64.b64encode(token).decode()}"
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: dockerd went away, or the relay has told why it had to break off."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = 60

    def do_GET(self) -> None:
        """Answer dockerd, and nobody else."""
        if not secrets.compare_digest(
            self.headers.get("Authorization", "").encode(), self.server.authorization.encode()
        ):
            self.send_response(HTTPStatus.UNAUTHORIZED)
            self.send_header("WWW-Authenticate", 'Basic realm="template-manager"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif found := PATH.fullmatch(self.path):
            self._answer(found[1], found[2])
        else:
            self.answer("application/json", b"{}")

    def _answer(self, kind: str, digest: str) -> None:
        relay = self.server.relay
        try:
            relay.answer(self, kind, digest)
        except TemplateManagerError as error:
            relay.error = relay.error or error
            self.close_connection = True
            raise

    def answer(self, content_type: str, body: bytes) -> None:
        """Answer with all of a small body."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, parts: Iterable[bytes]) -> None:
        """Answer with a layer as it comes; it ends where the connection does."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", BLOB)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
