"""What Prometheus is told: how builds end, how long their steps take, and how full a host is.

Everything goes through the meter of Temporal's SDK, so that one endpoint has the SDK's own metrics
(task queue latency, slots, failures) and ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta

from temporalio.common import MetricMeter
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig

from activities.contract.errors import AddressTakenError
from activities.contract.names import Step
from activities.contract.results import SweepReport
from activities.contract.status import BuildStatus
from activities.process.settings import Settings

PREFIX = "template_manager"
# From the quickest step to the longest pull, in seconds.
BUCKETS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0]
RESUME_BUCKETS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0]
STEP_SECONDS = f"{PREFIX}_step_seconds"
QUEUE_SECONDS = f"{PREFIX}_queue_seconds"
BUILD_SECONDS = f"{PREFIX}_build_seconds"
RESUME_SECONDS = f"{PREFIX}_resume_seconds"
REQUEST_SECONDS = f"{PREFIX}_rest_request_seconds"


def runtime_for(settings: Settings) -> Runtime | None:
    """Return a runtime that serves Prometheus at `metrics_address`; None when it is not set.

    Raises AddressTakenError.
    """
    if not settings.metrics_address:
        return None
    histograms = dict.fromkeys((STEP_SECONDS, QUEUE_SECONDS, BUILD_SECONDS), BUCKETS)
    histograms[REQUEST_SECONDS] = RESUME_BUCKETS
    config = PrometheusConfig(
        bind_address=settings.metrics_address,
        durations_as_seconds=True,
        counters_total_suffix=True,
        histogram_bucket_overrides={**histograms, RESUME_SECONDS: RESUME_BUCKETS},
    )
    try:
        return Runtime(telemetry=TelemetryConfig(metrics=config))
    except (RuntimeError, ValueError) as error:
        raise AddressTakenError(f"cannot listen on {settings.metrics_address}: {error}") from error


def count_build(meter: MetricMeter, status: BuildStatus) -> None:
    """Count a build that has ended. Called once a run, by the activity that archives its log."""
    result = {"result": status.state, "reason": _reason(status), "tenant": status.config.tenant}
    meter.create_counter(f"{PREFIX}_builds", "Builds that have ended").add(1, result)
    _record_times(meter, status)
    done = status.done
    if done.verification:
        resumed = timedelta(milliseconds=done.verification.resume_ms)
        meter.create_histogram_timedelta(RESUME_SECONDS, "Until a resumed guest answers").record(
            resumed
        )
    sent = meter.create_counter(f"{PREFIX}_uploaded_bytes", "Sent to the bucket")
    for name, artifact in done.uploads.items():
        sent.add(artifact.sent_bytes, {"artifact": name})


def count_sweep(meter: MetricMeter, report: SweepReport) -> None:
    """Count what a sweep has removed."""
    swept = meter.create_counter(f"{PREFIX}_swept", "Things that no live build owned")
    for item in report.items:
        swept.add(1, {"kind": item.kind, "outcome": "failed" if item.error else "removed"})


def count_request(meter: MetricMeter, method: str, path: str, status: int, seconds: float) -> None:
    """Count a REST request that was answered. The path has the names of its parameters."""
    tags = {"method": method, "path": path, "status": str(status)}
    meter.create_histogram_timedelta(REQUEST_SECONDS, "Until a REST request is answered").record(
        timedelta(seconds=seconds), tags
    )


def show_host(meter: MetricMeter, host: str, slots: int, used: int, free_bytes: int) -> None:
    """Show how full a host is."""
    tags = {"kvm_host": host}
    meter.create_gauge(f"{PREFIX}_slots", "Builds that this host takes").set(slots, tags)
    meter.create_gauge(f"{PREFIX}_slots_used", "Builds that it holds").set(used, tags)
    meter.create_gauge(f"{PREFIX}_disk_free_bytes", "Of its data directory").set(free_bytes, tags)


def show_tenant(
    meter: MetricMeter,
    tenant: str,
    *,
    builds: Mapping[str, int],
    stored_bytes: int | None,
    limits: Mapping[str, float | None],
) -> None:
    """Show what a tenant uses: open builds by what they do, and its limits; none is infinite."""
    tags = {"tenant": tenant}
    gauge = meter.create_gauge(f"{PREFIX}_tenant_builds", "Open builds of a tenant")
    for state, count in builds.items():
        gauge.set(count, {**tags, "state": state})
    if stored_bytes is not None:
        meter.create_gauge(f"{PREFIX}_tenant_stored_bytes", "Of its templates").set(
            stored_bytes, tags
        )
    allowed = meter.create_gauge_float(f"{PREFIX}_tenant_limit", "What a tenant may use")
    for limit, value in limits.items():
        allowed.set(math.inf if value is None else value, {**tags, "limit": limit})


def _record_times(meter: MetricMeter, status: BuildStatus) -> None:
    steps = meter.create_histogram_timedelta(STEP_SECONDS, "Time of a step")
    reused = meter.create_counter(f"{PREFIX}_steps", "Steps that have ended")
    for record in status.timeline:
        if record.seconds is None:
            continue
        took = timedelta(seconds=max(0.0, record.seconds))
        if record.step is Step.LEASE:
            meter.create_histogram_timedelta(QUEUE_SECONDS, "Waiting for a host").record(took)
        outcome = "reused" if record.reused else record.outcome
        steps.record(took, {"step": record.step, "outcome": outcome})
        reused.add(1, {"step": record.step, "outcome": outcome})
    ends = [record.ended for record in status.timeline if record.ended]
    if ends:
        whole = max(ends) - status.timeline[0].started
        meter.create_histogram_timedelta(BUILD_SECONDS, "Time of a whole build").record(
            max(whole, timedelta()), {"result": status.state}
        )


def _reason(status: BuildStatus) -> str:
    return status.failure.error_type if status.failure else ""
