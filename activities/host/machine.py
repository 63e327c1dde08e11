"""What kind of machine a host is, and how busy: told to whoever places sandboxes and builds."""

from __future__ import annotations

import platform

import psutil

from activities.contract.results import MachineFacts
from activities.process.processor import this_processor


def tell_machine() -> MachineFacts:
    """Look at this machine. The load is since the last look, and 0 at the first."""
    memory = psutil.virtual_memory()
    processor = this_processor()
    return MachineFacts(
        cpu_architecture=platform.machine(),
        cpu_family=processor.get("cpu family", ""),
        cpu_model=processor.get("model", ""),
        cpu_model_name=processor.get("model name", ""),
        cpu_flags=tuple(processor.get("flags", processor.get("Features", "")).split()),
        cpu_count=psutil.cpu_count() or 1,
        cpu_percent=psutil.cpu_percent(),
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.used,
    )
