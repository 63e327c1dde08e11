"""The container in which an image is asked about itself: its USER, its init, its shell.

It runs `guest/provision.sh` by the static busybox from a bind mount, so that images without a shell
work too. It gets no network, no capabilities and a read-only root: nothing in the image changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import docker
import docker.errors
from docker.types import LogConfig, Mount

from activities.contract.errors import (
    CheckpointLostError,
    DockerUnavailableError,
    ProvisioningError,
)
from activities.contract.inputs import BuildRootfsInput
from activities.contract.names import Step
from activities.contract.scope import BuildScope
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.image.containers import DEFAULT_PATH, labels_of, wait_for_exit
from activities.image.docker_daemon import ContainerConfig, InspectedImage, find_image
from activities.image.output_lines import OutputLines
from activities.process.settings import Settings
from activities.rootfs.guest_files import IN_GUEST, GuestFacts
from activities.step.build_log import BuildLog

ANSWER = "@tm@ "
# What has come on standard output and on standard error.
OutputParts = tuple[bytes | None, bytes | None]


PIDS_LIMIT = 256


MAX_OUTPUT_LINES = 1000
LOOKED_INTO = [Path("/etc"), Path("/bin"), Path("/sbin"), Path("/lib"), Path("/usr/lib/systemd")]


def container_name(scope: BuildScope) -> str:
    """Name the container in which an image is provisioned."""
    return f"tm-{scope.build_id}-{scope.lease.number}-provision"


def create_container(
    client: docker.APIClient, settings: Settings, build: BuildRootfsInput, staged: Path
) -> str:
    """Create (not start) the container and return its id.

    Raises CheckpointLostError when the image is no longer on the host.
    """
    config = require_image(client, build).config or ContainerConfig()
    memory = max(settings.provision_memory_mb, build.memory_mb) * MIB
    host_config = client.create_host_config(
        mounts=[
            Mount(IN_GUEST, str(staged), type="bind", read_only=True),
            *_empty_volumes(config.volumes or ()),
        ],
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network_mode="none",
        mem_limit=memory,
        memswap_limit=memory,
        pids_limit=PIDS_LIMIT,
        read_only=True,
        log_config=LogConfig(type=LogConfig.types.NONE),
    )
    created = client.create_container(
        build.image.image_id,
        name=container_name(build.scope),
        entrypoint=[f"{IN_GUEST}/busybox"],
        command=["sh", f"{IN_GUEST}/provision.sh"],
        user="0:0",
        working_dir="/",
        environment={"PATH": DEFAULT_PATH},
        healthcheck={"test": ["NONE"]},
        labels=labels_of(build.scope, DataDir(settings.data_dir)),
        host_config=host_config,
    )
    return str(created["Id"])


def _empty_volumes(volumes: Iterable[str]) -> Iterator[Mount]:
    """Yield mounts for those volumes that Docker need not fill with the image's files.

    Nobody looks into them here, but for where accounts and inits are.
    """
    for path in volumes:
        if not any(looked.is_relative_to(path) for looked in LOOKED_INTO):
            yield Mount(path, None, type="tmpfs")


def run_container(
    client: docker.APIClient,
    container_id: str,
    log: BuildLog,
    check: Callable[[], None],
    timeout_seconds: float,
) -> GuestFacts:
    """Run the container to its end; its output goes into the log.

    Raises ProvisioningError with the last lines when it fails or takes too long.
    """
    facts = GuestFacts()
    output = client.attach(container_id, stream=True, demux=True)
    reader = threading.Thread(target=_read_output, args=(output, facts, log), daemon=True)
    reader.start()
    deadline = time.monotonic() + timeout_seconds
    _start(client, container_id)
    code = wait_for_exit(client, container_id, reader, check, deadline=deadline)
    if code is None:
        raise ProvisioningError(
            f"provisioning did not end within {timeout_seconds:g} s", log_tail=log.tail()
        )
    if code != 0:
        raise ProvisioningError(
            _why_it_failed(client, container_id, code, log), log_tail=log.tail()
        )
    if not facts.is_complete:
        raise DockerUnavailableError("Docker lost output of the provisioning script")
    return facts


def _start(client: docker.APIClient, container_id: str) -> None:
    try:
        client.start(container_id)
    except docker.errors.APIError as error:
        # runc refuses what an image's files do not allow, such as our directory over a link.
        if "OCI runtime create failed" not in str(error.explanation):
            raise
        raise ProvisioningError(
            f"a container of the image cannot be started: {error.explanation}",
            hint=f"Docker could not show {IN_GUEST} to the image: remove that path from it.",
        ) from None


def require_image(client: docker.APIClient, build: BuildRootfsInput) -> InspectedImage:
    """Return what `docker inspect` tells of the build's image.

    Raises CheckpointLostError when it is no longer on the host.
    """
    image = find_image(client, build.image.image_id)
    if image is None:
        raise CheckpointLostError(
            f"image {build.image.reference} is no longer on the host", step=Step.PULL
        )
    return image


def _read_output(output: Iterable[OutputParts], facts: GuestFacts, log: BuildLog) -> None:
    streams = (OutputLines(), OutputLines())
    written = 0
    for parts in output:
        for stream, part in zip(streams, parts, strict=True):
            for line in stream.add(part or b""):
                written += 1
                _take_line(line, facts, log, written)
    for line in (line for stream in streams for line in stream.finish()):
        _take_line(line, facts, log, written)


def _take_line(line: str, facts: GuestFacts, log: BuildLog, number: int) -> None:
    if line.startswith(ANSWER):
        key, _, value = line.removeprefix(ANSWER).partition(" ")
        facts.answers[key] = value
    elif number <= MAX_OUTPUT_LINES:
        log.info(line, source="provision")


def _why_it_failed(client: docker.APIClient, container_id: str, code: int, log: BuildLog) -> str:
    state = client.inspect_container(container_id)["State"]
    if state.get("OOMKilled"):
        return "provisioning ran out of memory"
    last = log.tail()[-1:] if code == 3 else []
    return last[0] if last else f"the provisioning script failed with exit code {code}"
