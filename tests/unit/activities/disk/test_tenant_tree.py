"""A hostile tree opens nothing but regular files and directories, and leads nowhere else."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from activities.disk.tenant_tree import TenantTree, TooLargeError, open_directory, open_file

SECRET = b"of the host"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_bytes(SECRET)
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "tree"
    (place / "etc").mkdir(parents=True)
    return place


@pytest.fixture
def tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TenantTree]:
    if os.geteuid() != 0:  # files become root's; who is not root cannot give them away
        monkeypatch.setattr(os, "fchown", lambda *_: None)
    with TenantTree(root) as opened:
        yield opened


def put_odd_things(root: Path) -> dict[str, Path]:
    """What is no regular file of the tree, by what it is."""
    etc = root / "etc"
    os.mkfifo(etc / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(etc / "socket"))
    (etc / "loop").symlink_to("loop")
    (etc / "nowhere").symlink_to("/not/there")
    (etc / "device").symlink_to("/dev/zero")
    (etc / "to-process").symlink_to("/proc/self/environ")
    (etc / "above").symlink_to("../../outside")
    (etc / "absolute").symlink_to(root.parent / "outside")
    (etc / "directory").mkdir()
    return {path.name: path for path in etc.iterdir()}


def test_nothing_but_a_regular_file_is_read(root: Path, tree: TenantTree) -> None:
    for name in put_odd_things(root):
        assert tree.read(f"/etc/{name}", 1000) is None, name
        assert not tree.is_program(f"/etc/{name}")


def test_odd_things_are_replaced_and_not_written_through(root: Path, tree: TenantTree) -> None:
    odd = put_odd_things(root)
    del odd["directory"]
    for name, path in odd.items():
        assert tree.replace(f"/etc/{name}", b"ours\n"), name
        assert path.read_bytes() == b"ours\n"
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o644
    assert (root.parent / "outside").read_bytes() == SECRET
    assert not [path for path in (root / "etc").iterdir() if path.name.startswith(".template")]


def test_a_directory_is_not_replaced(root: Path, tree: TenantTree) -> None:
    put_odd_things(root)
    assert not tree.replace("/etc/directory", b"ours\n")
    assert not tree.replace("/not-there/file", b"ours\n")
    assert (root / "etc/directory").is_dir()
    assert not list((root / "etc").glob(".template*"))


def test_a_link_means_a_place_in_the_tree(root: Path, tree: TenantTree) -> None:
    """As in a container of the image: absolute ones too, and `..` ends at its root."""
    (root / "usr").mkdir()
    (root / "usr/passwd").write_bytes(b"the image's")
    (root / "etc/passwd").symlink_to("/usr/passwd")
    (root / "etc/up").symlink_to("../../../../usr/passwd")
    assert tree.read("/etc/passwd", 100) == b"the image's"
    assert tree.read("/etc/up", 100) == b"the image's"
    assert tree.read("../../etc/passwd", 100) == b"the image's"
    assert tree.real_path("/etc/up") == "/usr/passwd"
    assert tree.real_path("/etc/none") is None
    assert tree.real_path("/") == "/"


def test_what_is_written_stays_in_the_tree(root: Path, tree: TenantTree) -> None:
    outside = root.parent / "elsewhere"
    (root / "srv").symlink_to(outside)
    (root / "up").symlink_to("../elsewhere")
    assert not tree.replace("/srv/file", b"x")
    for path in ("/srv/work", "/up/work"):
        with pytest.raises(OSError, match="File exists"):
            tree.make_directory(path)
    with pytest.raises(OSError, match="No such file"):
        tree.add_file("/srv/file", io.BytesIO(b"x"), 0o644)
    with pytest.raises(OSError, match="No such file"):
        tree.add_link("/up/link", "x")
    assert list(outside.iterdir()) == []


def test_directories_are_made_by_what_is_there(root: Path, tree: TenantTree) -> None:
    (root / "var").symlink_to("etc")
    assert tree.make_directory("/var/lib/app//./data/../more")
    assert (root / "etc/lib/app/more").is_dir()
    assert not tree.make_directory("/etc/lib")
    (root / "etc/file").touch()
    for path in ("/etc/file", "/etc/file/below"):
        with pytest.raises(OSError):
            tree.make_directory(path)


def test_a_file_is_not_added_over_another(root: Path, tree: TenantTree) -> None:
    (root / "etc/there").symlink_to("/etc/target")
    with pytest.raises(FileExistsError):
        tree.add_file("/etc/there", io.BytesIO(b"x"), 0o755)
    tree.add_file("/etc/new", io.BytesIO(b"x"), 0o751)
    assert (root / "etc/new").stat().st_mode & 0o777 == 0o751


def test_reading_ends_at_the_limit(root: Path, tree: TenantTree) -> None:
    (root / "etc/passwd").write_bytes(b"x" * 1001)
    os.truncate(root / "etc/passwd", 1 << 40)
    with pytest.raises(TooLargeError, match=r"1099511627776 bytes; the limit is 1000"):
        tree.read("/etc/passwd", 1000)


@pytest.mark.parametrize("path", ["", "/", ".", "..", "a" * 300, "/".join("a" * 5000), "a\0b"])
def test_no_path_is_too_odd(tree: TenantTree, path: str) -> None:
    assert tree.read(path, 10) is None
    tree.status(path)


def test_a_walk_goes_through_no_link(root: Path) -> None:
    (root / "link").symlink_to("etc")
    (root / "etc/file").touch()
    (root / "etc/up").symlink_to("file")
    os.mkfifo(root / "etc/fifo")
    top = os.open(root, os.O_RDONLY)
    for path in (b"link", b"etc/../..", b"/etc/../../tree"):
        with pytest.raises(OSError):
            open_directory(top, path)
    directory = open_directory(top, b"etc")
    os.close(open_file(directory, b"file"))
    for name in (b"up", b"fifo", b"../etc/file/"):
        with pytest.raises(OSError):
            open_file(directory, name)
    os.close(directory)
    os.close(top)
