"""Opt-in spans for an OTLP collector: one a request, with the route's pattern, the method and the status.

Written against OpenTelemetry's API directly: the ready-made instrumentation puts paths and queries into
spans, which can name people. A span's trace is the one of the request's log lines and of the caller's
`traceparent`; a caller cannot switch sampling on, for the share decides by the trace's id alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import SettingsError
from server.marks import Marks

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

OTLP_PATH: Final = "/v1/traces"


def traces_address(endpoint: str) -> str:
    """Return where spans are sent: the endpoint, with OTLP's own path where it names none.

    Raises:
        SettingsError: it is no http or https address.
    """
    try:
        parts = urlsplit(endpoint)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise SettingsError(
            f"otlp_endpoint: {endpoint!r} is no http or https address; write http://HOST:4318 there "
            "(AFFIDAVIT_OTLP_ENDPOINT, or `otlp_endpoint` in config.yaml), or leave it out"
        )
    if parts.path in ("", "/"):
        return urlunsplit(parts._replace(path=OTLP_PATH))
    return endpoint


class Tracing:
    """Exports to one collector, in the background; what it cannot deliver it drops."""

    def __init__(self, endpoint: str, share: float) -> None:
        """Set the export up.

        Raises:
            SettingsError: OpenTelemetry is not installed, or the endpoint is no address.
        """
        address = traces_address(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
        except ImportError as error:
            raise SettingsError(
                "otlp_endpoint: OpenTelemetry is not installed; install affidavit[tracing], or leave it out"
            ) from error
        resource = Resource.create({"service.name": "affidavit"})
        self._provider: TracerProvider = TracerProvider(
            resource=resource, sampler=TraceIdRatioBased(share), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
        self.tracer: Tracer = self._provider.get_tracer("affidavit.server")

    def close(self) -> None:
        """Send what is waiting, and stop."""
        self._provider.shutdown()


class Traced:
    """ASGI middleware, inside the guard."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app, self._tracer = app, tracing.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        status = [0]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = int(message["status"])
            await send(message)

        with self._tracer.start_as_current_span(
            "request",
            context=_context_of(scope),
            kind=SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                await self._app(scope, receive, sending)
            finally:
                if span.is_recording():
                    _describe(span, scope, status[0])


def _context_of(scope: Scope) -> Any:
    """Return a context whose trace is the request's: the caller's, else its id."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    marks = Marks.of_headers(scope["headers"])
    trace_id = str(scope.get("affidavit.trace_id", marks.trace_id))
    parent = SpanContext(
        trace_id=int(trace_id, 16),
        span_id=int(marks.parent_id or trace_id[:16], 16) or 1,
        is_remote=True,
        trace_flags=TraceFlags(0),
    )
    return set_span_in_context(NonRecordingSpan(parent))


def _describe(span: Any, scope: Scope, status: int) -> None:
    from opentelemetry.trace import Status, StatusCode

    route = str(getattr(scope.get("route"), "path", "unknown"))
    span.update_name(f"{scope['method']} {route}")
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("http.request.id", str(scope.get("affidavit.request_id", "")))
    if status >= 500 or status == 0:
        span.set_status(Status(StatusCode.ERROR))
