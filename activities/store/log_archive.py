"""The log of a closed build: `logs/[<tenant>/]<build_id>.jsonl`, outside the template's prefix.

Its first line is the final `BuildStatus`, each further line a `LogEntry`. It answers for builds
that Temporal has forgotten, and for those that never became a template.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from pydantic import ValidationError
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.contrib.workflow_streams import PollInput, PollResult

from activities.contract.inputs import ArchiveLogInput
from activities.contract.interface import LogActivities
from activities.contract.names import DEFAULT_TENANT, LOG_TOPIC
from activities.contract.results import StoredObject
from activities.contract.status import BuildStatus, LogEntry, LogLevel
from activities.process.clock import utc_now
from activities.process.metrics import count_build
from activities.store.bucket import Bucket
from activities.store.layers import LayerObjects
from activities.store.objects import archived_log_name, metadata_name

READ_SECONDS = 30.0
POLL_QUERY = "__temporal_workflow_stream_poll"
"""Of `temporalio.contrib.workflow_streams`, which names it in its README."""


class BucketLogActivities(LogActivities):
    """Archives logs. See `interface` for the contract."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @activity.defn(name="archive_log")
    async def archive_log(self, archive: ArchiveLogInput, /) -> StoredObject:
        """Write the build's log and final status. A later run's log replaces an earlier one's.

        A build that has no template lets go of the layers that it has named.
        """
        entries: list[LogEntry] = []
        try:
            await asyncio.wait_for(_read_stream(entries), READ_SECONDS)
        except TimeoutError:  # a status with half a log is worth more than none
            message = "the rest of the log could not be read in time"
            entries.append(LogEntry(timestamp=utc_now(), level=LogLevel.WARN, message=message))
        status = _without_secrets(archive.final_status)
        archived = await asyncio.to_thread(
            self._bucket.write_object,
            archived_log_name(archive.build_id, status.config.tenant),
            to_jsonl(status, entries),
        )
        await asyncio.to_thread(self._let_go, archive.build_id)
        count_build(activity.metric_meter(), status)
        return archived

    def _let_go(self, build_id: str) -> None:
        """End the use of layers by a build that has come to no template, wherever it has ended."""
        layers = LayerObjects(self._bucket)
        uses = layers.uses(build_id)
        if self._bucket.stat_object(metadata_name(build_id)) is None:
            layers.release(build_id, uses)


def to_jsonl(status: BuildStatus, entries: Sequence[LogEntry]) -> bytes:
    """Write a status and log entries, one JSON object a line."""
    lines = [status.model_dump_json(), *(entry.model_dump_json() for entry in entries)]
    return ("\n".join(lines) + "\n").encode()


def read_archived_log(
    bucket: Bucket, build_id: str, tenant: str = DEFAULT_TENANT
) -> tuple[BuildStatus, list[LogEntry]] | None:
    """Return a closed build's final status and log, or None when there is none. Blocking."""
    found = bucket.read_object(archived_log_name(build_id, tenant))
    if found is None:
        return None
    first, *rest = found[0].decode().rstrip("\n").split("\n")  # not splitlines: texts have U+2028
    try:
        return (
            BuildStatus.model_validate_json(first),
            [LogEntry.model_validate_json(line) for line in rest],
        )
    except ValidationError:  # of a version that this one cannot read
        return None


def _without_secrets(status: BuildStatus) -> BuildStatus:
    """Keep of what was sealed only that there was something: a retry must know what it lacks."""
    return status.model_copy(
        update={
            "config": status.config.without_secrets(),
            "is_login_left_out": status.config.has_secrets,
        }
    )


async def _read_stream(entries: list[LogEntry]) -> None:
    """Append what the workflow's stream has now, without waiting for more.

    By queries: what `subscribe` reads would be stored in the workflow's history once more.
    """
    info, converter = activity.info(), activity.payload_converter()
    assert info.workflow_id is not None
    build = activity.client().get_workflow_handle(info.workflow_id, run_id=info.workflow_run_id)
    poll = PollInput(topics=[LOG_TOPIC])
    while True:
        page = await build.query(POLL_QUERY, poll, result_type=PollResult)
        for item in page.items:
            payload = Payload.FromString(base64.b64decode(item.data))
            entries.append(converter.from_payload(payload, LogEntry))
        if not page.more_ready:
            return
        poll = PollInput(topics=[LOG_TOPIC], from_offset=page.next_offset)
