"""A build that a host holds by a lease, with the host's ledger and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from activities.contract.scope import BuildScope, HostLease
from activities.disk.data_dir import DataDir
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from tests.support.example_template import BUILD


@dataclass(frozen=True)
class HeldBuild:
    """A host that holds a build."""

    settings: Settings
    ledger: LeaseLedger
    store: CheckpointStore
    scope: BuildScope


def hold(data_dir: Path, number: int = 1, build_id: str = BUILD) -> HeldBuild:
    """Let a host with that data directory hold a build by that lease number."""
    settings = Settings(data_dir=data_dir, host="h1", upload_chunk_mb=1)
    ledger = LeaseLedger(DataDir(data_dir))
    ledger.put(
        build_id=build_id,
        template_id="web",
        workflow_id=f"template-build-{build_id}",
        number=number,
        lifetime_seconds=600,
    )
    scope = BuildScope(
        build_id=build_id, template_id="web", lease=HostLease(host="h1", number=number)
    )
    return HeldBuild(settings, ledger, CheckpointStore(DataDir(data_dir), "h1"), scope)
