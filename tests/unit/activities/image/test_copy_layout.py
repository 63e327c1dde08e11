from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from activities.contract.errors import ImageStepError
from activities.image.copy_layout import CopyInstruction, lay_out
from tests.support.copied_files import tar_of_files

DIRECTORIES = {"/", "/srv", "/srv/there"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    (root / "src/sub").mkdir(parents=True)
    (root / "src/main.py").write_text("main")
    (root / "src/main.py").chmod(0o755)
    (root / "src/sub/more.py").write_text("more")
    (root / "src/link").symlink_to("main.py")
    (root / "a.txt").write_text("a")
    (root / "b.txt").write_text("b")
    names = ["src", "src/main.py", "src/sub", "src/sub/more.py", "src/link", "a.txt", "b.txt"]
    tar_of_files(root, names, tmp_path / "files.tar")
    return tmp_path / "files.tar"


def laid_out(files: Path, copy: CopyInstruction) -> dict[str, tarfile.TarInfo]:
    target = files.with_name("laid-out.tar")
    lay_out(files, copy, target, lambda path: path.rstrip("/") in DIRECTORIES, lambda: None)
    with tarfile.open(target) as opened:
        return {entry.name: entry for entry in opened.getmembers()}


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("a.txt", "/x", {"x"}),
        ("a.txt", "/x/", {"x/a.txt"}),
        ("a.txt", "/srv/there", {"srv/there/a.txt"}),
        ("*.txt", "/x/", {"x/a.txt", "x/b.txt"}),
        ("src", "/x", {"x/main.py", "x/sub", "x/sub/more.py", "x/link"}),
        (
            "src/",
            "/srv/there",
            {"srv/there/main.py", "srv/there/sub", "srv/there/sub/more.py", "srv/there/link"},
        ),
        ("src/sub", "/x", {"x/more.py"}),
        ("src/*", "/x/", {"x/main.py", "x/more.py", "x/link"}),
    ],
)
def test_copy_puts_things_where_docker_does(
    files: Path, source: str, destination: str, expected: set[str]
) -> None:
    assert set(laid_out(files, CopyInstruction(source, destination))) == expected


def test_everything(files: Path) -> None:
    found = laid_out(files, CopyInstruction(".", "/app/"))
    assert {"app/src/main.py", "app/a.txt"} <= set(found)


def test_owner_and_mode(files: Path) -> None:
    plain = laid_out(files, CopyInstruction("src", "/x"))
    assert (plain["x/main.py"].mode, plain["x/main.py"].uid) == (0o755, 0)
    assert plain["x/link"].linkname == "main.py"
    given = laid_out(files, CopyInstruction("src", "/x", 7, 8, "0640"))
    assert {(e.uid, e.gid) for e in given.values()} == {(7, 8)}
    assert given["x/main.py"].mode == 0o640


def test_nothing_that_fits_is_an_error(files: Path) -> None:
    with pytest.raises(ImageStepError, match="nothing"):
        laid_out(files, CopyInstruction("nothing", "/x"))


def test_an_entry_outside_is_refused(tmp_path: Path) -> None:
    files = tmp_path / "files.tar"
    with tarfile.open(files, "w") as opened:
        opened.addfile(tarfile.TarInfo("../../etc/passwd"))
    with pytest.raises(ImageStepError, match="outside"):
        laid_out(files, CopyInstruction(".", "/x"))
