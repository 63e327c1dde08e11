"""An image's user, init and shell, as a container of it would have them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from activities.disk.tenant_tree import TenantTree
from activities.rootfs.image_look import ACCOUNTS_BYTES, Look, LookError, look_at

ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235:App:/home/app:/bin/sh\n4242:x:7:8::/n:\n"
GROUPS = "root:x:0:\napp:x:1235:\nextra:x:4321:other,app\nwheel:x:10:root,app\n"


def look(root: Path, user: str = "", workdir: str = "/", command: tuple[str, ...] = ()) -> Look:
    with TenantTree(root) as tree:
        return look_at(tree, user, workdir, command, "/usr/bin:/sbin:relative:")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(ACCOUNTS)
    (tmp_path / "etc/group").write_text(GROUPS)
    return tmp_path


@pytest.mark.parametrize(
    ("user", "line", "home"),
    [
        ("", "0 0 10 root", "/root"),
        ("root", "0 0 10 root", "/root"),
        ("app", "1234 1235 4321,10 app", "/home/app"),
        ("1234", "1234 1235 4321,10 app", "/home/app"),
        ("app:wheel", "1234 10 - app", "/home/app"),
        ("app:77", "1234 77 - app", "/home/app"),
        ("app:", "1234 1235 4321,10 app", "/home/app"),
        (":wheel", "0 10 - root", "/root"),
        ("99", "99 0 -", "/"),
        ("99:98", "99 98 -", "/"),
        ("4242", "4242 0 -", "/"),  # a number is no name, though somebody has it
        ("7", "7 8 - 4242", "/n"),
        ("app:4242", "1234 4242 - app", "/home/app"),
        ("01234", "1234 1235 4321,10 app", "/home/app"),
        ("+1234", "1234 1235 4321,10 app", "/home/app"),
        ("00", "0 0 10 root", "/root"),
        ("2147483647", "2147483647 0 -", "/"),
    ],
)
def test_a_user_is_found_as_docker_finds_it(root: Path, user: str, line: str, home: str) -> None:
    found = look(root, user)
    assert (found.user.rstrip(), found.home) == (line, home)


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("ghost", "/etc/passwd of the image has no user ghost"),
        ("app:ghosts", "/etc/group of the image has no group ghosts"),
        ("2147483648", "2147483648 is no id between 0 and 2147483647"),
        ("99:99999999999999999999", "no id between"),
        ("-1", "-1 is no id between"),
        ("1" * 200, "no user 1111"),
        ("٣", "no user ٣"),
        ("1_0", "no user 1_0"),
    ],
)
def test_a_user_that_is_not_there_is_named(root: Path, user: str, why: str) -> None:
    with pytest.raises(LookError, match=why):
        look(root, user)


@pytest.mark.parametrize(
    ("passwd", "line", "home"),
    [
        (" \t app:x:1:2::/h:/bin/sh\r", "1 2 - app", "/h"),
        ("\r\n\r\napp:x:1:2::/h\r\n", "1 2 - app", "/h"),
        ("app:x:1:2:::/bin/sh", "1 2 - app", ""),
        ("app:x:1", "1 0 - app", ""),
        ("app:x:4294967294:1::/h", "4294967294 1 - app", "/h"),
        ("app", "0 0 - app", ""),
        ("app:x:abc:def::/h", "0 0 - app", "/h"),
        ("app:x:1_0:0x1::/h", "0 0 - app", "/h"),
        ("app:x:0012:٣::/h", "12 0 - app", "/h"),
        ("app:x:1:2:a:/h:/bin/sh:more:and:more", "1 2 - app", "/h"),
    ],
)
def test_odd_accounts_are_read_as_docker_reads_them(
    root: Path, passwd: str, line: str, home: str
) -> None:
    (root / "etc/passwd").write_text(passwd)
    (root / "etc/group").write_text("")
    found = look(root, "app")
    assert (found.user, found.home) == (line, home)


def test_odd_groups_are_read_as_docker_reads_them(root: Path) -> None:
    (root / "etc/group").write_text(" a:x:7:app \r\nb:x:zz:other,app\nc:x:9\n:x:10:app,\n")
    assert look(root, "app").user == "1234 1235 7,0,10 app"


@pytest.mark.parametrize("uid", ["-1", "4294967295", "99999999999", "9" * 99])
def test_an_id_that_docker_does_not_take_is_refused(root: Path, uid: str) -> None:
    (root / "etc/passwd").write_text(f"app:x:{uid}:0::/:\n")
    with pytest.raises(LookError, match="no id between"):
        look(root, "app")


def test_an_image_without_accounts(tmp_path: Path) -> None:
    assert look(tmp_path, "").user == "0 0 - "
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")
    (tmp_path / "etc/group").symlink_to("/dev/zero")
    assert look(tmp_path, "5:6").user == "5 6 - "


def test_accounts_are_read_to_a_limit(root: Path) -> None:
    os.truncate(root / "etc/passwd", 200 << 20)
    with pytest.raises(LookError, match=rf"{200 << 20} bytes; the limit is {ACCOUNTS_BYTES}"):
        look(root, "app")
    (root / "etc/passwd").write_text(ACCOUNTS)
    (root / "etc/group").write_text("g:x:1:" + "m," * 40_000)
    with pytest.raises(LookError, match="80006 bytes; the limit"):
        look(root, "app")


def test_a_million_groups_take_no_time(root: Path) -> None:
    lines = (f"g{n}:x:{n % 60_000}:" for n in range(1_000_000))
    (root / "etc/group").write_text("\n".join(lines)[: ACCOUNTS_BYTES - 20] + "\nlast:x:5:app\n")
    began = time.monotonic()
    assert look(root, "app").user == "1234 1235 5 app"
    assert time.monotonic() - began < 30


def test_an_account_in_too_many_groups(root: Path) -> None:
    (root / "etc/group").write_text("g:x:1:app\n" * 70_000)
    with pytest.raises(LookError, match="70000 groups of the image; the kernel's limit is 65536"):
        look(root, "app")


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)


def test_systemd_is_the_init(root: Path) -> None:
    program(root / "usr/lib/systemd/systemd")
    (root / "lib").symlink_to("usr/lib")
    found = look(root)
    assert (found.init_kind, found.init_path) == ("systemd", "/usr/lib/systemd/systemd")


def test_an_init_is_known_by_what_it_is(root: Path) -> None:
    program(root / "bin/busybox")
    (root / "sbin").mkdir()
    (root / "sbin/init").symlink_to("/bin/busybox")
    found = look(root)
    assert (found.init_kind, found.init_path) == ("added", "")
    assert found.notes == ["/sbin/init is no init that we know (/bin/busybox): ours is used"]
    (root / "etc/inittab").touch()
    assert look(root).init_kind == "other"


def test_a_pipe_is_no_init_and_no_shell(root: Path) -> None:
    for name in ("sbin/init", "usr/lib/systemd/systemd", "bin/sh"):
        (root / name).parent.mkdir(parents=True)
        os.mkfifo(root / name, 0o777)
        (root / name).chmod(0o777)
    found = look(root)
    assert (found.init_kind, found.has_shell, found.notes) == ("added", False, [])


@pytest.mark.parametrize("content", [b"", b"ELF", b"echo x\n"])
@pytest.mark.parametrize("path", ["usr/lib/systemd/systemd", "sbin/init"])
def test_what_the_kernel_does_not_run_is_no_init(root: Path, path: str, content: bytes) -> None:
    program(root / path)
    (root / path).write_bytes(content)
    (root / "etc/inittab").touch()
    found = look(root)
    assert found.init_kind == "added"
    told = f"/{path} is no program that a kernel runs: it is not taken for an init"
    assert found.notes == [told]


def test_a_directory_is_no_init(root: Path) -> None:
    (root / "lib/systemd/systemd").mkdir(parents=True)
    assert look(root).init_kind == "added"


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("/sbin/init",), 0),
        (("init",), 0),
        (("/usr/lib/systemd/systemd", "--unit=basic.target"), 0),
        (("/bin/sh", "-c", "exec /sbin/init"), 0),
        (("/bin/sh", "-c", "/sbin/init --log-level=info"), 0),
        (("/usr/local/bin/entrypoint", "/sbin/init"), 1),
        (("/bin/sh", "-c", "mkdir -p /run/x;exec init"), 5),
        (("/bin/sh", "-c", "echo 'an open quote"), None),
        (("/bin/sh", "-c"), None),
        (("httpd", "-f"), None),
        (("/bin/init",), None),  # there is none
        ((), None),
    ],
)
def test_the_init_is_found_in_a_command(
    root: Path, command: tuple[str, ...], word: int | None
) -> None:
    program(root / "usr/lib/systemd/systemd")
    (root / "sbin").mkdir()
    (root / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
    assert look(root, command=command).init_word == word


def test_a_program_beside_busybox_s_init_is_not_the_init(root: Path) -> None:
    program(root / "usr/bin/busybox")
    (root / "sbin").mkdir()
    for name in ("usr/bin/sh", "sbin/init"):
        (root / name).symlink_to("/usr/bin/busybox")
    assert look(root, command=("/sbin/init",)).init_word is None  # it is none without an inittab
    (root / "etc/inittab").touch()
    assert look(root, command=("/sbin/init",)).init_word == 0
    assert look(root, command=("sh",)).init_word is None


def test_what_is_no_directory_at_etc_has_no_accounts(root: Path) -> None:
    (root / "etc/fstab").write_text("a b c\n")
    (root / "etc").rename(root / "else")
    (root / "etc").symlink_to("else")
    assert look(root).notes == []
    assert look(root).user == "0 0 - "
    with pytest.raises(LookError, match="no user app"):
        look(root, "app")


def test_a_workdir_that_docker_refuses_is_refused(root: Path) -> None:
    with pytest.raises(LookError, match="WORKDIR srv/x is no absolute path"):
        look(root, workdir="srv/x")


def test_a_workdir_that_is_a_file_is_refused(root: Path) -> None:
    (root / "srv").touch()
    with pytest.raises(LookError, match="WORKDIR /srv is not a directory"):
        look(root, workdir="/srv")
    os.mkfifo(root / "pipe")
    with pytest.raises(LookError, match="WORKDIR /pipe is not a directory"):
        look(root, workdir="/pipe")


def test_fstab_is_told_not_used(root: Path) -> None:
    (root / "etc/fstab").write_text("# comment\n\nLABEL=x /boot vfat defaults 0 1\n")
    assert look(root).notes == ["/etc/fstab is not used, as in a container: LABEL=x /boot vfat"]
    (root / "etc/fstab").write_text("a b c\n" * 500)
    assert look(root).notes[-1] == "/etc/fstab: 480 more lines"
    os.truncate(root / "etc/fstab", 1 << 30)
    assert "the limit is 65536" in look(root).notes[0]
