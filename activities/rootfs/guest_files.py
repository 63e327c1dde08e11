"""What we put into a guest: everything under `/.template`, and what a bare image lacks.

It is staged in a directory that provisioning shows to a container of the image, and then written
into the root file system. Values that came from outside are files, never parts of a script.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from activities.contract.errors import (
    AgentMissingError,
    HostFaultError,
    ProvisioningError,
    StartCommandError,
)
from activities.contract.guest_network import GUEST_ADDRESS, HOST_NAME
from activities.contract.inputs import BuildRootfsInput
from activities.contract.requests import IMAGE_COMMAND
from activities.contract.results import ImageConfig
from activities.disk.namespaces import changed_root
from activities.image.containers import DEFAULT_PATH
from activities.process.settings import Settings

GUEST_FILES = Path(__file__).resolve().parent / "guest"


IN_GUEST = "/.template"


ROOT = Path("/")


ROOT_MODE = 0o755


LOADER = "ld.so"
# As ldd says it: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or the loader's path alone.
LINKED = re.compile(r"(?:(?P<name>\S+) => )?(?P<path>/\S+) \(0x[0-9a-f]+\)")
# As an image's command these ask for the image's init, not for a program beside it.
INITS = frozenset(
    {"/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"}
)


# Only provisioning needs these.
NOT_FOR_THE_GUEST = frozenset({"provision.sh", "image.user"})


# Mount points, and where Docker mounts files: it adds them to a container as well.
NEEDED_DIRECTORIES = ("proc", "sys", "dev", "etc")


@dataclass
class GuestFacts:
    """What provisioning found out about the image: the script's answers by key."""

    answers: dict[str, str] = field(default_factory=dict)

    @property
    def init_kind(self) -> str:
        """`systemd`, `other` or `added`."""
        return self.answers["init"].split(" ")[0]

    @property
    def agent_version(self) -> str:
        """The first line that the agent's `-version` printed, or ''."""
        return self.answers.get("agent", "")

    @property
    def has_shell(self) -> bool:
        """Whether the image has a `/bin/sh` of its own."""
        return "shell" in self.answers

    @property
    def is_complete(self) -> bool:
        """Whether the script said all that a guest needs."""
        return {"user", "home", "init"} <= self.answers.keys()


def guest_files_sha256(settings: Settings) -> str:
    """Return one hash over all that we put into a guest: scripts, busybox, agent.

    Raises AgentMissingError when the configured agent is not there.
    """
    digest = hashlib.sha256()
    programs = [settings.busybox_path, settings.guest_agent_path, *_setpriv_files().values()]
    for path in [*_own_files(), *programs]:
        if path is None:
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise _missing(path, settings) from None
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def stage_guest_files(directory: Path, settings: Settings, build: BuildRootfsInput) -> None:
    """Put into `directory` what the provisioning script and the guest need."""
    (directory / "bin").mkdir(parents=True)
    (directory / "run").mkdir()
    directory.chmod(0o755)
    for path in _own_files():
        _copy_in(path, directory / path.name, 0o755 if path.name == "init" else 0o644)
    _copy_in(settings.busybox_path, directory / "busybox", 0o755)
    (directory / "setpriv").mkdir()
    for name, path in _setpriv_files().items():
        _copy_in(path, directory / "setpriv" / name, 0o755)
    (directory / "bin" / "sh").symlink_to("../busybox")
    if settings.guest_agent_path:
        _copy_in(settings.guest_agent_path, directory / "agent", 0o755)
    _write_value(directory / "ready.command", build.ready_command)
    _write_value(directory / "image.user", build.image.config.user)
    _write_value(directory / "workdir", build.image.config.working_dir or "/")


def image_command(config: ImageConfig) -> tuple[str, ...]:
    """Return what a container of the image runs: ENTRYPOINT and CMD, as Docker reads them.

    Raises StartCommandError when the image has neither.
    """
    # Docker takes the entrypoint of a single empty word for none.
    entrypoint = () if config.entrypoint == ("",) else config.entrypoint
    words = (*entrypoint, *config.cmd)
    if not words:
        raise StartCommandError(
            "the image has neither ENTRYPOINT nor CMD",
            hint="Give a start command (CLI: --start-command) instead of 'image'.",
        )
    return words


def stage_answers(directory: Path, build: BuildRootfsInput, facts: GuestFacts) -> None:
    """Add what the guest needs of the provisioning script's answers, and the start command."""
    _write_value(directory / "user", facts.answers["user"] + "\n")
    _write_value(directory / "init.kind", facts.answers["init"] + "\n")
    variables = guest_environment(build.image.config, build.env, facts.answers["home"])
    if not facts.has_shell:
        _add_applets(directory)
    pairs = "".join(f"{name}={value}\0" for name, value in variables.items())
    _write_value(directory / "env", pairs, mode=0o600)
    _stage_start_command(directory, build, facts)


def _stage_start_command(directory: Path, build: BuildRootfsInput, facts: GuestFacts) -> None:
    if build.start_command != IMAGE_COMMAND:
        _write_value(directory / "start.command", build.start_command)
        return
    words = image_command(build.image.config)
    if words[0] in INITS and facts.init_kind != "added":
        return  # the image's command is its init, which the guest runs in any case
    _write_value(directory / "start.argv", "".join(f"{word}\0" for word in words))


