"""The outermost layer: an id, a place in the queue, a size limit, time limits and a measurement for every
request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, MutableMapping
from typing import Any, Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.deadlines import Deadlines
from server.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    DeadlineError,
    IncompleteBodyError,
    NoSuchRouteError,
    OverloadedError,
    ServerError,
    TooBusyError,
    render,
)
from server.logs import is_logged, log_request, marked
from server.marks import Marks
from server.monitoring import Monitoring
from server.settings import Settings
from server.shedding import Shedder

_logger = logging.getLogger(__name__)

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_ALWAYS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})

_has_control: Final = re.compile(r"[\x00-\x1f\x7f]").search


class _Sending:
    """The `send` of one request: adds what every answer bears, and remembers the status."""

    __slots__ = ("_headers", "_send", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.status = send, 0
        self._headers = ((b"x-content-type-options", b"nosniff"), (b"x-request-id", request_id.encode()))

    def __call__(self, message: MutableMapping[str, Any]) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            message = {**message, "headers": [*self._headers, *message.get("headers", ())]}
        return self._send(message)


class Guard:
    """ASGI middleware. Reads the whole body first, under its limits, so that no route ever waits for a slow
    one.
    """

    def __init__(
        self, app: ASGIApp, *, settings: Settings, monitoring: Monitoring, shedder: Shedder | None = None
    ) -> None:
        """`shedder` is the worker's, where calls over gRPC count beside requests."""
        self._app, self._settings, self._monitoring = app, settings, monitoring
        self._deadlines = Deadlines()
        self._arriving = 0  # requests whose body is on its way
        self._shedder = shedder or Shedder(most=settings.max_in_flight, target_s=settings.shed_latency_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = scope["method"]
        if asked == "HEAD":  # GET's answer, of which whoever serves us sends no body: RFC 9110 section 9.3.2
            scope = {**scope, "method": "GET"}
        marks = Marks.of_headers(scope["headers"])
        scope["affidavit.request_id"], scope["affidavit.trace_id"] = marks.request_id, marks.trace_id
        logged, sending = marks.logged, _Sending(send, marks.request_id)
        begun, always = time.perf_counter(), scope["path"] in _ALWAYS
        monitoring = self._monitoring
        monitoring.tallies.enter()
        with marked(logged):
            try:
                if not always:
                    self._shedder.look()
                await self._run(scope, receive, sending, marks, always)
            except OverloadedError as error:
                monitoring.shed.labels("in_flight").inc()
                await render(Request(scope), error)(scope, receive, sending)
            finally:
                seconds, status = time.perf_counter() - begun, sending.status
                route = getattr(scope.get("route"), "path", "unknown")
                method = asked if asked in _METHODS else "other"
                monitoring.tallies.leave()
                if "affidavit.entered" in scope:  # a body's time on the way says nothing about this worker
                    took_s = begun + seconds - scope["affidavit.entered"]
                    self._shedder.leave(took_s if _tells_load(scope) else None)
                monitoring.answered(method, route, status, seconds)
                if self._settings.access_log and (status >= 400 or not always) and is_logged():
                    log_request(
                        method=method,
                        route=route,
                        status=status,
                        seconds=seconds,
                        principal=str(scope.get("affidavit.principal", "")),
                        marks=logged,
                    )

    async def _run(self, scope: Scope, receive: Receive, send: _Sending, marks: Marks, always: bool) -> None:
        settings, deadlines, body = self._settings, self._deadlines, None
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            if _has_control(scope["path"]):
                # the router's patterns end in $, for which a path and the same path with a newline are one
                raise NoSuchRouteError("the path holds a control character")
            timeout_s = marks.timeout_s(settings.request_timeout_s)
            task = deadlines.start(loop, begun + min(settings.body_timeout_s, timeout_s))
            try:
                self._refuse_long(_declared(scope))
                scope["affidavit.body"] = body = await self._body(receive)
                if not always:
                    self._shedder.enter()
                    scope["affidavit.entered"] = time.perf_counter()
                deadlines.move(task, begun + timeout_s)
                await self._app(scope, _replayed(body, receive), send)
            except asyncio.CancelledError:
                if not deadlines.stop(task):
                    raise
                raise self._late(marks, timeout_s, body is not None) from None
            finally:
                deadlines.stop(task)
        except OverloadedError:
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: logged there, answered without its text
            if isinstance(error, TimeoutError):  # of something inside that has a limit of its own
                error = TooBusyError("a part of the answer took too long; try again")
            if send.status:
                _logger.error("an answer broke off: %s", type(error).__name__)
            else:
                await render(Request(scope), error)(scope, receive, send)

    def _late(self, marks: Marks, timeout_s: float, has_body: bool) -> ServerError:
        if not has_body and self._settings.body_timeout_s <= timeout_s:
            return BodyTimeoutError(f"the body did not arrive within {self._settings.body_timeout_s:g} s")
        said = f"no answer within {timeout_s:g} s"
        return TooBusyError(said) if marks.timeout is None else DeadlineError(said)

    def _refuse_long(self, size: int) -> None:
        if size > self._settings.max_body_bytes:
            limit = self._settings.max_body_bytes
            raise BodyTooLargeError(f"a body may hold {limit} bytes; send fewer rows a request")

    async def _body(self, receive: Receive) -> bytes:
        """Read the body to its end. Most come whole with the head; of others only so many are read at once.

        Raises:
            BodyTooLargeError: it is longer than may be.
            IncompleteBodyError: the connection ended before the body did.
            OverloadedError: too many bodies are on their way.
        """
        message = await receive()
        body: bytes = message.get("body", b"")
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._refuse_long(len(body))
            return body
        if self._arriving >= self._settings.max_in_flight:
            raise OverloadedError(f"{self._arriving} bodies are on their way; come back in a few seconds")
        self._arriving += 1
        try:
            return await self._whole(message, receive)
        finally:
            self._arriving -= 1

    async def _whole(self, message: Message, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise IncompleteBodyError("the connection ended before the body did; nothing was asked")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._refuse_long(size)
            if not message.get("more_body", False):
                return b"".join(parts)
            message = await receive()


def _declared(scope: Scope) -> int:
    """How many bytes the request says that its body has; 0 where it says nothing that is a number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value[:20]) if value.isdigit() else 0
    return 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever the connection says."""
    delivered = False

    async def replay() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _tells_load(scope: Scope) -> bool:
    """Whether how long a request took says how busy the worker is: not of one that waits for witnesses."""
    return str(scope["path"]).endswith(("/predict", "/infer")) and "affidavit.waits" not in scope
