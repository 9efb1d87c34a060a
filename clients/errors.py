"""Every error `clients` raises on purpose: one base, stable codes, evidence as fields.

Two audiences, never mixed. A `ClientsError` speaks to the site's own people and may name a file, a row, a
column. A `RefusedError` carries a code from the closed list `audit.entries.REFUSAL_CODES`, which is all
that leaves the site, beside a reason that goes to the site's console and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class ClientsError(Exception):
    """Base of every error `clients` raises on purpose."""

    code = "clients.error"


class HomeError(ClientsError):
    """A site's home is missing, in use, or says something that cannot be."""

    code = "clients.home"

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}; {fix}")
        self.path, self.problem, self.fix = path, problem, fix


class IdentityError(ClientsError):
    """A key folder is incomplete, exists already, or cannot be read."""

    code = "clients.identity"

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}; {fix}")
        self.path, self.problem, self.fix = path, problem, fix


class LinkError(ClientsError):
    """The relay cannot reach the agent of this site."""

    code = "clients.link"


class SimulationError(ClientsError):
    """A federation on this machine cannot be put together as asked."""

    code = "clients.simulation"


class OdometerError(ClientsError):
    """The release does not continue the population's odometer."""

    code = "clients.odometer"


class LedgerBehindError(ClientsError):
    """The ledger is older than what this site is known to have released: an old copy was put back."""

    code = "clients.ledger_behind"

    def __init__(self, *, population: str, ledger: int, seen: int, witness: str) -> None:
        super().__init__(
            f"the ledger of population {population} ends at release {ledger}, but {witness} shows release "
            f"{seen}; an old copy was put back: restore the newest ledger.db, or stop using this population"
        )
        self.population, self.ledger, self.seen, self.witness = population, ledger, seen, witness


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProblem:
    """One thing that is wrong with a data file, said so that the person at the site can mend it."""

    file: str
    row: int | None  # 1-based row of data, the header not counted; None: the file as a whole
    column: str | None
    problem: str
    fix: str

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        column = "" if self.column is None else f", column {self.column!r}"
        return f"{self.file}{row}{column}: {self.problem}; {self.fix}"


class DataFileError(ClientsError):
    """The data file breaks the contract; for the site's own console only."""

    code = "clients.data"

    def __init__(self, problems: tuple[DataProblem, ...]) -> None:
        shown = [str(problem) for problem in problems[:20]]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        super().__init__("\n".join(shown))
        self.problems = problems


class RefusedError(ClientsError):
    """The agent will not answer. Only `refusal` leaves the site; `reason` stays on its console."""

    code = "clients.refused"

    def __init__(self, refusal: str, reason: str) -> None:
        from audit.entries import REFUSAL_CODES  # here: every message's relay loads this module

        if refusal not in REFUSAL_CODES:
            raise ValueError(f"{refusal!r} is not in the closed list audit.entries.REFUSAL_CODES")
        super().__init__(f"{refusal}: {reason}")
        self.refusal, self.reason = refusal, reason


class WaitingError(RefusedError):
    """The site's people have to decide first; the coordinator asks again."""

    def __init__(self, reason: str) -> None:
        super().__init__("waiting_for_site", reason)
