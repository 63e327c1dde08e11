"""Where the history comes from that `replay` runs against the code: a file, or Temporal."""

from __future__ import annotations

from pathlib import Path

from temporalio.client import Client, WorkflowHistory

from activities.contract.names import build_workflow_id


def history_from_file(path: Path) -> WorkflowHistory:
    """Read a history as the Web UI or `temporal workflow show --output json` writes it.

    Raises ValueError when the file is not such a history.
    """
    try:
        return WorkflowHistory.from_json(path.stem, path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a workflow history in JSON: {error}") from error


async def history_of_build(client: Client, build_id: str) -> WorkflowHistory:
    """Fetch the history of a build's latest run. Raises RPCError NOT_FOUND after retention."""
    return await client.get_workflow_handle(build_workflow_id(build_id)).fetch_history()
