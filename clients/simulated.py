"""A federation for a notebook: DataFrames in, a run with its history, its cost and its version out.

Everything is as in production but for the place: temporary homes on this machine, and people's keys made up
on the spot. `clients.simulation.simulate` makes these objects; their methods are for the person at the
notebook.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from audit.cost_bodies import UNBOUNDED
from audit.entries import Entry
from audit.epsilon import epsilon_text
from audit.models import answer_of
from audit.principal import LocalOwner, Principal
from clients.errors import DataFileError, SimulationError
from clients.home import SITE_NAME, SiteHome
from clients.identity import Identity
from clients.service import cosign_here
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.evaluation import model_outputs
from federation.progress import RunEvent
from federation.registry import Version
from federation.service import ApproveRequest, RegisterRequest, approve, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SiteData = pd.DataFrame | Path | str


@dataclass(slots=True, eq=False)
class SimulatedFederation:
    """The homes behind a simulation. `folder` holds everything; a temporary one goes with this object."""

    folder: Path
    files: dict[str, Path]
    homes: dict[str, SiteHome]
    coordinator: Coordinator
    scientist: Identity
    officer: Identity
    public_file: Path | None
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Close the log; remove the folder when it was temporary."""
        self.coordinator.close()
        if self._temporary is not None:
            self._temporary.cleanup()


