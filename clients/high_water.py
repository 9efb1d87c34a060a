"""The high-water marks: where each population's odometer is known to have stood, kept apart from the ledger.

A mark is raised after each commit, so a crash leaves it at most one event behind, which is harmless; a
ledger that ends below its mark is an old copy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from audit._files import write_durably
from audit.canonical import JsonValue, canonical_bytes
from clients.errors import HomeError


@dataclass(frozen=True, slots=True)
class Head:
    """Where a population's odometer stands."""

    sequence: int
    event_hash: str


class HighWaterMarks:
    """One small file, written whole and synced."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Head]:
        """Return the mark of each population; none before the first release.

        Raises:
            HomeError: the file is damaged.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            document = json.loads(data)
            return {
                name: Head(int(item["sequence"]), str(item["event_hash"])) for name, item in document.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HomeError(self._path, "cannot be read", "restore it from the site's backup") from error

    def raise_to(self, population: str, head: Head) -> None:
        """Note a release that is committed."""
        marks = self.read() | {population: head}
        document: dict[str, JsonValue] = {
            name: {"sequence": mark.sequence, "event_hash": mark.event_hash} for name, mark in marks.items()
        }
        write_durably(self._path, canonical_bytes(document))
