"""Make the images of the demo and the tests, and push them to the dev stack's registry.

`python temporal-dev/images.py debian busybox alpine-like` leaves `<registry>/demo/<name>:latest`:

- `debian`: a minimal Debian with systemd as init,
- `busybox`: one static program and a page, no init, no shell links, no /etc,
- `alpine-like`: a busybox userland with its own init, as in Alpine, without OpenRC,
- `python`: a minimal Debian with Python, in the place of the public base of our own image.

In the first three `/bin/busybox httpd -f -p 8080 -h /srv` serves a page. A second run finds that
everything is there. The debootstraps are kept as tar files in the state directory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import requests
from devstack.environment import state_dir
from devstack.ports import StackPorts
from devstack.processes import ServiceError
from devstack.services import Progress, print_progress

from activities.disk.locks import locked

START_COMMAND = "/bin/busybox httpd -f -p 8080 -h /srv"
BUSYBOX = Path("/bin/busybox")
# The same input gives the same layer, whenever it is made.
MODIFIED = 1_700_000_000
LOCAL_REPOSITORY = "template-manager-dev"
DEBIAN_PACKAGES = "systemd-sysv,busybox"
PYTHON_PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """An image: its content and the configuration that Docker keeps beside it."""

    name: str
    # Writes or finds a tar file of the whole root file system.
    archive: Callable[[Progress], Path]
    changes: tuple[str, ...]
    recipe: Callable[[], str]


def page(name: str) -> bytes:
    """What the image's web server answers."""
    return f"<!doctype html><title>{name}</title><p>Hello from {name}.</p>\n".encode()


class Tree:
    """A tar file in the making, with every entry owned by root and dated alike."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w")  # noqa: SIM115  # closed by close()

    def close(self) -> None:
        """Finish the tar file."""
        self._tar.close()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        self._add(path, tarfile.DIRTYPE, mode)

    def file(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """Add a file."""
        self._add(
            path, tarfile.REGTYPE, mode, content if isinstance(content, bytes) else content.encode()
        )

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, tarfile.SYMTYPE, 0o777, target=target)

    def _add(
        self, path: str, kind: bytes, mode: int, content: bytes = b"", target: str = ""
    ) -> None:
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode, entry.mtime, entry.linkname = kind, mode, MODIFIED, target
        entry.size = len(content)
        self._tar.addfile(entry, io.BytesIO(content))


@contextmanager
def _tree(name: str) -> Iterator[tuple[Tree, Path]]:
    directory = _cache()
    path = directory / f"{name}.tar"
    tree = Tree(path)
    try:
        yield tree, path
    finally:
        tree.close()


def _cache() -> Path:
    directory = state_dir() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _static_busybox() -> bytes:
    if not BUSYBOX.exists():
        raise ServiceError(f"{BUSYBOX} is missing: install busybox-static, or run `make setup`.")
    return BUSYBOX.read_bytes()


def _archive_busybox(progress: Progress) -> Path:
    with _tree("busybox") as (tree, path):
        tree.directory("bin")
        tree.file("bin/busybox", _static_busybox(), 0o755)
        tree.directory("srv")
        tree.file("srv/index.html", page("busybox"))
    return path


ALPINE_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnobody:x:65534:\n",
    "etc/shadow": "root:*::0:::::\nnobody:!::0:::::\n",
    "etc/hostname": "alpine-like\n",
    "etc/profile": f"export {PATH}\n",
    "etc/os-release": 'ID=alpine-like\nNAME="alpine-like"\nPRETTY_NAME="alpine-like"\n',
    "etc/inittab": (
        "::sysinit:/bin/mount -o remount,rw /\n"
        "::sysinit:/bin/hostname -F /etc/hostname\n"
        "::ctrlaltdel:/sbin/reboot\n"
        "::shutdown:/bin/umount -a -r\n"
    ),
}
ALPINE_DIRECTORIES = (
    *("bin", "sbin", "usr", "usr/bin", "usr/sbin", "usr/local", "usr/local/bin"),
    *("dev", "etc", "home", "mnt", "proc", "run", "srv", "sys", "var", "var/log"),
)


def _archive_alpine_like(progress: Progress) -> Path:
    with _tree("alpine-like") as (tree, path):
        for directory in ALPINE_DIRECTORIES:
            tree.directory(directory)
        tree.directory("root", 0o700)
        tree.directory("tmp", 0o1777)
        tree.file("bin/busybox", _static_busybox(), 0o755)
        for applet in _applets():
            tree.link(applet, "/bin/busybox")
        for name, content in ALPINE_FILES.items():
            tree.file(name, content, 0o640 if name == "etc/shadow" else 0o644)
        tree.file("srv/index.html", page("alpine-like"))
    return path


def _applets() -> list[str]:
    listing = subprocess.run(
        [BUSYBOX, "--list-full"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    directories = set(ALPINE_DIRECTORIES)
    paths = {path if str(Path(path).parent) in directories else f"bin/{path}" for path in listing}
    return sorted(paths - {"bin/busybox"})


def _debian_suite() -> str:
    """The suite of this machine if it is a Debian, whose keys and mirror are then known."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return "stable"


