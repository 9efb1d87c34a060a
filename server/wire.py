"""How bytes leave: what one turn of the event loop writes to a connection is one system call.

uvicorn writes an answer's head and its body apart, and each write of its own costs the kernel's way to the
network and the peer a wake-up. Nothing waits for more to come: at the end of the turn all of it goes. And
uvicorn sets a timer after each answer, which the next request of the connection takes back; here one timer a
connection looks how long it has been quiet.

Whoever connects has shown no key yet, so how large and how late the head of a request may be is limited here,
and how many connections a worker has; uvicorn would read for ever. Only what does not come in one piece is
counted. Trailer fields are read and forgotten: they are no headers (RFC 9110, section 6.5.1).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import (
    MEDIA_TYPE,
    STATUS,
    TITLES,
    BodyTimeoutError,
    BodyTooLargeError,
    HeadTooLargeError,
    OverloadedError,
    ServerError,
)

_logger = logging.getLogger(__name__)

_TRAILERS: Final[Any] = deque(maxlen=0)  # keeps nothing


class _Turn:
    """The connections of one event loop that have something to write in this turn."""

    __slots__ = ("__weakref__", "_writing")

    def __init__(self) -> None:
        self._writing: list[GatheringTransport] = []

    def add(self, transport: GatheringTransport, loop: asyncio.AbstractEventLoop) -> None:
        if not self._writing:
            loop.call_soon(self._end)
        self._writing.append(transport)

    def _end(self) -> None:
        writing, self._writing = self._writing, []
        for transport in writing:
            try:
                transport.flush()
            except Exception as error:  # noqa: BLE001 - of one connection; the others write all the same
                _logger.warning("an answer cannot be sent: %s", type(error).__name__)


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turn] = WeakKeyDictionary()


class GatheringTransport:
    """A transport that writes at the end of the loop's turn, and is the one that it wraps in all else."""

    __slots__ = ("_loop", "_parts", "_transport", "_turn")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        turn = _turns.get(loop)
        if turn is None:
            turn = _turns[loop] = _Turn()
        self._transport, self._loop, self._turn = transport, loop, turn
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._turn.add(self, self._loop)
        self._parts.append(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self.drop()
        self._transport.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.flush()
        self._transport.set_protocol(protocol)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def flush(self) -> None:
        """Write what has gathered."""
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def drop(self) -> None:
        """Forget what has gathered: nobody is there to read it."""
        self._parts = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a connection may cost before anybody knows who asks."""

    header_bytes: int = 65_536  # request line and header fields
    header_fields: int = 256
    header_s: float = 10.0  # from a request's first byte to the end of its head
    raw_body_bytes: int = 8 << 20  # of a body in chunks, with all that frames and follows it
    connections: int = 4_096  # of one worker
    refused: Callable[[str], None] = lambda reason: None  # called for each that is refused here


class GatheringProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol over such a transport, within limits."""

    limits = Limits()

    _due: float | None = None  # by when it must have gone on; None: a request is under way, and has limits
    _is_whole = True  # the last message ended; what comes is the head of the next
    _has_begun = False  # some of that head has come
    _head_bytes = 0  # of it, in pieces of their own
    _body_bytes = 0  # of a message that did not end in the piece in which its head did
    _piece_bytes = 0
    _refusal: type[ServerError] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        gathering: Any = GatheringTransport(transport, self.loop)
        super().connection_made(gathering)
        self._wait(self.timeout_keep_alive)
        if len(self.connections) > self.limits.connections:
            self._refuse("connections", OverloadedError)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_looking()
        gathering: Any = self.transport
        gathering.drop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_whole, self._piece_bytes = self._is_whole, len(data)
        super().data_received(data)
        if self._due is not None or not self._is_whole or "path" not in self.scope:
            self._look_at_part(len(data), was_whole)

    def on_headers_complete(self) -> None:
        limits = self.limits
        if len(self.headers) > limits.header_fields or (
            self._head_bytes + self._piece_bytes > limits.header_bytes
            and self._size_of_head() > limits.header_bytes
        ):
            self._refusal = HeadTooLargeError
            raise HeadTooLargeError("")  # which the parser makes an error of its own
        self._due, self._is_whole = None, False
        if self._has_begun or self._body_bytes:
            self._stop_looking()  # it would look too late for whoever is quiet after the answer
            self._has_begun, self._head_bytes, self._body_bytes = False, 0, 0
        super().on_headers_complete()
        self.headers = _TRAILERS

    def on_message_complete(self) -> None:
        self._is_whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        if self._has_begun:
            self._wait_anew(self.limits.header_s)
        else:
            self._wait(self.timeout_keep_alive)

    def send_400_response(self, msg: str) -> None:
        if self._refusal is None:
            super().send_400_response(msg)
        else:
            self._refuse("head", self._refusal)

    def _unset_keepalive_if_required(self) -> None:
        """The timer looks for itself whether a request came."""

    def _look_at_part(self, size: int, was_whole: bool) -> None:
        """After a piece that ended within a message, or before the first byte of one."""
        limits = self.limits
        if self.transport.is_closing():
            return
        if not self._is_whole:
            self._body_bytes += size
            if self._body_bytes > limits.raw_body_bytes and self._is_chunked():
                self._refuse("body", BodyTooLargeError)
            return
        if self._has_begun:
            self._head_bytes += size
        else:
            self._has_begun = True
            if self._due is not None:  # else it has time while the request before it is answered
                self._wait_anew(limits.header_s)
                self._head_bytes = size if was_whole else 0
        if self._head_bytes > limits.header_bytes or len(self.headers or ()) > limits.header_fields:
            self._refuse("head", HeadTooLargeError)

    def _size_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _is_chunked(self) -> bool:
        """Whether the last message's body is of unknown length; else the parser counts its bytes."""
        return any(name == b"transfer-encoding" for name, _ in self.scope["headers"])

    def _refuse(self, reason: str, kind: type[ServerError]) -> None:
        """Say why, unless somebody else's answer is being written, and close."""
        if self.transport.is_closing():
            return
        self.limits.refused(reason)
        cycle: Any = self.cycle  # None before the first request
        if cycle is None or cycle.response_complete:
            self.transport.write(_REFUSALS[kind])
        self.transport.close()

    def _wait(self, seconds: float) -> None:
        """Close in so many seconds unless a request is under way then; a timer that is set looks before."""
        self._due = self.loop.time() + seconds
        if self.timeout_keep_alive_task is None:
            self._look_after(seconds)

    def _wait_anew(self, seconds: float) -> None:
        self._stop_looking()
        self._wait(seconds)

    def _stop_looking(self) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def _look_after(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self.timeout_keep_alive_task = None
        if self._due is None:
            return  # the next answer sets the timer
        left_s = self._due - self.loop.time()
        if left_s > 0:
            self._look_after(left_s)
        elif self._has_begun:
            self._refuse("head_late", BodyTimeoutError)
        else:
            self.timeout_keep_alive_handler()


def protocol_within(limits: Limits) -> type[GatheringProtocol]:
    """The protocol with these limits, for whoever makes one of it for each connection."""
    return type("LimitedProtocol", (GatheringProtocol,), {"limits": limits})


_SAID: Final[dict[type[ServerError], str]] = {
    OverloadedError: "the worker has as many connections as it takes; come back in a second",
    HeadTooLargeError: "the request's line and header fields are too large or too many; send fewer",
    BodyTooLargeError: "the body is framed by far more bytes than it holds",
    BodyTimeoutError: "the request's head did not arrive in time",
}


def _refusal(kind: type[ServerError]) -> bytes:
    """The whole answer to somebody of whose request nothing is known: a problem document."""
    status = STATUS[kind.code]
    document = {
        "type": f"urn:affidavit:problem:{kind.code}",
        "title": TITLES[status],
        "status": status,
        "code": kind.code,
        "detail": _SAID[kind],
    }
    body = json.dumps(document).encode()
    fields = {
        "content-type": MEDIA_TYPE,
        "content-length": len(body),
        "affidavit-code": kind.code,
        "cache-control": "no-store",
        "connection": "close",
        **({"retry-after": 1} if status == 503 else {}),
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


_REFUSALS: Final = {kind: _refusal(kind) for kind in _SAID}
