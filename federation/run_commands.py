"""Commands about runs: `runs start | list | show | follow | stop | plot`; `runs updates` is in
`federation.update_commands`, `runs resume` in `clients.resume_commands`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import base_home, emit, guarded, table
from federation import update_commands

if TYPE_CHECKING:
    from federation.coordinator import Coordinator
    from federation.progress import RunEvent
    from federation.runs import RunView

runs = typer.Typer(name="runs", help="Runs over the network: start, watch, stop.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunId = Annotated[str, typer.Argument(help="The run's id, or its beginning.")]
Delta = Annotated[float, typer.Option(help="The delta at which epsilon is shown.")]

_ENDS = frozenset({"completed", "failed"})


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    update_commands.register(runs)
    application.add_typer(runs)


@runs.command("start")
@guarded
def start(
    charter: Annotated[Path, typer.Argument(help="The charter that the sites have signed.")],
    author: Annotated[Path, typer.Option(help="Home of the identity that signs the run (`identity new`).")],
    public_set: Annotated[
        Path | None, typer.Option(help="The public set's file; without it no gate can pass.")
    ] = None,
    follow: Annotated[
        bool, typer.Option(help="Show the run until it ends, then register its version.")
    ] = True,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Start a run over the network: `coordinator up` and the sites' `site up` carry it out.

    Exit codes: 0 started (with --follow: completed and registered), 1 refused or failed (the log says why), 2
    wrong usage.
    """
    from audit.principal import LocalOwner, Principal
    from federation.charter import Charter
    from federation.network.submit import follow as follow_run
    from federation.network.submit import submit
    from federation.service import RegisterRequest, TrainRequest, run_config, start_run
    from federation.service import register as register_version

    loaded, key = Charter.load(charter), _identity(author)
    principal = Principal(id=key.verify_key.fingerprint, role="scientist", key=key.text)
    with _coordinator(home) as opened:
        if public_set is not None:
            opened.blobs.put(public_set.read_bytes())
        run = start_run(opened, principal, LocalOwner(), TrainRequest(charter=loaded), key)
        number = submit(opened, run_config(opened, run, principal))
        if not follow:
            emit({"run": run, "superlink": str(number)}, f"run {run}", as_json=as_json)
            return
        typer.echo(f"run {run}", err=True)
        follow_run(opened, run, number, lambda event: tell_event(event, as_json=as_json))
        version = register_version(opened, principal, LocalOwner(), RegisterRequest(run=run))
    document = {
        "run": run,
        "model": version.model,
        "version": version.digest,
        "gates_passed": version.gates_passed,
        "epsilon": max((item.run_epsilon for item in version.registered.costs), key=float, default=None),
    }
    emit(
        document, f"version {version.digest} of {version.model} is registered as a candidate", as_json=as_json
    )


@runs.command("list")
@guarded
def list_runs(delta: Delta = 1e-5, home: Home = None, as_json: AsJson = False) -> None:
    """List the runs of the log with round, epsilon so far, who is awaited, and which can be resumed.

    Exit codes: 0 done, 1 no log here, 2 wrong usage.
    """
    from audit.epsilon import epsilon_text

    with _ledger(home) as (ledger, folder):
        from federation.runs import list_runs as read

        found = [_followed(view, folder) for view in read(ledger, delta=delta)]
    rows = [
        [
            view.run[:12],
            view.model,
            "resumable" if view.resumable else view.state,
            f"{view.round}/{view.rounds}",
            epsilon_text(max(view.epsilon.values(), default=0.0)),
            ", ".join(view.awaited) or "-",
            ", ".join(f"{name}: {reason}" for name, reason in sorted(view.refused.items())) or "-",
        ]
        for view in found
    ]
    columns = ("run", "model", "state", "round", "epsilon", "awaited", "refused")
    document = {"runs": [_document(view) for view in found]}
    emit(document, table("", columns, rows) if rows else "no run in this log", as_json=as_json)


@runs.command("show")
@guarded
def show(run: RunId, delta: Delta = 1e-5, home: Home = None, as_json: AsJson = False) -> None:
    """Show one run: members, what each has spent, refusals with their codes, the last metrics.

    Exit codes: 0 done, 1 there is no such run, 2 wrong usage.
    """
    view = _view(home, run, delta)
    emit(_document(view), _screen(view), as_json=as_json)


