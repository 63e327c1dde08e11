"""Images of all kinds: what a build takes, beside what `docker pull` of the same reference does."""

from __future__ import annotations

import bz2
import json
import lzma
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import docker
import pytest
from devstack.ports import free_port
from devstack.registry import CONFIG, LAYER, MANIFEST, Layer
from devstack.workbench import Workbench, workbench

from activities.contract.errors import (
    DockerRefusedError,
    FirecrackerMissingError,
    ImageFormatUnsupportedError,
    ImageUnusableError,
    KernelMissingError,
    NotAnImageError,
    TemplateManagerError,
    TooManyLayersError,
    WrongArchitectureError,
)
from activities.contract.scope import VmShape
from activities.image.docker_daemon import MAX_LAYERS, docker_errors
from tests.support.file_trees import ADDED_DIRECTORIES, tree_of_ext4
from tests.support.host_resources import all_resources, assert_nothing_left
from tests.support.served_images import Json, ServedImages, serving_images

pytestmark = pytest.mark.counts_host

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER = (DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER)
ZSTD_LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"
HELM = "application/vnd.cncf.helm.config.v1+json"
ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}
SHAPE = VmShape(
    memory_mb=128, vcpu_count=1, kernel_version="vmlinux-6.1", firecracker_version="v1.13.1"
)

Make = Callable[[ServedImages], object]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Workbench]:
    before = all_resources()
    made = workbench(tmp_path / "data")
    yield made
    made.remove_images()
    assert_nothing_left(before)


@pytest.fixture
def images() -> Iterator[ServedImages]:
    with serving_images() as serving:
        yield serving


def docker_pull(client: docker.APIClient, reference: str) -> str | None:
    """Return the id of the image that `docker pull` takes, and remove it; None if it refuses."""
    if subprocess.run(["docker", "pull", "-q", reference], check=False).returncode:
        return None
    image = str(client.inspect_image(reference)["Id"])  # type: ignore[no-untyped-call] # its stub has no types
    client.remove_image(image, force=True)
    return image


def on(image: Json, architecture: str = "amd64", os: str = "linux", variant: str = "") -> Json:
    """Return an image's entry in an index, for that platform."""
    platform = {"os": os, "architecture": architecture, **({"variant": variant} if variant else {})}
    return {**image, "platform": platform}


def zstd(tar: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=tar, capture_output=True, check=True).stdout


def small_layer(text: bytes = b"1") -> bytes:
    return Layer().directory("etc").add("etc/name", text).tar()


@dataclass(frozen=True)
class Case:
    """What a registry has, and what becomes of it. The reference's tag is `it`."""

    name: str
    make: Make
    taken: str = ""
    """The tag of the image that a build takes."""
    refused: type[TemplateManagerError] | None = None
    says: str = ""
    docker_differs: str = ""
    """Why `docker pull` on this machine does not do the same; '' when it does."""


LATER_DOCKER = "dockerd 20.10 does not look into an entry without a platform; later ones do"
NO_ZSTD = "dockerd 20.10 does not unpack zstd; later ones do"
WRONG_ONE = "dockerd takes what cannot run here, with a warning"


def nested(images: ServedImages, told: Callable[[Json], Json]) -> object:
    arm, amd = images.image("arm", architecture="arm64"), images.image("amd")
    return images.index("it", told(images.index("inner", on(arm, "arm64"), on(amd))))


def with_features(images: ServedImages) -> object:
    platform = {"os": "linux", "architecture": "amd64", "os.version": "5", "os.features": ["x"]}
    return images.index("it", {**images.image("a"), "platform": platform})


def with_urls(images: ServedImages) -> object:
    """An image whose layer only another server has."""
    images.image(
        "it", types=(DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER.replace("diff", "foreign.diff"))
    )
    manifest = json.loads(images.contents["it"][1])
    layer = manifest["layers"][0]
    del images.contents[layer["digest"]]
    layer["urls"] = [f"http://127.0.0.1:{free_port()}/layer"]
    return images.document(manifest, "it")


