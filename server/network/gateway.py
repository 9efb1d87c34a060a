"""The one door: what the world may say to a coordinator, and nothing else.

    /v1/fleet/…    ten routes of a SuperNode, authenticated and checked, passed to SuperLink on loopback
    /v1/join/…     joining, leaving, key exchange: signed messages, answered here
    /v1/audit/…    the log's routes that need no key: checkpoint, consistency, cosignatures, hash tiles
    all else       404, with no byte of a body read

Headers are judged before a body is read, a body is read up to its route's limit and no further, and every
caller has a rate.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from anyio import to_thread
from starlette.types import Receive, Scope, Send

from audit.errors import AuditError
from federation.network.membership import Membership
from server.network.directory import NodeDirectory
from server.network.fleet import FLEET, FleetGate, NodeRefusedError
from server.network.holding import PullHold
from server.network.joining import Joining, JoinProblem
from server.network.limits import RateLimit

_logger = logging.getLogger(__name__)

PASSED_HEADERS: Final[tuple[str, ...]] = ("accept", "content-type", "user-agent")
RETURNED_HEADERS: Final = ("content-type", "cache-control")
LOG_READS: Final = frozenset({"/v1/audit/checkpoint", "/v1/audit/consistency"})
LOG_TILES: Final = "/v1/audit/tile/"
COSIGNATURES: Final = "/v1/audit/cosignatures"
COSIGNATURE_BYTES: Final = 16 << 10
PULL: Final = "/v1/fleet/pull-messages"
PUSH: Final = "/v1/fleet/push-messages"
PUSH_PART: Final = "/v1/fleet/push-object"
UPSTREAM_S: Final = 60.0
STRANGER_PER_S: Final = 5.0
STRANGER_BURST: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_bytes: int
    body_timeout_s: float
    requests_per_s: float
    burst: int


class _TooLargeError(Exception):
    pass


class _GoneError(Exception):
    pass


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        membership: Membership,
        directory: NodeDirectory,
        *,
        superlink: httpx.AsyncClient,
        api: httpx.AsyncClient,
        ca_pem: bytes,
        limits: Limits,
        bell: Path | None = None,
    ) -> None:
        """`bell`: where the ServerApps ring when they have sent something."""
        self._membership, self._directory = membership, directory
        self._superlink, self._api = superlink, api
        self._limits = limits
        self._gate = FleetGate(membership.roster, directory.node_id_of)
        self._joining = Joining(membership, ca_pem)
        self._node_rate = RateLimit(limits.requests_per_s, limits.burst)
        self._stranger_rate = RateLimit(STRANGER_PER_S, STRANGER_BURST)
        self._bell, self._hold = bell, PullHold()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        try:
            if path in FLEET and method == "POST":
                await self._fleet(scope, receive, send)
            elif Joining.knows(method, path):
                await self._join(scope, receive, send)
            elif method == "GET" and (path in LOG_READS or path.startswith(LOG_TILES)):
                await self._log(scope, b"", send)
            elif method == "POST" and path == COSIGNATURES:
                self._limit_stranger(scope)
                await self._log(scope, await self._body(scope, receive, COSIGNATURE_BYTES), send)
            else:
                await answer(send, 404)
        except NodeRefusedError as error:
            await self._note(error)
            await answer(send, error.status)
        except JoinProblem as problem:
            await answer_json(send, problem.status, problem.document())
        except _TooLargeError:
            await answer(send, 413)
        except TimeoutError:
            await answer(send, 408)
        except _GoneError:
            return
        except httpx.HTTPError as error:
            _logger.warning("%s is not passed on: %s", path, type(error).__name__)
            await answer(send, 503)
        except AuditError as error:
            _logger.error("the log cannot take a step of %s: %s", path, error.code)
            await answer(send, 503)

    async def _fleet(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = headers_of(scope), scope["path"]
        node = self._gate.authenticate(headers)
        if not self._node_rate.allows(node.fingerprint):
            raise NodeRefusedError("", status=503)
        limit = FLEET[path][1] or self._limits.max_body_bytes
        body = await self._body(scope, receive, limit)
        self._gate.check_body(path, node, body)
        passed = {name: headers[name] for name in PASSED_HEADERS if name in headers}
        passed |= {name: value for name, value in headers.items() if name.startswith("flwr-")}
        hold, rings = self._hold, self._hold.rings
        if path == PULL:
            if not await hold.wait(node.node_key, receive):
                raise _GoneError
            self._gate.check_standing(node)
            rings = hold.rings
        reply = await self._superlink.post(path, content=body, headers=passed, timeout=UPSTREAM_S)
        if reply.status_code == 200:
            if path == PULL:
                hold.answered(node.node_key, rings, reply.content)
            elif path == PUSH:
                hold.reply_begun(node.node_key, reply.content)
            elif path == PUSH_PART:
                hold.reply_part(node.node_key)
        await respond(send, reply)

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit_stranger(scope)
        body = b""
        if scope["method"] == "POST":
            body = await self._body(scope, receive, Joining.MAX_BODY_BYTES)
        status, content, kind = await to_thread.run_sync(
            partial(self._joining.answer, scope["method"], scope["path"], body)
        )
        await answer(send, status, content, kind)

    async def _log(self, scope: Scope, body: bytes, send: Send) -> None:
        self._limit_stranger(scope)
        query = scope.get("query_string", b"").decode("ascii", "replace")
        target = scope["path"] + (f"?{query}" if query else "")
        headers = {"content-type": "application/json"} if body else {}
        reply = await self._api.request(
            scope["method"], target, content=body, headers=headers, timeout=UPSTREAM_S
        )
        await respond(send, reply)

    async def _body(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        declared = headers_of(scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
            raise _TooLargeError
        return await asyncio.wait_for(_read(receive, limit), self._limits.body_timeout_s)

    def _limit_stranger(self, scope: Scope) -> None:
        client = scope.get("client") or ("unknown", 0)
        if not self._stranger_rate.allows(str(client[0])):
            raise JoinProblem(429, "network.too_busy", "too many requests from this address; wait a moment")

    async def _note(self, error: NodeRefusedError) -> None:
        if not error.reason:
            return
        _logger.warning("refused: %s site=%s key=%s", error.reason, error.site or "?", error.fingerprint[:16])
        try:
            await to_thread.run_sync(
                self._membership.node_refused, error.site, error.fingerprint, error.reason
            )
        except AuditError as problem:
            _logger.error("a refusal could not be logged: %s", problem.code)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._directory.start()
                if self._bell is not None and not self._hold.start(self._bell):
                    _logger.warning("no bell at %s; SuperNodes look by themselves", self._bell)
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self._hold.stop()
                await to_thread.run_sync(self._directory.stop)
                await self._superlink.aclose()
                await self._api.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def _read(receive: Receive, limit: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLargeError
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def headers_of(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; of a repeated one the first."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


async def respond(send: Send, reply: httpx.Response) -> None:
    headers = {name: reply.headers[name] for name in RETURNED_HEADERS if name in reply.headers}
    await answer(send, reply.status_code, reply.content, headers=headers)


async def answer(
    send: Send,
    status: int,
    content: bytes = b"",
    kind: str = "",
    *,
    headers: Mapping[str, str] | None = None,
) -> None:
    listed = dict(headers or {})
    if kind:
        listed["content-type"] = kind
    listed |= {"content-length": str(len(content)), "x-content-type-options": "nosniff"}
    if status in (408, 413):
        listed["connection"] = "close"
    raw = [(name.encode(), value.encode("latin-1")) for name, value in listed.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


async def answer_json(send: Send, status: int, document: Mapping[str, Any]) -> None:
    await answer(send, status, json.dumps(document).encode(), "application/json")


Application = Callable[[Scope, Receive, Send], Awaitable[None]]