def _archive_debian(progress: Progress) -> Path:
    def add_page(root: Path) -> None:
        (root / "srv/index.html").write_bytes(page("debian"))

    return _archive_debootstrap("debian", DEBIAN_PACKAGES, _debian_recipe(), add_page, progress)


def _archive_python(progress: Progress) -> Path:
    def trust_what_this_machine_trusts(root: Path) -> None:
        shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))

    return _archive_debootstrap(
        "python", PYTHON_PACKAGES, _python_recipe(), trust_what_this_machine_trusts, progress
    )


def _archive_debootstrap(
    name: str, packages: str, recipe: str, finish: Callable[[Path], None], progress: Progress
) -> Path:
    path = _cache() / f"{name}-{_hash(recipe)[:16]}.tar"
    with locked(_cache() / f"{name}.lock", lambda: None):  # another process may make the same
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=_cache(), prefix="debootstrap-") as work:
            root, draft = Path(work) / "root", Path(work) / "root.tar"
            _debootstrap(name, packages, root, progress)
            _clean(root)
            finish(root)
            progress(f"{name}: packing")
            pack = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=./dev/*"]
            subprocess.run([*pack, "-C", str(root), "-cf", str(draft), "."], check=True)
            draft.rename(path)
    return path


def _debootstrap(name: str, packages: str, root: Path, progress: Progress) -> None:
    if shutil.which("debootstrap") is None:
        raise ServiceError("debootstrap is not installed. Run `make setup`.")
    command = [*_debootstrap_command(packages), _debian_suite(), str(root)]
    phases, lines = set(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            # It tells of every package several times: the first of each kind is enough.
            if line.startswith("I: ") and (phase := line.split()[1]) not in phases:
                phases.add(phase)
                progress(f"{name}: {line[3:].strip()}")
    if child.returncode != 0:
        raise ServiceError("debootstrap failed:\n" + "".join(lines[-20:]))


def _debootstrap_command(packages: str) -> list[str]:
    return ["debootstrap", "--variant=minbase", f"--include={packages}"]


def _clean(root: Path) -> None:
    """What images of Debian leave out: package files, lists, and this machine's identity."""
    for pattern in ("var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*", "var/log/*.log"):
        for path in root.glob(pattern):
            path.unlink()
    for name in ("etc/machine-id", "etc/hostname", "etc/resolv.conf"):
        (root / name).write_text("")


def _debian_recipe() -> str:
    command = [*_debootstrap_command(DEBIAN_PACKAGES), _debian_suite()]
    return " ".join(command) + page("debian").decode()


def _python_recipe() -> str:
    command = [*_debootstrap_command(PYTHON_PACKAGES), _debian_suite()]
    return " ".join(command) + hashlib.sha256(CERTIFICATES.read_bytes()).hexdigest()


def _busybox_recipe() -> str:
    return hashlib.sha256(_static_busybox()).hexdigest() + page("busybox").decode()


def _alpine_recipe() -> str:
    return _busybox_recipe() + repr((ALPINE_FILES, ALPINE_DIRECTORIES))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


SERVE = f"CMD {json.dumps(START_COMMAND.split())}"
IMAGES = {
    image.name: image
    for image in (
        Image("debian", _archive_debian, (f"ENV {PATH}", SERVE), _debian_recipe),
        Image("busybox", _archive_busybox, (SERVE,), _busybox_recipe),
        Image("alpine-like", _archive_alpine_like, (f"ENV {PATH}", SERVE), _alpine_recipe),
        Image("python", _archive_python, (f"ENV {PATH}",), _python_recipe),
    )
}


def reference(name: str, registry: str) -> str:
    """Where an image is in a registry."""
    return f"{registry}/demo/{name}:latest"


def make(name: str, progress: Progress = print_progress) -> str:
    """Make an image unless Docker has it; the name that it has in Docker alone."""
    image = IMAGES[name]
    recipe = _hash(image.recipe() + "".join(image.changes))[:16]
    local = f"{LOCAL_REPOSITORY}/{name}:{recipe}"
    with contextlib.closing(docker.from_env(timeout=600)) as client:
        try:
            client.images.get(local)
        except docker.errors.ImageNotFound:
            _import(client, image, local, progress)
    return local


def make_and_push(name: str, registry: str, progress: Progress = print_progress) -> str:
    """Make an image unless Docker has it, push it unless the registry has it; its reference."""
    local, target = make(name, progress), reference(name, registry)
    with contextlib.closing(docker.from_env(timeout=600)) as client:
        client.images.get(local).tag(*target.rsplit(":", 1))
        if not _is_pushed(client, target):
            _push(client, target, progress)
        progress(f"{name}: {target} is there")
    return target


def _import(client: docker.DockerClient, image: Image, local: str, progress: Progress) -> None:
    archive = image.archive(progress)
    progress(f"{image.name}: importing {archive.stat().st_size / 1e6:.0f} MB into Docker")
    repository, _, tag = local.rpartition(":")
    client.api.import_image_from_file(
        str(archive), repository=repository, tag=tag, changes=[*image.changes]
    )


def _is_pushed(client: docker.DockerClient, target: str) -> bool:
    """Whether the registry's tag is the very image that Docker has here."""
    registry, _, rest = target.partition("/")
    repository, _, tag = rest.rpartition(":")
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    url = f"http://{registry}/v2/{repository}/manifests/{tag}"
    try:
        answer = requests.head(url, headers=accept, timeout=30)
    except requests.ConnectionError:
        raise ServiceError(
            f"no registry at {registry}: run `python temporal-dev/devstack up`."
        ) from None
    digest = answer.headers.get("Docker-Content-Digest", "none")
    known: list[str] = client.images.get(target).attrs.get("RepoDigests") or []
    return answer.ok and any(entry.endswith(f"@{digest}") for entry in known)


def _push(client: docker.DockerClient, target: str, progress: Progress) -> None:
    repository, _, tag = target.rpartition(":")
    shown = ""
    for event in client.api.push(repository, tag, stream=True, decode=True):
        if "error" in event:
            raise ServiceError(f"push of {target} failed: {event['error']}")
        if shown != (shown := _push_step(event, shown)):
            progress(f"{target}: {shown}")


def _push_step(event: dict[str, Any], shown: str) -> str:
    """Progress in steps of a fifth: a line for each of Docker's events would be too many."""
    detail = event.get("progressDetail") or {}
    if event.get("status") != "Pushing" or not detail.get("total"):
        return shown
    fifth = min(5, int(detail["current"] * 5 / detail["total"]))
    return f"pushing layer {event['id']} of {detail['total'] / 1e6:.0f} MB: {fifth * 20} %"


def main() -> int:
    """Provide the named images, all of them by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}")
    parser.add_argument(
        "--keep", action="store_true", help="only keep their files here, without Docker"
    )
    arguments = parser.parse_args()
    names = arguments.names or list(IMAGES)
    if unknown := set(names) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}")
    registry = f"127.0.0.1:{StackPorts.from_environment().registry}"
    try:
        for name in names:
            if arguments.keep:
                print(IMAGES[name].archive(print_progress))
            else:
                print(make_and_push(name, registry))
    except (ServiceError, docker.errors.DockerException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
