"""Putting our files, and what a bare image lacks, into a root file system.

Imports only the standard library and `tenant_tree`: it runs in `tree_fill`, a child process.
"""

from __future__ import annotations

import stat
from pathlib import Path

from activities.contract.guest_network import GUEST_ADDRESS, HOST_NAME
from activities.disk.tenant_tree import RefusedTreeError, TenantTree

IN_GUEST = "/.template"
# Mount points, and where Docker mounts files: it adds them to a container as well.
NEEDED_DIRECTORIES = ("/proc", "/sys", "/dev", "/etc")
MTAB = "/etc/mtab"
HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
ff00::0\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


class WorkdirError(RefusedTreeError):
    """WORKDIR cannot be made, in words for its user."""


def add_to_root(tree: TenantTree, staged: Path, dns_server: str) -> list[str]:
    """Write the staged files and what a bare image lacks into a root file system.

    Returns the paths that were added or filled. Nothing may stand at IN_GUEST. Raises OSError.
    """
    with tree.times_kept("/"):
        tree.set_mode("/", 0o755)
        _add_staged(tree, staged)
        added = [IN_GUEST]
        added += [path for path in NEEDED_DIRECTORIES if tree.make_real_directory(path)]
        with tree.times_kept("/etc"):
            return added + _write_network_files(tree, dns_server)


def add_request(tree: TenantTree, staged: Path, workdir: str) -> list[str]:
    """Write what a guest is told by its request beside what `add_to_root` has written.

    Returns the paths that were added elsewhere. Raises WorkdirError, and OSError.
    """
    with tree.times_kept("/"):
        for path in sorted(staged.iterdir()):
            with path.open("rb") as source:
                tree.add_file(f"{IN_GUEST}/{path.name}", source, stat.S_IMODE(path.stat().st_mode))
        return _make_workdir(tree, workdir)


def _add_staged(tree: TenantTree, staged: Path) -> None:
    tree.make_directory(IN_GUEST)
    for path in sorted(staged.rglob("*")):  # parents before children
        name = f"{IN_GUEST}/{path.relative_to(staged)}"
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            tree.add_link(name, str(path.readlink()))
        elif stat.S_ISDIR(mode):
            tree.make_directory(name, mode=stat.S_IMODE(mode))
        else:
            with path.open("rb") as source:
                tree.add_file(name, source, stat.S_IMODE(mode))


def _make_workdir(tree: TenantTree, workdir: str) -> list[str]:
    try:
        return [workdir] if tree.make_directory(workdir) else []
    except OSError as error:
        raise WorkdirError(f"WORKDIR {workdir} cannot be made: {error.strerror}") from error


def _write_network_files(tree: TenantTree, dns_server: str) -> list[str]:
    """Write what Docker has in a container over the image's own, which nobody sees there either."""
    wanted = {
        "/etc/hosts": f"{HOSTS}{GUEST_ADDRESS}\t{HOST_NAME}\n",
        "/etc/hostname": f"{HOST_NAME}\n",
        "/etc/resolv.conf": f"nameserver {dns_server}\n",
    }
    written = [name for name, content in wanted.items() if tree.replace(name, content.encode())]
    return written + ([MTAB] if tree.replace_by_link(MTAB, "/proc/mounts") else [])
