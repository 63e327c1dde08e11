"""How each activity is run: its time limit, its attempts, its summary. One table, no exceptions.

Every activity heartbeats, waits for its own clean-up when it is cancelled, and retries with
backoff what can help. A typed user error is not retried: it says so itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from temporalio.common import RetryPolicy

from activities.contract.requests import MAX_IMAGE_STEPS, BuildOptions

# A host may be restarting; only then do its steps wait. The lease notices a dead host sooner.
SCHEDULE_TO_START = timedelta(minutes=30)
# Too large a result is our own fault and comes again every time.
NEVER_RETRIED = ["PayloadsTooLarge"]


@dataclass(frozen=True)
class Policy:
    """Limits of one activity. `limit_seconds` is for one attempt."""

    limit_seconds: Callable[[BuildOptions], float]
    attempts: int | None = None
    """None: the build's own `retry_attempts`."""

    def start_to_close(self, options: BuildOptions) -> timedelta:
        """Return the limit for one attempt."""
        return timedelta(seconds=self.limit_seconds(options))

    def retry(self, options: BuildOptions) -> RetryPolicy:
        """Return the retry policy of a step."""
        return RetryPolicy(
            initial_interval=timedelta(seconds=options.retry_initial_seconds),
            maximum_interval=timedelta(seconds=options.retry_maximum_seconds),
            maximum_attempts=self.attempts or options.retry_attempts,
            non_retryable_error_types=NEVER_RETRIED,
        )


SHORT_SECONDS = 60
# Room for the guest's own limit to pass first, so that its error tells more than a timeout.
SLACK_SECONDS = 60

POLICIES = {
    "pull_image": Policy(lambda o: o.pull_timeout_seconds),
    "build_image": Policy(lambda o: MAX_IMAGE_STEPS * o.image_step_timeout_seconds),
    "import_template": Policy(lambda o: o.pull_timeout_seconds),
    "build_rootfs": Policy(lambda o: o.rootfs_timeout_seconds),
    "find_snapshot": Policy(lambda o: 600),
    "set_up_network": Policy(lambda o: SHORT_SECONDS),
    "start_vm": Policy(lambda o: 600),
    "wait_until_ready": Policy(lambda o: o.ready_timeout_seconds + SLACK_SECONDS),
    "snapshot_vm": Policy(lambda o: 900),
    "verify_snapshot": Policy(lambda o: 900, attempts=3),
    "upload_artifact": Policy(lambda o: o.upload_timeout_seconds),
    "publish_template": Policy(lambda o: 600),
}


def undo_retry(options: BuildOptions) -> RetryPolicy:
    """Return the retry policy of a compensation: as often as its total time allows."""
    return RetryPolicy(
        initial_interval=timedelta(seconds=options.retry_initial_seconds),
        maximum_interval=timedelta(seconds=options.retry_maximum_seconds),
        non_retryable_error_types=NEVER_RETRIED,
    )
