"""A collector of OpenTelemetry traces on this machine: OTLP over HTTP."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.local_http import QuietHandler, serving


@dataclass(frozen=True)
class Span:
    """What tests look at of a span."""

    name: str
    service: str
    trace: bytes
    attributes: dict[str, str]


@dataclass
class Collector:
    """Keeps every span that comes."""

    address: str = ""
    spans: list[Span] = field(default_factory=list)

    def trace_of(self, workflow_id: str) -> list[Span]:
        """Return all spans of the trace in which that workflow was started."""
        starts = [
            span for span in self.spans if span.attributes.get("temporalWorkflowID") == workflow_id
        ]
        traces = {span.trace for span in starts}
        return [span for span in self.spans if span.trace in traces]

    def take(self, body: bytes) -> None:
        """Take an export request."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    attributes = _attributes(span.attributes)
                    self.spans.append(
                        Span(span.name, named["service.name"], span.trace_id, attributes)
                    )


def _attributes(pairs: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in pairs}


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Run a collector; `OTEL_EXPORTER_OTLP_ENDPOINT` must lead to its address."""
    collector = Collector()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.body()
            zipped = self.headers.get("Content-Encoding") == "gzip"
            collector.take(gzip.decompress(body) if zipped else body)
            told = ExportTraceServiceResponse().SerializeToString()
            self.answer(200, told, Content_Type="application/x-protobuf")

    with serving(Handler) as address:
        collector.address = f"http://{address}"
        yield collector
