"""The server's own log: one JSON line an event, with the field names of the Elastic Common Schema.

Two rules hold for every line, whoever writes it. Only fields of a fixed list are written, so that no caller
of a logger can let a row in by a field's name. And of an exception its type and the places in the code are
written, never its text: a library's message may quote the value that it did not like.

The log is for operators; what can be proved is in the ledger.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

import structlog

Format = Literal["ecs", "text"]

ECS_VERSION: Final = "8.11.0"
SERVICE: Final = "affidavit"
FIELDS: Final = frozenset(
    {
        "@timestamp",
        "ecs.version",
        "error.code",
        "error.stack_trace",
        "error.type",
        "event.action",
        "event.duration",
        "event.outcome",
        "http.request.id",
        "http.request.method",
        "http.response.status_code",
        "log.level",
        "log.logger",
        "message",
        "process.pid",
        "service.name",
        "trace.id",
        "url.path",
        "user.id",
    }
)
"""All that a line may hold. `url.path` is the route's pattern, never what the caller wrote in its place."""

_MARKS: ContextVar[Mapping[str, str] | None] = ContextVar("affidavit_log_marks", default=None)
_MAX_FRAMES: Final = 40

access = logging.getLogger("server.access_log")


def configure(form: Format, level: str, *, stream: TextIO | None = None) -> None:
    """Send everything that this process logs to `stream` (standard error), in one form."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(formatter(form))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def formatter(form: Format) -> logging.Formatter:
    """Return what turns a record into one line."""
    if form == "text":
        return _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    return structlog.stdlib.ProcessorFormatter(
        processors=[_to_ecs],
        foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name],
    )


class marked:  # noqa: N801 - reads as a verb; a generator's context would cost each request twice as much
    """Give every line of this task, and of what it starts, these fields."""

    __slots__ = ("_marks", "_token")

    def __init__(self, marks: Mapping[str, str]) -> None:
        self._marks = marks

    def __enter__(self) -> None:
        before = _MARKS.get()
        self._token = _MARKS.set({**before, **self._marks} if before else self._marks)

    def __exit__(self, *_: object) -> None:
        _MARKS.reset(self._token)


def log_request(
    *, method: str, route: str, status: int, seconds: float, principal: str, marks: Mapping[str, str]
) -> None:
    """Write the line of one answered request."""
    if not access.isEnabledFor(logging.INFO):
        return
    access.info(
        "%s %s %d",
        method,
        route,
        status,
        extra={
            "ecs": {
                **marks,
                "event.action": "http.request",
                "event.duration": int(seconds * 1e9),
                "event.outcome": "success" if status < 400 else "failure",
                "http.request.method": method,
                "http.response.status_code": status,
                "url.path": route,
                **({"user.id": principal} if principal else {}),
            }
        },
    )


def _to_ecs(_: Any, __: str, event: structlog.typing.EventDict) -> str:
    record: logging.LogRecord | None = event.get("_record")
    moment = datetime.fromtimestamp(record.created, UTC) if record is not None else datetime.now(UTC)
    document: dict[str, Any] = {
        "@timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "log.level": event.get("level", "info"),
        "message": str(event.get("event", "")),
        "ecs.version": ECS_VERSION,
        "service.name": SERVICE,
        "process.pid": os.getpid(),
        "log.logger": event.get("logger", record.name if record is not None else ""),
        **(_MARKS.get() or {}),
    }
    given = getattr(record, "ecs", None)
    document.update(given if isinstance(given, dict) else {})
    document.update({name: value for name, value in event.items() if name in FIELDS})
    caught = event.get("exc_info")
    error = caught[1] if isinstance(caught, tuple) else caught
    if isinstance(error, BaseException):
        document["error.type"] = type(error).__name__
        document["error.stack_trace"] = stack_of(error)
    kept = {name: value for name, value in document.items() if name in FIELDS}
    return json.dumps(
        kept, ensure_ascii=False, separators=(",", ":"), default=lambda value: type(value).__name__
    )


def stack_of(error: BaseException) -> str:
    """Return where an exception and its causes came from: types and places in the code, no text of theirs."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.extract_tb(current.__traceback__)[-_MAX_FRAMES:]
        places = [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        parts.append("\n".join([type(current).__name__, *places]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nafter\n".join(parts)


class _TextFormatter(logging.Formatter):
    """Plain lines for people at a terminal, under the same rule for exceptions."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the library's name
        error = ei[1] if isinstance(ei, tuple) else None
        return stack_of(error) if error is not None else ""
