"""The Flower ServerApp. It opens the coordinator's home, reads the prepared run, and carries it out.

Run config: `home` (the coordinator's home), `run` (the id that `federation.service.start_run` gave), and
optionally `principal` (who resumes it), `hold-s` (how long a hold on the run outlives a killed process),
`signer-home`, `poll-s`, `discovery-s` (how long to wait for sites to connect) and `patience-s` (how long for
sites whose people have to decide). The same object runs under the in-process grid, Flower's simulation and
its deployment.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.coordinator import Coordinator
from federation.errors import HomeError, ResumeError, RunHeldError
from federation.exchange import Exchange
from federation.network.ringing import with_bells
from federation.patience import PATIENCE_S
from federation.preparation import ACTOR
from federation.progress import RunEvent, emit, listening
from federation.resume import prepared_run
from federation.rounds import RoundLoop
from federation.run_hold import TTL_S
from federation.run_journal import RunJournal
from federation.run_state import RunOutcome

DEFAULT_POLL_S: Final = 0.01
DEFAULT_DISCOVERY_S: Final = 30.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run that the run config names."""
    config = context.run_config
    home, run = config.get("home"), config.get("run")
    if not isinstance(home, str) or not isinstance(run, str) or not home or not run:
        raise HomeError("run config", "`home` and `run` must name a coordinator's home and a prepared run")
    signer_home = config.get("signer-home")
    chosen = signer_home if isinstance(signer_home, str) and signer_home else None
    with Coordinator.open(home, chosen) as coordinator, with_bells(grid, coordinator.home) as heard:
        principal = config.get("principal")
        carry_out(
            heard,
            coordinator,
            run,
            exchange=Exchange(
                heard,
                poll_s=_seconds(config.get("poll-s"), DEFAULT_POLL_S),
                discovery_s=_seconds(config.get("discovery-s"), DEFAULT_DISCOVERY_S),
            ),
            patience_s=_seconds(config.get("patience-s"), PATIENCE_S),
            hold_s=_seconds(config.get("hold-s"), TTL_S),
            principal=principal if isinstance(principal, str) and principal else ACTOR,
        )


def _seconds(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def carry_out(
    grid: Grid,
    coordinator: Coordinator,
    run: str,
    *,
    exchange: Exchange | None = None,
    patience_s: float = PATIENCE_S,
    hold_s: float = TTL_S,
    principal: str = ACTOR,
) -> RunOutcome:
    """Carry out the prepared run over `grid`, or go on with it; see `RoundLoop.carry_out`.

    Raises:
        HomeError: no such run was prepared in this home.
        RunFailedError: the run stopped; the log says why.
        RunHeldError, ResumeError: it was begun, and cannot go on here and now.
    """
    prepared = prepared_run(coordinator, run)
    journal = RunJournal(coordinator.home, run)
    loop = RoundLoop(
        coordinator,
        grid,
        prepared.charter,
        prepared.started,
        exchange=exchange,
        patience_s=patience_s,
        stop=lambda: journal.is_asked_to_stop,
        hold_s=hold_s,
    )
    with journal, listening(run, journal.write):
        try:
            return loop.carry_out(prepared.charter_author, principal=principal)
        except (ResumeError, RunHeldError) as error:
            emit(RunEvent(kind="not_resumed", run=run, detail=f"{error.code}: {error}"))
            raise
