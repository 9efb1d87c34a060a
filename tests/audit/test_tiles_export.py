"""The exported tree: what outside tools read, written step by step, never over another history."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from audit.checkpoints import Checkpoint, add_signatures, cosign, parse_checkpoint_note, sign_checkpoint
from audit.errors import AuditError
from audit.ledger import Ledger
from audit.merkle import consistency_proof, hash_leaf, inclusion_proof, root_from, root_of
from audit.tiles import ENTRIES, Tile, TileTree, decode_bundle, tiles_of
from audit.tiles_export import ExportError, FolderStore, export_tiles, open_store


def note_of(ledger: Ledger, signer, size: int | None = None) -> bytes:
    size = ledger.tree_size if size is None else size
    return sign_checkpoint(Checkpoint(ledger.origin, size, ledger.root_at(size)), signer)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 600])
def test_tree_of_files_proves_every_entry(ledger, log_signer, log_tools, tmp_path, size):
    log_tools.fill(ledger, range(size))
    note = note_of(ledger, log_signer)
    done = export_tiles(ledger, note, tmp_path / "out")
    files = files_of(tmp_path / "out")
    assert files.pop("checkpoint") == note
    assert set(files) == {tile.path for tile in tiles_of(size)}
    assert done.files_written == len(files) + 1
    tree = TileTree(files.__getitem__, size)
    assert root_from(tree.node, size) == parse_checkpoint_note(note).root_hash
    entries = [
        entry
        for tile in tiles_of(size)
        if tile.level == ENTRIES
        for entry in decode_bundle(files[tile.path], tile.width)
    ]
    assert entries == ledger.entries(0, size)
    assert root_of(map(hash_leaf, entries)) == ledger.root_hash
    for index in {0, size // 2, size - 1} & set(range(size)):
        assert inclusion_proof(tree.node, index, size) == ledger.inclusion_proof(index, size)
    if size > 1:
        assert consistency_proof(tree.node, 1, size) == ledger.consistency_proof(1, size)


def test_step_by_step_gives_the_files_of_one_step_and_rewrites_no_full_tile(
    ledger, log_signer, log_tools, tmp_path
):
    steps, folder = (3, 200, 256, 300, 513, 700), tmp_path / "steps"
    done, stamps = 0, {}
    for size in steps:
        log_tools.fill(ledger, range(done, size))
        done = size
        export_tiles(ledger, note_of(ledger, log_signer), folder)
        for path in folder.rglob("*"):
            if path.is_file() and ".p" not in str(path.parent.suffix) and path.name != "checkpoint":
                assert stamps.setdefault(path, path.stat().st_ino) == path.stat().st_ino, (
                    f"{path} written twice"
                )
    export_tiles(ledger, note_of(ledger, log_signer), tmp_path / "once")
    once, stepwise = files_of(tmp_path / "once"), files_of(folder)
    assert once.items() <= stepwise.items()
    assert all(".p/" in path for path in set(stepwise) - set(once)), (
        "only partial tiles of earlier sizes stay"
    )


def test_second_export_of_the_same_tree_writes_nothing_but_new_cosignatures(
    ledger, log_signer, log_tools, new_witness_key, tmp_path
):
    log_tools.fill(ledger, range(300))
    note = note_of(ledger, log_signer)
    export_tiles(ledger, note, tmp_path / "out")
    assert export_tiles(ledger, note, tmp_path / "out").files_written == 0
    cosigned = add_signatures(note, [cosign(note, new_witness_key("east"), 1_800_000_000)])
    assert export_tiles(ledger, cosigned, tmp_path / "out").files_written == 1
    assert (tmp_path / "out" / "checkpoint").read_bytes() == cosigned


def test_witness_tree_holds_no_entry(ledger, log_signer, log_tools, tmp_path):
    log_tools.fill(ledger, range(300), text="secret-word")
    export_tiles(ledger, note_of(ledger, log_signer), tmp_path / "out", entries=False)
    files = files_of(tmp_path / "out")
    assert not [path for path in files if "entries" in path]
    assert not [path for path, data in files.items() if b"secret-word" in data]


def test_object_store_gets_the_same_tree(ledger, log_signer, log_tools, tmp_path):
    log_tools.fill(ledger, range(260))
    note = note_of(ledger, log_signer)
    export_tiles(ledger, note, tmp_path / "out")
    export_tiles(ledger, note, "memory://bucket/log/")
    memory = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/log/"): memory.cat_file(path) for path in memory.find("/bucket/log")}
    assert found == files_of(tmp_path / "out")
    assert export_tiles(ledger, note, "memory://bucket/log").files_written == 0
    memory.rm("/bucket", recursive=True)


def test_target_of_another_log_or_history_is_left_alone(ledger, log_signer, log_tools, tmp_path):
    log_tools.fill(ledger, range(300))
    note, out = note_of(ledger, log_signer), tmp_path / "out"
    export_tiles(ledger, note, out)
    before = files_of(out)
    with Ledger.create(tmp_path / "other.db", ledger.origin) as other:
        log_tools.fill(other, range(400), text="rewritten")
        with pytest.raises(ExportError, match="another history"):
            export_tiles(other, note_of(other, log_signer), out)
        with pytest.raises(ExportError, match="not of this log"):
            export_tiles(other, note, out)
    with Ledger.create(tmp_path / "third.db", "third.example/log") as third:
        signer = type(log_signer)("third.example/log", log_signer.key)
        with pytest.raises(ExportError, match="holds log"):
            export_tiles(third, note_of(third, signer), out)
    with pytest.raises(ExportError, match="already"):
        export_tiles(ledger, note_of(ledger, log_signer, 10), out)
    assert files_of(out) == before


def test_full_tile_that_differs_stops_the_export(ledger, log_signer, log_tools, tmp_path):
    log_tools.fill(ledger, range(300))
    out = tmp_path / "out"
    path = out / Tile(0, 0).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * 8192)
    with pytest.raises(ExportError, match="another full tile"):
        export_tiles(ledger, note_of(ledger, log_signer), out)
    assert path.read_bytes() == b"\0" * 8192
    assert not (out / "checkpoint").exists()


@pytest.mark.parametrize("stop_after", range(0, 12, 2))
def test_export_that_broke_off_shows_no_checkpoint_without_its_tiles(
    ledger, log_signer, log_tools, tmp_path, stop_after
):
    class Breaking(FolderStore):
        left = stop_after

        def write(self, path: str, data: bytes) -> None:
            if not self.left:
                raise OSError("no space left")
            self.left -= 1
            super().write(path, data)

    log_tools.fill(ledger, range(10))
    out = tmp_path / "out"
    export_tiles(ledger, note_of(ledger, log_signer), out)
    log_tools.fill(ledger, range(10, 1100))
    note = note_of(ledger, log_signer)
    with pytest.raises(ExportError, match="no space left"):
        export_tiles(ledger, note, Breaking(out))
    size = parse_checkpoint_note((out / "checkpoint").read_bytes()).tree_size
    assert size == 10
    assert {tile.path for tile in tiles_of(size)} <= set(files_of(out))
    assert not [name for name in files_of(out) if os.path.basename(name).startswith(".")]
    export_tiles(ledger, note, out)
    tree = TileTree(lambda path: (out / path).read_bytes(), 1100)
    assert root_from(tree.node, 1100) == ledger.root_hash


def test_unknown_kind_of_url_is_named(tmp_path):
    with pytest.raises(ExportError, match="nosuch://"):
        open_store("nosuch://bucket/log")


def test_malformed_checkpoint_at_the_target_is_not_overwritten(ledger, log_signer, tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"something else\n")
    with pytest.raises(AuditError):
        export_tiles(ledger, note_of(ledger, log_signer), tmp_path)
    assert (tmp_path / "checkpoint").read_bytes() == b"something else\n"
