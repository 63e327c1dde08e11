"""What each step means, to E2B and to Docker: one row, one test, in real guests.

Those that are not marked `whole` run with all tests, the others by `make test-guest`.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import images
import pytest
import pytest_asyncio
from devstack.registry import Layer, Registry

from activities.contract.errors import ImageStepError
from activities.contract.image_steps import (
    Add,
    Arg,
    Copy,
    Env,
    ImageStep,
    Meaning,
    Run,
    User,
    Workdir,
)
from activities.contract.results import PulledImage
from activities.disk.ext4 import check_filesystem
from activities.store.bucket import Bucket
from tests.support.copied_files import uploaded_files
from tests.support.file_trees import Entry
from tests.support.step_checks import go_on
from tests.support.step_host import StepHost, base_of, read
from tests.support.vm_host import vm_host

pytestmark = pytest.mark.counts_host

PASSWD = b"root:x:0:0::/root:/bin/sh\nweb:x:1234:1235::/home/web:/bin/sh\n"
GROUP = b"root:x:0:\nstaff:x:50:\nweb:x:77:\nown:x:1235:"
PROFILE = b"export PROFILE=read\n"
TOLD = "/tmp/told"


@pytest_asyncio.fixture
async def host(tmp_path: Path, empty_bucket: Bucket) -> AsyncIterator[StepHost]:
    async with vm_host(tmp_path / "data") as made:
        yield StepHost(made, empty_bucket, tmp_path)


@dataclass(frozen=True)
class Row:
    """A row of the tables: steps, and what they leave."""

    name: str
    steps: tuple[ImageStep, ...]
    e2b: Mapping[str, object] = field(default_factory=dict)
    """What is found at paths of the disk, as `found` tells it; None is nothing."""
    docker: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Those of each COPY and ADD, with `__` for a slash."""
    short: bool = False


@dataclass(frozen=True)
class Owned:
    """A file or directory by its owner, group and mode."""

    uid: int
    gid: int
    mode: int | None = None


def run(command: str, **more: Any) -> Run:
    return Run(command=command, **more)


def copy(source: str, destination: str, **more: Any) -> Copy:
    return Copy(source=source, destination=destination, files_sha256="0" * 64, **more)


def tell(words: str) -> Run:
    return run(f'echo "{words}" >>{TOLD}')


