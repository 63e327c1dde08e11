"""From root to the VMM's own small world, and into the VMM: between its supervisor and itself.

Usage: `vm_launcher.py PLAN [ARGUMENT…]`, in the VM's own directory, whose file PLAN says what to do
(see `launch`). It joins the VM's cgroups and makes a mount namespace of its own, in which `/fc-vm`
is the VM's files, `/dev` has what a VMM needs and nothing else, and `/proc` shows the VMM's own
processes; all else is read-only. Then it becomes the VMM, by setpriv: another user, no capability,
no way to any. The host sees nothing of this but an empty `/fc-vm`, and all of it ends with the VMM.

So begins also what carries the VM's way to the internet; its world is smaller still.

Standard library only, as its supervisor.
"""

import ctypes
import json
import os
import stat
import sys

CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 0x20, 0x1000, 0x4000, 0x80000
# linux/mount.h and fcntl.h; the number of the call is the same on every architecture.
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
FLAGS = {"ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}
UMASK = 0o077
# Name, and the numbers that the kernel gives it everywhere (Documentation/admin-guide/devices.txt).
DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "kvm": (10, 232),
    "net/tun": (10, 200),
}

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind or source} on {target}: {os.strerror(code)}")


def join_cgroups(directories: list[str]) -> None:
    """Have this process, and what it becomes, count in these cgroups."""
    for directory in directories:
        with open(f"{directory}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")


def leave_host() -> None:
    """Take a mount namespace whose mounts nobody else sees; unmounts of the host still come. And
    one of System V's shared memory, which would stay when its makers have ended."""
    if _libc.unshare(CLONE_NEWNS | CLONE_NEWIPC) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"unshare mounts and shared memory: {os.strerror(code)}")
    mount("none", "/", "", MS_REC | MS_SLAVE)


def make_read_only() -> None:
    """Have all that is mounted read-only: everybody may write to some directories of a host."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    flags = ctypes.c_uint(AT_RECURSIVE)
    if _libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", flags, attributes, size) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"make the host's files read-only: {os.strerror(code)}")


def make_directory(path: str) -> None:
    """Have a directory that everybody may enter."""
    if not os.path.isdir(path):  # noqa: PTH112 # pathlib would double the start-up time
        os.mkdir(path, 0o755)  # noqa: PTH102 # as above


def bind(source: str, target: str, flags: int) -> None:
    """Show a file or directory at another place, with these flags."""
    mount(source, target, "", MS_BIND)
    mount("none", target, "", MS_REMOUNT | MS_BIND | flags)


def make_devices(user: int, names: list[str]) -> None:
    """Mount a `/dev` with these alone, owned by a user."""
    mount("dev", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k")
    make_directory("/dev/net")
    for name in names:
        numbers = DEVICES[name]
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o600, os.makedev(*numbers))
        os.chown(f"/dev/{name}", user, user)


def close_world(user: int, devices: list[str], hidden: list[str]) -> None:
    """Leave what is not the VMM's business out of the host's root, which is its own, too."""
    plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount("proc", "/proc", "proc", plain, "hidepid=2")
    make_devices(user, devices)
    for directory in hidden:
        mount("none", directory, "tmpfs", MS_RDONLY | plain, "mode=0,size=4k")


def show_alone(directory: str, files: dict[str, str]) -> None:
    """Cover a directory; of its files these alone are seen, as they are now: name and content."""
    mount("none", directory, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,size=1m")
    for name, content in files.items():
        with open(f"{directory}/{name}", "w", encoding="utf-8") as file:
            file.write(content)


def launch(plan_file: str, arguments: list[str]) -> None:
    """Become the VMM. Raises OSError.

    The plan has `user` (its uid and gid), `cgroups` (directories), `mounts` (source, target,
    `FLAGS`), `directory` (where the VMM begins) and `command`, whose first word is a path; the
    arguments follow it. `root` is the jail that the command is about to enter: it has a world of
    its own; '' is none, and then it can write to `mounts` alone, and sees of `/dev` the `devices`
    alone, of directories in `alone` their files there alone, and nothing of the directories
    `hidden`.
    """
    with open(plan_file, encoding="utf-8") as file:
        plan = json.load(file)
    os.umask(0o022)
    join_cgroups(plan["cgroups"])
    leave_host()
    make_directory(plan["root"] + plan["directory"])
    if not plan["root"]:
        make_read_only()
    for source, target, flags in plan["mounts"]:
        bind(source, target, sum(FLAGS[flag] for flag in flags))
    if not plan["root"]:
        close_world(plan["user"], plan["devices"], plan["hidden"])
        for directory, files in plan["alone"].items():
            show_alone(directory, files)
        os.chdir(plan["directory"])
    os.umask(UMASK)
    command = [*plan["command"], *arguments]
    os.execve(command[0], command, {})  # noqa: S606 # no shell is wanted


if __name__ == "__main__":
    try:
        launch(sys.argv[1], sys.argv[2:])
    except OSError as error:
        sys.exit(f"it cannot be started: {error}")
