"""A run over the network: prepared here, submitted to SuperLink, followed by its journal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from audit.entries import RunCompleted, RunFailed, RunStarted, decode_entry, parse_body
from audit.ledger import Ledger
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import RunFailedError
from federation.network.bundle import build_bundle
from federation.network.control import SuperLinkControl
from federation.network.errors import NetworkError, NotCarriedOutError, RunControlError
from federation.network.settings import NetworkHome
from federation.progress import Listener
from federation.run_hold import is_held
from federation.run_journal import RunJournal
from federation.service import RunConfig

POLL_S: Final = 0.02  # between the ServerApp's looks for replies, each of which waits for a bell
DISCOVERY_S: Final = 90.0  # a restarted SuperNode is refused for up to a minute
STATUS_EVERY_S: Final = 3.0
MISSED: Final = 2  # looks at which nobody holds a run that somebody held
LOST_S: Final = 20.0  # SuperLink says finished and the log shows no end


def control_of(coordinator: Coordinator) -> SuperLinkControl:
    """Return the line to this home's SuperLink; NetworkError without a network part."""
    network = NetworkHome.open(coordinator.home)
    return SuperLinkControl(network.settings().superlink, network.pki.inner_ca)


def submit(coordinator: Coordinator, config: RunConfig) -> int:
    """Hand a prepared run to SuperLink; return SuperLink's number for it.

    Raises:
        RunControlError: SuperLink is not there, or does not take the run.
    """
    number = control_of(coordinator).start_run(
        build_bundle(), {**config, "poll-s": POLL_S, "discovery-s": DISCOVERY_S}
    )
    RunJournal(coordinator.home, config["run"]).keep_number(number)
    return number


def network_launch(coordinator: Coordinator, on_event: Listener | None = None) -> Callable[[RunConfig], None]:
    """Return what `federation.service.train` and `resume` call to carry a run out over the network."""

    def launch(config: RunConfig) -> None:
        _, after = RunJournal(coordinator.home, config["run"]).read()
        number = submit(coordinator, config)
        follow(coordinator, config["run"], number, on_event, after=after)

    return launch


def follow(
    coordinator: Coordinator, run: str, number: int, on_event: Listener | None = None, *, after: int = 0
) -> None:
    """Pass the run's events behind byte `after` of its journal on until it ended.

    Raises:
        RunFailedError: it failed.
        NotCarriedOutError: it was not taken up, or its ServerApp went without a word; it can be resumed.
    """
    journal, control = RunJournal(coordinator.home, run), control_of(coordinator)
    looked, gone, heard, begun, missed = time.monotonic(), 0.0, False, False, 0
    while True:
        events, after = journal.read(after)
        heard = heard or bool(events)  # a hold before that may be a dead process's
        for event in events:
            if on_event is not None:
                on_event(event)
            if event.kind == "not_resumed":
                raise NotCarriedOutError(event.detail)
        ended = end_of(coordinator.ledger, run)
        if isinstance(ended, RunCompleted):
            return
        if isinstance(ended, RunFailed):
            raise RunFailedError(run, ended.round, ended.reason, "the log has the reason")
        now = time.monotonic()
        if now - looked >= STATUS_EVERY_S:
            looked = now
            held = is_held(coordinator.ledger, run)
            begun = begun or (held and heard)
            missed = 0 if held or not begun else missed + 1
            gone = _gone_since(control, number, gone, now)
            if missed >= MISSED and end_of(coordinator.ledger, run) is not None:
                continue
            if missed >= MISSED or (gone and now - gone > LOST_S):
                raise NotCarriedOutError(
                    f"run {run}: its ServerApp is gone and the log has no end of it; "
                    f"go on with `affidavit runs resume {run[:12]}`"
                )
        time.sleep(0.1)


def stop_run(coordinator: Coordinator, run: str, *, now: bool, grace_s: float = 0.0) -> bool:
    """Ask a run to stop after its round; `now` ends it at SuperLink too and writes the end.

    Returns:
        Whether the run has ended already.
    """
    journal = RunJournal(coordinator.home, run)
    if end_of(coordinator.ledger, run) is not None:
        return True
    journal.ask_to_stop()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        if end_of(coordinator.ledger, run) is not None:
            return True
        time.sleep(0.1)
    if not now:
        return False
    number = journal.number
    if number is not None:
        try:
            control_of(coordinator).stop_run(number)
        except NetworkError as error:
            raise RunControlError(
                f"run {run} was asked to stop; SuperLink does not answer: {error}"
            ) from error
    from federation.runs import find_run

    view = find_run(coordinator.ledger, run, home=coordinator.home)
    if not view.started:  # nobody was asked yet: what is ended here begins here
        started = parse_body(RunStarted, coordinator.kept_run(run)["run_started"])
        coordinator.append(started, "coordinator", stable_event_id("run.started", run))
    body = RunFailed(run=run, charter=view.charter, round=view.round, reason="stopped")
    coordinator.append(body, "coordinator", stable_event_id("run.failed", run))
    return True


def end_of(ledger: Ledger, run: str) -> RunCompleted | RunFailed | None:
    """Return the entry that ended a run, or None."""
    for row in ledger.search(type=("run.completed", "run.failed"), run=run, limit=1):
        body = decode_entry(row.body).body
        if isinstance(body, (RunCompleted, RunFailed)):
            return body
    return None


def _gone_since(control: SuperLinkControl, number: int, gone: float, now: float) -> float:
    try:
        status = control.run_status(number)
    except NetworkError:
        return gone
    finished = not status or status.startswith("finished")
    return (gone or now) if finished else 0.0
