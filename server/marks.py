"""What a request bears on its way: its id, its trace, its deadline.

The id goes into the entry, the answer and every log line, and an entry stays for good. So a caller's own
(`X-Request-ID`) counts only where it is a UUID or 32 hexadecimal digits, which name nobody; any other is
replaced, and the answer's header says by what. `traceparent` is W3C Trace Context's. `X-Request-Timeout` is
in seconds and can only shorten the server's own limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from starlette.types import Scope

from audit.chance import hex_text
from server.errors import MalformedRequestError

REQUEST_ID: Final = b"x-request-id"
TIMEOUT: Final = b"x-request-timeout"
TRACEPARENT: Final = b"traceparent"

_OURS: Final = frozenset({REQUEST_ID, TRACEPARENT, TIMEOUT})
_HEX32 = re.compile(r"[0-9a-f]{32}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_SECONDS = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})")
_ZEROS: Final = "0" * 32


class Marks(NamedTuple):
    """One request's."""

    request_id: str  # 32 hex
    trace_id: str  # 32 hex: the caller's trace, else the request's id
    timeout: str | None  # as the caller wrote it
    parent_id: str = ""  # 16 hex: the caller's span, where it gave a trace

    @classmethod
    def of_headers(cls, headers: Iterable[tuple[bytes, bytes]]) -> Marks:
        """Read them; what is not as it must be counts as absent, but for the timeout."""
        given: dict[bytes, str] = {}
        for name, value in headers:
            if name in _OURS:
                given.setdefault(name, value.decode("latin-1").strip())
        if not given:
            request_id = hex_text(16)
            return cls(request_id, request_id, None)
        request_id = parse_request_id(given.get(REQUEST_ID, "")) or hex_text(16)
        trace = parse_trace(given.get(TRACEPARENT, ""))
        return cls(
            request_id=request_id,
            trace_id=request_id if trace is None else trace[0],
            timeout=given.get(TIMEOUT),
            parent_id="" if trace is None else trace[1],
        )

    @property
    def logged(self) -> dict[str, str]:
        """The fields that each of the request's log lines bears."""
        return {"http.request.id": self.request_id, "trace.id": self.trace_id}

    def timeout_s(self, most: float) -> float:
        """Return how long the request may take.

        Raises:
            MalformedRequestError: the header is no number of seconds above 0.
        """
        if self.timeout is None:
            return most
        seconds = float(self.timeout) if _SECONDS.fullmatch(self.timeout) else 0.0
        if seconds <= 0:
            problem = "X-Request-Timeout is a number of seconds above 0, such as 2 or 0.25"
            raise MalformedRequestError(problem, fields=[{"field": "X-Request-Timeout", "problem": problem}])
        return min(seconds, most)


def parse_request_id(text: str) -> str | None:
    """Return a caller's id as 32 hexadecimal digits; None where it might name somebody."""
    lower = text.lower()
    if _UUID.fullmatch(lower):
        lower = lower.replace("-", "")
    return lower if _HEX32.fullmatch(lower) and lower != _ZEROS else None


def parse_trace(text: str) -> tuple[str, str] | None:
    """Return trace id and span id of a W3C traceparent, or None."""
    found = _TRACEPARENT.fullmatch(text)
    return (found[1], found[2]) if found and found[1] != _ZEROS and found[2] != "0" * 16 else None


def note_waiting(scope: Scope) -> None:
    """Remember that a request waits for a checkpoint: how long it takes says nothing about load."""
    scope["affidavit.waits"] = True


def note_principal(scope: Scope, principal: str) -> None:
    """Remember whose request it is, by pseudonym, for its line in the log."""
    scope["affidavit.principal"] = principal
