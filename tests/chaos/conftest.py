"""Chaos: the short form runs with all tests, the whole one by `make chaos`.

Each cell of the table tells what was done to which process during which step, and how it ended.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.chaos import CELLS, Cell, ChaosProduct, running_chaos_product

RESULTS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", choices=("short", "full"), default="short", help="how much chaos")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "full":
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        full = metafunc.config.getoption("--chaos") == "full"
        cells = [cell for cell in CELLS if not cell.not_run and (full or cell.short)]
        metafunc.parametrize("cell", cells, ids=[cell.name for cell in cells])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined] # pluggy's hooks have no types
    cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")  # type: ignore[attr-defined] # pytest's own, without a type
    if isinstance(cell, Cell) and (report.when == "call" or report.failed):
        told = dict(item.user_properties).get("ended", "")
        item.config.stash[RESULTS][cell.name] = "FAILED" if report.failed else str(told)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("chaos: what was killed during which step, and how the build ended")
    for cell in CELLS:
        ended = results.get(cell.name) or cell.not_run or "not in the short form (make chaos)"
        terminalreporter.write_line(f"{cell.process:<14}{cell.step:<12}{ended}")


@pytest.fixture(scope="package")
def product() -> Iterator[ChaosProduct]:
    """The whole product with short time limits."""
    with running_chaos_product() as running:
        yield running
