"""What is answered about a build while Temporal is away."""

from __future__ import annotations

import pytest

from api.pb import template_manager_pb2 as pb
from api.server import last_known
from api.server.access import Caller, Right, current_caller
from api.server.last_known import LastKnown


def building(template_id: str = "web") -> pb.TemplateBuildStatusResponse:
    return pb.TemplateBuildStatusResponse(state="building", template_id=template_id)


def as_caller(tenant: str) -> None:
    current_caller.set(Caller(name=tenant, right=Right.BUILD, tenant=tenant))


def test_it_is_told_with_its_age() -> None:
    as_caller("acme")
    known = LastKnown()
    known.keep("one", "acme", building())
    status = known.status("one", "")
    assert status is not None and status.state == "building"
    assert status.HasField("known_until")
    assert known.status("one", "web") is not None


def test_what_is_not_the_caller_s_or_is_gone_is_not_told() -> None:
    known = LastKnown()
    known.keep("one", "acme", building())
    known.keep("two", "acme", building())
    as_caller("other")
    assert known.status("one", "") is None
    as_caller("acme")
    assert known.status("one", "of another template") is None
    assert known.status("never seen", "") is None
    known.forget("two")
    assert known.status("two", "") is None


def test_those_asked_for_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_known, "MAX_BUILDS", 2)
    as_caller("acme")
    known = LastKnown()
    for build_id in ("one", "two", "one", "three"):
        known.keep(build_id, "acme", building())
    assert [known.status(b, "") is not None for b in ("one", "two", "three")] == [True, False, True]
