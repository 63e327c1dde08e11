"""The images whose containers and guests are compared."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import docker
import images
from devstack.registry import BUSYBOX, Layer

SCRIPT = Path(__file__).with_name("probes.sh")
PROBE = ("/probe/busybox", "sh", "/probe/probes.sh")
ARGUMENTS = ("a b", "", "$HOME `id`", "*", "é\n")
DEMO_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNTS = b"root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235:App:/home/app:/bin/sh\n"
GROUPS = b"root:x:0:\napp:x:1235:\nextra:x:4321:app\nwheel:x:10:root\n"


@dataclass(frozen=True)
class ProbedImage:
    """An image: what it stands on, what it adds, and its config."""

    name: str
    base: str = ""
    """Of the dev stack's; "" is nothing at all."""
    layer: Layer = field(default_factory=Layer)
    user: str = ""
    directory: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = (*PROBE, *ARGUMENTS)
    volumes: tuple[str, ...] = ()
    by_entrypoint: bool = False
    """The probe is not the image's own command: its command is an init."""

    def make(self, client: docker.DockerClient) -> str:
        """Make it in Docker; returns its id."""
        base = images.make(self.base) if self.base else _empty(client)
        container = client.containers.create(base, command=["x"])
        try:
            container.put_archive("/", _probe_layer().tar())
            container.put_archive("/", self.layer.tar())
            return str(container.commit(changes=self._changes()).id)
        finally:
            container.remove()

    def _changes(self) -> list[str]:
        changes = [f"ENTRYPOINT {json.dumps(self.entrypoint)}", f"CMD {json.dumps(self.cmd)}"]
        changes += [f"USER {self.user}"] if self.user else []
        changes += [f"WORKDIR {self.directory}"] if self.directory else []
        changes += [f"VOLUME {json.dumps(self.volumes)}"] if self.volumes else []
        changes += [f"ENV {name}={json.dumps(value)}" for name, value in self.env.items()]
        return changes


def probed_images() -> list[ProbedImage]:
    """Return the six kinds."""
    return [
        ProbedImage("busybox", "busybox", env={"COLOR": "dark blue", "EMPTY": ""}),
        ProbedImage(
            "alpine-like with inittab",
            "alpine-like",
            Layer().directory("home/app", uid=1234, gid=1235).directory("run/app"),
            directory="/srv/deep/er",
        ),
        ProbedImage("Debian with systemd", "debian", by_entrypoint=True, cmd=("/sbin/init",)),
        ProbedImage(
            "no shell",
            layer=Layer()
            .directory("etc")
            .add("etc/passwd", b"nonroot:x:65532:65532::/home/nonroot:/sbin/nologin\n")
            .add("etc/group", b"nonroot:x:65532:\n")
            .directory("home/nonroot", uid=65532, gid=65532)
            .directory("tmp", 0o1777),
            user="nonroot",
            directory="/home/nonroot",
        ),
        ProbedImage(
            "an /init of its own",
            "alpine-like",
            Layer()
            .add("init", b'#!/bin/sh\nexport BY_INIT=yes\nexec "$@"\n', mode=0o755)
            .directory("etc")
            .add("etc/passwd", ACCOUNTS)
            .add("etc/group", GROUPS)
            .add("etc/hostname", b"of-the-image\n")
            .add("etc/hosts", b"10.0.0.1 of-the-image\n")
            .symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
            .add("etc/fstab", b"LABEL=none /boot/efi vfat defaults 0 1\n")
            .directory("home/app", uid=1234, gid=1235),
            user="app",
            entrypoint=("/init",),
        ),
        ProbedImage(
            "a USER that is only a number",
            "busybox",
            Layer().directory("work", 0o777),
            user="4242",
            directory="/work",
            entrypoint=("",),
        ),
    ]


def _probe_layer() -> Layer:
    layer = Layer().directory("probe").busybox("probe/busybox")
    layer.add("probe/probes.sh", SCRIPT.read_bytes()).directory("probe/out", 0o1777)
    assert BUSYBOX.exists()
    return layer


def _empty(client: docker.DockerClient) -> str:
    layer = Layer().directory("probe")
    with closing(io.BytesIO(layer.tar())) as archive:
        made = client.api.import_image_from_data(archive.read(), repository="probe/empty", tag="1")
    return str(json.loads(made.splitlines()[-1])["status"])