@dataclass(slots=True, eq=False, repr=False)
class SimulatedRun:
    """One finished run: `history` by round, `epsilons` by site, and what can be done with its version."""

    id: str
    charter: Charter
    weights: list[float]
    events: tuple[RunEvent, ...]
    private: bool
    federation: SimulatedFederation
    version: Version | None = field(default=None)

    @property
    def history(self) -> pd.DataFrame:
        """One row a round: metrics on the public set, epsilon spent so far, sites, cosignatures, seconds."""
        rows: list[dict[str, Any]] = [
            {
                "round": event.round,
                **event.metrics,
                "epsilon": float("inf") if not self.private else event.epsilon,
                "sites": len(event.sites),
                "cosignatures": event.witnesses,
                "seconds": round(event.elapsed_s, 3),
            }
            for event in self.events
            if event.kind == "round"
        ]
        return pd.DataFrame(rows).set_index("round")

    @property
    def epsilons(self) -> pd.DataFrame:
        """What each site's population has spent, by the accountant; empty before `register`."""
        if self.version is None:
            return pd.DataFrame(
                columns=["site", "run_epsilon", "lifetime_epsilon", "delta", "unit", "relation"]
            )
        return pd.DataFrame(
            [
                {
                    "site": item.site,
                    "run_epsilon": float(item.run_epsilon),
                    "lifetime_epsilon": float(
                        "inf" if item.lifetime_epsilon == UNBOUNDED else item.lifetime_epsilon
                    ),
                    "delta": float(item.delta),
                    "unit": item.unit,
                    "relation": item.relation,
                }
                for item in self.version.registered.costs
            ]
        )

    def entries(self, type: str | None = None) -> list[Entry]:
        """Return this run's entries in the log, in order; of one type, such as "site.statement", if given."""
        found = self.federation.coordinator.entries(run=self.id, **({} if type is None else {"type": type}))
        return [entry for _, entry in found]

    def register(self) -> Version:
        """Judge the weights by the charter's gates and enter them in the registry as a candidate.

        Raises:
            SimulationError: the run was made without privacy; it has no place in a registry.
        """
        if not self.private:
            raise SimulationError("a run without privacy is a comparison; it cannot be registered")
        author = self.federation.scientist
        principal = Principal(id=author.key.verify_key.fingerprint, role="scientist", key=author.public)
        log = self.federation.coordinator
        self.version = register(log, principal, LocalOwner(), RegisterRequest(run=self.id))
        cosign_here(self.federation.homes, log)
        return self.version

    def approve(self, reason: str = "simulated approval") -> Version:
        """Let the simulated officer sign the version into use.

        Raises:
            SimulationError: it is not registered yet.
            TransitionError: a gate failed, or the charter names other officers.
        """
        if self.version is None:
            raise SimulationError("register the version first: run.register()")
        officer = self.federation.officer
        principal = Principal(id=officer.key.verify_key.fingerprint, role="officer", key=officer.public)
        request = ApproveRequest(version=self.version.digest, to_state="live", reason=reason)
        log = self.federation.coordinator
        self.version = approve(log, principal, LocalOwner(), request, officer.key)
        cosign_here(self.federation.homes, log)
        return self.version

    def by_site(self, held_out: Mapping[str, SiteData], *, metric: str | None = None) -> pd.DataFrame:
        """Return what each site gains, on `held_out` rows of its own, by site.

        Columns: the trivial baseline, `local_only` (the same recipe on the site's own rows, without noise),
        `federated` (the version as anybody uses it), `personal` (with the site's intercept and the layers
        that stayed there) and `gain` (personal over local only). Nothing is released or logged.

        Raises:
            SimulationError: a site is not the charter's, or the metric does not fit its task.
            DataFileError: held-out rows cannot be read.
        """
        from clients.personal import by_site, kept_layers

        folders = {name: home.local_layers_path for name, home in self.federation.homes.items()}
        kept = kept_layers(self.charter, folders, self.id) if self.charter.model.local_layers else {}
        return by_site(self.charter, self.weights, self.federation.files, held_out, kept, metric)

    @property
    def policy(self) -> str:
        """The trust file of the made-up sites: which log and which witnesses they believe."""
        return next(iter(self.federation.homes.values())).policy().format()

    def evidence(self) -> bytes:
        """Return the file that proves the version offline, to whoever holds `policy`.

        Raises:
            SimulationError: the version is not registered yet.
        """
        if self.version is None:
            raise SimulationError("register the version first: run.register()")
        from audit.service import export_evidence

        last = (
            self.version.transitions[-1].leaf_index if self.version.transitions else self.version.leaf_index
        )
        log = self.federation.coordinator
        return export_evidence(log.ledger, log.blobs.find, leaf_index=last)

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the averaged weights' answers for rows of the charter's features; nothing is logged."""
        from audit.encoding import RowEncoder

        encoder = RowEncoder(self.charter.document["features"])
        rows = [
            encoder.encode({str(name): value for name, value in row.items()})
            for row in frame[list(encoder.names)].to_dict("records")
        ]
        label = self.charter.document["label"]
        answers = [
            answer_of(self.charter.task, label, outputs)
            for outputs in model_outputs(self.charter.layers, self.weights, rows)
        ]
        return pd.DataFrame(answers, index=frame.index)

    def plot(self) -> Figure:
        """Return the learning curve and the privacy spent, round by round."""
        from federation.plots import history_figure

        title = "" if self.private else "NOT PRIVATE: noise left out"
        budget = float(self.charter.privacy.epsilon) if self.private else None
        return history_figure(self.events, budget=budget, title=title)

    def close(self) -> None:
        self.federation.close()

    def __repr__(self) -> str:
        version = "not registered" if self.version is None else f"version {self.version.digest[:12]}"
        private = "" if self.private else ", NOT PRIVATE"
        of = f"{self.charter.name}: {len(self.charter.sites)} sites"
        return f"<SimulatedRun {self.id[:12]} of {of}, {version}{private}>"

    def _repr_html_(self) -> str:
        last = next((event for event in reversed(self.events) if event.kind == "round"), None)
        metrics = {} if last is None else last.metrics
        rows = [
            ("charter", f"{self.charter.name} {self.charter.digest[:12]}"),
            ("sites", ", ".join(self.charter.site_names)),
            ("rounds", str(self.charter.plan.rounds)),
            *[(f"{name} of the last round", f"{value:.4f}") for name, value in metrics.items()],
            ("epsilon", self._epsilon_text(last)),
            (
                "version",
                "not registered"
                if self.version is None
                else f"{self.version.digest[:12]} {self.version.state}",
            ),
        ]
        cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
        return f"<table><caption>Run {escape(self.id[:12])}</caption>{cells}</table>"

    def _epsilon_text(self, last: RunEvent | None) -> str:
        if not self.private:
            return "NOT PRIVATE: noise left out"
        spent = 0.0 if last is None or last.epsilon is None else last.epsilon
        privacy = self.charter.privacy
        return f"{epsilon_text(spent)} for one {privacy.unit} ({privacy.relation}), delta {privacy.delta}"


def write_site_files(folder: Path, sites: Mapping[str, SiteData]) -> dict[str, Path]:
    """Write each DataFrame as a CSV file; a path is used where it is.

    Raises:
        SimulationError: a name cannot name a site, or there is none.
    """
    if not sites:
        raise SimulationError("there are no sites: give a mapping of name to DataFrame or file")
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, data in sites.items():
        if not SITE_NAME.fullmatch(name):
            raise SimulationError(f"{name!r} cannot name a site; use lower-case letters, digits and '-'")
        files[name] = write_frame(folder / f"{name}.csv", data)
    return files


def write_frame(path: Path, data: SiteData) -> Path:
    if isinstance(data, pd.DataFrame):
        data.to_csv(path, index=False)
        return path
    return Path(data)


def count_rows(path: Path) -> int:
    """Return how many rows a site's file has: in a simulation that number becomes public.

    Raises:
        SimulationError: the file cannot be read, or is empty.
    """
    from clients.loader import read_table

    try:
        rows = len(read_table(path).frame)
    except DataFileError as error:
        raise SimulationError(str(error)) from error
    if rows == 0:
        raise SimulationError(f"{path} holds no rows")
    return rows
