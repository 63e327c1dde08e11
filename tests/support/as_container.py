"""The probes' answers of a container and of a guest, and which of them may differ."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import docker

from activities.contract.requests import IMAGE_COMMAND
from tests.support.probed_images import ARGUMENTS, PROBE
from tests.support.vm_host import VmHost

TABLE = Path(__file__).parents[2] / "docs" / "guest.md"
HOST_NAME = "instance"
DNS_SERVER = "8.8.8.8"
READY = "/probe/busybox test -e /probe/out/done"
DISK_MB = 32

# The same, as a start command's text.
COMMAND = f"exec {shlex.join((*PROBE, *ARGUMENTS))}"

Answers = dict[str, bytes]


def allowed_differences() -> set[str]:
    """Return the probes that the docs let differ."""
    return set(re.findall(r"^\| `([a-z-]+)` \|", TABLE.read_text(), re.MULTILINE))


def in_container(
    client: docker.DockerClient, image_id: str, *, by_entrypoint: bool = False
) -> Answers:
    """Return what the probes say in a container."""
    container = client.containers.create(
        image_id,
        hostname=HOST_NAME,
        dns=[DNS_SERVER],
        entrypoint=["/bin/sh", "-c"] if by_entrypoint else None,
        command=[COMMAND] if by_entrypoint else None,
    )
    try:
        container.start()
        assert container.wait(timeout=120)["StatusCode"] == 0, container.logs()
        content, _ = container.get_archive("/probe/out")
        with tarfile.open(fileobj=io.BytesIO(b"".join(content))) as archive:
            members = [member for member in archive if member.isfile()]
            answers = {
                Path(member.name).name: (archive.extractfile(member) or io.BytesIO()).read()
                for member in members
            }
    finally:
        container.remove(force=True)
    return answers | {"identity": _without_what_dockerd_ignores(answers["identity"])}


def _without_what_dockerd_ignores(identity: bytes) -> bytes:
    """Drop signals 32 and 33 from the ignored ones.

    They are the C library's own (nptl(7)): no program can set them, but a dockerd whose starter
    ignored them hands that on to its containers.
    """
    return re.sub(
        rb"(?<=SigIgn:\t)[0-9a-f]{16}",
        lambda found: b"%016x" % (int(found[0], 16) & ~(0b11 << 31)),
        identity,
    )


async def in_guest(
    host: VmHost, reference: str, place: Path, *, by_entrypoint: bool = False
) -> Answers:
    """Return what they say in a guest, read from its disk when it is dead."""
    disk = await disk_of_probed_guest(host, reference, by_entrypoint=by_entrypoint)
    return files_of(disk, "/probe/out", place)


async def disk_of_probed_guest(
    host: VmHost, reference: str, *, by_entrypoint: bool = False
) -> Path:
    """Let a guest of an image run the probes; return its disk when it is dead."""
    pulled = await host.bench.pull(reference)
    command = IMAGE_COMMAND
    if by_entrypoint:
        command = COMMAND
    vm = host.vm()
    rootfs = await host.rootfs(
        pulled, vm, start_command=command, ready_command=READY, disk_size_mb=DISK_MB
    )
    await host.start(vm, rootfs)
    await host.wait(vm, 180)
    process = host.process(vm)
    process.kill()
    return process.files / "rootfs.ext4"


def files_of(disk: Path, directory: str, place: Path) -> Answers:
    """Return the files of a directory on an ext4 whose guest has just died."""
    subprocess.run(["e2fsck", "-fy", disk], capture_output=True, check=False)
    place.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump {directory} {place}", disk], capture_output=True, check=True
    )
    return {path.name: path.read_bytes() for path in (place / Path(directory).name).iterdir()}


def require_the_same(found: Answers, expected: Answers) -> None:
    """Fail with every answer that differs and may not."""
    assert found.keys() == expected.keys()
    differing = {name for name in expected if expected[name] != found[name]}
    told = {name: (expected[name], found[name]) for name in differing - allowed_differences()}
    assert not told, "\n".join(
        f"{name}: container {ours!r}, guest {theirs!r}" for name, (ours, theirs) in told.items()
    )
