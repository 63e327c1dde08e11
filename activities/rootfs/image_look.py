"""What a guest must know of its image: the user, the init, the shell. Read from the image's files.

Nothing of the image runs. Imports only the standard library and `tenant_tree`: it runs in
`tree_look`, a child process.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from activities.disk.tenant_tree import RefusedTreeError, TenantTree, TooLargeError

ACCOUNTS_BYTES = 16 * 1024 * 1024
LINE_BYTES = 64 * 1024  # as long a line as Docker reads (Go's bufio.Scanner)
FSTAB_BYTES = 64 * 1024
FSTAB_LINES = 20
LARGEST_ID = (1 << 32) - 2
LARGEST_IN_USER = (1 << 31) - 1  # of an id that only USER has; Docker asks no more of files
NUMBER = re.compile(r"[+-]?[0-9]{1,100}", re.ASCII)
MAX_GROUPS = 65536  # setgroups(2)
SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
INIT = "/sbin/init"
RUNNABLE = (b"\x7fELF", b"#!")  # execve(2); a guest has no binfmt_misc of its own
# What is linked or copied to /sbin/init may be anything, such as tini: it ends with what it runs,
# and the kernel panics when the first process does. busybox and sysvinit live by their inittab.
INITS = frozenset({"openrc-init", "runit-init", "runit", "finit", "dinit"})
INITS_WITH_INITTAB = frozenset({"busybox", "init"})


class LookError(RefusedTreeError):
    """The image cannot be made a guest of, in words for its user."""


@dataclass(frozen=True)
class Look:
    """What was found. `user` is `<uid> <gid> <groups, or -> <name>`."""

    user: str
    home: str
    init_kind: str
    """`systemd`, `other` or `added`."""
    init_path: str
    has_shell: bool
    notes: list[str] = field(default_factory=list)
    """Lines for the build log."""
    init_word: int | None = None
    """Which word of the image's command is the init that the guest begins with; None for none."""


def look_at(
    tree: TenantTree, user: str, workdir: str, command: Sequence[str] = (), path: str = ""
) -> Look:
    """Look at an image whose config has this USER and WORKDIR, and perhaps a command and a PATH.

    Raises LookError when the image does not have the user or group, has a file in the place of
    WORKDIR, or has accounts or a WORKDIR that Docker does not take either.
    """
    if not workdir.startswith("/"):
        raise LookError(f"WORKDIR {workdir} is no absolute path; Docker does not run the image")
    try:
        account = _resolve_user(tree, user)
    except TooLargeError as error:
        raise LookError(str(error)) from None
    if tree.status(workdir) is not None and not tree.is_directory(workdir):
        raise LookError(f"WORKDIR {workdir} is not a directory in the image")
    notes: list[str] = []
    kind, init = _find_init(tree, notes)
    notes += _fstab_notes(tree)
    init_word = _find_word(tree, command, path, init) if kind != "added" else None
    has_shell = tree.is_program("/bin/sh")
    return Look(account.line, account.home, kind, init, has_shell, notes, init_word)


@dataclass
class _Account:
    """As Docker finds it (moby/sys/user, GetExecUser): the first entry counts."""

    uid: int
    gid: int = 0
    name: str = ""
    home: str = "/"
    groups: list[int] = field(default_factory=list)

    @property
    def line(self) -> str:
        groups = ",".join(map(str, self.groups)) or "-"
        return f"{self.uid} {self.gid} {groups} {self.name}"


def _resolve_user(tree: TenantTree, spec: str) -> _Account:
    wanted, _, group = spec.partition(":")
    account = _find_account(tree, wanted)
    if account is None:
        number = _number(wanted or "0")
        if number is None:
            raise LookError(f"USER {spec}: /etc/passwd of the image has no user {wanted}")
        account = _Account(_id(number, f"USER {spec}", LARGEST_IN_USER))
    if group:
        account.gid = _find_group(tree, spec, group)
    elif account.name:
        account.groups = _groups_of(tree, account.name)
    return account


def _find_account(tree: TenantTree, wanted: str) -> _Account | None:
    """Find a user by what USER says: a number is always a number, never a name."""
    number = _number(wanted or "0")
    for name, _, uid, gid, _, home, *_ in _entries(tree, "/etc/passwd", 7):
        has_id = _number(uid) or 0
        if has_id == number if number is not None else name == wanted:
            where = f"the user {name} in /etc/passwd of the image"
            return _Account(_id(has_id, where), _id(_number(gid) or 0, where), name, home)
    return None


def _find_group(tree: TenantTree, spec: str, wanted: str) -> int:
    number = _number(wanted)
    for name, _, gid, *_ in _entries(tree, "/etc/group", 4):
        has_id = _number(gid) or 0
        if has_id == number if number is not None else name == wanted:
            return _id(has_id, f"the group {name} in /etc/group of the image")
    if number is None:
        raise LookError(f"USER {spec}: /etc/group of the image has no group {wanted}")
    return _id(number, f"USER {spec}", LARGEST_IN_USER)


