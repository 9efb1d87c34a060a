"""The three hospitals of the tiny federation, their patients and the public ones."""

from __future__ import annotations

import csv
import io
import random
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

from audit.entries import (
    ZERO_DIGEST,
)
from audit.keys import SigningKey
from audit.notes import KeyType, NoteSigner

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
ORIGIN = "log.example/tiny"
SITES = {"east": 60, "north": 45, "west": 30}
FEATURES = ("alpha", "beta", "gamma")


@dataclass
class Hospital:
    name: str
    rows: list[tuple[list[float], int]]
    identity: SigningKey = field(default_factory=SigningKey.generate)
    statement: SigningKey = field(default_factory=SigningKey.generate)
    witness: SigningKey = field(default_factory=SigningKey.generate)
    population: str = field(default_factory=lambda: secrets.token_hex(16))
    sequence: int = 0
    head: str = ZERO_DIGEST

    @property
    def note_signer(self) -> NoteSigner:
        return NoteSigner(self.name, self.witness, KeyType.COSIGNATURE)


def patients(count: int, seed: int) -> list[tuple[dict[str, float], int]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.randrange(2)
        found.append(({name: round(rng.gauss(4 + 2 * label, 1.2), 3) for name in FEATURES}, label))
    return found


def public_csv() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FEATURES, "ill"])
    for row, label in patients(40, 99):
        writer.writerow([*(row[name] for name in FEATURES), "yes" if label else "no"])
    return text.getvalue().encode()
