"""What a version said of the same rows a moment ago, for one asker: where the charter allows it.

Kept are a model's outputs, in one worker's memory, by the version, its charter, the site, the exact bits of
the encoded rows, and who asked: another's question leaves no trace in how fast an answer comes. Nothing else
is kept. The version is chosen, the quota counted and the decision made anew for each request, the answer is
rounded by the charter that is in force for it, and the entry is a new one with salts of its own, like any
other: it does not say where the outputs came from, for they are the same function of the same rows.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from server.warm import WarmModel

MAX_ROWS: Final = 16  # of one request; larger ones are not looked for

Key = tuple[str, str, int | None, str, bytes]
Outputs = list[list[float]]


@dataclass(slots=True)
class AnswerCache:
    """One worker's; used from its event loop alone."""

    most: int  # requests remembered; 0: none
    kept_s: float
    count: Callable[[str], None]  # told "hit" or "miss"
    monotonic: Callable[[], float] = time.monotonic
    _kept: OrderedDict[Key, tuple[float, Outputs]] = field(default_factory=OrderedDict)

    def key(
        self, warm: WarmModel, encoded: Sequence[Sequence[float]], site: int | None, asker: str
    ) -> Key | None:
        """Return what names these rows of this asker; None where nothing may be kept."""
        if not warm.terms.cache or not self.most or not asker or not 0 < len(encoded) <= MAX_ROWS:
            return None
        flat = [value for row in encoded for value in row]
        return warm.version, warm.charter, site, asker, struct.pack(f"<{len(flat)}d", *flat)

    def get(self, key: Key) -> Outputs | None:
        """Return the outputs, if they are there and young enough."""
        kept = self._kept
        found = kept.get(key)
        if found is None or found[0] <= self.monotonic():
            kept.pop(key, None)
            self.count("miss")
            return None
        kept.move_to_end(key)
        self.count("hit")
        return [list(row) for row in found[1]]

    def put(self, key: Key, outputs: Outputs) -> None:
        """Keep a copy; the one that was used longest ago makes room."""
        kept = self._kept
        kept[key] = self.monotonic() + self.kept_s, [list(row) for row in outputs]
        kept.move_to_end(key)
        while len(kept) > self.most:
            kept.popitem(last=False)
