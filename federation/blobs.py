"""Files by digest: weights, updates, public sets. Nothing is believed because of where it lies.

A large file is never held whole: `put_stream` writes it as it comes, `open` reads it piece by piece, and the
digest is checked before the first byte is handed out.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from federation._packs import Packs
from federation.errors import BlobAlteredError, BlobMissingError

PIECE_BYTES: Final = 1 << 20
SMALL_BYTES: Final = 1 << 16  # what is larger has a file of its own
PACKED_FROM: Final = 16  # small files at a time: below, each has its own too

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of files named by the SHA-256 of their bytes; written whole or not at all, checked when
    read.

    With `durable=False` files are left to the system to write out: for a simulation, whose machine is its
    only participant.
    """

    def __init__(self, folder: Path | str, *, durable: bool = True) -> None:
        self.folder, self.durable = Path(folder), durable
        self._packs = Packs(self.folder / "packs")

    def put(self, data: bytes) -> str:
        """Keep `data`; return its digest. The file is durable when this returns."""
        digest = hashlib.sha256(data).hexdigest()
        self._put(digest, [memoryview(data)])
        return digest

    def put_all(self, items: Iterable[bytes], digests: Sequence[str] | None = None) -> list[str]:
        """Keep several files; return their digests in order. Many small ones go into one pack: one file,
        synced once. `digests` are theirs, where the caller has made them of these very bytes.
        """
        data = list(items)
        if digests is None:
            digests = [hashlib.sha256(item).hexdigest() for item in data]
        found = list(zip(digests, data, strict=True))
        small = {digest: item for digest, item in found if len(item) <= SMALL_BYTES}
        if len(small) < PACKED_FROM:
            return [self.put(item) for item in data]
        self._packs.put(small, self._sync)
        return [digest if len(item) <= SMALL_BYTES else self.put(item) for digest, item in found]

    def put_stream(self, pieces: Iterable[bytes | memoryview]) -> str:
        """Keep what comes piece by piece, never whole in memory; return its digest, durable as with `put`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{secrets.token_hex(16)}"
        hashed = hashlib.sha256()
        try:
            with open(partial, "xb") as file:
                for piece in pieces:
                    hashed.update(piece)
                    file.write(piece)
                self._sync(file)
            path = self._path(hashed.hexdigest())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return hashed.hexdigest()

    def get(self, digest: str) -> bytes:
        """Return the bytes of `digest`.

        Raises:
            BlobMissingError: nothing is kept under it.
            BlobAlteredError: what is kept has another digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise BlobMissingError(digest)
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            data = self._packs.get(digest)
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise BlobAlteredError(digest, found)
        return data

    def size_bytes(self, digest: str) -> int:
        """Return the size of what is kept under `digest`, before anybody reads it.

        Raises:
            BlobMissingError: nothing is kept under it.
        """
        if not _DIGEST.fullmatch(digest):
            raise BlobMissingError(digest)
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return len(self._packs.get(digest))

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        """Open a file to be read piece by piece, its digest checked before; errors as `get`."""
        if not _DIGEST.fullmatch(digest):
            raise BlobMissingError(digest)
        file: BinaryIO
        try:
            file = open(self._path(digest), "rb")  # noqa: SIM115 - closed below, and handed out in between
        except FileNotFoundError:
            file = io.BytesIO(self._packs.get(digest))
        with file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise BlobAlteredError(digest, found)
            file.seek(0)
            yield file

    def find(self, digest: str) -> bytes | None:
        """Return the bytes of `digest`, or None when nothing is kept under it; altered bytes raise."""
        try:
            return self.get(digest)
        except BlobMissingError:
            return None

    def _put(self, digest: str, pieces: Iterable[bytes | memoryview]) -> None:
        path = self._path(digest)
        if path.exists() and self._is_whole(digest):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{digest}.{secrets.token_hex(4)}")
        with open(partial, "xb") as file:
            for piece in pieces:
                file.write(piece)
            self._sync(file)
        os.replace(partial, path)

    def _is_whole(self, digest: str) -> bool:
        try:
            with self.open(digest):
                return True
        except (BlobAlteredError, BlobMissingError):
            return False

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        if self.durable:
            os.fsync(file.fileno())

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest
