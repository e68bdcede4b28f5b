"""A collector of OpenTelemetry: OTLP over HTTP, protobuf, traces only."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

from tests.servers.http import LocalServer, Request, Response


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    failed: bool
    message: str
    nanoseconds: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector(LocalServer):
    """Takes spans and keeps them in `spans`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spans: list[Span] = []

    async def handle(self, request: Request, mangle: str) -> Response:
        """Take what /v1/traces is sent."""
        if request.path != "/v1/traces":
            return Response(404)
        body = gzip.decompress(request.body) if request.headers.get("content-encoding") == "gzip" else request.body
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _plain(one.resource.attributes)
            for scope in one.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.status.code == 2,
                            span.status.message, span.end_time_unix_nano - span.start_time_unix_nano, _plain(span.attributes), resource,
                        )
                    )  # fmt: skip
        return Response(200, ExportTraceServiceResponse().SerializeToString(), {"content-type": "application/x-protobuf"})


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
