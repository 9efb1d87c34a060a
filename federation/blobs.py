"""Files by digest: weights, updates, public sets. Nothing is believed because of where it lies."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Final

from federation.errors import BlobAlteredError, BlobMissingError

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of files named by the SHA-256 of their bytes; written whole or not at all, checked when
    read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def put(self, data: bytes) -> str:
        """Keep `data`; return its digest. The file is durable when this returns."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return digest
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{digest}.{secrets.token_hex(4)}")
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return digest

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
        except FileNotFoundError as error:
            raise BlobMissingError(digest) from error
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
        except FileNotFoundError as error:
            raise BlobMissingError(digest) from error

    def find(self, digest: str) -> bytes | None:
        """Return the bytes of `digest`, or None when nothing is kept under it; altered bytes raise."""
        try:
            return self.get(digest)
        except BlobMissingError:
            return None

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest
