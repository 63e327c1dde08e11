"""Container images: from a registry to this host's dockerd, at a digest."""

from __future__ import annotations

import base64
import contextlib
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import docker
import docker.errors
import requests
from pydantic import Field
from temporalio import activity

from activities.contract.errors import (
    DockerUnavailableError,
    ImageDamagedError,
    ImageFormatUnsupportedError,
    ImageNotFoundError,
    ImageUnusableError,
    RegistryAuthError,
    RegistryUnavailableError,
)
from activities.contract.image_reference import ImageReference, ImageReferenceError
from activities.contract.inputs import PullImageInput
from activities.contract.interface import ImageActivities
from activities.contract.model import Model
from activities.contract.names import Step, tenant_mark
from activities.contract.registry_logins import Sealed
from activities.contract.results import ImageConfig, PulledImage
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.image.config_size import require_small_config
from activities.image.docker_daemon import (
    ContainerConfig,
    DaemonInfo,
    InspectedImage,
    daemon_info,
    docker_errors,
    error_in_words,
    find_image,
    require_layers_taken,
)
from activities.image.layer_check import ImageBudget, ImageLimits, required_layer
from activities.image.layer_marks import LayerMarks
from activities.image.manifests import LAYER_TYPES, OLD_TYPES, printable
from activities.image.pulled_images import PulledImages
from activities.image.registry import (
    Credentials,
    RegistryAccess,
    RegistryConversation,
    RemoteImage,
    RemoteLayer,
    resolve,
)
from activities.image.registry_login import HostLogins, credentials_for
from activities.image.relay import ImageRelay
from activities.process.sealing import SealedFor, Sealer
from activities.process.settings import Settings
from activities.step.build_log import BuildLog
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.step.vm_requirements import require_parts

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
POLL_SECONDS = 0.2
SHORTEST_SECRET_LINE = 16
# What dockerd says of images that it will never take.
UNUSABLE = (
    "failed to register layer",
    "invalid rootfs",
    "don't match image configuration",
    "in history section",
    "cannot unmarshal",
    "cannot be used on this platform",
)
UNSUPPORTED = ("unsupported media type", "unsupported manifest", "encountered remote")


