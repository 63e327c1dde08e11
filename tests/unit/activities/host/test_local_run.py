"""What `run` does with a template's files before it resumes them, and how it is stopped."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from activities.contract.errors import TemplateDamagedError
from activities.contract.names import ArtifactName
from activities.disk.cgroups import Limits
from activities.disk.data_dir import DataDir
from activities.host.local_run import LocalTemplate, stop_signal
from activities.microvm.launching import Launch
from tests.support.example_template import metadata

SIZE = 9 * 1024 * 1024


@pytest.fixture(autouse=True)
def hangup_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_it_so_that_it_cleans_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopped.wait(10)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_under_nohup_it_goes_on() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signal() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stopped.wait(0.1)


@pytest.fixture
def template(tmp_path: Path) -> LocalTemplate:
    told = metadata()
    artifacts = {}
    for name in ArtifactName:
        content = os.urandom(4096) + bytes(SIZE - 4096)
        (tmp_path / name).write_bytes(content)
        values = {"size_bytes": SIZE, "sha256": hashlib.sha256(content).hexdigest()}
        artifacts[name] = told.artifacts[name].model_copy(update=values)
    told = told.model_copy(update={"artifacts": artifacts})
    launch = Launch(tmp_path, Limits(memory_mb=1, cpus=1, processes=1), range(1))
    return LocalTemplate(tmp_path, told, launch, DataDir(tmp_path / "data"), 30)


def test_all_files_are_read_and_told_to_their_end(template: LocalTemplate) -> None:
    told: dict[str, tuple[int, int]] = {}
    template.check(lambda name, done, total: told.update({name: (done, total)}))
    assert told == {f"checking {name}": (SIZE, SIZE) for name in ArtifactName}


@pytest.mark.parametrize("name", ArtifactName)
@pytest.mark.parametrize("place", [0, SIZE // 2, SIZE - 1])
def test_a_single_bit_that_has_flipped_is_told(
    template: LocalTemplate, name: ArtifactName, place: int
) -> None:
    with (template.directory / name).open("r+b") as file:
        file.seek(place)
        bit = file.read(1)[0] ^ 1
        file.seek(place)
        file.write(bytes([bit]))
    with pytest.raises(TemplateDamagedError, match=f"{name} is not what was built"):
        template.check()


def test_a_file_that_the_disk_does_not_give_back_is_told(template: LocalTemplate) -> None:
    (template.directory / "memfile").unlink()
    with pytest.raises(TemplateDamagedError, match="memfile cannot be read: No such file"):
        template.check()
