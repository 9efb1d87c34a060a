"""The log as files: a C2SP tlog-tiles tree in a folder or behind an fsspec URL, written incrementally.

Tiles first, the checkpoint last: a reader never sees a checkpoint whose tiles are not there. Only what is
new since the checkpoint at the target is written; a full tile is never written again, and one that differs
stops the export, because then the target shows another history. Partial tiles of earlier sizes stay, for
readers that hold an earlier checkpoint. Each file appears whole or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from audit._files import write_durably
from audit.checkpoints import Checkpoint, parse_checkpoint_note
from audit.errors import AuditError
from audit.merkle import hash_leaf, root_from
from audit.notes import MAX_NOTE_BYTES
from audit.tiles import ENTRIES, HEIGHT, Tile, TileError, encode_bundle, tiles_of

_logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"


class ExportError(AuditError):
    """The tree cannot be written there; what is there stays as it was, but for new tiles."""

    code = "audit.export"


class ReadableLog(Protocol):
    """What an export and the API need of a ledger."""

    @property
    def origin(self) -> str: ...

    def node(self, level: int, index: int) -> bytes: ...

    def entries(self, start: int, stop: int) -> list[bytes]: ...

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]: ...

    def root_at(self, size: int) -> bytes: ...


class TileStore(Protocol):
    """Where files go; `write` shows all of a file or nothing."""

    def read(self, path: str) -> bytes | None: ...

    def write(self, path: str, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did."""

    tree_size: int
    previous_size: int
    files_written: int
    bytes_written: int


class FolderStore:
    """A folder; each file is synced and renamed into place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, path: str) -> bytes | None:
        try:
            return (self._folder / path).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        target = self._folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, data, mode=0o644)


class ObjectStore:
    """Anything fsspec reaches (s3://, gs://, az://, memory:// …); objects appear whole by nature."""

    def __init__(self, url: str) -> None:
        """Find the file system of `url`.

        Raises:
            ExportError: fsspec, or the package for this kind of URL, is not installed or refuses.
        """
        try:
            from fsspec.core import url_to_fs

            self._fs: Any
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise ExportError(f"{url}: cannot be reached: {error}") from error

    def read(self, path: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(f"{self._root}/{path}")
        except FileNotFoundError:
            return None
        return data

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._root}/{path}", data)


def open_store(target: str | Path) -> TileStore:
    """Return the store of a folder's path or of a URL; raises `ExportError`."""
    text = str(target)
    if "://" not in text:
        return FolderStore(Path(text))
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        return FolderStore(Path(rest))
    return ObjectStore(text.rstrip("/"))


def tile_bytes(log: ReadableLog, tile: Tile) -> bytes:
    """Return the bytes of a tile or bundle that lies within the log.

    Raises:
        TileError: the log is shorter, or an entry's bytes are not those that were hashed.
        AuditError: the log cannot be read.
    """
    stop = tile.start + tile.width
    if tile.level == ENTRIES:
        entries, hashes = log.entries(tile.start, stop), log.leaf_hashes(tile.start, stop)
        if len(entries) != tile.width or [hash_leaf(entry) for entry in entries] != hashes:
            raise TileError(f"{tile.path}: the log does not hold these entries as they were hashed; run fsck")
        return encode_bundle(entries)
    if tile.level == 0:
        hashes = log.leaf_hashes(tile.start, stop)
        if len(hashes) != tile.width:
            raise TileError(f"{tile.path}: is beyond the log")
        return b"".join(hashes)
    return b"".join(log.node(tile.level * HEIGHT, index) for index in range(tile.start, stop))


def export_tiles(
    log: ReadableLog,
    note: bytes,
    target: str | Path | TileStore,
    *,
    entries: bool = True,
    progress: Callable[[Tile], None] | None = None,
) -> Exported:
    """Bring the tree at `target` up to the checkpoint `note`.

    Args:
        log: the ledger. note: its checkpoint, with whatever cosignatures it has.
        target: a folder, a URL, or a store. entries: also the bundles, which only readers with the right to
            read entries may get; without them the tree is for witnesses.
        progress: told each file after it was written.

    Raises:
        ExportError: the target holds a larger tree, another log or another history, or cannot be written.
        TileError: the log's own bytes contradict each other.
    """
    store = target if not isinstance(target, str | Path) else open_store(target)
    checkpoint = parse_checkpoint_note(note)
    if checkpoint.origin != log.origin or root_from(log.node, checkpoint.tree_size) != checkpoint.root_hash:
        raise ExportError(f"the checkpoint of size {checkpoint.tree_size} is not of this log")
    files = size_bytes = 0
    try:
        previous = _previous(log, store, checkpoint)
        for tile in tiles_of(checkpoint.tree_size, since=previous, entries=entries):
            data = tile_bytes(log, tile)
            if tile.is_full and (held := store.read(tile.path)) is not None:
                if held != data:
                    raise ExportError(f"{tile.path}: the target holds another full tile: another history")
                continue
            store.write(tile.path, data)
            files, size_bytes = files + 1, size_bytes + len(data)
            if progress is not None:
                progress(tile)
        if store.read(CHECKPOINT) != note:
            store.write(CHECKPOINT, note)
            files, size_bytes = files + 1, size_bytes + len(note)
    except OSError as error:
        raise ExportError(f"the target cannot be read or written: {error}") from error
    _logger.info("exported size=%d since=%d files=%d", checkpoint.tree_size, previous, files)
    return Exported(checkpoint.tree_size, previous, files, size_bytes)


def _previous(log: ReadableLog, store: TileStore, new: Checkpoint) -> int:
    """The size of the tree at the target, once it is shown to be an earlier one of this log."""
    held = store.read(CHECKPOINT)
    if held is None:
        return 0
    try:
        old = parse_checkpoint_note(held[: MAX_NOTE_BYTES + 1])
    except AuditError as error:
        raise ExportError(f"the target's checkpoint is malformed: {error}; choose another target") from error
    if old.origin != new.origin:
        raise ExportError(f"the target holds log {old.origin!r}, not {new.origin!r}")
    if old.tree_size > new.tree_size:
        raise ExportError(f"the target holds {old.tree_size} entries already, the checkpoint {new.tree_size}")
    if log.root_at(old.tree_size) != old.root_hash:
        raise ExportError(f"the target's {old.tree_size} entries are another history than this log's")
    return old.tree_size
