"""What `audit.service` needs of a ledger, over a list."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from audit.entries import (
    columns_of,
)
from audit.errors import EntryNotFoundError
from audit.merkle import NodeSource, hash_leaf, inclusion_proof, source_of

columns = functools.cache(columns_of)


@dataclass(frozen=True, slots=True)
class Stored:
    leaf_index: int
    leaf_hash: bytes
    body: bytes
    columns: Any


class MemoryLog:
    """What `audit.service` needs of a ledger, over a list."""

    def __init__(self) -> None:
        self.leaves: list[bytes] = []
        self.notes: list[bytes] = []
        self._proved: tuple[bytes, ...] = ()
        self._source: NodeSource = source_of([])

    @property
    def tree_size(self) -> int:
        return len(self.leaves)

    @property
    def hashes(self) -> list[bytes]:
        return [hash_leaf(leaf) for leaf in self.leaves]

    def entry(self, leaf_index: int) -> bytes:
        if not 0 <= leaf_index < len(self.leaves):
            raise EntryNotFoundError(leaf_index=leaf_index, tree_size=len(self.leaves))
        return self.leaves[leaf_index]

    def inclusion_proof(self, leaf_index: int, tree_size: int) -> list[bytes]:
        leaves = tuple(self.leaves[:tree_size])
        if self._proved != leaves:
            self._proved, self._source = leaves, source_of([hash_leaf(leaf) for leaf in leaves])
        return inclusion_proof(self._source, leaf_index, tree_size)

    def checkpoints(self) -> list[bytes]:
        return list(self.notes)

    def search(
        self, *, after: int | None = None, limit: int = 100, type: Any = None, **asked: Any
    ) -> list[Stored]:
        found = []
        for index, leaf in enumerate(self.leaves):
            have = columns(leaf)
            wanted = {name: value for name, value in asked.items() if value is not None}
            fits = (after is None or index > after) and (type is None or have.type == type)
            if fits and all(getattr(have, name) == value for name, value in wanted.items()):
                found.append(Stored(index, hash_leaf(leaf), leaf, have))
        return found[:limit]
