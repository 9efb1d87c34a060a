"""Tile paths in their only form, bundles to the byte, and proofs read from tiles alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import AuditError
from audit.merkle import (
    consistency_proof,
    consistency_proof_of,
    edge_hashes,
    hash_leaf,
    inclusion_proof,
    inclusion_proof_of,
    root_from,
    root_of,
)
from audit.tiles import (
    ENTRIES,
    Tile,
    TileError,
    TileTree,
    decode_bundle,
    decode_tile,
    encode_bundle,
    root_of_bundles,
    tile_at,
    tiles_of,
)

LEAVES = [hash_leaf(b"%d" % i) for i in range(1000)]


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "tile/0/000"),
        (Tile(2, 1_234_067), "tile/2/x001/x234/067"),
        (Tile(ENTRIES, 999, 7), "tile/entries/999.p/7"),
        (Tile(ENTRIES, 1000), "tile/entries/x001/000"),
        (Tile(63, 273, 112), "tile/63/273.p/112"),
    ],
)
def test_path_is_the_one_of_the_specification(tile: Tile, path: str) -> None:
    assert tile.path == path
    assert Tile.parse(path) == tile


@pytest.mark.parametrize(
    "path",
    [
        "", "tile", "tile/0", "tile/0/", "tile/0/0", "tile/0/00", "tile/0/0000", "tile/00/000", "tile/64/000",
        "tile/-1/000", "tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/007", "tile/0/000.p/",
        "/tile/0/000", "tile/0/x000/000", "tile/0/000/000",
        "tile/0/x001/x234", "tile/0/../000", "tile/entries/../../etc",
        "tile/0/000\n", "tile/0/000.p/1/", "tile/data/000", "tile/0/٠٠٠", "tile/8/0/000", "checkpoint",
        "tile/0/x999/x999/x999/x999/x999/x999/x999/999", "tile/0/x999/x999/x999/x999/x999/x999/999",
    ],
)  # fmt: skip
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(TileError):
        Tile.parse(path)


@given(st.integers(-1, 63), st.integers(0, 2**60), st.integers(1, 256))
def test_every_tile_reads_back_from_its_path(level: int, index: int, width: int) -> None:
    tile = Tile(level, index, width)
    assert Tile.parse(tile.path) == tile


@given(st.text(max_size=40) | st.from_regex(r"tile/[0-9a-z]{1,7}/[x0-9./p]{1,20}", fullmatch=True))
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        tile = Tile.parse(text)
    except TileError:
        return
    assert tile.path == text


def test_tree_of_seventy_thousand_has_the_tiles_of_the_specification() -> None:
    tiles = list(tiles_of(70_000, entries=False))
    assert [sum(t.is_full for t in tiles if t.level == level) for level in (0, 1, 2)] == [273, 1, 0]
    assert [t.width for t in tiles if not t.is_full] == [112, 17, 1]
    assert max(t.level for t in tiles) == 2


def test_no_tile_is_empty_and_none_is_missing_at_the_edges() -> None:
    for size in (0, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537):
        tiles = list(tiles_of(size))
        assert all(tile.width for tile in tiles)
        assert sum(tile.width for tile in tiles if tile.level == ENTRIES) == size
        assert sum(tile.width for tile in tiles if tile.level == 1) == size // 256


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_what_is_new_is_what_was_not_there(one: int, other: int) -> None:
    small, large = sorted((one, other))
    had = {tile.path for tile in tiles_of(small)}
    new = [tile.path for tile in tiles_of(large, since=small)]
    assert len(new) == len(set(new))
    assert {tile.path for tile in tiles_of(large)} - had == set(new)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 513, 1000])
def test_proofs_from_tiles_are_those_from_the_leaves(size: int) -> None:
    leaves = LEAVES[:size]
    files: dict[str, bytes] = {}
    for tile in tiles_of(size, entries=False):
        span = 256**tile.level
        hashes = [
            root_of(leaves[i * span : (i + 1) * span]) for i in range(tile.start, tile.start + tile.width)
        ]
        files[tile.path] = b"".join(hashes)
    tree = TileTree(files.__getitem__, size)
    assert root_from(tree.node, size) == root_of(leaves)
    for index in {0, size // 2, size - 1}:
        assert inclusion_proof(tree.node, index, size) == inclusion_proof_of(leaves, index)
    for old in {1, size // 2 or 1, size}:
        assert consistency_proof(tree.node, old, size) == consistency_proof_of(leaves, old)
    with pytest.raises(TileError):
        tree.node(0, size)
    assert len(edge_hashes(tree.node, size)) == size.bit_count()


@given(st.lists(st.binary(max_size=40), max_size=9))
def test_bundle_reads_back_as_written(entries: list[bytes]) -> None:
    assert decode_bundle(encode_bundle(entries), len(entries)) == entries


@given(st.binary(max_size=60), st.integers(0, 256))
def test_any_bundle_parses_or_is_refused(data: bytes, width: int) -> None:
    try:
        entries = decode_bundle(data, width)
    except TileError:
        return
    assert encode_bundle(entries) == data


def test_entry_too_long_for_a_bundle_is_refused() -> None:
    with pytest.raises(TileError):
        encode_bundle([b"x" * 65_536])


def test_tile_of_another_length_is_refused() -> None:
    with pytest.raises(TileError):
        decode_tile(b"x" * 33, 1)
    with pytest.raises(AuditError):
        tile_at(0, 1, 256)


@given(st.lists(st.binary(max_size=4), max_size=600), st.data())
def test_root_of_bundles_is_the_root_of_the_entries_and_of_no_others(
    entries: list[bytes], data: st.DataObject
) -> None:
    def fetch(path: str) -> bytes:
        tile = Tile.parse(path)
        assert tile.level == ENTRIES
        return encode_bundle(entries[tile.start : tile.start + tile.width])

    root = root_of(hash_leaf(entry) for entry in entries)
    assert root_of_bundles(fetch, len(entries)) == root
    if entries:
        entries[data.draw(st.integers(0, len(entries) - 1))] += b"x"
        assert root_of_bundles(fetch, len(entries)) != root


def test_root_of_bundles_refuses_a_bundle_of_another_width() -> None:
    for held in (2, 4):
        with pytest.raises(TileError):
            root_of_bundles(lambda path, held=held: encode_bundle([b"a"] * held), 3)  # type: ignore[misc]


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 7])
def test_bundle_cut_short_names_the_entry_it_ends_in(cut: int) -> None:
    whole = encode_bundle([b"abc", b"de"])
    with pytest.raises(TileError, match=f"within entry {0 if cut >= 5 else 1}"):
        decode_bundle(whole[:-cut], 2)
