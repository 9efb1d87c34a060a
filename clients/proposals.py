"""What waits for the site's people: charters and runs, kept in the site's home until somebody decides.

One file a proposal, `proposals/<id>.json`, in canonical JSON: the charter's text, and the start of the run
when it is one. The id is the run's name, or the charter's digest. At most `MAX_PENDING` wait; a coordinator
cannot fill the disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from audit._files import write_durably
from audit.canonical import canonical_bytes, parse_canonical
from audit.entries import RunStarted, body_document, parse_body
from audit.errors import AuditError
from clients.errors import HomeError, RefusedError
from clients.terms import charter_digest

FOLDER: Final = "proposals"
MAX_PENDING: Final = 64
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,95}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A charter, or a run under it, that somebody asked this site to take part in."""

    charter: str  # canonical text
    run: RunStarted | None

    @property
    def id(self) -> str:
        return self.digest if self.run is None else self.run.run

    @property
    def digest(self) -> str:
        return charter_digest(self.charter)


class Proposals:
    """The folder of one site's open proposals."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER

    def keep(self, proposal: Proposal) -> None:
        """Keep a proposal for review; a newer one of the same id takes its place.

        Raises:
            RefusedError: rate_limited; too many wait.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._path(proposal.id)
        if not path.exists() and len(self.ids()) >= MAX_PENDING:
            raise RefusedError("rate_limited", f"{MAX_PENDING} proposals wait for this site's people already")
        if proposal.run is not None and _DIGEST.fullmatch(proposal.id):
            raise RefusedError("bad_request", "a run may not be named like a charter")
        document: dict[str, Any] = {"charter": proposal.charter, "run_started": None}
        if proposal.run is not None:
            document["run_started"] = body_document(proposal.run)
        data = canonical_bytes(document)
        if not path.exists() or path.read_bytes() != data:
            write_durably(path, data)

    def ids(self) -> tuple[str, ...]:
        """Return what waits: runs by name, charters by digest."""
        if not self._folder.is_dir():
            return ()
        return tuple(sorted(path.stem for path in self._folder.glob("*.json")))

    def find(self, name: str) -> Proposal | None:
        """Return a waiting proposal by its id, or by the first eight or more digits of a charter's digest.

        Raises:
            HomeError: its file was altered.
        """
        names = [known for known in self.ids() if known == name]
        if not names and len(name) >= 8:
            names = [known for known in self.ids() if known.startswith(name)]
        if len(names) != 1:
            return None
        path = self._path(names[0])
        try:
            document = parse_canonical(path.read_bytes())
            if not isinstance(document, dict) or not isinstance(document["charter"], str):
                raise HomeError(path, "is no proposal", "remove it; it is asked again")
            started = document["run_started"]
            run = None if started is None else parse_body(RunStarted, started)
        except (AuditError, KeyError, OSError) as error:
            raise HomeError(path, f"is damaged: {error}", "remove it; it is asked again") from error
        found = Proposal(charter=document["charter"], run=run)
        if found.id != names[0]:
            raise HomeError(path, "holds another proposal", "remove it; it is asked again")
        return found

    def settle(self, name: str) -> None:
        """Forget a proposal that was decided."""
        if _ID.fullmatch(name):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise RefusedError("bad_request", f"{name[:60]!r} cannot name a proposal")
        return self._folder / f"{name}.json"
