"""Process logs: structlog over the standard library, JSON in production.

Every line of a running activity says which build, step, host, activity and attempt it is about;
also those of Temporal's SDK. The build log that users read is another thing: see `build_log`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import structlog

from activities.contract.names import Step, VmPurpose, build_of_workflow
from activities.contract.scope import VmRef
from activities.contract.text import printable_lines
from activities.process.settings import Settings

STEPS = {
    "hold_host": Step.LEASE,
    "hold_host_if_free": Step.LEASE,
    "pull_image": Step.PULL,
    "build_image": Step.PULL,
    "import_template": Step.PULL,
    "run_steps": Step.ROOTFS,
    "build_rootfs": Step.ROOTFS,
    "clean_up_rootfs": Step.ROOTFS,
    "find_snapshot": Step.BOOT,
    "start_vm": Step.BOOT,
    "wait_until_ready": Step.BOOT,
    "snapshot_vm": Step.BOOT,
    "verify_snapshot": Step.VERIFY,
    "send_layers": Step.UPLOAD,
    "upload_artifact": Step.UPLOAD,
    "upload_artifacts": Step.UPLOAD,
    "publish_template": Step.UPLOAD,
    "discard_upload": Step.UPLOAD,
    "release_host": Step.RELEASE,
    "archive_log": Step.RELEASE,
}
SDK_FIELDS = ("temporal_activity", "temporal_workflow")


def fields_of_activity(
    workflow_id: str, activity_type: str, attempt: int, argument: object
) -> dict[str, str | int]:
    """Return what every line of a running activity says. `argument` is its first one."""
    step = STEPS.get(activity_type)
    if isinstance(argument, VmRef):
        step = Step.BOOT if argument.purpose is VmPurpose.BOOT else Step.VERIFY
    fields = {
        "workflow_id": workflow_id,
        "build_id": build_of_workflow(workflow_id),
        "step": str(step) if step else None,
        "activity": activity_type,
        "attempt": attempt,
    }
    return {name: value for name, value in fields.items() if value}


def flatten_sdk_fields(
    _logger: object, _method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    """Give the SDK's own lines, which tell it in a dictionary, the fields that ours have."""
    for name in SDK_FIELDS:
        about = event.pop(name, None)
        if isinstance(about, Mapping) and about.get("workflow_id"):
            activity = str(about.get("activity_type", ""))
            attempt = int(about.get("attempt", 0))
            fields = fields_of_activity(str(about["workflow_id"]), activity, attempt, None)
            event.update({key: value for key, value in fields.items() if key not in event})
    return event


def only_text(
    _logger: object, _method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    """Let no text of a line steer the terminal in which an operator reads it."""
    return {
        name: printable_lines(value) if isinstance(value, str) else value
        for name, value in event.items()
    }


def configure_logging(settings: Settings, process: str) -> None:
    """Send every logger's lines, ours and the libraries', to stderr in one form.

    `process` (api, worker, host) and, on a KVM host, its name stand on every line.
    """
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), flatten_sdk_fields],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                only_text,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for noisy in ("urllib3", "docker", "google", "pyroute2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    if process == "host":
        structlog.contextvars.bind_contextvars(host=settings.host)
