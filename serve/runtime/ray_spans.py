"""Where the spans of Ray Serve and of users' own code go: to the collector of ours, and only within traces of ours."""

from __future__ import annotations

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from serve.settings import Settings
from serve.telemetry.export import collector_of, otlp_exporter


def processors() -> list[SpanProcessor]:
    """Return what Ray Serve hands spans to (RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH); none where no collector is set."""
    collector = collector_of(Settings.from_environment())
    return [] if collector is None else [BatchSpanProcessor(otlp_exporter(collector))]
