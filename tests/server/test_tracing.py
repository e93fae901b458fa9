"""A server that sends a span per request to a collector on this machine, and logs no text of a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from httpx2 import Client

from tests.serving import NATIVE, WAIT_SECONDS, options, serving, until

LOCAL = "/v1/local/rank"
SECRET = "a-secret-that-no-log-contains"
SECRET_BODY = {
    "model": "qwen3-rerank", "query": SECRET, "documents": [SECRET], "instruct": SECRET, "instruction": SECRET,
}  # fmt: skip


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP receiver on this machine: its URL, and the bodies received."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Suppress the access log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}/v1/traces", bodies
        finally:
            receiver.shutdown()
            thread.join()


def test_a_server_logs_no_text_at_any_level_and_sends_a_span_per_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bad = [
        SECRET_BODY | {"query": [SECRET]}, SECRET_BODY | {"documents": {"a": SECRET}}, SECRET_BODY | {"model": SECRET},
        [SECRET], SECRET,
    ]  # fmt: skip
    with collector() as (endpoint, bodies):
        arguments = ["--otlp-endpoint", endpoint, "--log-level", "debug", "--log-format", "json"]
        with serving(tmp_path / "log", *options(tiny_checkpoint), *arguments) as server:
            with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
                ranked = client.post("/v1/rerank", json={"query": SECRET, "documents": ["a"]})
                statuses = [
                    client.post(path, json=one).status_code for path in (NATIVE, LOCAL) for one in [SECRET_BODY, *bad]
                ]
                client.post(NATIVE, content=f'{{"query": "{SECRET}'.encode())
                client.post(NATIVE, json=SECRET_BODY, headers={"X-Request-Timeout-Ms": SECRET})
            assert {200, 400, 404} <= set(statuses)
        until(lambda: bodies)  # the remaining spans are sent on exit
        assert LOCAL in server.output
        assert SECRET not in server.output
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (span,) = [span for span in spans if span.name.endswith(" /v1/rerank")]
    assert ranked.headers["x-request-id"] in str(span)
    assert SECRET not in str(spans)
