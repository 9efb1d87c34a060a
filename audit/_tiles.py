"""Nodes of the stored tree, read from rows of leaves and tiles; perfect subtrees are immutable and cached."""

from __future__ import annotations

from functools import lru_cache

from sqlalchemy import Connection, Engine, select

from audit import _store
from audit.errors import LedgerCorruptError
from audit.merkle import HASH_SIZE, hash_node
from audit.tables import LEAF, NODE, TILE_HEIGHT, TILE_WIDTH

_CACHED_TILES = 4096  # 16 KiB each, 64 MiB in all: a million leaves stay warm
_CACHED_NODES = 4096
_OFFSETS = tuple(
    HASH_SIZE * sum(TILE_WIDTH >> lower for lower in range(height)) for height in range(TILE_HEIGHT + 1)
)  # where each height begins in a full tile's nodes
_MASKS = tuple((TILE_WIDTH >> height) - 1 for height in range(TILE_HEIGHT + 1))


class TileReader:
    """A node source for `audit.merkle` over a ledger's tables."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._warm: dict[tuple[int, int], bytes] = {}
        self._warm_size = -1
        self.known_size = 0  # the largest tree seen committed; tiles within it are full
        self._loose_node = lru_cache(maxsize=_CACHED_NODES)(self._load_loose_node)
        self._full_tile = lru_cache(maxsize=_CACHED_TILES)(self._load_full_tile)

    def grow(self, tree_size: int) -> None:
        self.known_size = max(self.known_size, tree_size)

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of a perfect subtree that lies within `known_size`.

        Raises:
            LedgerCorruptError: a stored hash is missing or is none.
        """
        tile_level, height = divmod(level, TILE_HEIGHT)
        tile = index >> (TILE_HEIGHT - height)
        if (tile + 1) << TILE_HEIGHT * (tile_level + 1) <= self.known_size:
            at = _OFFSETS[height] + (index & _MASKS[height]) * HASH_SIZE
            return self._full_tile(tile_level, tile)[at : at + HASH_SIZE]
        return self._warm.get((level, index)) or self._loose_node(level, index)

    def warm(self, tree_size: int) -> None:
        """Hold every perfect subtree of the unfinished tiles of the first `tree_size` leaves."""
        if tree_size == self._warm_size:  # what a tree of this size is made of never changes
            return
        rows: list[list[bytes]] = []
        with _store.reading(self._engine) as connection:
            while available := tree_size >> TILE_HEIGHT * len(rows):
                start = available - available % TILE_WIDTH
                rows.append(_tile_row(connection, len(rows), start, available) if available > start else [])
        held: dict[tuple[int, int], bytes] = {}
        for tile_level, row in enumerate(rows):
            available = tree_size >> TILE_HEIGHT * tile_level
            start = available - available % TILE_WIDTH
            height = 0
            while row:
                first = start >> height
                held.update(
                    ((tile_level * TILE_HEIGHT + height, first + i), node) for i, node in enumerate(row)
                )
                row = [hash_node(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]
                height += 1
        self._warm, self._warm_size = held, tree_size

    def _load_loose_node(self, level: int, index: int) -> bytes:
        tile_level, height = divmod(level, TILE_HEIGHT)
        return _pyramid(self._tile_row(tile_level, index << height, (index + 1) << height))[-1][0]

    def _load_full_tile(self, tile_level: int, tile: int) -> bytes:
        """All 511 nodes of a full tile, level by level, in one piece: 16 KiB instead of 511 objects."""
        levels = _pyramid(self._tile_row(tile_level, tile * TILE_WIDTH, (tile + 1) * TILE_WIDTH))
        return b"".join(node for level in levels for node in level)

    def _tile_row(self, tile_level: int, start: int, stop: int) -> list[bytes]:
        with _store.reading(self._engine) as connection:
            return _tile_row(connection, tile_level, start, stop)


def _tile_row(connection: Connection, tile_level: int, start: int, stop: int) -> list[bytes]:
    if tile_level == 0:
        query = select(LEAF.c.leaf_hash).where(LEAF.c.idx >= start, LEAF.c.idx < stop).order_by(LEAF.c.idx)
    else:
        query = (
            select(NODE.c.hash)
            .where(NODE.c.level == tile_level * TILE_HEIGHT, NODE.c.idx >= start, NODE.c.idx < stop)
            .order_by(NODE.c.idx)
        )
    hashes = list(connection.execute(query).scalars())
    if len(hashes) != stop - start or any(
        type(item) is not bytes or len(item) != HASH_SIZE for item in hashes
    ):
        raise LedgerCorruptError(f"hashes {start} to {stop} of tile level {tile_level} are missing; run fsck")
    return hashes


def _pyramid(base: list[bytes]) -> list[list[bytes]]:
    """All levels above `base`, whose length is a power of two; the last level is its root."""
    levels = [base]
    while len(levels[-1]) > 1:
        row = levels[-1]
        levels.append([hash_node(row[i], row[i + 1]) for i in range(0, len(row), 2)])
    return levels
