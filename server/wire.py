"""How bytes leave: what one turn of the event loop writes to a connection is one system call.

uvicorn writes an answer's head and its body apart, and each write of its own costs the kernel's way to the
network and the peer a wake-up. Nothing waits for more to come: at the end of the turn all of it goes. And
uvicorn sets a timer after each answer, which the next request of the connection takes back; here one timer a
connection looks how long it has been quiet.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_logger = logging.getLogger(__name__)


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


class GatheringProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol over such a transport."""

    _quiet_since: float | None = None  # None: a request is under way, or none has come yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        gathering: Any = GatheringTransport(transport, self.loop)
        super().connection_made(gathering)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        gathering: Any = self.transport
        gathering.drop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._quiet_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_after(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        self._quiet_since = None

    def _look_after(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self.timeout_keep_alive_task = None
        if self._quiet_since is None:
            return  # the next answer sets the timer
        left_s = self._quiet_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._look_after(left_s)
        else:
            self.timeout_keep_alive_handler()
