"""The outermost layer: an id, a place in the queue, a size limit, time limits and a measurement for every
request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    DeadlineError,
    MalformedRequestError,
    NoSuchRouteError,
    OverloadedError,
    TooBusyError,
    render,
)
from server.logs import log_request, marked
from server.marks import Marks
from server.monitoring import Monitoring
from server.settings import Settings
from server.shedding import Shedder

_logger = logging.getLogger(__name__)

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_ALWAYS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})


class Guard:
    """ASGI middleware. Reads the whole body first, under its limits, so that no route ever waits for a slow
    one.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, monitoring: Monitoring) -> None:
        self._app, self._settings, self._monitoring = app, settings, monitoring
        self._shedder = Shedder(most=settings.max_in_flight, target_s=settings.shed_latency_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        marks = Marks.of_headers(scope["headers"])
        scope["affidavit.request_id"], scope["affidavit.trace_id"] = marks.request_id, marks.trace_id
        with marked(http_request_id=marks.request_id, trace_id=marks.trace_id):
            await self._counted(scope, receive, send, marks)

    async def _counted(self, scope: Scope, receive: Receive, send: Send, marks: Marks) -> None:
        begun, status = time.perf_counter(), [0]
        request_id = marks.request_id.encode()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = int(message["status"])
                headers = [
                    (b"x-content-type-options", b"nosniff"),
                    (b"x-request-id", request_id),
                    *message.get("headers", []),
                ]
                message = {**message, "headers": headers}
            await send(message)

        entered = False
        self._monitoring.in_flight.inc()
        try:
            if scope["path"] not in _ALWAYS:
                self._shedder.enter()
                entered = True
            await self._run(scope, receive, sending, status, marks)
        except OverloadedError as error:
            self._monitoring.shed.labels("in_flight").inc()
            await render(Request(scope), error)(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._monitoring.in_flight.dec()
            if entered:
                self._shedder.leave(seconds if _tells_load(scope) else None)
            self._monitoring.requests.labels(method, route, str(status[0])).inc()
            self._monitoring.seconds.labels(route).observe(seconds)
            if self._settings.access_log and (status[0] >= 400 or scope["path"] not in _ALWAYS):
                log_request(
                    method=method,
                    route=route,
                    status=status[0],
                    seconds=seconds,
                    principal=str(scope.get("affidavit.principal", "")),
                    marks={"http.request.id": marks.request_id, "trace.id": marks.trace_id},
                )

    async def _run(self, scope: Scope, receive: Receive, send: Send, status: list[int], marks: Marks) -> None:
        request = Request(scope)
        if any(ord(char) < 0x20 or char == "\x7f" for char in scope["path"]):
            # the router's patterns end in $, for which a path and the same path with a newline are one
            odd = NoSuchRouteError("the path holds a control character")
            await render(request, odd)(scope, receive, send)
            return
        try:
            timeout_s = marks.timeout_s(self._settings.request_timeout_s)
            until = time.perf_counter() + timeout_s
            body = await asyncio.wait_for(
                self._body(request, receive), min(self._settings.body_timeout_s, timeout_s)
            )
        except (BodyTooLargeError, MalformedRequestError) as error:
            await render(request, error)(scope, receive, send)
            return
        except TimeoutError:
            late = BodyTimeoutError(f"the body did not arrive within {self._settings.body_timeout_s:g} s")
            await render(request, late)(scope, receive, send)
            return
        delivered = False

        async def replay() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await asyncio.wait_for(self._app(scope, replay, send), max(0.0, until - time.perf_counter()))
        except Exception as error:  # noqa: BLE001 - the last resort: logged there, answered without its text
            if isinstance(error, TimeoutError):
                said = f"no answer within {timeout_s:g} s"
                error = TooBusyError(said) if marks.timeout is None else DeadlineError(said)
            if status[0]:
                _logger.error("an answer broke off: %s", type(error).__name__)
            else:
                await render(request, error)(scope, receive, send)

    async def _body(self, request: Request, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        declared = request.headers.get("content-length", "")
        refused = BodyTooLargeError(f"a body may hold {limit} bytes; send fewer rows a request")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise refused
        parts: list[bytes] = []
        size = 0
        while True:
            message: dict[str, Any] = dict(await receive())
            if message["type"] == "http.disconnect":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise refused
            if not message.get("more_body", False):
                return b"".join(parts)


def _tells_load(scope: Scope) -> bool:
    """Whether how long a request took says how busy the worker is: not of one that waits for witnesses."""
    path = str(scope["path"])
    return path.endswith(("/predict", "/infer")) and b"wait=" not in scope["query_string"]
