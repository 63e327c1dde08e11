"""A Dockerfile is built by the user's own builder, and the template is of what that has pushed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry, running_registry
from devstack.stack import Stack
from temporalio.client import Client

from activities.store.bucket import Bucket
from api.cli.image_builders import BuilderName, ImageBuild, PushedImage, find_builder
from api.client.client import TemplateClient
from api.server.server import running_server
from tests.support.command_line import Ended, cli, started
from tests.support.image_builders import buildah_environment, forget_images
from tests.support.pushed_images import StoredImage, tags_of
from tests.support.recording_host import RecordingHost
from tests.support.running_api import Api, forget, serving, settings_for

pytestmark = pytest.mark.counts_host

BOTH = (BuilderName.DOCKER, BuilderName.BUILDAH)
BOM = "\ufeff"
TOKEN = "of nobody else"


@dataclass
class Building:
    """A builder of this machine, an API, and a registry that the API says images belong to."""

    api: Api
    registry: Registry
    name: BuilderName
    base: str
    place: Path
    template_id: str = field(default_factory=lambda: f"t-{uuid.uuid4().hex[:8]}")

    def context(self, dockerfile: str, **files: str) -> Path:
        """Make a context; in the files' names `__` is a slash."""
        directory = self.place / uuid.uuid4().hex
        for name, content in {"Dockerfile": dockerfile, **files}.items():
            path = directory / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return directory

    async def cli(self, *arguments: str, passed_on: Sequence[str] = ()) -> Ended:
        """Run `build` as a user does."""
        own = ("--builder", self.name, "--template-id", self.template_id, "--no-follow")
        address = ("--api-address", self.api.server.address)
        rest = ("--", *passed_on) if passed_on else ()
        return await cli("build", *arguments, *own, *address, *rest)

    async def built(self, directory: Path, *arguments: str, passed_on: Sequence[str] = ()) -> str:
        """Build a directory; returns the image that the host was told to pull."""
        ended = await self.cli("--dockerfile", str(directory), *arguments, passed_on=passed_on)
        assert ended.code == 0, ended.err
        build_id = ended.out.strip()
        self.api.ids.append(build_id)
        assert (await self.api.ended(build_id)).state == "completed"
        image = self.pulled()[-1]
        assert image.startswith(f"{self.registry.address}/{self.template_id}:{build_id}@sha256:")
        return image

    async def image(
        self, directory: Path, *arguments: str, passed_on: Sequence[str] = ()
    ) -> StoredImage:
        """Build a directory; returns the image that was pushed."""
        return StoredImage(await self.built(directory, *arguments, passed_on=passed_on))

    async def pushed(self, directory: Path) -> PushedImage:
        """Build and push a directory without a template: it is the quicker way."""
        (directory.parent / "results").mkdir(exist_ok=True)
        image = f"{self.registry.address}/{self.template_id}:{directory.name}"
        build = ImageBuild(directory, directory / "Dockerfile", image)
        builder = await find_builder(self.name)
        return await builder.build_and_push(build, directory.parent / "results")

    async def failed(self, directory: Path, *arguments: str) -> Ended:
        """Build what cannot be built: nothing is pushed, and no build is started."""
        ended = await self.cli("--dockerfile", str(directory), *arguments)
        assert ended.code != 0
        assert self.pulled() == []
        assert tags_of(self.registry.address, self.template_id) == []
        return ended

    def pulled(self) -> list[str]:
        return [
            argument.image for name, argument in self.api.journal.arguments if name == "pull_image"
        ]

    def start_commands(self) -> list[str]:
        return [
            argument.start_command
            for name, argument in self.api.journal.arguments
            if name == "build_rootfs"
        ]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
        forget_images(running.address)


