"""Bundles unpacked once, and read by the process of every later message.

    scratch/bundles/<digest>             whole, written by nobody any more
    scratch/bundles/<digest>.<random>    being unpacked by one message's process

The relay gives each message's process a place. Where the bundle is not there yet, that process has a child
unpack it after the agent has approved its bytes; the child may write there and reach nothing else, and runs
nothing of the bundle, but compiles what every message's process would else compile anew; the process itself
may only read there. The relay puts the place into the row of whole ones when the process has ended. So no
bundle's code ever writes what later processes read.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import py_compile
import re
import secrets
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from clients.confinement import Allowance, confine
from clients.errors import LinkError

KEPT: Final = 4
COMPILED: Final = (
    "audit/__init__.py", "audit/canonical.py", "audit/errors.py",
    "clients/__init__.py", "clients/client_app.py", "clients/errors.py", "clients/link.py",
    "clients/socket_link.py", "federation/__init__.py", "federation/errors.py", "federation/pieces.py",
)  # fmt: skip
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_WHOLE: Final = ".whole"


class BundleStore:
    """The relay's side; one relay a folder."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which is made and cleared of what an earlier relay left half done."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.glob("*.*"):
            shutil.rmtree(left, ignore_errors=True)

    def place(self, digest: str | None) -> Path | None:
        """Return where a message's process finds, or puts, the bundle; None for what names no bundle."""
        if digest is None or not _DIGEST.fullmatch(digest):
            return None
        ready = self._folder / digest
        if ready.is_dir():
            return ready
        place = self._folder / f"{digest}.{secrets.token_hex(4)}"
        place.mkdir(mode=0o700)
        return place

    def settle(self, place: Path) -> None:
        """Keep what the process of `place` has unpacked, now that it has ended; drop what is not whole."""
        if "." not in place.name:
            return
        ready = place.with_name(place.name.partition(".")[0])
        if is_whole(place) and not ready.exists():
            os.rename(place, ready)
            self._forget_oldest()
        else:
            shutil.rmtree(place, ignore_errors=True)

    def _forget_oldest(self) -> None:
        whole = [path for path in self._folder.iterdir() if _DIGEST.fullmatch(path.name)]
        for path in sorted(whole, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)


class Unpacker:
    """The side of one message's process; make it before the process is confined or starts a thread."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._child: tuple[int, int] | None = None  # pid, where its bytes go
        if not is_whole(place):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(writing)
                _unpack(reading, place)
            os.close(reading)
            self._child = pid, writing

    def unpacked(self, content: bytes) -> Path:
        """Return where the bundle of these approved bytes lies unpacked.

        Raises:
            LinkError: these are not the bytes that the place is for, or they cannot be unpacked.
        """
        if hashlib.sha256(content).hexdigest() != _digest_of(self._place):
            raise LinkError("the bundle is not the one that was announced")
        if self._child is not None:
            pid, writing = self._child
            with os.fdopen(writing, "wb") as target, suppress(BrokenPipeError):
                target.write(content)
            _, status = os.waitpid(pid, 0)
            if status:
                raise LinkError(f"the bundle could not be unpacked (status {status})")
        return self._place


def _unpack(reading: int, place: Path) -> None:
    """In the child: unpack what comes, if it is what was announced; does not return."""
    status = 1
    try:
        prefixes = tuple(sorted({Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)}))
        confine(Allowance(read=(*prefixes, Path("/usr"), Path("/lib")), write=(place, Path("/dev/null"))))
        with os.fdopen(reading, "rb") as source:
            content = source.read()
        if hashlib.sha256(content).hexdigest() == _digest_of(place):
            install: Any = importlib.import_module("flwr.cli.install")
            os.environ["TMPDIR"] = str(place)
            tempfile.tempdir = None
            install.install_from_fab(content, install_dir=place, skip_prompt=True)
            _compile(place / "apps")
            (place / _WHOLE).touch()
            status = 0
    finally:
        os._exit(status)


def _compile(apps: Path) -> None:
    """Compile the relay's modules where they are, each bound to its source's digest; run none of them."""
    by_digest = py_compile.PycInvalidationMode.CHECKED_HASH
    for source in (app / name for app in apps.iterdir() for name in COMPILED):
        with suppress(py_compile.PyCompileError, OSError, ValueError):  # then it is compiled when it is read
            py_compile.compile(str(source), doraise=True, invalidation_mode=by_digest)


def is_whole(place: Path) -> bool:
    """Whether a bundle was unpacked there to its end."""
    return (place / _WHOLE).is_file()


def _digest_of(place: Path) -> str:
    return place.name.partition(".")[0]