MANY = {"src__a.py": "a", "src__sub__b.py": "b", "src__sub__deep__c.py": "c"}
ROWS = [
    Row(
        "a RUN is run by a login shell where there is bash, as the default user",
        (run(f'shopt -q login_shell && echo "$BASH $PROFILE $(busybox id -un)" >{TOLD}'),),
        e2b={TOLD: "/bin/bash read user\n", "/home/user": Owned(1000, 1000, 0o755)},
        short=True,
    ),
    Row(
        "a RUN is run by /bin/sh to Docker, as the image's user",
        (tell("${BASH:-sh} $(busybox id -un) $(pwd) $HOME ${PROFILE:-unread}"),),
        docker={TOLD: "sh root / /root unread\n", "/home/user": None},
    ),
    Row(
        "a RUN is run in the default directory",
        (tell("$(pwd) $HOME"),),
        e2b={TOLD: "/home/user /home/user\n"},
    ),
    Row(
        "a RUN is run as its second argument",
        (tell("1"), run(f"busybox id -u >/tmp/root; pwd >>{TOLD}", user="root")),
        e2b={"/tmp/root": "0\n", TOLD: "1\n/home/user\n"},
        docker={"/tmp/root": "0\n", TOLD: "1\n/\n"},
    ),
    Row(
        "variables stand for what was set so far, that of the image included",
        (
            Env(variables=(("A", "$A:${A}2"), ("B", "$NONE|"))),
            Arg(variables=(("C", "$A+"),)),
            Env(variables=(("D", "$C$B"),)),
            Workdir(path="/srv/$A"),
            tell("$A $B $C $D $(pwd)"),
        ),
        e2b={TOLD: "image:image2 | image:image2+ image:image2+| /srv/image:image2\n"},
        docker={TOLD: "image:image2 | image:image2+ image:image2+| /srv/image:image2\n"},
    ),
    Row(
        "a WORKDIR is made, with those above it, and owned by the current user",
        (
            run("busybox mkdir -p /srv && busybox chown 50:50 /srv", user="root"),
            User(name="web"),
            Workdir(path="/srv/one/two"),
            tell("$(pwd)"),
        ),
        e2b={
            "/srv": Owned(50, 50),
            "/srv/one": Owned(1234, 1235, 0o755),
            "/srv/one/two": Owned(1234, 1235, 0o755),
            TOLD: "/srv/one/two\n",
        },
        docker={
            "/srv": Owned(50, 50),
            "/srv/one": Owned(1234, 1235, 0o755),
            "/srv/one/two": Owned(1234, 1235, 0o755),
            TOLD: "/srv/one/two\n",
        },
    ),
    Row(
        "a USER that the image lacks is made, with its group and home",
        (User(name="me"), tell("$(busybox id -un) $(busybox id -gn) $HOME"), Workdir(path="/me")),
        e2b={
            TOLD: "me me /home/me\n",
            "/home/me": Owned(1001, 1001, 0o755),
            "/home/me/.of-skel": Owned(1001, 1001),
            "/me": Owned(1001, 1001),
            "/etc/passwd": f"{PASSWD.decode()}user:x:1000:1000::/home/user:/bin/bash\n"
            "me:x:1001:1001::/home/me:/bin/bash\n",
            "/etc/group": f"{GROUP.decode()}\nuser:x:1000:\nme:x:1001:\n",
        },
    ),
    Row(
        "the default user and one with a second argument have sudo without a password",
        (User(name="web", sudo="true"), User(name="other", sudo="false"), tell("1")),
        e2b={
            "/etc/sudoers": "# sudo's own\nuser ALL=(ALL:ALL) NOPASSWD: ALL\n"
            "web ALL=(ALL:ALL) NOPASSWD: ALL\n"
        },
    ),
    Row(
        "a USER has sudo to Docker where its second argument says so",
        (User(name="web", sudo="true"), tell("1")),
        docker={"/etc/sudoers": "# sudo's own\nweb ALL=(ALL:ALL) NOPASSWD: ALL\n"},
    ),
    Row(
        "a COPY belongs to the current user",
        (User(name="web"), copy("one", "/srv/one"), copy("one", "here")),
        files={"one": "1"},
        e2b={
            "/srv/one": Owned(1234, 77),
            "/home/user/here": Owned(1234, 77),
        },
        docker={"/srv/one": Owned(0, 0), "/here": Owned(0, 0)},
        short=True,
    ),
    Row(
        "a name alone means the group of its name",
        (copy("one", "/one", owner="web"), copy("one", "/two", owner="web:staff")),
        files={"one": "1"},
        e2b={"/one": Owned(1234, 77), "/two": Owned(1234, 50)},
        docker={"/one": Owned(1234, 1235), "/two": Owned(1234, 50)},
    ),
    Row(
        "a COPY has the mode that it is given",
        (copy("src", "/app", mode="0711"),),
        files=MANY,
        e2b={"/app/a.py": Owned(1000, 1000, 0o711), "/app/sub": Owned(1000, 1000, 0o711)},
        docker={"/app/a.py": Owned(0, 0, 0o711)},
    ),
    Row(
        "links in a destination are followed, and stay",
        (copy("one", "/var/run/one"), copy("src", "/var/run/dir")),
        files={"one": "1", **MANY},
        e2b={"/run/one": "1", "/run/dir/a.py": "a", "/var/run": "/run"},
        docker={"/run/one": "1", "/run/dir/a.py": "a", "/var/run": "/run"},
    ),
    Row(
        "a ** keeps sub-directories",
        (copy("src/**/*.py", "/app/"), copy("*", "/all/")),
        files=MANY,
        e2b={
            "/app/a.py": "a",
            "/app/sub/b.py": "b",
            "/app/sub/deep/c.py": "c",
            "/all/src/sub/b.py": "b",
        },
        docker={"/app/b.py": "b", "/app/sub": None, "/all/a.py": "a"},
    ),
    Row(
        "a directory's content is copied, a file under its new name or into a directory",
        (copy("src", "/app"), copy("one", "/renamed"), copy("one", "/app/"), copy("one", "/tmp")),
        files={"one": "1", **MANY},
        e2b={"/app/sub/b.py": "b", "/renamed": "1", "/app/one": "1", "/tmp/one": "1"},
        docker={"/app/sub/b.py": "b", "/renamed": "1", "/app/one": "1", "/tmp/one": "1"},
    ),
]


def found(disk: Path, tree: Mapping[str, Entry], path: str, expected: object) -> object:
    """Return what is at a path, in the words of what is expected there."""
    entry = tree.get(path)
    if entry is None:
        return None
    if isinstance(expected, Owned):
        return Owned(entry.uid, entry.gid, None if expected.mode is None else entry.mode)
    if entry.kind == "symlink":
        return entry.content
    return read(disk, path) if entry.kind == "file" else entry.kind


async def require(host: StepHost, image: PulledImage, row: Row, meaning: Meaning) -> None:
    sha256 = uploaded_files(host.bucket, host.place, row.files) if row.files else ""
    steps = [
        step.model_copy(update={"files_sha256": sha256}) if isinstance(step, Copy | Add) else step
        for step in row.steps
    ]
    made = await host.build(image, *steps, meaning=meaning)
    disk, tree = host.disk(made), host.tree(made)
    check_filesystem(disk, go_on)
    expected = row.e2b if meaning is Meaning.E2B else row.docker
    there = {path: found(disk, tree, path, value) for path, value in expected.items()}
    assert there == dict(expected)


def cases(meaning: Meaning) -> list[Any]:
    is_e2b = meaning is Meaning.E2B
    rows = [row for row in ROWS if (row.e2b if is_e2b else row.docker)]
    return [
        pytest.param(row, id=row.name, marks=[] if row.short and is_e2b else pytest.mark.whole)
        for row in rows
    ]


async def with_bash(host: StepHost, registry: Registry) -> PulledImage:
    """An image with bash, sudo's file and accounts of its own, and a link in /var."""
    layer = Layer().directory("etc/skel").add("etc/skel/.of-skel", b"").busybox()
    layer.symlink("bin/sh", "busybox").add("etc/sudoers", b"# sudo's own\n", mode=0o440)
    layer.add("etc/passwd", PASSWD).add("etc/group", GROUP).add("etc/profile", PROFILE)
    layer.directory("run").directory("var").symlink("var/run", "/run")
    layer.directory("home").directory("tmp", mode=0o1777)
    for path in bash_files():
        layer.add(str(path).lstrip("/"), path.read_bytes(), mode=0o755)
    config = {"Env": ["A=image", "PATH=/usr/bin:/bin"]}
    registry.push("steps-bash", [layer.tar()], config=config)
    return await host.host.bench.pull(f"{registry.address}/steps-bash")


def bash_files() -> list[Path]:
    """Return this machine's bash and what it is linked with."""
    told = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    return [Path("/bin/bash"), *(Path(word) for word in told.split() if word.startswith("/"))]


@pytest.mark.parametrize("row", cases(Meaning.E2B))
async def test_to_e2b(host: StepHost, registry: Registry, row: Row) -> None:
    await require(host, await with_bash(host, registry), row, Meaning.E2B)


@pytest.mark.parametrize("row", cases(Meaning.DOCKER))
async def test_to_docker(host: StepHost, registry: Registry, row: Row) -> None:
    await require(host, await with_bash(host, registry), row, Meaning.DOCKER)


@pytest.mark.whole
async def test_without_bash_a_run_is_run_by_sh(host: StepHost, registry: Registry) -> None:
    """And without sudo, shadow and skel the user is made all the same."""
    image = await base_of(host, registry)
    row = Row("", (tell("$(busybox id -un) $(pwd)"),), e2b={TOLD: "user /home/user\n"})
    await require(host, image, row, Meaning.E2B)


@pytest.mark.whole
@pytest.mark.parametrize("meaning", Meaning)
async def test_without_any_shell_a_run_is_refused_and_a_copy_done(
    host: StepHost, registry: Registry, meaning: Meaning
) -> None:
    registry.push("steps-none", [Layer().add("static", b"x").tar()])
    image = await host.host.bench.pull(f"{registry.address}/steps-none")
    copied = {"/srv/one": "1"}
    row = Row("", (copy("one", "/srv/one"),), e2b=copied, docker=copied, files={"one": "1"})
    await require(host, image, row, meaning)
    with pytest.raises(ImageStepError, match="the image has no /bin/sh"):
        await host.build(image, run("true"), meaning=meaning)


@pytest.mark.whole
async def test_in_an_image_with_systemd(host: StepHost, registry: Registry) -> None:
    """The user is made, bash is its shell, and a service is used in the RUN that starts it."""
    with closing(docker.from_env(timeout=600)) as client:
        repository = f"{registry.address}/meaning-systemd"
        client.images.get(images.make("debian")).tag(repository, "latest")
        client.images.push(repository, "latest")
        client.images.remove(f"{repository}:latest")
    image = await host.host.bench.pull(repository)
    unit = "[Service]\\nExecStart=/bin/sleep 1000\\n"
    start = f'printf "{unit}" >/etc/systemd/system/web.service && systemctl start web'
    made = await host.build(
        image,
        run(f"{start} && systemctl is-active web >/first", user="root"),
        tell("$(id -un) $(pwd) ${BASH:+bash}"),
        meaning=Meaning.E2B,
        disk_size_mb=64,
        timeout_seconds=240,
    )
    assert read(host.disk(made), "/first") == "active\n"
    assert read(host.disk(made), TOLD) == "user /home/user bash\n"


@pytest.mark.whole
@pytest.mark.parametrize("meaning", Meaning)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
async def test_an_add_unpacks_a_tar_to_docker_alone(
    host: StepHost, registry: Registry, meaning: Meaning, pack: Callable[[bytes], bytes]
) -> None:
    image = await base_of(host, registry)
    files = files_with_an_archive(host, pack)
    added = Add(source=".", destination="/all", files_sha256=files)
    steps = [added, Add(source="packed", destination="/here/", files_sha256=files)]
    made = await host.build(image, *steps, meaning=meaning)
    tree = host.tree(made)
    # A directory is copied as it is, whatever is in it.
    assert tree["/all/packed"].kind == "file"
    assert read(host.disk(made), "/all/plain") == "not a tar\n"
    if meaning is Meaning.E2B:
        assert tree["/here/packed"].kind == "file"
        return
    assert "/here/packed" not in tree
    assert read(host.disk(made), "/here/in/side") == "of the archive"
    assert (tree["/here/in/side"].uid, tree["/here/in/side"].mode) == (42, 0o640)


def files_with_an_archive(host: StepHost, pack: Callable[[bytes], bytes]) -> str:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("in/side")
        entry.size, entry.uid, entry.gid, entry.mode = len(b"of the archive"), 42, 43, 0o640
        archive.addfile(entry, io.BytesIO(b"of the archive"))
    contents = {"packed": pack(packed.getvalue()), "plain": b"not a tar\n"}
    return uploaded_files(host.bucket, host.place, contents)
