"""Which tests may run beside others: `temporal-dev/run-tests` runs two halves at once.

Unit, workflow and replay tests count nothing of the machine; modules of other folders say so, or
that they count. A test that says neither runs in the half that counts, where it harms nobody.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
COUNT_NOTHING = ("unit", "workflows", "replay")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(HERE).parts[0] in COUNT_NOTHING:
            item.add_marker(pytest.mark.counts_nothing)
    items.sort(key=lambda item: item.get_closest_marker("comes_first") is None)
