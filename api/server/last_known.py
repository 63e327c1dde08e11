"""What was last known of builds, for the time in which Temporal is away.

E2B's control plane marks a build as failed for good when a status call fails, whatever the error.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from activities.process.clock import utc_now
from api.pb import template_manager_pb2 as pb
from api.server.tenancy import is_visible
from api.server.wire import timestamp

MAX_BUILDS = 5_000
"""Of some KB each; more builds than a server has clients who ask for them."""


@dataclass(frozen=True)
class _Known:
    tenant: str
    template_id: str
    status: bytes
    at: datetime


class LastKnown:
    """Keeps the latest status of the builds that were asked for last, without log lines."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def keep(self, build_id: str, tenant: str, status: pb.TemplateBuildStatusResponse) -> None:
        """Remember what has just been found out."""
        known = _Known(tenant, status.template_id, status.SerializeToString(), utc_now())
        self._known[build_id] = known
        self._known.move_to_end(build_id)
        if len(self._known) > MAX_BUILDS:
            self._known.popitem(last=False)

    def forget(self, build_id: str) -> None:
        """Have nothing of a build any more: it is not there."""
        self._known.pop(build_id, None)

    def status(self, build_id: str, template_id: str) -> pb.TemplateBuildStatusResponse | None:
        """Return what the caller may see of a build, with since when that is old; or None."""
        known = self._known.get(build_id)
        if known is None or not is_visible(known.tenant):
            return None
        if template_id and known.template_id not in ("", template_id):
            return None
        status = pb.TemplateBuildStatusResponse.FromString(known.status)
        status.known_until.CopyFrom(timestamp(known.at))
        return status