def guest_environment(image: ImageConfig, extra: dict[str, str], home: str) -> dict[str, str]:
    """Return the commands' environment: Docker's defaults, the image's ENV, the request's."""
    defaults = {"PATH": DEFAULT_PATH, "HOME": home, "HOSTNAME": HOST_NAME}
    own = dict(variable.split("=", 1) for variable in image.env if "=" in variable)
    return defaults | own | extra


def add_to_root(root: Path, staged: Path, workdir: str, dns_server: str) -> list[str]:
    """Write the staged files and what a bare image lacks into a mounted root file system.

    Returns the paths that were added or filled. Call it inside `in_mount_namespace`: it changes
    the thread's root, so that a symlink in the image (`/etc` -> `/somewhere`) means a place in the
    image and never one on the host. Raises ProvisioningError when WORKDIR cannot be made.
    """
    content = _read_tree(staged)
    with changed_root(root), _times_kept(ROOT):
        ROOT.chmod(ROOT_MODE)
        _write_tree(content)
        added = [IN_GUEST, *_add_directories(), *_make_workdir(workdir)]
        with _times_kept(ROOT / "etc"):
            return added + _write_network_files(dns_server)


def _own_files() -> list[Path]:
    return sorted(path for path in GUEST_FILES.iterdir() if path.is_file())


@cache
def _setpriv_files() -> dict[str, Path]:
    """Return util-linux's setpriv and what it is linked with, by their names in the guest.

    It is what becomes a user by numbers alone, with all groups: busybox cannot, and an image may
    have no accounts at all. Started by its own loader it needs no library of the image. Raises
    HostFaultError when the host has none.
    """
    program = shutil.which("setpriv")
    if program is None:
        raise HostFaultError("this host has no setpriv", hint="apt-get install util-linux")
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    files = {"setpriv": Path(program).resolve()}
    for line in told.stdout.splitlines():
        found = LINKED.fullmatch(line.strip())
        if found and found["name"]:
            files[found["name"]] = Path(found["path"]).resolve()
        elif found:
            files[LOADER] = Path(found["path"]).resolve()
    return files


def _read_tree(staged: Path) -> list[tuple[str, int, bytes]]:
    """Return (path in the guest, mode, content or link target), parents before children."""
    tree = [(IN_GUEST, stat.S_IFDIR | 0o755, b"")]
    for path in sorted(staged.rglob("*")):
        name = str(path.relative_to(staged))
        mode = path.lstat().st_mode
        if name in NOT_FOR_THE_GUEST:
            continue
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        else:
            content = b"" if path.is_dir() else path.read_bytes()
        tree.append((f"{IN_GUEST}/{name}", mode, content))
    return tree


def _write_tree(tree: list[tuple[str, int, bytes]]) -> None:
    ours = Path(IN_GUEST)
    if ours.is_symlink() or ours.is_file():
        ours.unlink()
    shutil.rmtree(ours, ignore_errors=True)
    for name, mode, content in tree:
        path = Path(name)
        if stat.S_ISLNK(mode):
            path.symlink_to(os.fsdecode(content))
            continue
        if stat.S_ISDIR(mode):
            path.mkdir()
        else:
            path.write_bytes(content)
        path.chmod(stat.S_IMODE(mode))


def _add_directories() -> list[str]:
    added = []
    for name in NEEDED_DIRECTORIES:
        path = ROOT / name
        if not os.path.lexists(path):
            path.mkdir()
            path.chmod(ROOT_MODE)
            added.append(str(path))
    return added


def _make_workdir(workdir: str) -> list[str]:
    path = ROOT / workdir
    if path.is_dir():
        return []
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ProvisioningError(f"WORKDIR {workdir} cannot be made: {error.strerror}") from error
    return [workdir]


def _write_network_files(dns_server: str) -> list[str]:
    """Write what Docker mounts over in a container: there nobody sees the image's own either."""
    wanted = {
        "/etc/hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        f"{GUEST_ADDRESS}\t{HOST_NAME}\n",
        "/etc/hostname": f"{HOST_NAME}\n",
        "/etc/resolv.conf": f"nameserver {dns_server}\n",
    }
    return [name for name, content in wanted.items() if _replace(Path(name), content)]


def _replace(path: Path, content: str) -> bool:
    """Put a file in the place of whatever is there: a link or a device is not written through."""
    draft = path.with_name(f".template.{path.name}")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError:  # /etc is a file, or the path is a directory: the image wants it so
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        return False
    return True


@contextmanager
def _times_kept(directory: Path) -> Iterator[None]:
    try:
        before = directory.stat()
    except OSError:
        yield
        return
    yield
    os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))


def _write_value(path: Path, value: str, mode: int = 0o644) -> None:
    path.write_bytes(value.encode("utf-8", "surrogateescape"))
    path.chmod(mode)


def _copy_in(source: Path, target: Path, mode: int) -> None:
    status = source.stat()
    if stat.S_IMODE(status.st_mode) == mode and status.st_uid == 0:
        # As another name where that can be: it is only read, and takes no room beside the image.
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
    target.chmod(mode)


def _add_applets(directory: Path) -> None:
    done = subprocess.run(
        [directory / "busybox", "--list"], capture_output=True, text=True, check=True
    )
    for name in done.stdout.split():
        link = directory / "bin" / name
        if not os.path.lexists(link):
            link.symlink_to("../busybox")


def _missing(path: Path, settings: Settings) -> Exception:
    if path == settings.guest_agent_path:
        return AgentMissingError(f"the guest agent is not at {path}")
    return HostFaultError(
        f"the static busybox is not at {path}", hint="Install Debian's package busybox-static."
    )
