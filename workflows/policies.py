"""How each activity is run: one table with a row for each of them.

Every attempt has a limit. A row without `total` is retried for as long as its attempts last; one
without `attempts` as often as the build's options say. A typed user error is not retried: it says
so itself. Limits are seconds, or a function of the build's options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy

from activities.contract.names import ArtifactName
from activities.contract.requests import MAX_IMAGE_STEPS, BuildOptions

Limit = float | Callable[[BuildOptions], float]

# Too large a result is our own fault and comes again every time.
NEVER_RETRIED = ["PayloadsTooLarge"]
UNLIMITED = 0
MINUTE = 60
HOUR = 60 * MINUTE
# Longer than any build: a lease ends by release or by silence, never by age.
MAX_HOLD = 30 * 24 * HOUR
# A host may be restarting; only then do its steps wait. The lease notices a dead host sooner.
RESTART = 30 * MINUTE
# Room for the guest's own limit to pass first, so that its error tells more than a timeout.
SLACK = MINUTE
# For the VM of a step to boot, and for what it runs to end.
BOOT = 10 * MINUTE


@dataclass(frozen=True)
class Policy:
    """How one activity is run. `undo` names the activity that removes what it may have left."""

    attempt: Limit
    """For one attempt, from its start."""
    attempts: int | None = None
    """How often it is tried; None is what the build's options say."""
    wait: Limit | None = None
    """Until a worker takes it."""
    total: Limit | None = None
    """For all attempts together, waiting included."""
    heartbeat: bool = False
    """It beats, so that a dead worker is noticed and a cancellation gets through and is awaited."""
    undo: str | None = None

    def config(self, options: BuildOptions) -> workflow.ActivityConfig:
        """Return what Temporal takes."""
        config = workflow.ActivityConfig(
            start_to_close_timeout=_timedelta(self.attempt, options),
            retry_policy=RetryPolicy(
                initial_interval=timedelta(seconds=options.retry_initial_seconds),
                maximum_interval=timedelta(seconds=options.retry_maximum_seconds),
                maximum_attempts=(
                    options.retry_attempts if self.attempts is None else self.attempts
                ),
                non_retryable_error_types=NEVER_RETRIED,
            ),
        )
        if self.wait is not None:
            config["schedule_to_start_timeout"] = _timedelta(self.wait, options)
        if self.total is not None:
            config["schedule_to_close_timeout"] = _timedelta(self.total, options)
        if self.heartbeat:
            config["heartbeat_timeout"] = timedelta(seconds=options.heartbeat_timeout_seconds)
            config["cancellation_type"] = (
                workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED
            )
        return config


def _timedelta(limit: Limit, options: BuildOptions) -> timedelta:
    return timedelta(seconds=limit(options) if callable(limit) else limit)


def _step(attempt: Limit, *, attempts: int | None = None, undo: str | None = None) -> Policy:
    """Return the row of a step on the host that holds the build."""
    return Policy(attempt, attempts, wait=RESTART, heartbeat=True, undo=undo)


def _undo(*, beats: bool = True) -> Policy:
    """Return the row of a compensation: as often as its total time allows."""
    total = _teardown
    return Policy(MINUTE, UNLIMITED, wait=total, total=total, heartbeat=beats)


def _teardown(options: BuildOptions) -> float:
    return options.teardown_timeout_seconds


def _all_steps(options: BuildOptions) -> float:
    return (MAX_IMAGE_STEPS + 1) * (options.image_step_timeout_seconds + BOOT)


# fmt: off
POLICIES = {
    # A tenant's line
    "enter_line":          Policy(MINUTE, UNLIMITED),
    "look_at_line":        Policy(5 * MINUTE, attempts=3),
    # A host
    "find_host":           Policy(MINUTE, attempts=3),
    "hold_host":           Policy(MAX_HOLD, attempts=1, wait=lambda o: o.lease_wait_seconds,
                                  heartbeat=True, undo="release_host"),
    "hold_host_if_free":   Policy(MAX_HOLD, attempts=1, wait=2, heartbeat=True,
                                  undo="release_host"),
    "release_host":        Policy(5, attempts=1, total=5),
    "tell_host":           Policy(10, attempts=2, wait=5, total=10),
    # A build, in the order of its steps
    "pull_image":          _step(lambda o: o.pull_timeout_seconds),
    "import_template":     _step(lambda o: o.pull_timeout_seconds),
    "build_image":         _step(lambda o: MAX_IMAGE_STEPS * o.image_step_timeout_seconds,
                                 undo="clean_up_rootfs"),
    "build_rootfs":        _step(lambda o: o.rootfs_timeout_seconds, undo="clean_up_rootfs"),
    "run_steps":           _step(_all_steps, undo="kill_vm"),
    "send_layers":         _step(lambda o: _all_steps(o) + o.upload_timeout_seconds,
                                 undo="discard_upload"),
    "find_snapshot":       _step(10 * MINUTE),
    "set_up_network":      _step(MINUTE, undo="tear_down_network"),
    "start_vm":            _step(10 * MINUTE, undo="kill_vm"),
    "wait_until_ready":    _step(lambda o: o.ready_timeout_seconds + SLACK),
    "snapshot_vm":         _step(15 * MINUTE),
    "verify_snapshot":     _step(15 * MINUTE, attempts=3, undo="kill_vm"),
    "upload_artifact":     _step(lambda o: o.upload_timeout_seconds, undo="discard_upload"),
    "upload_artifacts":    _step(lambda o: len(ArtifactName) * o.upload_timeout_seconds,
                                 undo="discard_upload"),
    "publish_template":    _step(10 * MINUTE, undo="discard_upload"),
    "move_tags":           Policy(MINUTE, UNLIMITED, total=HOUR),
    "archive_log":         Policy(MINUTE, UNLIMITED, total=5 * MINUTE),
    # What undoes them
    "clean_up_rootfs":     _undo(),
    "tear_down_network":   _undo(),
    "kill_vm":             _undo(),
    "discard_upload":      _undo(),
    "discard_checkpoints": _undo(),
    # Deleting, and sweeping
    "delete_objects":      Policy(5 * MINUTE, UNLIMITED, total=30 * MINUTE, heartbeat=True),
    "delete_image_tag":    Policy(5 * MINUTE, UNLIMITED, total=30 * MINUTE),
    "remove_late_arrivals": Policy(5 * MINUTE, UNLIMITED),
    # Removing a tenant
    "find_builds_of_tenant": Policy(30 * MINUTE, UNLIMITED, heartbeat=True),
    "delete_build_of_tenant": Policy(30 * MINUTE, attempts=5, heartbeat=True),
    "delete_objects_of_tenant": Policy(30 * MINUTE, UNLIMITED, heartbeat=True),
    "sweep_host":          Policy(30 * MINUTE, attempts=3, total=30 * MINUTE),
    "sweep_bucket":        Policy(30 * MINUTE, attempts=3, total=30 * MINUTE),
}
# fmt: on
