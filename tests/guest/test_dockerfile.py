"""A guest of a Dockerfile's image is what `docker run` makes of that image: answers and files."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest
import pytest_asyncio
from devstack.registry import BUSYBOX, Layer, Registry, running_registry

from api.cli.image_builders import BuilderName, ImageBuild, PushedImage, find_builder
from tests.support.as_container import (
    disk_of_probed_guest,
    files_of,
    in_container,
    require_the_same,
)
from tests.support.file_trees import difference, tree_of_ext4, tree_of_image
from tests.support.image_builders import buildah_environment, forget_images
from tests.support.probed_images import ACCOUNTS, GROUPS, SCRIPT
from tests.support.vm_host import VmHost, vm_host

pytestmark = pytest.mark.counts_host

# What an ext4 has, and what the probes and a boot write.
WRITTEN = re.compile(
    r"/(lost\+found|probe/out(/.*)?|srv/app(/here)?|(run|tmp|dev|proc|sys|etc|var)(/.*)?)?"
)


@dataclass(frozen=True)
class Recipe:
    """A Dockerfile whose image runs the probes, and what else is in its context."""

    name: str
    builder: BuilderName
    text: str
    """`{base}` is the tests' base."""
    files: dict[str, str] = field(default_factory=dict)


RECIPES = (
    Recipe(
        "stages, users and variables",
        BuilderName.DOCKER,
        """\
ARG TAG=latest
FROM {base}:${TAG:-none} AS made
RUN echo made > /made && chown 1234:1235 /made && ln -s made /link
FROM {base}:${TAG}
COPY probe /probe
RUN mkdir /probe/out && chmod 1777 /probe/out
ENV PATH=/opt/app/bin:$PATH
ENV app.name="my  app" SAID=${MISSING:-else} QUOTED='a "b" $c'
COPY --from=made /made /link /from/
COPY --chown=app:extra foo.sh /bin
COPY ["with space*.txt", "/spaced/"]
WORKDIR /srv
WORKDIR app
RUN chmod 777 .
USER app
ENTRYPOINT ["/probe/busybox", "sh"]
CMD ["/probe/probes.sh", "a  b", "$PATH", "*", ""]
""",
        {"foo.sh": "#!/bin/sh\n", "with space 1.txt": "1", "with space 2.txt": "2"},
    ),
    Recipe(
        "volumes, numbers and a shell's command",
        BuilderName.BUILDAH,
        """\
FROM {base}
COPY . /context
COPY probe /probe
RUN mkdir -p /probe/out /data && chmod 1777 /probe/out && echo kept > /data/file
VOLUME /data /srv/app
WORKDIR /srv/app
RUN chmod 777 .
USER 4242:4343
CMD exec /probe/busybox sh /probe/probes.sh "$PATH" 'a  b'
""",
        {".dockerignore": "# probe\n*.key\n!public.key\n", "my.key": "", "public.key": "p"},
    ),
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
        forget_images(running.address)


@pytest.fixture(scope="module")
def base(registry: Registry) -> str:
    """A small userland with accounts, whose /bin is a link, as Debian's is."""
    layer = Layer().directory("usr").directory("usr/bin").busybox("usr/bin/busybox")
    for applet in ("sh", "chmod", "chown", "env", "ln", "mkdir"):
        layer.symlink(f"usr/bin/{applet}", "busybox")
    layer.symlink("bin", "usr/bin").directory("tmp", 0o1777).directory("etc").directory("run")
    layer.add("etc/passwd", ACCOUNTS).add("etc/group", GROUPS).directory("home")
    layer.directory("home/app", uid=1234, gid=1235)
    registry.push("base", [layer.tar()], config={"Env": ["PATH=/of/base:/usr/bin"]})
    return f"{registry.address}/base"


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmHost]:
    async with vm_host(tmp_path / "data") as made:
        yield made


async def pushed(recipe: Recipe, base: str, registry: Registry, place: Path) -> PushedImage:
    """Have a recipe's image built and pushed."""
    context = place / "context"
    (context / "probe").mkdir(parents=True)
    shutil.copy(BUSYBOX, context / "probe" / "busybox")
    shutil.copy(SCRIPT, context / "probe" / "probes.sh")
    for name, content in {
        "Dockerfile": recipe.text.replace("{base}", base),
        **recipe.files,
    }.items():
        (context / name).write_text(content)
    (place / "results").mkdir()
    image = f"{registry.address}/{recipe.builder}:1"
    build = ImageBuild(context, context / "Dockerfile", image)
    return await (await find_builder(recipe.builder)).build_and_push(build, place / "results")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
async def test_a_guest_of_a_dockerfile_is_what_its_container_is(
    recipe: Recipe,
    base: str,
    host: VmHost,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in buildah_environment(tmp_path / "images", registry.address).items():
        monkeypatch.setenv(name, value)
    image = await pushed(recipe, base, registry, tmp_path)
    assert image.has_command
    with closing(docker.from_env(timeout=600)) as client:
        image_id = str(client.images.pull(image.reference).id)
        expected = in_container(client, image_id)
        disk = await disk_of_probed_guest(host, image.reference)
        require_the_same(files_of(disk, "/probe/out", tmp_path / "out"), expected)
        (tmp_path / "image").mkdir()
        of_image = tree_of_image(client.api, image_id, tmp_path / "image")
    differing = difference(of_image, tree_of_ext4(disk, tmp_path / "mounted"))
    assert {path: how for path, how in differing.items() if not WRITTEN.fullmatch(path)} == {}