class DockerImageActivities(ImageActivities):
    """Pulls images with this host's dockerd, which gets every byte from us."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        sealer: Sealer,
        make_docker_client: Callable[[], docker.APIClient],
    ) -> None:
        """`make_docker_client` gives a client of its own to each pull, so that it can be cut."""
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._sealer = sealer
        self._make_docker_client = make_docker_client
        self._pulled = PulledImages(self._data_dir)

    @activity.defn(name="pull_image")
    async def pull_image(self, pull: PullImageInput, /) -> PulledImage:
        """Bring the image to the host and resolve it to a digest."""
        async with running_step(self._settings, self._ledger, pull.scope, Step.PULL) as step:
            return await step.in_thread(self._pull, step, pull)

    def _pull(self, step: RunningStep, pull: PullImageInput) -> PulledImage:
        if pull.shape is not None:
            require_parts(self._settings, pull.shape, step.log)
        try:
            return self._pull_once(step, pull)
        except RegistryAuthError as error:
            if pull.auth is None or not pull.auth.TOKEN_RUNS_OUT:
                raise
            # Its token may have run out on the way.
            step.log.warn(f"{error.message}: logging in again")
            return self._pull_once(step, pull)

    def _pull_once(self, step: RunningStep, pull: PullImageInput) -> PulledImage:
        reference = _reference_of(pull.image)
        credentials = self._credentials(pull, reference, step.log)
        with contextlib.closing(self._make_docker_client()) as client, docker_errors():
            step.progress("asking the registry")
            daemon = daemon_info(client)
            remote = self._resolve(client, daemon, pull.image, credentials, step.check)
            require_taken(remote)
            step.log.info(f"image {reference} is {remote.digest} for linux/{remote.architecture}")
            step.check()
            name = next((name for name in names_here(remote) if find_image(client, name)), None)
            if name is not None:
                step.log.info("the image is on the host already")
                self._pulled.used(name)
            else:
                name = names_here(remote)[0]
                self._fetch(client, daemon, remote, credentials, step, pull.timeout_seconds)
            described = _describe(remote, find_image(client, name))
        return described.model_copy(update={"tenant": pull.scope.tenant if credentials else ""})

    def _fetch(  # noqa: PLR0917 # what a pull needs, in the order in which it is found
        self,
        client: docker.APIClient,
        daemon: DaemonInfo,
        remote: RemoteImage,
        credentials: Credentials | None,
        step: RunningStep,
        timeout_seconds: float,
    ) -> None:
        """Bring the image to dockerd under the first of its names here."""
        limits = ImageLimits.of(self._settings)
        require_size(remote, limits)
        room = Room((daemon.directory,), self._settings.min_free_disk_mb * MIB)
        require_room = partial(room.require, f"pull {remote.reference}")
        # dockerd keeps each layer as it comes until it has made files of it.
        require_room(2 * sum(remote.layer_bytes.values()))
        budget = ImageBudget(str(remote.reference), limits, require_room)
        access = RegistryAccess.of(self._settings, daemon.insecure_registries)
        talk = RegistryConversation(remote.reference, credentials, access, timeout_seconds)
        with (
            talk as registry,
            registry.cut_by(step.check),
            ImageRelay(remote, registry, budget) as relay,
        ):
            temporary = f"{relay.name}@{relay.digest}"
            self._pulled.add(temporary)  # what a crash leaves of it
            try:
                _Pull(client, remote, relay, step, timeout_seconds).run()
                self._require_given(remote, registry, relay.passed, limits)
                self._keep(client, remote)
            finally:
                with contextlib.suppress(DockerUnavailableError):  # then the sweep does it
                    self._pulled.remove_image(client, temporary)

    def _require_given(
        self,
        remote: RemoteImage,
        registry: RegistryConversation,
        passed: set[tuple[str, str]],
        limits: ImageLimits,
    ) -> None:
        """Have the registry show each layer that dockerd has taken from another image.

        dockerd knows layers by what they unpack to, for which it takes the config's word: that a
        layer of the registry does unpack to that is to be shown, too.
        """
        host, marks = remote.reference.registry, LayerMarks(self._data_dir)
        budget = ImageBudget(str(remote.reference), limits)
        for layer in dict.fromkeys(remote.layers):
            pair = (layer.digest, layer.diff_id)
            is_known = pair in passed or (marks.has(host, *pair) and registry.has_blob(pair[0]))
            if not is_known:
                _require_same(remote, layer, registry.blob(layer.digest), budget)
            marks.add(host, *pair)

    def _keep(self, client: docker.APIClient, remote: RemoteImage) -> None:
        _describe(remote, find_image(client, remote.config_digest))  # a refused one is not kept
        name = names_here(remote)[0]
        self._pulled.add(name)
        repository, _, tag = name.rpartition(":")
        client.tag(remote.config_digest, repository, tag)

    def _resolve(
        self,
        client: docker.APIClient,
        daemon: DaemonInfo,
        image: str,
        credentials: Credentials | None,
        check: Callable[[], None],
    ) -> RemoteImage:
        access = RegistryAccess.of(self._settings, daemon.insecure_registries)
        try:
            return resolve(_reference_of(image), host_architecture(), credentials, access, check)
        except ImageNotFoundError as error:
            if not _is_known_to_docker(client, image):
                raise
            raise ImageNotFoundError(
                f"{error.message}; it is only in this host's dockerd",
                hint="Push the image to a registry: hosts take images from registries only.",
            ) from None

    def _credentials(
        self, pull: PullImageInput, reference: ImageReference, log: BuildLog
    ) -> Credentials | None:
        only_for = SealedFor(
            pull.scope.build_id, reference.registry, tenant_mark(pull.scope.tenant)
        )

        def open_secret(sealed: Sealed) -> str:
            secret = self._sealer.open(sealed, only_for)
            _redact(log, secret)
            return secret

        host = HostLogins(self._settings.lends_host_login_to)
        credentials = credentials_for(reference, pull.auth, open_secret, host)
        if credentials:
            _redact(log, credentials.password)
        return credentials


class PullEvent(Model):
    """What dockerd tells while it pulls."""

    layer: str = Field("", alias="id")
    """The short digest of a layer, as it is unpacked, or something else."""
    status: str = ""
    error: str | None = None


class _Pull:
    """One pull by digest, through the relay, that can be stopped at any time."""

    def __init__(
        self,
        client: docker.APIClient,
        remote: RemoteImage,
        relay: ImageRelay,
        step: RunningStep,
        timeout_seconds: float,
    ) -> None:
        self._client = client
        self._remote = remote
        self._relay = relay
        self._step = step
        self._timeout_seconds = timeout_seconds
        self._events: queue.SimpleQueue[PullEvent | Exception | None] = queue.SimpleQueue()
        self._responses: list[requests.Response] = []
        self._there: set[str] = set()
        """Layers that dockerd has already, by their packed digests."""
        client.hooks["response"].append(self._remember)

    def run(self) -> None:
        """Pull. Raises what went wrong; when it must stop, dockerd stops pulling too."""
        total = sum(self._remote.layer_bytes.values())
        count = len(self._remote.layer_bytes)
        self._step.log.info(f"pulling {count} layers, {total / MIB:.1f} MiB")
        reader = threading.Thread(target=self._read, name="pull", daemon=True)
        reader.start()
        try:
            for event in self._until_the_end():
                self._take(event, total)
        finally:
            self._cut()
            reader.join(POLL_SECONDS)

    def _until_the_end(self) -> Iterator[PullEvent]:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            self._step.check()
            if self._relay.error is not None:
                raise self._relay.error
            if time.monotonic() > deadline:
                raise RegistryUnavailableError(
                    f"the pull did not end within {self._timeout_seconds:g} s"
                )
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=POLL_SECONDS)
                if event is None:
                    return
                if isinstance(event, docker.errors.APIError):
                    self._raise_for(str(event.explanation))
                if isinstance(event, Exception):
                    raise event
                yield event

    def _read(self) -> None:
        login = self._relay.login
        auth = {"username": login.username, "password": login.password}
        try:
            for event in self._client.pull(
                self._relay.name,
                tag=self._relay.digest,
                stream=True,
                decode=True,
                auth_config=auth,
            ):
                self._events.put(PullEvent.model_validate(event))
            self._events.put(None)
        except Exception as error:
            self._events.put(error)

    def _take(self, event: PullEvent, total: int) -> None:
        if event.error is not None:
            self._raise_for(event.error)
        if event.status == "Already exists":
            short = f"sha256:{event.layer}"
            layers = self._remote.layers
            self._there |= {one.digest for one in layers if one.diff_id.startswith(short)}
        elif event.status == "Pull complete":
            self._step.log.debug(f"layer {event.layer}: unpacked")
        sizes = self._remote.layer_bytes
        done = self._relay.fetched_bytes + sum(sizes[digest] for digest in self._there)
        self._step.progress("pulling", min(done, total), total, "bytes")

    def _raise_for(self, message: str) -> NoReturn:
        """Give what dockerd says its type; what the relay knows of it comes first."""
        if self._relay.error is not None:
            raise self._relay.error
        plain = message.replace(self._relay.name, self._remote.reference.name)
        _raise_for_message(self._remote.reference, plain)

    def _remember(self, response: requests.Response, *_: object, **__: object) -> None:
        self._responses.append(response)

    def _cut(self) -> None:
        """Close the stream under the reader: dockerd then stops pulling."""
        for response in self._responses:
            with contextlib.suppress(Exception):
                response.raw.shutdown()
            response.close()


def host_architecture() -> str:
    """Return this host's architecture by the name that images use."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)


