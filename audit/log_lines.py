"""What a process says of itself: one JSON line an event, with the field names of the Elastic Common Schema.

Two rules hold for every line, whoever writes it. Only fields of a fixed list are written, so that no caller
of a logger can let a row in by a field's name. And of an exception its type and the places in the code are
written, never its text: a library's message may quote the value that it did not like.

The servers add their requests' marks (`server.logs`); a site's processes write these lines as they are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO, cast, get_args

from audit.errors import AuditError

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

FORM: Final = "AFFIDAVIT_LOG_FORMAT"
_MAX_FRAMES: Final = 40


class LogFormatError(AuditError):
    """The environment names a form of log lines that does not exist."""

    code = "log.format"


def form_of(environ: Mapping[str, str] | None = None) -> Format:
    """Return the form that AFFIDAVIT_LOG_FORMAT names, `ecs` where it is not set.

    Raises:
        LogFormatError: it names another.
    """
    wanted = (os.environ if environ is None else environ).get(FORM, "") or "ecs"
    if wanted in get_args(Format):
        return cast("Format", wanted)
    raise LogFormatError(f"{FORM}: {wanted[:20]!r} is none of {', '.join(get_args(Format))}")


def configure(form: Format, level: str, *, stream: TextIO | None = None) -> None:
    """Send everything that this process logs to `stream` (standard error), in one form."""
    send_to(TextFormatter() if form == "text" else EcsFormatter(), level, stream=stream)


def send_to(formatter: logging.Formatter, level: str, *, stream: TextIO | None = None) -> None:
    """Send everything that this process logs to `stream` (standard error), and nowhere else."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


def line_of(
    *,
    created: float,
    level: str,
    logger: str,
    message: str,
    fields: Mapping[str, Any],
    error: BaseException | None,
) -> str:
    """Return the line of one event; of `fields` only those of the list are in it."""
    document = {
        "@timestamp": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
        "log.level": level,
        "message": message,
        "ecs.version": ECS_VERSION,
        "service.name": SERVICE,
        "process.pid": os.getpid(),
        "log.logger": logger,
        **fields,
    }
    if error is not None:
        document["error.type"] = type(error).__name__
        document["error.stack_trace"] = stack_of(error)
    kept = {name: value for name, value in document.items() if name in FIELDS}
    return json.dumps(
        kept, ensure_ascii=False, separators=(",", ":"), default=lambda value: type(value).__name__
    )


class EcsFormatter(logging.Formatter):
    """One JSON line a record; a record's `ecs` (`extra={"ecs": {…}}`) gives further fields."""

    def format(self, record: logging.LogRecord) -> str:
        given = getattr(record, "ecs", None)
        return line_of(
            created=record.created,
            level=record.levelname.lower(),
            logger=record.name,
            message=record.getMessage(),
            fields=given if isinstance(given, dict) else {},
            error=record.exc_info[1] if record.exc_info else None,
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


class TextFormatter(logging.Formatter):
    """Plain lines for people at a terminal, under the same rule for exceptions."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the library's name
        error = ei[1] if isinstance(ei, tuple) else None
        return stack_of(error) if error is not None else ""
