"""A site's witness over HTTP: C2SP tlog-witness `add-checkpoint`, as one small ASGI application.

    POST /add-checkpoint                       200 with the cosignature, or the protocol's refusal
    GET  /<hex SHA-256 of origin>/checkpoint   the checkpoint this witness cosigned last, with its line
    GET  /healthz                              200 while the witness's state can be read

It needs the site's witness key and `witness.json`, no data, ledger or agent, and may run beside them. Status
and order are the protocol's: 404 unknown origin, 403 signature, 400 form, 409 other old size, 422 proof. The
state is on disk before the answer leaves. A contradiction is kept as a file that convicts the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from audit.checkpoints import add_signatures, cosign
from audit.errors import AuditError, WitnessError, WitnessProofError
from audit.witness import Witness, status_of
from audit.witness_request import MAX_REQUEST_BYTES, AddCheckpoint, monitoring_name
from clients.accusations import keep_accusation

_logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answer = tuple[int, str, bytes]

HEAD_TIMEOUT_S: Final = 10.0
BODY_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 64
PLAIN: Final = "text/plain; charset=utf-8"


def system_time() -> int:
    """POSIX seconds by this machine's clock."""
    return int(datetime.now(UTC).timestamp())


class WitnessServer:
    """The ASGI application of one witness of one log."""

    def __init__(
        self, witness: Witness, home: Path, *, prefix: str = "", now: Callable[[], int] = system_time
    ) -> None:
        self._witness, self._home, self._now = witness, home, now
        self._add = f"{prefix}/add-checkpoint"
        self._show = f"{prefix}/{monitoring_name(witness.log.name)}/checkpoint"
        self._health = f"{prefix}/healthz"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        status, kind, body = await self._answer(scope, receive)
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        if status == 405:
            headers.append((b"allow", b"POST" if scope["path"] == self._add else b"GET, HEAD"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path, method = scope["path"], scope["method"]
        if path not in (self._add, self._show, self._health):
            return 404, PLAIN, b"no such path\n"
        if method not in (("POST",) if path == self._add else ("GET", "HEAD")):
            return 405, PLAIN, b"method not allowed\n"
        try:
            if path == self._add:
                body = await asyncio.wait_for(_body(receive), BODY_TIMEOUT_S)
                if body is None:
                    return 413, PLAIN, b"a request has at most %d bytes\n" % MAX_REQUEST_BYTES
                return await asyncio.to_thread(self.add_checkpoint, body)
            return await asyncio.to_thread(self._show_last, health=path == self._health)
        except TimeoutError:
            return 408, PLAIN, b"the body did not arrive in time\n"
        except (AuditError, OSError) as error:
            _logger.error("the witness cannot act: %s", error)
            return 500, PLAIN, b"the witness cannot act; its own log has the reason\n"

    def add_checkpoint(self, body: bytes) -> Answer:
        """Answer one request: status, content type, body."""
        try:
            request = AddCheckpoint.parse(body)
            line = self._witness.cosign(request.note, request.old_size, request.proof, self._now())
        except WitnessProofError as error:
            keep_accusation(self._home, error.seen_note, error.offered_note, request.proof)
            return status_of(error)
        except WitnessError as error:
            if error.status >= 500:
                raise
            return status_of(error)
        return 200, PLAIN, line

    def _show_last(self, *, health: bool) -> Answer:
        state = self._witness.state()
        if health:
            return 200, PLAIN, b"size %d\n" % state.checkpoint.tree_size
        if state.note is None:
            return 404, PLAIN, b"nothing cosigned yet\n"
        line = cosign(state.note, self._witness.key, state.timestamp)  # Ed25519: the very line given then
        return 200, PLAIN, add_signatures(state.note, [line])


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None when it is over the cap."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_REQUEST_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def impatient_protocol(head_timeout_s: float = HEAD_TIMEOUT_S) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with a time limit on each request's head, which it has none for.

    Otherwise a few connections that never finish their first line would use up `MAX_CONNECTIONS` for good.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline = self.loop.call_later(head_timeout_s, self._give_up)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._deadline.cancel()
            self._deadline = self.loop.call_later(head_timeout_s, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._deadline.cancel()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            cycle: Any = self.cycle  # none before the first request
            if cycle is None or cycle.response_complete:
                self.transport.close()

    return Impatient


def serve(server: WitnessServer, *, host: str, port: int) -> None:
    """Listen until stopped."""
    import uvicorn

    uvicorn.run(
        server,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        http=impatient_protocol(),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        server_header=False,
    )