@runs.command("follow")
@guarded
def follow(
    run: RunId,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    delta: Delta = 1e-5,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show a run until it ends, or nobody carries it out: a live table, or one JSON event a line.

    Exit codes: 0 it completed, 1 it failed, was stopped or was broken off, 2 wrong usage.
    """
    with _ledger(home) as (ledger, folder):
        from federation.run_journal import RunJournal
        from federation.runs import find_run

        view = find_run(ledger, run, delta=delta, home=folder)
        journal, after = RunJournal(folder, view.run), 0
        if as_json:
            while True:
                events, after = journal.read(after)
                for event in events:
                    tell_event(event, as_json=True)
                view = find_run(ledger, run, delta=delta, home=folder)
                if (view.state != "running" or view.resumable) and not events:
                    break
                time.sleep(every_s if not events else 0)
        else:
            view = _live(lambda: _followed(find_run(ledger, run, delta=delta, home=folder), folder), every_s)
    if view.state != "completed":
        raise typer.Exit(1)


@runs.command("stop")
@guarded
def stop(
    run: RunId,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the round's end.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Stop a run after its present round; what was released stays debited at the sites.

    Exit codes: 0 asked (with --now: stopped), 1 there is no such run, 2 wrong usage.
    """
    from federation.network.submit import stop_run
    from federation.runs import find_run

    with _coordinator(home) as opened:
        view = find_run(opened.ledger, run, home=opened.home)
        ended = stop_run(opened, view.run, now=now)
    shown = f"run {view.run} " + ("has ended" if ended else "stops after this round")
    emit({"run": view.run, "ended": ended}, shown, as_json=as_json)


@runs.command("plot")
@guarded
def plot(
    run: RunId,
    out: Annotated[Path, typer.Option(help="The picture (PNG or SVG).")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run's metrics and epsilon by round.

    Exit codes: 0 done, 1 there is no such run, or it has no round yet, 2 wrong usage.
    """
    from audit.console import CommandError
    from federation.charter import Charter
    from federation.plots import save_history
    from federation.registry import charter_text
    from federation.run_journal import RunJournal
    from federation.runs import find_run

    with _ledger(home) as (ledger, folder):
        view = find_run(ledger, run)
        events, _ = RunJournal(folder, view.run).read()
        text, _ = charter_text(ledger, view.charter)
    if not any(event.kind == "round" for event in events):
        raise CommandError(f"run {view.run} has no round to draw", code="runs.no_round")
    loaded = Charter.from_canonical(text)
    save_history(events, out, budget=float(loaded.privacy.epsilon), title=loaded.name)
    emit({"run": view.run, "file": str(out)}, f"wrote {out}", as_json=as_json)


def _live(read: Any, every_s: float) -> RunView:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            view: RunView = read()
            live.update(Text(_screen(view)), refresh=True)
            if view.state != "running" or view.resumable:
                return view
            time.sleep(every_s)


def _screen(view: RunView) -> str:
    from audit.epsilon import epsilon_text

    reason = f" ({view.reason})" if view.reason else ""
    state = "broken off, resumable" if view.resumable else view.state
    head = [
        f"run      {view.run}",
        f"model    {view.model}   charter {view.charter[:16]}",
        f"state    {state}{reason}, round {view.round} of {view.rounds}",
        f"awaited  {', '.join(view.awaited) or '-'}",
    ]
    if view.abandoned:
        named = (f"round {number} ({reason})" for number, reason in sorted(view.abandoned.items()))
        head.append(f"abandoned  {', '.join(named)}")
    if view.resumed:
        head.append("resumed  " + ("once" if view.resumed == 1 else f"{view.resumed} times"))
    if view.needs:
        head.append(f"needs    {view.needs}")
    if view.metrics:
        head.append(
            "metrics  " + "  ".join(f"{name} {value:.4f}" for name, value in sorted(view.metrics.items()))
        )
    rows = [
        [
            name,
            "accepted" if name in view.accepted else "-",
            epsilon_text(view.epsilon.get(name, 0.0)),
            view.refused.get(name, "missing in the last round" if name in view.missing else "-"),
            str(view.undelivered.get(name, 0) or "-"),
        ]
        for name in view.members
    ]
    return "\n".join([*head, table("", ("site", "run", "epsilon", "refused", "undelivered"), rows)])


def _document(view: RunView) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(view)


def tell_event(event: RunEvent, *, as_json: bool) -> None:
    """Print one thing that happened in a run: a line for people, or a document for programs."""
    import dataclasses

    from audit.epsilon import epsilon_text

    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(event)))
    elif event.kind == "round":
        shown = "  ".join(f"{name} {value:.4f}" for name, value in sorted(event.metrics.items()))
        typer.echo(
            f"round {event.round:>3}/{event.rounds}  {len(event.sites)} sites  {shown}  "
            f"epsilon {epsilon_text(event.epsilon or 0)}  {event.elapsed_s:.1f} s"
        )
    elif event.kind not in ("asked", "answered"):
        names = ", ".join(event.sites)
        typer.echo(" ".join(part for part in (event.kind, names, event.detail) if part))
    sys.stdout.flush()


def _followed(view: RunView, folder: Path) -> RunView:
    from federation.run_journal import RunJournal

    return view.follow(RunJournal(folder, view.run).read()[0])


def _view(home: Path | None, run: str, delta: float) -> RunView:
    from federation.runs import find_run

    with _ledger(home) as (ledger, folder):
        return _followed(find_run(ledger, run, delta=delta, home=folder), folder)


@contextmanager
def _ledger(home: Path | None) -> Iterator[tuple[Any, Path]]:
    from audit.ledger import Ledger
    from audit.location import log_location

    folder = base_home(home) / "coordinator"
    with Ledger.open(log_location(folder)) as ledger:
        yield ledger, folder


@contextmanager
def _coordinator(home: Path | None) -> Iterator[Coordinator]:
    from federation.coordinator import Coordinator

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        yield coordinator


def _identity(path: Path) -> Any:
    from federation.commands import read_identity

    return read_identity(path)
