"""Whether the hosts have the guest agent that this deployment requires in every template."""

from __future__ import annotations

from activities.contract.errors import AgentMissingError
from activities.process.settings import Settings
from api.errors import failed_precondition
from api.server.known_hosts import KnownHosts


class RequiredAgent:
    """Refuses builds whose template would be of no use to who resumes it."""

    def __init__(self, settings: Settings, hosts: KnownHosts) -> None:
        self._settings = settings
        self._hosts = hosts

    async def require(self) -> None:
        """Raise ApiError FAILED_PRECONDITION when no host that answers has an agent.

        While none answers, or where one does not tell, hosts refuse for themselves.
        """
        if not self._settings.require_guest_agent:
            return
        facts = await self._hosts.facts() or {}
        told = [each.has_agent for each in facts.values() if each is not None]
        if told and not any(has is not False for has in told):
            raise failed_precondition(
                "NO_GUEST_AGENT",
                "this service requires a guest agent in every template, and no host has one",
                AgentMissingError.hint,
            )