@pytest.fixture(scope="module")
def base(registry: Registry) -> str:
    """A small userland whose /bin is a link, as Debian's is."""
    layer = Layer().directory("usr").directory("usr/bin").busybox("usr/bin/busybox")
    for applet in ("sh", "cat", "cp", "env", "ln", "mkdir", "test"):
        layer.symlink(f"usr/bin/{applet}", "busybox")
    layer.symlink("bin", "usr/bin").directory("tmp", 0o1777)
    registry.push("base", [layer.tar()], config={"Env": ["PATH=/of/base:/usr/bin"]})
    return f"{registry.address}/base:latest"


@pytest_asyncio.fixture
async def api(
    temporal: Client,
    recording_host: RecordingHost,
    storage: Stack,
    empty_bucket: Bucket,
    registry: Registry,
) -> AsyncIterator[Api]:
    """An API whose own images are in the tests' registry."""
    settings = settings_for(storage, registry=registry.address)
    forget(recording_host.journal)
    async with (
        running_server(temporal, settings) as server,
        TemplateClient(server.address) as client,
    ):
        await serving(server.address, True)
        running = Api(server, client, temporal, recording_host, settings)
        yield running
        await running.end_everything()


@pytest.fixture(params=BOTH, ids=str)
def building(
    request: pytest.FixtureRequest,
    api: Api,
    registry: Registry,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Building:
    for name, value in buildah_environment(tmp_path / "images", registry.address).items():
        monkeypatch.setenv(name, value)
    return Building(api, registry, request.param, base, tmp_path)


# ---- What Dockerfiles mean is what their builders make of them


async def test_stages_variables_and_links_of_the_base_are_as_the_builder_makes_them(
    building: Building,
) -> None:
    context = building.context(
        """\
ARG BASE=nowhere/nothing
ARG TAG=latest
FROM ${BASE}:${TAG} AS made
RUN ["/bin/sh", "-c", "echo made > /made && ln -s made /link"]
FROM ${BASE}:${TAG:-none}
ARG GREETING=hello
ENV PATH=/opt/app/bin:$PATH
ENV app.name="my app" SAID=${GREETING:-nothing}-${MISSING:-else}
ENV ALT=${SAID:+no}
COPY --from=made /made /link /from/
COPY --chown=1234:1235 foo.sh /bin
COPY ["with space*.txt", "/spaced/"]
RUN echo "$GREETING $PATH" > /ran
VOLUME ["/data"]
WORKDIR /srv
WORKDIR app
USER 1234:1235
ENTRYPOINT ["/bin/foo.sh"]
CMD ["a b", "c"]
""",
        **{"foo.sh": "#!/bin/sh\n", "with space 1.txt": "1", "with space 2.txt": "2", "other": ""},
    )
    name, _, tag = building.base.rpartition(":")
    image = await building.image(
        context,
        "--build-arg",
        f"BASE={name}",
        "--build-arg",
        "GREETING=hi",
        "--build-arg",
        f"TAG={tag}",
    )
    environment = image.environment()
    assert environment["PATH"] == "/opt/app/bin:/of/base:/usr/bin"
    assert environment["app.name"] == "my app"
    assert (environment["SAID"], environment["ALT"]) == ("hi-else", "no")
    nodes, files = image.nodes(), image.files()
    assert nodes["bin"].kind == tarfile.SYMTYPE, "the base's /bin is still a link"
    assert nodes["usr/bin/foo.sh"].owner == (1234, 1235)
    assert files["from/made"] == files["from/link"] == b"made\n"
    assert {path: files[path] for path in files if path.startswith("spaced/")} == {
        "spaced/with space 1.txt": b"1",
        "spaced/with space 2.txt": b"2",
    }
    assert files["ran"] == b"hi /opt/app/bin:/of/base:/usr/bin\n"
    config = image.config
    assert (config["WorkingDir"], config["User"]) == ("/srv/app", "1234:1235")
    assert config["Volumes"] == {"/data": {}}
    assert (config["Entrypoint"], config["Cmd"]) == (["/bin/foo.sh"], ["a b", "c"])
    assert building.start_commands() == ["image"]


async def test_what_a_base_says_of_those_who_build_on_it_is_done(building: Building) -> None:
    base = building.context(
        f"FROM {building.base}\nONBUILD COPY told /told\nONBUILD RUN cat /told > /done\n", told="-"
    )
    triggering = (await building.pushed(base)).reference
    image = await building.image(building.context(f"FROM {triggering}\n", told="by the base"))
    assert image.files()["done"] == b"by the base"


async def test_a_dockerfile_with_a_byte_order_mark_is_one(building: Building) -> None:
    context = building.context(f"{BOM}FROM scratch\nCOPY Dockerfile /\n")
    pushed = await building.pushed(context)
    assert set(StoredImage(pushed.reference).files()) == {"Dockerfile"}
    assert not pushed.has_command


@pytest.mark.parametrize(
    ("ignored", "kept"),
    [
        pytest.param(f"{BOM}secret.key\n", {"keep.log", "a/other.log"}, id="byte order mark"),
        pytest.param("# secret.key\n*.log\n", {"secret.key", "a/other.log"}, id="comment"),
        pytest.param("*\n!keep.log\n", {"keep.log"}, id="negation"),
        pytest.param("**/*.log\n!a/*.log\n", {"secret.key", "a/other.log"}, id="any depth"),
        pytest.param("  a  \n\n/secret.key\n", {"keep.log"}, id="spaces and a leading slash"),
    ],
)
async def test_ignored_files_are_not_in_the_image(
    building: Building, ignored: str, kept: set[str]
) -> None:
    context = building.context(
        "FROM scratch\nCOPY . /\n",
        **{".dockerignore": ignored, "secret.key": "s", "keep.log": "k", "a__other.log": "o"},
    )
    files = StoredImage((await building.pushed(context)).reference).files()
    assert files.keys() - {"Dockerfile", ".dockerignore"} == kept


async def test_options_after_two_dashes_go_to_the_builder(building: Building) -> None:
    (building.place / "token").write_text(TOKEN)
    context = building.context(
        f"FROM {building.base} AS first\n"
        f"ENV NOT_CACHED={building.template_id}\n"
        "RUN --mount=type=secret,id=token cp /run/secrets/token /told\n"
        "FROM scratch AS last\n"
    )
    secret = f"id=token,src={building.place}/token"
    image = await building.image(context, passed_on=("--secret", secret, "--target", "first"))
    assert image.files()["told"] == TOKEN.encode()


async def test_a_heredoc_is_built_or_refused_in_the_builder_s_own_words(building: Building) -> None:
    context = building.context(f"FROM {building.base}\nRUN <<E\necho one > /one\nE\n")
    ended = await building.cli("--dockerfile", str(context))
    if ended.code == 0:  # newer ones than Debian 12's
        building.api.ids.append(ended.out.strip())
        await building.api.ended(ended.out.strip())
        assert StoredImage(building.pulled()[-1]).files()["one"] == b"one\n"
        return
    assert ended.code == 1
    assert "unknown instruction" in ended.err.lower()
    assert building.pulled() == tags_of(building.registry.address, building.template_id) == []


async def test_a_file_elsewhere_is_built_with_the_directory_as_context(building: Building) -> None:
    context = building.context("FROM nowhere/nothing\n", page="of the context")
    other = building.place / "other.Dockerfile"
    other.write_text("FROM scratch\nCOPY page /\nCMD []\n")
    ended = await building.cli("-f", str(other), str(context))
    assert ended.code == 0, ended.err
    building.api.ids.append(ended.out.strip())
    assert (await building.api.ended(ended.out.strip())).state == "completed"
    assert StoredImage(building.pulled()[-1]).files() == {"page": b"of the context"}
    assert building.start_commands() == [""], "it has no command of its own"


async def test_a_start_command_of_the_user_s_own_wins(building: Building) -> None:
    context = building.context('FROM scratch\nCOPY Dockerfile /\nCMD ["/never"]\n')
    await building.built(context / "Dockerfile", "--start-command", "/mine")
    assert building.start_commands() == ["/mine"]


# ---- What goes wrong


async def test_a_step_that_fails_ends_in_its_own_words_and_starts_nothing(
    building: Building,
) -> None:
    context = building.context(f"FROM {building.base}\nRUN echo of no use >&2; exit 7\n")
    ended = await building.failed(context)
    assert ended.code == 1
    assert "of no use" in ended.err
    assert f"{building.name} could not build it" in ended.err
    assert ended.out == ""


async def test_a_registry_that_wants_a_login_is_named(building: Building, tmp_path: Path) -> None:
    context = building.context("FROM scratch\nCOPY Dockerfile /\n")
    (tmp_path / "closed").mkdir()
    nobody = "me:$2y$05$9PdAKmGf7vTx5BaLJKmHyeZ1WGDbBxgUWqj3n4YXmNRDpDGjJTYhO\n"
    with running_registry(tmp_path / "closed", htpasswd=nobody) as closed:
        ended = await building.failed(context, "--registry", closed.address)
        forget_images(closed.address)
    assert ended.code == 1
    assert f"{building.name} could not push {closed.address}/" in ended.err
    assert "Log in to the registry" in ended.err


async def test_a_request_that_would_be_refused_is_refused_before_anything_is_built(
    building: Building,
) -> None:
    ended = await building.failed(building.context("FROM nowhere/nothing\n"), "--memory", "511")
    assert ended.code == 2
    assert "511" in ended.err
    assert "nowhere" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name)
