"""Hosts that die, freeze, come back, or have more builds than slots."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.chaos import ChaosProduct
from tests.support.real_stack import nothing_left

OTHER = "host-b"
pytestmark = pytest.mark.timeout(400)


@contextmanager
def another_host(product: ChaosProduct) -> Iterator[Path]:
    """Have a second host; yields its data directory."""
    product.stack.start_app("host", OTHER)
    try:
        yield product.stack.environment.state_dir / f"data-{OTHER}"
    finally:
        product.stack.stop(OTHER)


def _signal_host(product: ChaosProduct, number: signal.Signals) -> None:
    """Signal the host's worker and all VMs of it: a machine that is suspended."""
    pids = [product.stack.pid("host")]
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(product.data_dir) + "/" in command or _works_in(process, product.data_dir):
            pids.append(process.pid)
    for pid in pids:
        if pid is not None:
            os.kill(pid, number)


def _works_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.cwd().startswith(f"{directory}/vms/")
    except psutil.Error:
        return False


@pytest.mark.full
@pytest.mark.parametrize("step", ["sending", "ready", "upload"])
def test_a_frozen_host_is_fenced_off(product: ChaosProduct, step: str) -> None:
    """Another host finishes the build; the frozen one, when it wakes, harms nothing."""
    with another_host(product) as other_data, nothing_left(product, product.data_dir, other_data):
        product.stack.stop(OTHER)  # so that the build is on the host that is frozen
        build_id = product.new_build_for(step)
        product.until(build_id, lambda status: bool(status["host"]))
        product.stack.restart(OTHER)
        assert product.hit(build_id, step, lambda: _signal_host(product, signal.SIGSTOP))
        try:
            status = product.ended_somehow(build_id)
            assert status["state"] == "completed", status
            assert status["host"] == OTHER
            assert product.cli("pull", build_id, str(other_data / "pulled")).code == 0
        finally:
            _signal_host(product, signal.SIGCONT)
        _swept(product)
        # What it published is untouched by the host that woke up.
        again = product.cli("pull", build_id, str(other_data / "pulled-again"))
        assert again.code == 0, again.err
        assert product.cli("delete", build_id).code == 0
        for name in ("pulled", "pulled-again"):
            for path in (other_data / name).iterdir():
                path.unlink()
            (other_data / name).rmdir()


def _swept(product: ChaosProduct) -> None:
    """Wait until the host that woke up has nothing of the build any more."""
    deadline = time.monotonic() + 90
    while any((product.data_dir / "vms").glob("*")) or any((product.data_dir / "leases").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.mark.full
@pytest.mark.parametrize("step", ["sending", "ready"])
def test_a_host_that_never_comes_back_costs_its_grace(product: ChaosProduct, step: str) -> None:
    with another_host(product) as other_data, nothing_left(product, product.data_dir, other_data):
        product.stack.stop(OTHER)
        build_id = product.new_build_for(step)
        product.until(build_id, lambda status: bool(status["host"]))
        product.stack.restart(OTHER)
        assert product.hit(build_id, step, lambda: product.kill("host"))
        began = time.monotonic()
        status = product.ended_somehow(build_id)
        assert status["state"] == "completed", status
        assert status["host"] == OTHER
        assert time.monotonic() - began < 90
        product.bring_back("host")
        _swept(product)
        assert product.cli("delete", build_id).code == 0


@pytest.mark.full
def test_two_builds_of_one_image_at_once(product: ChaosProduct) -> None:
    with nothing_left(product):
        more = ("--env", "TWIN=1", "--force")
        builds = [product.build(product.image, *more) for _ in range(2)]
        for build_id in builds:
            status = product.ended_somehow(build_id)
            assert status["state"] == "completed", status
            product.require_template(build_id)
        for build_id in builds:
            assert product.cli("delete", build_id).code == 0


@pytest.mark.full
def test_twenty_builds_with_two_slots(product: ChaosProduct) -> None:
    with nothing_left(product):
        first = product.build(product.image, "--env", "MANY=1")
        assert product.ended_somehow(first)["state"] == "completed"
        builds = [product.build(product.image, "--env", "MANY=1") for _ in range(20)]
        most = 0
        waiting = set(builds)
        deadline = time.monotonic() + 300
        while waiting:
            assert time.monotonic() < deadline, waiting
            most = max(most, len(list((product.data_dir / "leases").glob("*[0-9a-f]"))))
            listed = product.cli("list", "--state", "completed", "--limit", "100", "--json").out
            waiting = {build_id for build_id in waiting if build_id not in listed}
        assert most <= 2
        product.require_template(builds[-1])
        for build_id in [first, *builds]:
            assert product.cli("delete", build_id).code == 0