CASES = [
    # ---- Layers
    Case("no layers", lambda i: i.image("it", []), "it"),
    Case(
        "no layers, and diff_ids null",
        lambda i: i.image("it", [], rootfs={"type": "layers", "diff_ids": None}),
        "it",
    ),
    Case("the same layer twice", lambda i: i.image("it", [small_layer()] * 2), "it"),
    Case(
        "layers that are not packed",
        lambda i: i.image("it", types=(MANIFEST, CONFIG, LAYER.removesuffix("+gzip")), pack=bytes),
        "it",
    ),
    Case("bzip2", lambda i: i.image("it", pack=bz2.compress), "it"),
    Case("xz", lambda i: i.image("it", pack=lzma.compress), "it"),
    Case(
        "non-distributable layers that the registry has",
        lambda i: i.image(
            "it", types=(MANIFEST, CONFIG, LAYER.replace("v1", "nondistributable.v1"))
        ),
        "it",
    ),
    Case(
        "layers that are elsewhere",
        with_urls,
        refused=ImageUnusableError,
        says="the registry lacks a layer of it",
    ),
    Case(
        "zstd",
        lambda i: i.image("it", types=(MANIFEST, CONFIG, ZSTD_LAYER), pack=zstd),
        "it",
        docker_differs=NO_ZSTD,
    ),
    Case(
        "zstd under another name",
        lambda i: i.image("it", pack=zstd),
        "it",
        docker_differs=NO_ZSTD,
    ),
    Case(
        "encrypted",
        lambda i: i.image(
            "it", types=(MANIFEST, CONFIG, f"{LAYER}+encrypted"), pack=lambda _: b"x" * 999
        ),
        refused=ImageFormatUnsupportedError,
        says="encrypted",
    ),
    Case(
        "layers of an unknown kind",
        lambda i: i.image("it", types=(MANIFEST, CONFIG, "application/vnd.example.layer")),
        refused=ImageFormatUnsupportedError,
        says="vnd.example.layer",
    ),
    Case(
        "126 layers",
        lambda i: i.image("it", [small_layer(b"%d" % n) for n in range(126)]),
        refused=TooManyLayersError,
        says="126 layers; Docker takes 125",
    ),
    # ---- Configs
    Case("config without os", lambda i: i.image("it", os=None), "it"),
    Case("config without architecture", lambda i: i.image("it", architecture=None), "it"),
    Case("config with neither", lambda i: i.image("it", os="", architecture=""), "it"),
    Case("config without config", lambda i: i.image("it", config=None), "it"),
    Case("config without history", lambda i: i.image("it", history=None), "it"),
    Case("x86_64", lambda i: i.image("it", architecture="x86_64"), "it"),
    Case("amd64/v2", lambda i: i.image("it", variant="v2"), "it"),
    Case(
        "no rootfs",
        lambda i: i.image("it", rootfs=None),
        refused=ImageUnusableError,
        says="no rootfs",
    ),
    Case(
        "fewer layers than the config has",
        lambda i: i.image("it", rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64] * 2}),
        refused=ImageUnusableError,
        says="manifest has 1 layers, its config 2",
    ),
    Case(
        "other layers than the config has",
        lambda i: i.image("it", rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}),
        refused=ImageUnusableError,
        says="is not the one that its config names",
    ),
    Case(
        "a config that no history takes",
        lambda i: i.image("it", config={"Env": ["A=" + "x" * 400_000]}),
        refused=ImageUnusableError,
        says="bytes; at most 327680 are taken",
        docker_differs="dockerd keeps a config on its disk, however large it is",
    ),
    Case(
        "more history than layers",
        lambda i: i.image("it", history=[{}, {}]),
        refused=ImageUnusableError,
        says="history tells of 2 layers, and it has 1",
    ),
    Case(
        "os is a number", lambda i: i.image("it", os=7), refused=ImageUnusableError, says="config"
    ),
    Case(
        "windows",
        lambda i: i.image("it", os="windows"),
        refused=WrongArchitectureError,
        says="windows/amd64; this host runs linux/amd64",
    ),
    Case(
        "another architecture",
        lambda i: i.image("it", architecture="arm64"),
        refused=WrongArchitectureError,
        says="is for linux/arm64; this host",
        docker_differs=WRONG_ONE,
    ),
    # ---- Indexes
    Case(
        "OCI index",
        lambda i: i.index(
            "it", on(i.image("arm", architecture="arm64"), "arm64"), on(i.image("a"))
        ),
        "a",
    ),
    Case(
        "Docker's list",
        lambda i: i.index("it", on(i.image("a", types=DOCKER)), kind=DOCKER_LIST),
        "a",
    ),
    Case(
        "OCI index over Docker's manifest",
        lambda i: i.index("it", on(i.image("a", types=DOCKER))),
        "a",
    ),
    Case("the first of two", lambda i: i.index("it", on(i.image("b")), on(i.image("a"))), "b"),
    Case(
        "the plain variant",
        lambda i: i.index("it", on(i.image("v3"), variant="v3"), on(i.image("a"))),
        "a",
    ),
    Case("v1 is plain", lambda i: i.index("it", on(i.image("a"), variant="v1")), "a"),
    Case("x86_64 in an index", lambda i: i.index("it", on(i.image("a"), "x86_64")), "a"),
    Case("os left out in an index", lambda i: i.index("it", on(i.image("a"), os="")), "a"),
    Case("os.version and os.features", with_features, "a"),
    Case(
        "attestations beside it",
        lambda i: i.index(
            "it",
            {**on(i.image("b"), "unknown", "unknown"), "annotations": ATTESTATION},
            on(i.image("a")),
        ),
        "a",
    ),
    Case(
        "a platform comes before none",
        lambda i: i.index("it", i.image("b"), on(i.image("a"))),
        "a",
    ),
    Case(
        "only attestations",
        lambda i: i.index("it", on(i.image("b"), "unknown", "unknown")),
        refused=NotAnImageError,
        says="holds attestations: no image",
    ),
    Case(
        "only newer variants",
        lambda i: i.index("it", on(i.image("v2"), variant="v2"), on(i.image("v3"), variant="v3")),
        refused=WrongArchitectureError,
        says="holds linux/amd64/v2, linux/amd64/v3; this host",
    ),
    Case(
        "arm v7 and 386",
        lambda i: i.index("it", on(i.image("v7"), "arm", variant="v7"), on(i.image("i"), "386")),
        refused=WrongArchitectureError,
        says="holds linux/386, linux/arm/v7; this host",
    ),
    Case("nothing", lambda i: i.index("it"), refused=NotAnImageError, says="holds nothing"),
    Case(
        "an index that is wrong about its image",
        lambda i: i.index("it", on(i.image("arm", architecture="arm64"))),
        refused=WrongArchitectureError,
        says="is for linux/arm64",
        docker_differs=WRONG_ONE,
    ),
    Case(
        "no platform",
        lambda i: i.index("it", i.image("arm", architecture="arm64"), i.image("a")),
        "a",
        docker_differs=LATER_DOCKER,
    ),
    Case(
        "a nested index without platform",
        lambda i: nested(i, lambda inner: inner),
        "amd",
        docker_differs=LATER_DOCKER,
    ),
    Case(
        "a nested index with a platform",
        lambda i: nested(i, on),
        "amd",
        docker_differs=LATER_DOCKER,
    ),
    Case(
        "an image comes before a nested index",
        lambda i: i.index("it", i.index("inner", on(i.image("b"))), on(i.image("a"))),
        "a",
    ),
    # ---- No images
    Case(
        "a helm chart",
        lambda i: i.image(
            "it",
            types=(MANIFEST, HELM, "application/vnd.cncf.helm.chart.content.v1.tar+gzip"),
            os=None,
            architecture=None,
            rootfs=None,
        ),
        refused=NotAnImageError,
        says=f"not a container image: its media type is {HELM}",
    ),
    Case(
        "a plugin",
        lambda i: i.image(
            "it", types=(DOCKER_MANIFEST, "application/vnd.docker.plugin.v1+json", DOCKER_LAYER)
        ),
        refused=NotAnImageError,
        says="docker.plugin",
    ),
    Case(
        "an artifact",
        lambda i: i.document(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "artifactType": "application/vnd.example.sbom",
                "config": i.put(b"{}", "application/vnd.oci.empty.v1+json"),
                "layers": [i.put(b"{}", "application/vnd.oci.empty.v1+json")],
            },
            "it",
        ),
        refused=NotAnImageError,
        says="application/vnd.example.sbom",
    ),
    Case(
        "schema 1",
        lambda i: i.document(
            {
                "schemaVersion": 1,
                "mediaType": "application/vnd.docker.distribution.manifest.v1+json",
                "name": "odd",
                "tag": "it",
                "architecture": "amd64",
                "fsLayers": [],
                "history": [],
            },
            "it",
        ),
        refused=ImageFormatUnsupportedError,
        says="manifest schema 1",
    ),
    *(
        Case(f"a config of type {kind}", partial(ServedImages.image, tag="it", types=types), "it")
        for kind, types in {
            "octet-stream": (MANIFEST, "application/octet-stream", LAYER),
            "json": (DOCKER_MANIFEST, "application/json", DOCKER_LAYER),
            "HTML": (DOCKER_MANIFEST, "text/html", DOCKER_LAYER),
            "OCI in Docker's manifest": (DOCKER_MANIFEST, CONFIG, DOCKER_LAYER),
            "Docker in OCI's manifest": (MANIFEST, DOCKER_CONFIG, LAYER),
        }.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_an_image_is_taken_as_docker_pull_takes_it(
    host: Workbench, images: ServedImages, case: Case
) -> None:
    case.make(images)
    reference = images.reference("it")
    if case.refused is None:
        pulled = await host.pull(reference)
        assert pulled.image_id == images.image_id(case.taken)
        assert pulled.architecture == "amd64"
        host.remove_images()
    else:
        with pytest.raises(case.refused, match=re.escape(case.says)) as error:
            await host.pull(reference)
        assert type(error.value) is case.refused
        assert not error.value.retryable
        assert error.value.hint
        assert not host.client.images(name=reference.rpartition(":")[0])
    by_docker = docker_pull(host.client, reference)
    same = by_docker == (images.image_id(case.taken) if case.taken else None)
    assert same is not bool(case.docker_differs)


async def test_an_image_without_layers_is_an_empty_root(
    host: Workbench, images: ServedImages, tmp_path: Path
) -> None:
    images.image("it", [])
    rootfs = await host.build_rootfs(await host.pull(images.reference("it")))
    names = tree_of_ext4(rootfs, tmp_path / "ext4").keys()
    assert "/.template/init" in names
    top = {f"/{name.split('/')[1]}" for name in names}
    assert top <= {"/", "/.template", "/etc", *ADDED_DIRECTORIES}


async def test_an_image_that_says_nothing_of_itself_has_its_files(
    host: Workbench, images: ServedImages, tmp_path: Path
) -> None:
    layer = Layer().directory("srv").add("srv/page", b"hello\n").tar()
    images.image("it", [layer], os=None, architecture=None, config=None)
    rootfs = await host.build_rootfs(await host.pull(images.reference("it")))
    assert "/srv/page" in tree_of_ext4(rootfs, tmp_path / "ext4")


# ---- Layers beyond Docker's limit


async def test_too_many_layers_are_refused_before_anything_is_pulled(
    host: Workbench, images: ServedImages
) -> None:
    images.image("it", [small_layer(b"%d" % n) for n in range(130)])
    with pytest.raises(TooManyLayersError, match=r"130 layers; Docker takes 125") as error:
        await host.pull(images.reference("it"))
    assert not error.value.retryable
    assert "flatten" in error.value.hint
    assert not host.client.images(name=f"{images.address}/odd")


async def test_as_many_layers_as_docker_takes(
    host: Workbench, images: ServedImages, tmp_path: Path
) -> None:
    layers = [Layer().directory(f"l{n}").tar() for n in range(MAX_LAYERS)]
    images.image("it", layers)
    pulled = await host.pull(images.reference("it"))
    rootfs = await host.build_rootfs(pulled)
    assert {f"/l{n}" for n in range(MAX_LAYERS)} <= set(tree_of_ext4(rootfs, tmp_path / "ext4"))
    container = host.client.create_container(pulled.image_id, command=["x"])["Id"]
    try:
        with pytest.raises(TooManyLayersError, match="max depth"), docker_errors():
            host.client.commit(container)
    finally:
        host.client.remove_container(container)


def test_what_docker_will_always_refuse_is_not_tried_again(host: Workbench) -> None:
    with pytest.raises(DockerRefusedError, match="Docker refused a call") as error, docker_errors():
        host.client.import_image_from_data(b"", repository="CAPITALS/are-not-taken")
    assert not error.value.retryable


# ---- What the host lacks


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"kernel_version": "vmlinux-0.1"}, KernelMissingError, "vmlinux-0.1/vmlinux.bin"),
        ({"firecracker_version": "v0.0.1"}, FirecrackerMissingError, "v0.0.1/firecracker"),
    ],
)
async def test_what_the_host_lacks_is_named_before_the_registry_is_asked(
    tmp_path: Path, change: dict[str, str], kind: type[TemplateManagerError], text: str
) -> None:
    kernel = tmp_path / "kernels" / SHAPE.kernel_version / "vmlinux.bin"
    firecracker = tmp_path / "vmms" / SHAPE.firecracker_version / "firecracker"
    for path in (kernel, firecracker):
        path.parent.mkdir(parents=True)
        path.touch(0o755)
    host = workbench(
        tmp_path / "data", kernels_dir=tmp_path / "kernels", firecracker_dir=tmp_path / "vmms"
    )
    nobody = f"127.0.0.1:{free_port()}/web"
    with pytest.raises(kind, match=text):
        await host.pull(nobody, shape=SHAPE.model_copy(update=change))
    with pytest.raises(TemplateManagerError, match="refused"):
        await host.pull(nobody, shape=SHAPE)