@pytest.mark.parametrize("building", [BuilderName.BUILDAH], indirect=True, ids=str)
async def test_leaving_stops_the_builder(building: Building, number: signal.Signals) -> None:
    context = building.context(
        f"FROM {building.base}\nRUN echo I am there; cat /tmp/../dev/zero > /dev/null\n"
    )
    command = ("build", "--dockerfile", str(context), "--builder", building.name)
    process = await started(*command, "--api-address", building.api.server.address)
    assert process.stderr is not None
    while b"I am there" not in await asyncio.wait_for(process.stderr.readline(), 30):
        pass
    process.send_signal(number)
    await asyncio.wait_for(process.communicate(), 30)  # the builder has its standard error, too
    assert process.returncode == 128 + number
    assert building.pulled() == []


async def test_an_api_of_an_earlier_version_wants_to_be_told_the_registry(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    server = grpc.aio.server()  # knows no rpc at all
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        ended = await cli("build", "--dockerfile", str(tmp_path), "--api-address", address)
    finally:
        await server.stop(None)
    assert ended.code == 2
    assert "--registry" in ended.err


async def test_without_a_builder_it_says_which_to_install(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    only_docker = tmp_path / "bin"
    only_docker.mkdir()
    build = ("build", "--dockerfile", str(tmp_path), "--api-address", api.server.address)
    none = await cli(*build, env={"PATH": str(only_docker)})
    assert none.code == 3
    for told in ("docker.io", "docker-buildx", "podman", "buildah", "--image"):
        assert told in none.err
    (only_docker / "docker").symlink_to(shutil.which("docker", path="/usr/bin") or "")
    away = {"PATH": str(only_docker), "DOCKER_HOST": "tcp://127.0.0.1:1"}
    unreachable = await cli(*build, env=away)
    assert unreachable.code == 3
    assert "Cannot connect to the Docker daemon" in " ".join(unreachable.err.split())
    assert api.journal.calls == []


async def test_a_docker_without_buildkit_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("docker", path="/usr/bin")
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    (first / "docker").write_text(
        f'#!/bin/sh\n[ "$1" = build ] && {{ echo no buildx >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (first / "docker").chmod(0o755)
    (second / "docker").symlink_to(str(real))
    monkeypatch.setenv("PATH", f"{first}{os.pathsep}{second}")
    assert (await find_builder()).path == str(second / "docker")
