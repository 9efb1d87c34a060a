"""The outermost layer: an id, a size limit, two time limits and a measurement for every request."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTimeoutError, BodyTooLargeError, NoSuchRouteError, TooBusyError, render
from server.monitoring import Monitoring
from server.settings import Settings

_logger = logging.getLogger(__name__)

_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Guard:
    """ASGI middleware. Reads the whole body first, under its limits, so that no route ever waits for a slow
    one.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, monitoring: Monitoring) -> None:
        self._app, self._settings, self._monitoring = app, settings, monitoring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["affidavit.request_id"] = secrets.token_hex(16)
        begun, status = time.perf_counter(), [0]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = int(message["status"])
                headers = [(b"x-content-type-options", b"nosniff"), *message.get("headers", [])]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._run(scope, receive, sending, status)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._monitoring.requests.labels(method, route, str(status[0])).inc()
            self._monitoring.seconds.labels(route).observe(time.perf_counter() - begun)

    async def _run(self, scope: Scope, receive: Receive, send: Send, status: list[int]) -> None:
        request = Request(scope)
        if any(ord(char) < 0x20 or char == "\x7f" for char in scope["path"]):
            # the router's patterns end in $, for which a path and the same path with a newline are one
            odd = NoSuchRouteError("the path holds a control character")
            await render(request, odd)(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._body(request, receive), self._settings.body_timeout_s)
        except BodyTooLargeError as error:
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
            await asyncio.wait_for(self._app(scope, replay, send), self._settings.request_timeout_s)
        except Exception as error:  # noqa: BLE001 - the last resort: logged there, answered without its text
            if isinstance(error, TimeoutError):
                error = TooBusyError(f"no answer within {self._settings.request_timeout_s:g} s")
            if status[0]:
                _logger.error("the answer of request=%s broke off: %s", scope["affidavit.request_id"], error)
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