def names_here(remote: RemoteImage) -> tuple[str, str]:
    """Return what dockerd may know the image by: a tag of ours, or what `docker pull` leaves.

    The latter is what versions up to 0.2 left, and what an operator may have pulled.
    """
    name, digest = remote.reference.name, remote.digest
    return f"{name}:{digest.replace(':', '-')}", remote.reference.at(digest)


def require_size(remote: RemoteImage, limits: ImageLimits) -> None:
    """Refuse an image that says itself that it is too large. Raises ImageBeyondLimitError."""
    ImageBudget(str(remote.reference), limits).packed(sum(remote.layer_bytes.values()))


def _require_same(
    remote: RemoteImage, layer: RemoteLayer, parts: Iterator[bytes], budget: ImageBudget
) -> None:
    """Require that a layer unpacks to what the image's config says."""
    for _ in required_layer(str(remote.reference), layer.digest, layer.diff_id, parts, budget):
        pass


def require_taken(remote: RemoteImage) -> None:
    """Refuse what cannot be taken before anything is fetched.

    Raises TooManyLayersError and ImageFormatUnsupportedError.
    """
    require_layers_taken(str(remote.reference), len(remote.layers))
    for kind in {layer.media_type for layer in remote.layers}:
        if kind.endswith("encrypted"):
            raise ImageFormatUnsupportedError(
                f"{remote.reference} has an encrypted layer ({printable(kind)})",
                hint="Push the image without encryption: a build has no key for its layers.",
            )
        if not kind.lower().startswith(LAYER_TYPES) and kind not in OLD_TYPES:
            raise ImageFormatUnsupportedError(
                f"{remote.reference} has a layer of a kind that is not an image's "
                f"({printable(kind)})"
            )


