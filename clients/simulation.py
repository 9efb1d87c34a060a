"""A whole federation on one machine: real homes, agents, ledgers, log and witnesses, Flower's real objects.

`run_federation` carries out one run for homes that exist; the command and the demo call it. `simulate`
makes temporary homes from DataFrames first, for a notebook: on disk, or in memory (`clients.virtual`) where
there are hundreds. Both use `federation.server_app` and
`clients.client_app` as they are, over the in-process grid or, with `engine="ray"`, over Flower's own
simulation.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from audit.decimals import decimal_text
from audit.keys import SigningKey
from audit.models import weights_of_file
from audit.principal import LocalOwner, Principal
from audit.replay import average
from clients.agent import Agent
from clients.agreement import CharterSource, complete_charter, read_source
from clients.errors import SimulationError
from clients.history import OpenedNotes
from clients.home import SiteHome
from clients.identity import Identity
from clients.simulated import (
    SimulatedFederation,
    SimulatedRun,
    SiteData,
    count_rows,
    write_frame,
    write_site_files,
)
from clients.simulated_launch import LAUNCHERS
from clients.trainer import Workshop
from clients.virtual import VirtualHome
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.evaluation import PublicData, metrics_of
from federation.progress import Listener, RunEvent
from federation.registry import statements
from federation.resume import prepared_run
from federation.service import ResumeRequest, TrainedRun, TrainRequest, resume, train
from federation.trust import federation_policy

if TYPE_CHECKING:
    pass

Engine = Literal["inprocess", "ray"]
Homes = Literal["disk", "memory"]

_MAX_DELTA: Final = Decimal("0.1")


def run_federation(
    charter: Charter,
    homes: Mapping[str, SiteHome],
    coordinator: Coordinator,
    author: SigningKey,
    *,
    model: str = "",
    public_set: Path | None = None,
    engine: Engine = "inprocess",
    on_event: Listener | None = None,
) -> TrainedRun:
    """Carry out one run of `charter` among the sites of `homes` and the coordinator's log.

    Sites that follow no log yet join this one under a policy in which every member is a witness.

    Args:
        charter: names exactly the sites of `homes`.
        homes: by site name; no other process may hold their ledgers.
        coordinator: open; the run is logged there.
        author: signs the run; whoever approves its version must be somebody else.
        model: the registry's name of the model; by default the charter's.
        public_set: the file whose digest the charter declares; without it no gate can be judged.
        engine: "inprocess", or "ray" for Flower's own simulation (an extra).
        on_event: called after each step, from a thread of the run.

    Raises:
        SimulationError: the sites are not the charter's, or the engine is not installed.
        LedgerBehindError: the log shows a release that a site's ledger does not have: an old copy.
        RunFailedError: the run stopped; the log says why.
    """
    if sorted(homes) != list(charter.site_names):
        raise SimulationError(f"homes of {sorted(homes)} for a charter of {list(charter.site_names)}")
    if public_set is not None:
        coordinator.blobs.put(public_set.read_bytes())
    join_all(homes, coordinator)
    with ExitStack() as stack:
        launch = LAUNCHERS[engine](_open_agents(homes, coordinator, stack), charter)
        principal = Principal(id=author.verify_key.fingerprint, role="scientist", key=author.text)
        request = TrainRequest(charter=charter, model=model)
        return train(coordinator, principal, LocalOwner(), request, author, launch, on_event=on_event)


class _Shared:
    """What the virtual sites of one run share: it follows from the charter and the log, never from rows."""

    def __init__(self) -> None:
        self._workshop = Workshop()
        self._notes: OpenedNotes | None = None

    def agent(self, home: SiteHome) -> Agent:
        """Open the agent of a site on disk, or that of a virtual one."""
        if not isinstance(home, VirtualHome):
            return Agent.open(home)
        self._notes = self._notes or OpenedNotes(home.policy())
        return home.agent(self._workshop, self._notes)


def resume_federation(
    run: str,
    homes: Mapping[str, SiteHome],
    coordinator: Coordinator,
    principal: Principal,
    *,
    engine: Engine = "inprocess",
    on_event: Listener | None = None,
) -> TrainedRun:
    """Go on with a run of `run_federation` whose process died; every release is answered as it was stored.

    Args:
        run: its id.
        homes: of the charter's sites, by name; no other process may hold their ledgers.
        coordinator: open; the run is logged there.
        principal: who resumes it, as the log will say.
        engine: see `run_federation`. on_event: called after each step, from a thread of the run.

    Raises:
        SimulationError: the sites are not the charter's, or the engine is not installed.
        HomeError: no such run was prepared in this home.
        RunHeldError: another process carries it out. ResumeError: it cannot go on, or not now.
        LedgerBehindError: the log shows a release that a site's ledger does not have: an old copy.
        RunFailedError: the run stopped; the log says why.
    """
    charter = prepared_run(coordinator, run).charter
    if sorted(homes) != list(charter.site_names):
        raise SimulationError(f"homes of {sorted(homes)} for a charter of {list(charter.site_names)}")
    join_all(homes, coordinator)
    with ExitStack() as stack:
        launch = LAUNCHERS[engine](_open_agents(homes, coordinator, stack), charter)
        request = ResumeRequest(run=run)
        return resume(coordinator, principal, LocalOwner(), request, launch, on_event=on_event)


def _open_agents(
    homes: Mapping[str, SiteHome], coordinator: Coordinator, stack: ExitStack
) -> dict[str, Agent]:
    agents, shared = {}, _Shared()
    for name, home in homes.items():
        agents[name] = shared.agent(home)
        stack.callback(agents[name].close)
    if not coordinator.simulated:  # virtual ledgers are as old as this process, and cannot be put back
        for statement in statements(coordinator.ledger):
            if statement.site in agents:
                agents[statement.site].observe(statement)
    return agents


def join_all(homes: Mapping[str, SiteHome], coordinator: Coordinator) -> None:
    """Let every site that follows no log yet follow this one."""
    witnesses = {name: home.keys().witness_signer(name).vkey for name, home in homes.items()}
    operators = {name: home.config.operator for name, home in homes.items()}
    policy = federation_policy(coordinator.log_key, witnesses, operators=operators)
    for home in homes.values():
        if not home.follows_a_log:
            home.join(policy)


def new_coordinator(folder: Path, origin: str = "", *, simulated: bool = False) -> Coordinator:
    """Make a coordinator's home and its signer's beside it, under `folder`."""
    name = origin or f"simulation.invalid/{secrets.token_hex(4)}"
    return Coordinator.create(folder / "coordinator", folder / "signer", name, simulated=simulated)


def simulate(
    charter: CharterSource,
    sites: Mapping[str, SiteData],
    *,
    public: SiteData | None = None,
    privacy: Literal["charter"] | None = "charter",
    folder: Path | str | None = None,
    lifetime_epsilon: str = "1000",
    engine: Engine = "inprocess",
    homes: Homes = "disk",
    on_event: Listener | None = None,
) -> SimulatedRun:
    """Train one model among made-up sites on this machine; the notebook's way in.

    Args:
        charter: YAML text, a file, a mapping or a `Charter`; site keys, row counts and noise are filled in.
        sites: a DataFrame or a CSV or Parquet file by site.
        public: held-out rows that the charter declares public; without them there are no metrics.
        privacy: None leaves the noise out: a comparison that is NOT PRIVATE and cannot be registered.
        folder: where homes and log are kept; by default a temporary folder that goes with the run.
        lifetime_epsilon: each made-up site's own cap; high, since a simulation is often repeated.
        engine: "inprocess" or "ray".
        homes: "disk" gives each site the home that a real one has; "memory" makes virtual sites, for hundreds
            of them: nothing of theirs outlives the process, and their enrolments call their operator
            "simulated", so that all of them are one voice in the log's policy.
        on_event: called after each step.

    Raises:
        CharterError, CharterFileError: names line, key and fix.
        SimulationError: a site's name or file cannot serve.
        RunFailedError: the run stopped; the log says why.
    """
    federation, agreed = _set_up(charter, sites, public, folder, lifetime_epsilon, homes)
    try:
        if privacy is None:
            return _without_privacy(agreed, federation)
        events: list[RunEvent] = []

        def note(event: RunEvent) -> None:
            if (
                event.kind != "answered" or homes == "disk"
            ):  # a thousand sites answer a thousand times a round
                events.append(event)
            if on_event is not None:
                on_event(event)

        run = run_federation(
            agreed,
            federation.homes,
            federation.coordinator,
            federation.scientist.key,
            public_set=federation.public_file,
            engine=engine,
            on_event=note,
        )
        weights = weights_of_file(agreed.layers, federation.coordinator.blobs.get(run.weights))
    except BaseException:
        federation.close()
        raise
    return SimulatedRun(run.run, agreed, weights, tuple(events), True, federation)


def _set_up(
    source: CharterSource,
    sites: Mapping[str, SiteData],
    public: SiteData | None,
    folder: Path | str | None,
    lifetime_epsilon: str,
    kind: Homes = "disk",
) -> tuple[SimulatedFederation, Charter]:
    with ExitStack() as undo:
        temporary = None
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="affidavit-")
            undo.callback(temporary.cleanup)
            folder = temporary.name
        base, delta = Path(folder), _delta(source)
        files = write_site_files(base / "data", sites)
        rows = {name: count_rows(path) for name, path in files.items()}
        public_file = None if public is None else write_frame(base / "data" / "public.csv", public)
        homes = {
            name: _home(base / "sites" / name, name, path, lifetime_epsilon, delta, kind)
            for name, path in files.items()
        }
        officer = Identity.create(base / "officer")
        agreed = complete_charter(
            source,
            identities={name: home.keys().identity.text for name, home in homes.items()},
            rows=rows,
            officers={"simulated-officer": officer.public},
            public_set=None if public_file is None else public_file.read_bytes(),
            public_rows=0 if public_file is None else count_rows(public_file),
        )
        scientist = Identity.create(base / "scientist")
        coordinator = new_coordinator(base, simulated=kind == "memory")
        federation = SimulatedFederation(
            base, files, homes, coordinator, scientist, officer, public_file, temporary
        )
        undo.pop_all()
    return federation, agreed


def _home(path: Path, name: str, data: Path, epsilon: str, delta: str, kind: Homes) -> SiteHome:
    if kind == "memory":
        return VirtualHome.make(path, name=name, data=data, lifetime_epsilon=epsilon, lifetime_delta=delta)
    return SiteHome.create(
        path,
        name=name,
        data=data,
        population=f"simulated people of {name}",
        lifetime_epsilon=epsilon,
        lifetime_delta=delta,
        auto_approve=True,
    )


def _delta(source: CharterSource) -> str:
    """The charter's delta, for the made-up sites' own cap; what is wrong with it is said later, by line."""
    privacy = read_source(source).get("privacy")
    delta = privacy.get("delta") if isinstance(privacy, dict) else None
    return decimal_text(delta) if isinstance(delta, (int, Decimal)) and 0 < delta < _MAX_DELTA else "0.00001"


def _without_privacy(charter: Charter, federation: SimulatedFederation) -> SimulatedRun:
    from clients.comparison import train_without_privacy

    started = time.monotonic()
    rounds = train_without_privacy(charter, federation.files)
    public = None if federation.public_file is None else federation.public_file.read_bytes()
    data = None if public is None else PublicData.read(charter, public)
    events = tuple(
        RunEvent(
            kind="round",
            run="not-private",
            round=number,
            rounds=len(rounds),
            sites=charter.site_names,
            metrics={}
            if data is None
            else {metric.name: float(metric.value) for metric in metrics_of(charter, data, weights)},
            elapsed_s=time.monotonic() - started,
        )
        for number, weights in enumerate(rounds, start=1)
    )
    weights = list(average(rounds[-charter.average_last :]))
    return SimulatedRun("not-private", charter, weights, events, False, federation)


__all__ = [
    "Engine",
    "join_all",
    "new_coordinator",
    "resume_federation",
    "run_federation",
    "simulate",
]
