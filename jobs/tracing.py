"""OpenTelemetry spans: one for the time that a worker has a document in hand, and one for each stage in it.

Off unless the OTEL_* variables say where spans go: then nothing of OpenTelemetry is imported, and a span costs a function call. All spans
of a document are one trace, whichever workers they come from, because its id is made of the correlation id. Spans hold ids, sizes and
times, never a document's content.
"""

from __future__ import annotations

import contextvars
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from uuid import UUID

from loguru import logger

from jobs.redaction import describe, register_secret

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

NAME = "docmill"
_NAMES_A_PLACE = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
_LAST_MS = 3000  # that a worker which stops waits for its last spans to be taken

_trace_id: contextvars.ContextVar[int] = contextvars.ContextVar("trace_id", default=0)
_tracers: list[Tracer] = []


def is_configured() -> bool:
    """Say whether the OTEL_* variables of the environment ask for spans."""
    wanted = any(os.environ.get(name) for name in _NAMES_A_PLACE) and os.environ.get("OTEL_TRACES_EXPORTER") != "none"
    return wanted and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def start_tracing(worker: str) -> Callable[[], None]:
    """Send spans from now on if they are configured; return what ends that and sends the last ones, within seconds.

    What cannot be done (packages that are missing, another exporter) is said in a warning; no worker stays out for it.
    """
    if not is_configured():
        return lambda: None
    try:
        provider = _provider(worker)
    except ImportError as error:
        logger.warning("Spans are configured, but not sent: {}. Install docmill[otel].", error)
        return lambda: None
    except ValueError as error:
        logger.warning("Spans are configured, but not sent: {}", error)
        return lambda: None
    _tracers[:] = [provider.get_tracer(NAME)]

    def stop() -> None:
        _tracers.clear()
        provider.force_flush(_LAST_MS)
        provider.shutdown()

    return stop


def _provider(worker: str) -> TracerProvider:
    """Return a provider of our own. Resource, sampler, batches and exporter take the rest from the OTEL_* variables themselves."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - only where spans are wanted
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator  # noqa: PLC0415

    class OfTheDocument(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return _trace_id.get() or super().generate_trace_id()

    named = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    exporter: SpanExporter
    if named == "console":
        exporter = ConsoleSpanExporter()
    elif named == "otlp" and protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
            for pair in os.environ.get(name, "").split(","):
                register_secret(pair.partition("=")[2].strip())
        exporter = OTLPSpanExporter()
    else:
        raise ValueError(f"OTEL_TRACES_EXPORTER={named!r} over {protocol!r}; docmill knows otlp over http/protobuf, and console.")
    own: dict[str, str | int] = {"service.instance.id": worker, "host.name": socket.gethostname(), "process.pid": os.getpid()}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        own["service.name"] = NAME
    provider = TracerProvider(resource=Resource.create(own), id_generator=OfTheDocument(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def trace_id_of(correlation_id: str) -> int:
    """Return the trace that a correlation id stands for: the id itself if it is a UUID, else 128 bits of its SHA-256."""
    try:
        number = UUID(correlation_id).int
    except ValueError:
        number = 0
    return number or int.from_bytes(hashlib.sha256(correlation_id.encode("utf-8", "replace")).digest()[:16], "big")


def span(name: str, *, trace: str | None = None, **attributes: Any) -> AbstractContextManager[Callable[..., None]]:
    """Span a block; an exception that leaves it is noted. Yield what takes more attributes. None is left out.

    `trace`: the correlation id whose trace an outermost span belongs to.
    """
    return _span(_tracers[0], name, trace, attributes) if _tracers else nullcontext(_nobody_listens)


def _nobody_listens(**attributes: Any) -> None:
    """For spans that are not sent."""


@contextmanager
def _span(tracer: Tracer, name: str, trace: str | None, attributes: dict[str, Any]) -> Iterator[Callable[..., None]]:
    from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

    token = _trace_id.set(trace_id_of(trace) if trace is not None else 0)
    try:
        with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as opened:

            def more(**added: Any) -> None:
                opened.set_attributes({f"docmill.{key}": value for key, value in added.items() if value is not None})

            more(**attributes)
            try:
                yield more
            except BaseException as error:
                opened.set_attribute("error.type", type(error).__qualname__)
                opened.set_status(Status(StatusCode.ERROR, describe(error)))
                raise
    finally:
        _trace_id.reset(token)
