"""Which activities each worker serves: all that the contract says of what it is given."""

from __future__ import annotations

from collections.abc import Callable

import docker
from temporalio.client import Client

from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.host.bucket_sweep import BucketSweep
from activities.host.orphans import describe_with
from activities.host.tenant_lines import TenantLines
from activities.image.docker_daemon import make_docker_client
from activities.image.pull import DockerImageActivities
from activities.instructions.disk_steps import VmDiskStepActivities
from activities.instructions.earlier_steps import EarlierStepActivities
from activities.microvm.microvm import HostMicrovmActivities
from activities.microvm.network import NetnsNetworkActivities
from activities.process.sealing import Sealer
from activities.process.settings import Settings
from activities.process.tenants_file import TenantsFile
from activities.rootfs.rootfs import HostRootfsActivities
from activities.step.checkpoints import CheckpointStore
from activities.step.discarding import HostCheckpointActivities
from activities.step.layer_disks import LayerDisks
from activities.step.ledger import LeaseLedger
from activities.store.bucket import Bucket
from activities.store.lease_numbers import LeaseObjects
from activities.store.log_archive import BucketLogActivities
from activities.template.ahead import BucketLayerActivities
from activities.template.artifacts import BucketArtifactActivities, BucketUploadUndoActivities
from activities.template.base import BucketBaseActivities
from activities.template.deletion import BucketDeletionActivities
from activities.template.naming import BucketNameActivities

Activity = Callable[..., object]


def served_by(*implementations: object) -> list[Activity]:
    """Return the activities of these: every method that a class of the contract asks for."""
    return [
        getattr(implementation, name)
        for implementation in implementations
        for contract in type(implementation).__mro__
        for name in sorted(getattr(contract, "__abstractmethods__", ()))
    ]


def step_activities(  # noqa: PLR0917 # what a host has, in the order in which it is assembled
    settings: Settings,
    ledger: LeaseLedger,
    store: CheckpointStore,
    bucket: Bucket,
    leases: LeaseObjects,
    docker_client: docker.APIClient,
) -> list[Activity]:
    """Return what a host's step queue serves for builds."""
    sealer = Sealer(settings.secret_keys)
    artifacts = BucketArtifactActivities(settings, bucket, ledger, store, leases)
    return served_by(
        DockerImageActivities(settings, ledger, sealer, make_docker_client),
        EarlierStepActivities(),
        BucketBaseActivities(settings, ledger, store, bucket),
        HostRootfsActivities(
            settings, ledger, store, docker_client, LayerDisks(settings, bucket, store)
        ),
        VmDiskStepActivities(settings, ledger, store, bucket, sealer),
        NetnsNetworkActivities(settings, ledger),
        HostMicrovmActivities(settings, ledger, store),
        HostCheckpointActivities(DataDir(settings.data_dir), store),
        BucketLayerActivities(settings, ledger, store, leases, artifacts.maker),
        artifacts,
    )


def bucket_activities(settings: Settings, client: Client) -> list[Activity]:
    """Return what the queue of the workflows serves: all that needs no host.

    Raises TenantsFileError when the tenants' file cannot be read.
    """
    bucket = Bucket(settings.bucket)
    sealer = Sealer(settings.secret_keys)
    describe = describe_with(client)
    return served_by(
        BucketUploadUndoActivities(bucket),
        BucketLogActivities(bucket),
        BucketNameActivities(bucket),
        BucketDeletionActivities(bucket, sealer, settings),
        BucketSweep(
            bucket,
            describe,
            late_arrival_seconds=settings.late_arrival_seconds,
            most_files_bytes=settings.max_files_mb * MIB,
            layer_max_age_hours=settings.layer_max_age_hours,
        ),
        TenantLines(client, describe, TenantsFile(settings.tenants_file)),
    )
