"""Which tests may run beside others: `temporal-dev/run-tests` runs two halves at once.

Unit, workflow and replay tests count nothing of the machine; modules of other folders say so, or
that they count. A test that says neither runs in the half that counts, where it harms nobody.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
COUNT_NOTHING = ("unit", "workflows", "replay")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="also run what is marked `whole`")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.path.relative_to(HERE).parts[0] in COUNT_NOTHING:
            item.add_marker(pytest.mark.counts_nothing)
    # Attacks count all containers: not beside those of what comes first in the other half.
    items.sort(
        key=lambda item: (
            item.get_closest_marker("comes_first") is None,
            item.path.relative_to(HERE).parts[0] == "attacks",
        )
    )
