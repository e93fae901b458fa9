"""OpenTelemetry tracing, enabled by `--otlp-endpoint`: one span per request.

Needs the extra `local-rerank[otel]`. A span has method, route, status, times and request id, never the request's text.
"""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp

import local_rerank
from local_rerank.errors import ConfigError

SERVICE = "local-rerank"


class Tracing:
    """Wraps an ASGI application, and flushes its spans when closed."""

    def __init__(self, endpoint: str) -> None:
        """Raises ConfigError if the packages are not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigError(f'otlp_endpoint needs {error.name}: pip install "local-rerank[otel]"') from None
        resource = Resource.create({"service.name": SERVICE, "service.version": local_rerank.__version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._middleware: Any = OpenTelemetryMiddleware

    def wrap(self, app: ASGIApp) -> ASGIApp:
        wrapped: ASGIApp = self._middleware(
            app,
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],  # one span per request
            http_capture_headers_server_response=["x-request-id"],
            http_capture_headers_sanitize_fields=["authorization"],  # whatever OTEL_* variables capture
        )
        return wrapped

    def close(self) -> None:
        self._provider.shutdown()
