"""OpenTelemetry spans of requests, where its packages are installed and an endpoint is configured; else nothing."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
NAMES = {  # of a log record: OpenTelemetry's names
    "id": "http.request.header.x-request-id",
    "method": "http.request.method",
    "path": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "queued_ms": "queued_ms",
    "first_token_ms": "first_token_ms",
}
log = logging.getLogger("service")


class Tracer:
    """Sends one span a request to the endpoint the environment names (OTLP over HTTP)."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "chinese-sft")
        self.provider = TracerProvider(resource=Resource.create({"service.name": name}))  # flushed at exit
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = self.provider.get_tracer("chinese-sft")
        self.kind = SpanKind.SERVER
        self.context = TraceContextTextMapPropagator()

    def add(self, record: dict[str, Any], traceparent: str) -> None:
        """Send the span of a request that has just ended; record: its log line. traceparent: the client's header."""
        end = time.time_ns()
        span = self.tracer.start_span(
            f"{record['method']} {record['path']}",
            self.context.extract({"traceparent": traceparent}),
            self.kind,
            {ours: record[name] for name, ours in NAMES.items() if record.get(name) is not None},
            start_time=end - record["ms"] * 1_000_000,
        )
        span.end(end)


def tracer() -> Tracer | None:
    """A Tracer, or None where no endpoint is configured or the packages are missing."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return Tracer()
    except ImportError:
        log.warning("没有追踪 no traces: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http")
        return None
