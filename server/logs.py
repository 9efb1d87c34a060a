"""The server's own log: the lines of `audit.log_lines`, with the marks of the request that they belong to.

The log is for operators; what can be proved is in the ledger.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TextIO

import structlog

from audit.log_lines import FIELDS, Format, TextFormatter, line_of, send_to

_MARKS: ContextVar[Mapping[str, str] | None] = ContextVar("affidavit_log_marks", default=None)

access = logging.getLogger("server.access_log")


def configure(form: Format, level: str, *, stream: TextIO | None = None) -> None:
    """Send everything that this process logs to `stream` (standard error), in one form."""
    send_to(formatter(form), level, stream=stream)


def formatter(form: Format) -> logging.Formatter:
    """Return what turns a record into one line."""
    if form == "text":
        return TextFormatter()
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


def is_logged() -> bool:
    """Whether requests' lines go anywhere."""
    return access.isEnabledFor(logging.INFO)


def log_request(
    *, method: str, route: str, status: int, seconds: float, principal: str, marks: Mapping[str, str]
) -> None:
    """Write the line of one answered request."""
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
    given = getattr(record, "ecs", None)
    caught = event.get("exc_info")
    error = caught[1] if isinstance(caught, tuple) else caught
    return line_of(
        created=record.created if record is not None else time.time(),
        level=event.get("level", "info"),
        logger=event.get("logger", record.name if record is not None else ""),
        message=str(event.get("event", "")),
        fields={
            **(_MARKS.get() or {}),
            **(given if isinstance(given, dict) else {}),
            **{name: value for name, value in event.items() if name in FIELDS},
        },
        error=error if isinstance(error, BaseException) else None,
    )
