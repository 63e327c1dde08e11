"""A deployment that requires a guest agent refuses what would be built without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import grpc
import pytest

from activities.contract.results import HostFacts
from activities.process.settings import Settings
from api.errors import ApiError
from api.server.known_hosts import KnownHosts
from api.server.required_agent import RequiredAgent
from tests.support.host_facts import host_facts

WITH, WITHOUT, EARLIER = (host_facts(has_agent=has) for has in (True, False, None))


class ToldHosts:
    """Hosts that have told this."""

    def __init__(self, facts: Mapping[str, HostFacts | None] | None) -> None:
        self._facts = facts

    async def facts(self) -> Mapping[str, HostFacts | None] | None:
        return self._facts


def required(facts: Mapping[str, HostFacts | None] | None, *, is_set: bool = True) -> RequiredAgent:
    hosts = cast("KnownHosts", ToldHosts(facts))  # why: only what they tell is asked for
    return RequiredAgent(Settings(require_guest_agent=is_set), hosts)


@pytest.mark.parametrize(
    "facts",
    [None, {}, {"a": None}, {"a": WITH}, {"a": WITHOUT, "b": WITH}, {"a": WITHOUT, "b": EARLIER}],
)
async def test_a_build_is_let_in_while_a_host_may_have_one(
    facts: Mapping[str, HostFacts | None] | None,
) -> None:
    await required(facts).require()


@pytest.mark.parametrize("facts", [{"a": WITHOUT}, {"a": WITHOUT, "b": None}])
async def test_it_is_refused_where_no_host_has_one(facts: Mapping[str, HostFacts | None]) -> None:
    with pytest.raises(ApiError) as error:
        await required(facts).require()
    assert (error.value.code, error.value.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_GUEST_AGENT",
    )
    await required(facts, is_set=False).require()
