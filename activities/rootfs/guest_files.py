"""What we put into a guest: everything under `/.template`, and what a bare image lacks.

It is staged in a directory, from where `tree_fill` writes it into the root file system. Values that
came from outside are files, never parts of a script.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from activities.contract.errors import (
    AgentMissingError,
    HostFaultError,
    StartCommandError,
)
from activities.contract.guest_network import HOST_NAME
from activities.contract.inputs import BuildRootfsInput
from activities.contract.requests import IMAGE_COMMAND
from activities.contract.results import ImageConfig
from activities.disk.limited_child import (
    READS_ANY,
    ChildLimits,
    ChildTimeoutError,
    run_limited,
)
from activities.disk.programs import child_environment
from activities.disk.taken_along import with_libraries
from activities.image.containers import DEFAULT_PATH
from activities.process.settings import Settings
from activities.rootfs.image_look import Look, is_shell_form

# Of a program in Go, as E2B's agent is, which starts threads and reserves addresses at once.
AGENT_LIMITS = ChildLimits(seconds=20, memory_mb=2048, threads=64)
# Go's garbage collector starts up to a thread for each processor: on a large host more than these.
FEW_PROCESSORS = {"GOMAXPROCS": "4"}
GUEST_FILES = Path(__file__).resolve().parent / "guest"


# Programs that a guest gets, and the Debian packages that have them.
TOOLS = {"setpriv": "util-linux", "env": "coreutils", "nice": "coreutils", "dd": "coreutils"}


def guest_files_sha256(settings: Settings) -> str:
    """Return one hash over all that we put into a guest: scripts, busybox, agent.

    Raises AgentMissingError when the configured agent is not there.
    """
    digest = hashlib.sha256()
    programs = [settings.busybox_path, settings.guest_agent_path, *_tools().values()]
    for path in [*_own_files(), *programs]:
        if path is None:
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise _missing(path, settings) from None
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def stage_programs(directory: Path, settings: Settings) -> None:
    """Put into `directory` what is the same in all guests: our scripts, the programs they use."""
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    for name in ("bin", "run", "tools"):
        (directory / name).mkdir()
        (directory / name).chmod(0o755)  # whatever the umask is
    for path in _own_files():
        copy_in(path, directory / path.name, 0o755 if path.name == "init" else 0o644)
    copy_in(settings.busybox_path, directory / "busybox", 0o755)
    for name, path in _tools().items():
        copy_in(path, directory / "tools" / name, 0o755)
    (directory / "bin" / "sh").symlink_to("../busybox")
    if settings.guest_agent_path:
        copy_in(settings.guest_agent_path, directory / "agent", 0o755)


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


def asked_command(build: BuildRootfsInput) -> tuple[tuple[str, ...], str]:
    """Return the image's own command, where it is the start command, and the PATH it is found by.

    Raises StartCommandError as `image_command` does.
    """
    if build.start_command != IMAGE_COMMAND:
        return (), ""
    config = build.image.config
    return image_command(config), guest_environment(config, build.env, "")["PATH"]


def stage_image_files(directory: Path, settings: Settings, look: Look) -> None:
    """Put into `directory` what every guest of an image needs."""
    stage_programs(directory, settings)
    write_value(directory / "init.kind", f"{look.init_kind} {look.init_path}".strip() + "\n")
    if not look.has_shell:
        _add_applets(directory)


def stage_request(directory: Path, build: BuildRootfsInput, look: Look) -> list[str]:
    """Put into `directory` what a guest is told by its request, and by the image's config.

    Returns what is to be said of it. Raises StartCommandError.
    """
    write_value(directory / "ready.command", build.ready_command)
    write_value(directory / "workdir", build.image.config.working_dir or "/")
    write_value(directory / "user", f"{look.user}\n")
    variables = guest_environment(build.image.config, build.env, look.home)
    pairs = "".join(f"{name}={value}\0" for name, value in variables.items())
    write_value(directory / "env", pairs, mode=0o600)
    return _stage_start_command(directory, build, look)


def _stage_start_command(directory: Path, build: BuildRootfsInput, look: Look) -> list[str]:
    if build.start_command != IMAGE_COMMAND:
        write_value(directory / "start.command", build.start_command)
        return []
    words = image_command(build.image.config)
    if look.init_word is None:
        write_value(directory / "start.argv", "".join(f"{word}\0" for word in words))
        return []
    if look.init_word > 0:
        raise StartCommandError(
            f"the image's command starts its init by another program: {shlex.join(words)}; a guest "
            f"begins with its init ({look.init_path})",
            hint="Give a start command (CLI: --start-command) for what runs beside the init, and "
            "let a unit of the init prepare what that program does.",
        )
    # The image's command is its init, which the guest runs in any case.
    if len(words) == 1 or is_shell_form(words):
        return []
    return [f"the image's command is its init: its arguments are not used: {shlex.join(words[1:])}"]


def agent_version(settings: Settings, check: Callable[[], None]) -> str:
    """Return the first line that the configured agent's `-version` prints; '' without an agent.

    It runs on this host: it is the operator's, and static. Raises AgentMissingError when it is not
    there, does not run, or tells no version where that is required.
    """
    agent = settings.guest_agent_path
    if agent is None:
        return ""
    try:
        end = run_limited(
            [agent, "-version"],
            AGENT_LIMITS,
            check,
            capabilities=READS_ANY,
            environment=FEW_PROCESSORS,
        )
    except ChildTimeoutError as error:
        raise AgentMissingError(f"the agent does not run: {error}") from None
    said = (end.output + end.errors).decode(errors="replace").strip()
    if end.code != 0:
        raise AgentMissingError(f"the agent does not run: {said[-400:]} (exit code {end.code})")
    version = said.partition("\n")[0]
    if settings.require_guest_agent and not version:
        raise AgentMissingError("the agent tells no version, which is required")
    return version


def guest_environment(image: ImageConfig, extra: dict[str, str], home: str) -> dict[str, str]:
    """Return the commands' environment: Docker's defaults, the image's ENV, the request's."""
    defaults = {"PATH": DEFAULT_PATH, "HOME": home, "HOSTNAME": HOST_NAME}
    return defaults | image.variables | extra


def _own_files() -> list[Path]:
    return sorted(path for path in GUEST_FILES.iterdir() if path.is_file())


def _tools() -> dict[str, Path]:
    """Return the host's programs that start a command, and what they are linked with, by name.

    setpriv becomes a user by numbers alone, with all groups: busybox cannot, and an image may have
    no accounts at all. env starts what the image's PATH leads to: busybox starts its own applets.
    dd tells how much of a flood of output it has taken away.
    Raises HostFaultError when the host has one of them not.
    """
    files: dict[str, Path] = {}
    for name, package in TOOLS.items():
        files |= with_libraries(name, package)
    return files


def write_value(path: Path, value: str, mode: int = 0o644) -> None:
    """Write a file that scripts of ours read: it came from outside and is no part of a script."""
    path.write_bytes(value.encode("utf-8", "surrogateescape"))
    path.chmod(mode)


def copy_in(source: Path, target: Path, mode: int) -> None:
    """Put a file of the host among the staged ones, under another name where that can be."""
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
        [directory / "busybox", "--list"],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
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
