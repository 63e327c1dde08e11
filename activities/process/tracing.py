"""One OpenTelemetry trace a build: from the gRPC call through the workflow into each activity.

Configured by OpenTelemetry's own variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`)
turns it on, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER` and others
say the rest. The protocol is OTLP over HTTP.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from temporalio.client import Interceptor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE = "template-manager"


def is_tracing() -> bool:
    """Whether traces are wanted."""
    return any(os.environ.get(name) for name in ENDPOINTS)


def configure_tracing(process: str) -> None:
    """Send this process's traces where the environment says; does nothing when it says nothing."""
    if not is_tracing():
        return
    # Loaded here: a process without traces needs none of it.
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": f"{SERVICE}-{process}",
            "service.namespace": SERVICE,
            "host.name": socket.gethostname(),
        }
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def client_interceptors() -> Sequence[Interceptor]:
    """Return what carries a trace through Temporal: workers take it from their client."""
    if not is_tracing():
        return ()
    from temporalio.contrib.opentelemetry import TracingInterceptor

    return (TracingInterceptor(),)
