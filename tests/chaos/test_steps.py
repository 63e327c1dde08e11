"""Steps of a request while processes are killed: the same files, and no step lost but that one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from activities.contract.names import ArtifactName, Step
from activities.disk.data_dir import DataDir
from activities.step.checkpoints import CheckpointStore
from api.pb import template_manager_pb2 as pb
from tests.support.chaos import ChaosProduct
from tests.support.file_trees import Entry, tree_of_ext4
from tests.support.real_stack import nothing_left

pytestmark = [pytest.mark.timeout(900), pytest.mark.full]

STEPS = (
    pb.TemplateStep(type="RUN", args=["sleep 2; echo one >/one; ln /one /also; sleep 1000 &"]),
    pb.TemplateStep(type="USER", args=["1234"]),
    pb.TemplateStep(type="WORKDIR", args=["/srv/made"]),
    pb.TemplateStep(
        type="RUN", args=["sleep 2; id -u >user; ps | grep -c '[s]leep 1000' >found; :"]
    ),
    pb.TemplateStep(type="RUN", args=["sleep 2; cat user found >>/srv/made/all; chmod 700 ."]),
)
# The first step is an ENV of the case's own.
PIECES = ("step 2: ", "step 5: ", "step 6: ", "the template's own files")


@pytest.fixture(scope="module")
def expected(product: ChaosProduct, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    """What the steps leave when nothing is killed."""
    build_id = product.build_with_steps(*STEPS)
    status = product.ended_somehow(build_id, 300)
    assert status["state"] == "completed", status
    files = files_of(product, build_id, tmp_path_factory.mktemp("expected"))
    assert product.cli("delete", build_id).code == 0
    return files


@pytest.mark.parametrize("process", ["host", "worker", "temporal", "firecracker"])
def test_a_kill_in_each_step_changes_no_file_and_loses_that_step_alone(
    product: ChaosProduct, expected: dict[str, Entry], process: str, tmp_path: Path
) -> None:
    with nothing_left(product):
        build_id = product.build_with_steps(*STEPS)
        for piece in PIECES:
            wait_for(product, build_id, piece)
            product.kill(process)
            product.bring_back(process)
        status = product.ended_somehow(build_id, 400)
        assert status["state"] == "completed", status
        begun = begun_pieces(product, build_id)
        assert set(begun) == set(PIECES)
        # Whatever has been done is never done again, however often the next one begins.
        assert begun == sorted(begun, key=PIECES.index)
        assert files_of(product, build_id, tmp_path) == expected
        assert product.cli("delete", build_id).code == 0


def wait_for(product: ChaosProduct, build_id: str, piece: str) -> None:
    """Wait until a piece of work has begun."""
    deadline = time.monotonic() + 300
    while piece not in begun_pieces(product, build_id):
        assert time.monotonic() < deadline, piece
        time.sleep(0.05)


def begun_pieces(product: ChaosProduct, build_id: str) -> list[str]:
    """Return which pieces of work have begun, one after the other, by the log on the host."""
    log = DataDir(product.data_dir).log(build_id)
    lines = log.read_text().splitlines() if log.exists() else []
    messages = [str(json.loads(line)["message"]) for line in lines if line.endswith("}")]
    begun = [message for message in messages if " used again" not in message]
    return [piece for message in begun for piece in PIECES if message.startswith(piece)]


def files_of(product: ChaosProduct, build_id: str, place: Path) -> dict[str, Entry]:
    """Return what the disk of the steps has, without times and the template's own files."""
    store = CheckpointStore(DataDir(product.data_dir), "host")
    kept = [kept for kept in store.all() if kept.path.parent.name == Step.ROOTFS]
    last = max((kept for kept in kept if build_id in kept.users), key=lambda kept: kept.used_at)
    tree = tree_of_ext4(last.path / ArtifactName.ROOTFS, place / "tree")
    return {
        name: replace(entry, mtime_ns=0)
        for name, entry in tree.items()
        if not name.startswith("/.template")
    }
