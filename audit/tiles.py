"""C2SP tlog-tiles: where each tile and entry bundle lies, what its bytes are, and proofs read from tiles.

    tile/<L>/<N>[.p/<W>]          hashes of level L*8: 32 bytes each, 256 in a full tile
    tile/entries/<N>[.p/<W>]      entries: 2 bytes of length, then the bytes, 256 in a full bundle

N is written in groups of three digits, all but the last with an x: 1234067 is x001/x234/067.

Source: C2SP tlog-tiles v0.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from audit.errors import AuditError
from audit.merkle import HASH_SIZE, MAX_TREE_SIZE, CompactRange, hash_leaves, hash_node

WIDTH: Final = 256
HEIGHT: Final = 8
MAX_LEVEL: Final = 63
MAX_TILE_BYTES: Final = WIDTH * HASH_SIZE
MAX_ENTRY_BYTES: Final = 65_535
MAX_BUNDLE_BYTES: Final = WIDTH * (2 + MAX_ENTRY_BYTES)
ENTRIES: Final = -1  # the level of entry bundles

_PATH = re.compile(
    r"tile/(entries|0|[1-9][0-9]?)/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?", re.ASCII
)


class TileError(AuditError):
    """A tile's path or bytes are not in the one form of tlog-tiles."""

    code = "audit.tile"


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """One tile or entry bundle: `level` is `ENTRIES` or 0 to 63, `width` 1 to 256 (256 is full)."""

    level: int
    index: int
    width: int = WIDTH

    def __post_init__(self) -> None:
        if not (
            ENTRIES <= self.level <= MAX_LEVEL
            and 0 <= self.index <= MAX_TREE_SIZE
            and 1 <= self.width <= WIDTH
        ):
            raise TileError(f"no tile has level {self.level}, index {self.index}, width {self.width}")

    @property
    def path(self) -> str:
        """The tile's path below the log's prefix."""
        digits = f"{self.index:03d}"
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
        number = "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])
        level = "entries" if self.level == ENTRIES else str(self.level)
        return f"tile/{level}/{number}" + (f".p/{self.width}" if self.width < WIDTH else "")

    @property
    def is_full(self) -> bool:
        return self.width == WIDTH

    @property
    def start(self) -> int:
        """The index of its first hash (or entry) within its level."""
        return self.index * WIDTH

    @classmethod
    def parse(cls, path: str) -> Tile:
        """Read a path in its only form.

        Raises:
            TileError: anything else, such as leading zeros, a level above 63 or a width of 0 or 256.
        """
        found = _PATH.fullmatch(path)
        if found is None:
            raise TileError(f"{path[:80]!r} is no tile's path")
        level = ENTRIES if found[1] == "entries" else int(found[1])
        tile = cls(level, int(found[2].replace("x", "").replace("/", "")), int(found[3] or WIDTH))
        if tile.path != path:
            raise TileError(f"{path[:80]!r} is not canonical; write {tile.path}")
        return tile


def level_width(level: int, tree_size: int) -> int:
    """Return how many hashes (or entries) a tree of `tree_size` has at a tile level."""
    return tree_size if level == ENTRIES else tree_size >> (HEIGHT * level)


def tile_at(level: int, index: int, tree_size: int) -> Tile:
    """Return the widest tile at that place in a tree of `tree_size`.

    Raises:
        TileError: the tree has none there.
    """
    return Tile(level, index, min(WIDTH, level_width(level, tree_size) - index * WIDTH))


def tiles_of(tree_size: int, *, since: int = 0, entries: bool = True) -> Iterator[Tile]:
    """Yield every tile that a tree of `tree_size` has and a tree of `since` had not, bundles first."""
    level = ENTRIES if entries else 0
    while level_width(level, tree_size):
        now, before = level_width(level, tree_size), level_width(level, since)
        for index in range(before // WIDTH, -(-now // WIDTH)):
            if now > before:
                yield tile_at(level, index, tree_size)
        level += 1


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Return a bundle's bytes.

    Raises:
        TileError: an entry does not fit.
    """
    if any(len(entry) > MAX_ENTRY_BYTES for entry in entries):
        raise TileError(f"an entry in a bundle has at most {MAX_ENTRY_BYTES} bytes")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def root_of_bundles(fetch: Callable[[str], bytes], tree_size: int) -> bytes:
    """Return the root over every entry of a tree of `tree_size`, read from its bundles, one at a time.

    Holds one bundle and one hash a level, whatever the size. Believes no tile: hashes come from the entries.

    Raises:
        TileError: a bundle is cut short, or goes on.
    """
    edge = CompactRange()
    for index in range(-(-tree_size // WIDTH)):
        tile = tile_at(ENTRIES, index, tree_size)
        edge.extend(hash_leaves(decode_bundle(fetch(tile.path), tile.width)))
    return edge.root()


def decode_bundle(data: bytes, width: int) -> list[bytes]:
    """Return the `width` entries of a bundle.

    Raises:
        TileError: the bytes are cut short, or go on.
    """
    entries: list[bytes] = []
    position, end = 0, len(data)
    for _ in range(width):
        start = position + 2
        if start > end:
            raise TileError(f"the bundle ends within entry {len(entries)}")
        position = start + (data[position] << 8 | data[position + 1])
        if position > end:
            raise TileError(f"the bundle ends within entry {len(entries)}")
        entries.append(data[start:position])
    if position != end:
        raise TileError(f"the bundle goes on after its {width} entries")
    return entries


def decode_tile(data: bytes, width: int) -> list[bytes]:
    """Return the `width` hashes of a tile; raises `TileError` for another length."""
    if len(data) != width * HASH_SIZE:
        raise TileError(f"a tile of {width} hashes has {width * HASH_SIZE} bytes, not {len(data)}")
    return [data[i : i + HASH_SIZE] for i in range(0, len(data), HASH_SIZE)]


class TileTree:
    """Nodes of a tree of `tree_size`, read from its tiles: a node source for `audit.merkle`.

    Nothing is believed: what is computed from the tiles counts only where it leads to a signed root.
    """

    def __init__(self, fetch: Callable[[str], bytes], tree_size: int) -> None:
        """`fetch` returns the bytes at a tile's path, or raises."""
        self._fetch, self._size = fetch, tree_size
        self._hashes = lru_cache(maxsize=256)(self._load)

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of a perfect subtree.

        Raises:
            TileError: it is not in the tree, or a tile has the wrong length.
        """
        tile_level, height = divmod(level, HEIGHT)
        first = index << height
        if first + (1 << height) > level_width(tile_level, self._size):
            raise TileError(f"node {index} of level {level} is not in a tree of {self._size}")
        row = self._hashes(tile_level, first // WIDTH)[first % WIDTH : first % WIDTH + (1 << height)]
        while len(row) > 1:
            row = [hash_node(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        return row[0]

    def _load(self, level: int, index: int) -> list[bytes]:
        tile = tile_at(level, index, self._size)
        return decode_tile(self._fetch(tile.path), tile.width)