def _groups_of(tree: TenantTree, account: str) -> list[int]:
    found = []
    for name, _, gid, members, *_ in _entries(tree, "/etc/group", 4):
        if account in members.split(","):
            found.append(_id(_number(gid) or 0, f"the group {name} in /etc/group of the image"))
    if len(found) > MAX_GROUPS:
        raise LookError(
            f"{account} is in {len(found)} groups of the image; the kernel's limit is {MAX_GROUPS}"
        )
    return found


def _entries(tree: TenantTree, path: str, fields: int) -> Iterator[list[str]]:
    """Yield the entries of a file of accounts, with at least so many fields each."""
    content = tree.read(path, ACCOUNTS_BYTES) if _has_own_etc(tree) else None
    for number, line in enumerate((content or b"").split(b"\n"), 1):
        if len(line) > LINE_BYTES:
            raise LookError(
                f"line {number} of {path} of the image is {len(line)} bytes; the limit, which is "
                f"also Docker's, is {LINE_BYTES}"
            )
        if text := line.decode(errors="replace").strip():
            yield (text.split(":") + [""] * fields)[: max(fields, 7)]


def _number(text: str) -> int | None:
    """Read a number as Docker does (Go's strconv.Atoi); None when it is none, which counts as 0.

    int() takes more: blanks, underscores, other scripts' digits.
    """
    return int(text) if NUMBER.fullmatch(text) else None


def _id(number: int, where: str, largest: int = LARGEST_ID) -> int:
    if not 0 <= number <= largest:
        shown = str(number) if abs(number) < 10**20 else "a longer number"
        raise LookError(f"{where}: {shown} is no id between 0 and {largest}, as Docker has them")
    return number


def _find_init(tree: TenantTree, notes: list[str]) -> tuple[str, str]:
    for path in SYSTEMD:
        if _can_be_run(tree, path, notes):
            return "systemd", path
    if _can_be_run(tree, INIT, notes):
        real = tree.real_path(INIT) or INIT
        name = posixpath.basename(real)
        has_inittab = _has_own_etc(tree) and tree.status("/etc/inittab") is not None
        if name in INITS or (name in INITS_WITH_INITTAB and has_inittab):
            return "other", INIT
        shown = real.encode(errors="surrogateescape").decode(errors="replace")
        notes.append(f"{INIT} is no init that we know ({shown}): ours is used")
    return "added", ""


def _can_be_run(tree: TenantTree, path: str, notes: list[str]) -> bool:
    """Whether the kernel runs it: with a first process that it does not run it would panic."""
    if not tree.is_program(path):
        return False
    if tree.beginning(path, 4).startswith(RUNNABLE):
        return True
    notes.append(f"{path} is no program that a kernel runs: it is not taken for an init")
    return False


def _find_word(tree: TenantTree, command: Sequence[str], path: str, init: str) -> int | None:
    """Find the init in a command, which may be a line for a shell."""
    real = tree.real_path(init)
    for number, word in enumerate(command_words(command)):
        named = next((each for each in _meant(word, path) if tree.is_program(each)), "")
        is_name_enough = init in SYSTEMD or posixpath.basename(word) == posixpath.basename(INIT)
        if named and is_name_enough and tree.real_path(named) == real:
            return number
    return None


def is_shell_form(command: Sequence[str]) -> bool:
    """Whether a command is a line for a shell, as a Dockerfile makes it of CMD without brackets."""
    return tuple(command[:2]) == ("/bin/sh", "-c") and len(command) > 2


def command_words(command: Sequence[str]) -> Sequence[str]:
    """Return the words of a command, or of its line for a shell but for an `exec` before them."""
    if not is_shell_form(command):
        return command
    lexer = shlex.shlex(command[2], posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an open quote
        return []
    return words[1:] if words[:1] == ["exec"] else words


def _meant(word: str, path: str) -> list[str]:
    """Return which files a word of a command may mean, the first that is there counts."""
    if "/" in word:
        return [word] if word.startswith("/") else []
    return [f"{directory}/{word}" for directory in path.split(":") if directory.startswith("/")]


def _has_own_etc(tree: TenantTree) -> bool:
    """Whether /etc is a directory: Docker puts an empty one in the place of anything else."""
    return tree.is_real_directory("/etc")


def _fstab_notes(tree: TenantTree) -> list[str]:
    """Say that nothing of it is mounted, as in a container: its devices are not there."""
    if not _has_own_etc(tree):
        return []
    try:
        content = tree.read("/etc/fstab", FSTAB_BYTES) or b""
    except TooLargeError as error:
        return [f"{error}: it is not used, as in a container"]
    rows = [line.split() for line in content.decode(errors="replace").splitlines()]
    told = [row[:3] for row in rows if row and not row[0].startswith("#")]
    notes = [f"/etc/fstab is not used, as in a container: {' '.join(row)}" for row in told]
    left_out = len(notes) - FSTAB_LINES
    return notes[:FSTAB_LINES] + ([f"/etc/fstab: {left_out} more lines"] if left_out > 0 else [])