def _reference_of(image: str) -> ImageReference:
    try:
        return ImageReference.parse(image)
    except ImageReferenceError as error:
        raise ImageNotFoundError(str(error)) from None


def _redact(log: BuildLog, secret: str) -> None:
    log.redact(secret)
    log.redact(base64.b64encode(secret.encode()).decode())
    for line in secret.replace("\\n", "\n").splitlines():
        if len(line) >= SHORTEST_SECRET_LINE:
            log.redact(line)


def _is_known_to_docker(client: docker.APIClient, image: str) -> bool:
    return bool(client.images(name=image, quiet=True))


def _describe(remote: RemoteImage, inspected: InspectedImage | None) -> PulledImage:
    if inspected is None or inspected.image_id != remote.config_digest:
        raise ImageDamagedError(f"dockerd does not have {remote.reference.at(remote.digest)}")
    config = inspected.config or ContainerConfig()
    described = PulledImage(
        reference=remote.reference.at(remote.digest),
        digest=remote.digest,
        image_id=inspected.image_id,
        architecture=remote.architecture,
        size_bytes=inspected.size_bytes,
        layer_count=inspected.layer_count,
        config=ImageConfig(
            env=config.env or (),
            user=config.user or "",
            working_dir=config.working_dir or "",
            entrypoint=config.entrypoint or (),
            cmd=config.cmd or (),
            healthcheck=(config.healthcheck.test if config.healthcheck else None) or (),
        ),
    )
    require_small_config(described.config, described.reference)
    return described


def _raise_for_message(reference: ImageReference, message: str) -> NoReturn:
    """Give what dockerd says in words its type.

    Of a registry it tells nothing: it has called none. What else it says may be of another pull.
    """
    text = message.lower()
    known = error_in_words(message, f"Docker cannot take {reference}: {message}")
    if known is not None:
        raise known
    if any(words in text for words in UNSUPPORTED):
        raise ImageFormatUnsupportedError(f"Docker does not read {reference}: {message}")
    if any(words in text for words in UNUSABLE):
        raise ImageUnusableError(f"Docker cannot unpack {reference}: {message}")
    raise RegistryUnavailableError(f"pulling {reference} failed: {message}")
