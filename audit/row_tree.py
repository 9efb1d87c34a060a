"""A tree over the rows of one prediction: the entry holds its root, and each row has a receipt of its own.

Row k's leaf is the canonical JSON {"input": commitment, "output": commitment}, hashed and joined as in RFC
6962. A row's receipt is its number, its two salts and values, and its inclusion path: whoever holds it shows
what was answered to that row, and learns nothing of the others but how many there were.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final

from audit.bodies import RowCommitment
from audit.canonical import canonical_bytes
from audit.errors import AuditError
from audit.merkle import EMPTY_ROOT, hash_leaf, inclusion_proofs_of, root_from_inclusion_proof

MAX_ROWS: Final = 1 << 20
_MAX_PATH: Final = 20


class RowPathError(AuditError):
    """A row's path does not lead to the entry's root."""

    code = "audit.row_path"


def row_leaf(row: RowCommitment) -> bytes:
    """Return the hash of one row's leaf."""
    return hash_leaf(canonical_bytes({"input": row.input, "output": row.output}))


class RowTree:
    """The tree of one prediction's rows; each node is hashed once, however many paths are asked for."""

    def __init__(self, rows: Sequence[RowCommitment]) -> None:
        root, self._paths = inclusion_proofs_of([row_leaf(row) for row in rows]) if rows else (EMPTY_ROOT, [])
        self.root = root.hex()
        self._texts: dict[bytes, str] = {}

    def path(self, row: int) -> str:
        """Return the row's inclusion path as text: base64 hashes, joined by commas.

        Raises:
            RowPathError: there is no such row.
        """
        if not 0 <= row < len(self._paths):
            raise RowPathError(f"there is no row {row} of {len(self._paths)}")
        texts = self._texts
        for node in self._paths[row]:
            if node not in texts:
                texts[node] = base64.b64encode(node).decode()
        return ",".join([texts[node] for node in self._paths[row]])


def parse_path(text: str) -> tuple[bytes, ...]:
    """Read a path.

    Raises:
        RowPathError: it is not as `RowTree.path` writes it.
    """
    parts = text.split(",") if text else []
    if len(parts) > _MAX_PATH:
        raise RowPathError(f"a path of {len(parts)} hashes is too long")
    hashes = []
    for part in parts:
        try:
            raw = base64.b64decode(part, validate=True)
        except ValueError as error:
            raise RowPathError("a path holds what is not base64") from error
        if len(raw) != 32 or base64.b64encode(raw).decode() != part:
            raise RowPathError("a path holds what is not the base64 of 32 bytes")
        hashes.append(raw)
    return tuple(hashes)


def verify_row(row: RowCommitment, number: int, count: int, path: str, root: str) -> None:
    """Prove that row `number` of `count` is under `root`.

    Raises:
        RowPathError: it is not, or the path is malformed.
    """
    if not 0 <= number < count:
        raise RowPathError(f"there is no row {number} of {count}")
    try:
        found = root_from_inclusion_proof(number, count, row_leaf(row), parse_path(path))
    except RowPathError:
        raise
    except AuditError as error:
        raise RowPathError(f"the path of row {number} does not fit its place: {error}") from error
    if found.hex() != root:
        raise RowPathError(f"row {number} is not under the entry's root")
