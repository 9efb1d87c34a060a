"""What a run tells while it goes: `<home>/runs/<run>.events.jsonl`, one event a line, and the wish to stop.

The log is the record; this file is for whoever watches. A ServerApp writes it wherever it runs, and nothing
depends on its being there or whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from federation.progress import RunEvent

_logger = logging.getLogger(__name__)

_FIELDS: Final = tuple(field.name for field in dataclasses.fields(RunEvent))
_fields_of: Final = attrgetter(*_FIELDS)
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


class RunJournal:
    """The files of one run beside its preparation."""

    def __init__(self, home: Path, run: str) -> None:
        self.events_path = home / "runs" / f"{run}.events.jsonl"
        self.stop_path = home / "runs" / f"{run}.stop"
        self.number_path = home / "runs" / f"{run}.superlink"
        self._descriptor: int | None = None

    def __enter__(self) -> RunJournal:
        return self

    def __exit__(self, *_: object) -> None:
        """Close what the first `write` opened."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, event: RunEvent) -> None:
        """Append one event; a full disk costs the watcher a line and the run nothing."""
        fields = dict(zip(_FIELDS, _fields_of(event), strict=True))
        fields["metrics"] = dict(event.metrics)
        line = _encode(fields) + "\n"
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self.events_path, flags, 0o666)
            os.write(self._descriptor, line.encode())
        except OSError as error:
            _logger.warning("an event of the run was not written: %s", error)

    def read(self, after: int = 0) -> tuple[list[RunEvent], int]:
        """Return the events behind byte `after`, and where the last whole line ends."""
        try:
            with self.events_path.open("rb") as file:
                file.seek(after)
                data = file.read()
        except FileNotFoundError:
            return [], after
        whole = data[: data.rfind(b"\n") + 1]
        return [event for line in whole.splitlines() if (event := _event(line))], after + len(whole)

    def ask_to_stop(self) -> None:
        self.stop_path.touch()

    @property
    def is_asked_to_stop(self) -> bool:
        return self.stop_path.exists()

    def keep_number(self, number: int) -> None:
        """Keep SuperLink's number of the run."""
        self.number_path.write_text(str(number), encoding="ascii")

    @property
    def number(self) -> int | None:
        try:
            return int(self.number_path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None


def _event(line: bytes) -> RunEvent | None:
    try:
        document: dict[str, Any] = json.loads(line)
        document["sites"], document["missing"] = tuple(document["sites"]), tuple(document["missing"])
        return RunEvent(**document)
    except (ValueError, TypeError, KeyError):
        return None
