"""Where a site keeps what it saw of a log's misbehaviour: files that anyone can check.

One file for each pair of contradicting checkpoints: a question is replaced by a conviction, never the other
way round, and nobody can fill the disk by asking the same twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from audit._files import write_durably
from audit.checkpoints import parse_checkpoint_note
from audit.errors import AuditError
from audit.merkle import NodeSource
from audit.misbehaviour import Misbehaviour, prove_fork
from clients.errors import ClientsError

_logger = logging.getLogger(__name__)

FOLDER: Final = "misbehaviour"


def keep_accusation(
    home: Path, seen: bytes | None, offered: bytes, proof: Sequence[bytes], larger: NodeSource | None = None
) -> Path | None:
    """Write what two contradicting notes prove into `home/misbehaviour`; return the file.

    Args:
        home: the site's home. seen: the note cosigned last. offered: the note refused.
        proof: the consistency proof that came with it. larger: nodes of the larger tree, where the log still
            serves its tiles: with them a question becomes a conviction.

    Returns:
        The file, or None when the notes prove nothing against anybody.
    """
    if seen is None:
        return None
    found: Misbehaviour | None = None
    for source in (larger, None) if larger is not None else (None,):
        try:
            found = prove_fork(seen, offered, larger=source, offered=proof)
            break
        except (AuditError, ClientsError) as error:
            _logger.info("no proof of misbehaviour: %s", error)
    if found is None:
        return None
    folder = home / FOLDER
    path = folder / f"{_pair(found)}.json"
    if path.exists() and (found.kind == "unproved" or not _is_question(path)):
        return path
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, found.encode())
    except OSError as error:
        _logger.error("log %s contradicts itself, and %s cannot be written: %s", found.origin, path, error)
        return None
    _logger.error("log %s contradicts itself (%s): %s", found.origin, found.kind, path)
    return path


def _pair(found: Misbehaviour) -> str:
    bodies = b"".join(parse_checkpoint_note(note).body() for note in found.notes)
    return hashlib.sha256(bodies).hexdigest()[:32]


def _is_question(path: Path) -> bool:
    try:
        return Misbehaviour.parse(path.read_bytes()).kind == "unproved"
    except (AuditError, OSError):
        return True
