"""The dashboard and the alerts speak of metrics that exist, and of errors that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from activities.contract import errors
from activities.process import metrics

MONITORING = Path(__file__).parents[3] / "docs" / "monitoring"
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


def known() -> set[str]:
    source = Path(metrics.__file__).read_text()
    names = set(re.findall(r'f"{PREFIX}_([a-z_]+)"', source))
    return {f"{metrics.PREFIX}_{name}" for name in names}


def used(text: str) -> set[str]:
    names = set(re.findall(r"template_manager_[a-z_]+", text))
    return {re.sub(f"({'|'.join(SUFFIXES)})$", "", name) for name in names}


def test_the_dashboard_shows_what_there_is() -> None:
    text = (MONITORING / "grafana-dashboard.json").read_text()
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert used(text) <= known()
    assert known() - used(text) == {"template_manager_build_seconds"}  # the steps say more


def test_the_alerts_speak_of_what_there_is() -> None:
    text = (MONITORING / "alerts.yml").read_text()
    [group] = yaml.safe_load(text)["groups"]
    assert all({"alert", "expr", "labels", "annotations"} <= rule.keys() for rule in group["rules"])
    assert used(text) <= known()
    named = set(re.findall(r"[A-Z][A-Za-z]+Error", text))
    assert named <= set(dir(errors))
