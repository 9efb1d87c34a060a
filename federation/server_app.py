"""The Flower ServerApp. It opens the coordinator's home, reads the prepared run, and carries it out.

Run config: `home` (the coordinator's home), `run` (the id that `federation.service.start_run` gave), and
optionally `signer-home`, `poll-s`, `discovery-s` (how long to wait for sites to connect) and `patience-s`
(how long for sites whose people have to decide). The same object runs under the in-process grid, Flower's
simulation and its deployment.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from audit.entries import RunStarted, parse_body
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.errors import HomeError
from federation.exchange import Exchange
from federation.network.ringing import with_bells
from federation.patience import PATIENCE_S
from federation.progress import listening
from federation.rounds import RoundLoop, RunOutcome
from federation.run_journal import RunJournal

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
        exchange = Exchange(
            heard,
            poll_s=_seconds(config.get("poll-s"), DEFAULT_POLL_S),
            discovery_s=_seconds(config.get("discovery-s"), DEFAULT_DISCOVERY_S),
        )
        patience_s = _seconds(config.get("patience-s"), PATIENCE_S)
        carry_out(heard, coordinator, run, exchange=exchange, patience_s=patience_s)


def _seconds(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and value > 0 else default


def carry_out(
    grid: Grid,
    coordinator: Coordinator,
    run: str,
    *,
    exchange: Exchange | None = None,
    patience_s: float = PATIENCE_S,
) -> RunOutcome:
    """Carry out the prepared run over `grid`.

    Raises:
        HomeError: no such run was prepared in this home.
        RunFailedError: the run stopped; the log says why.
    """
    kept = coordinator.kept_run(run)
    charter = Charter.from_canonical(kept["charter"])
    run_started = parse_body(RunStarted, kept["run_started"])
    journal = RunJournal(coordinator.home, run)
    loop = RoundLoop(
        coordinator,
        grid,
        charter,
        run_started,
        exchange=exchange,
        patience_s=patience_s,
        stop=lambda: journal.is_asked_to_stop,
    )
    with listening(run, journal.write):
        return loop.carry_out(kept["charter_author"])
