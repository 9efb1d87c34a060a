"""The Flower ServerApp. It opens the coordinator's home, reads the prepared run, and carries it out.

Run config: `home` (the coordinator's home), `run` (the id that `federation.service.start_run` gave), and
optionally `signer-home` and `poll-s`. The same object runs under the in-process grid, Flower's simulation
and its deployment.
"""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from audit.entries import RunStarted, parse_body
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.errors import HomeError
from federation.exchange import Exchange
from federation.rounds import RoundLoop, RunOutcome

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run that the run config names."""
    config = context.run_config
    home, run = config.get("home"), config.get("run")
    if not isinstance(home, str) or not isinstance(run, str) or not home or not run:
        raise HomeError("run config", "`home` and `run` must name a coordinator's home and a prepared run")
    signer_home, poll_s = config.get("signer-home"), config.get("poll-s")
    with Coordinator.open(
        home, signer_home if isinstance(signer_home, str) and signer_home else None
    ) as coordinator:
        exchange = Exchange(grid, poll_s=float(poll_s) if isinstance(poll_s, (int, float)) else 0.01)
        carry_out(grid, coordinator, run, exchange=exchange)


def carry_out(
    grid: Grid, coordinator: Coordinator, run: str, *, exchange: Exchange | None = None
) -> RunOutcome:
    """Carry out the prepared run over `grid`.

    Raises:
        HomeError: no such run was prepared in this home.
        RunFailedError: the run stopped; the log says why.
    """
    kept = coordinator.kept_run(run)
    charter = Charter.from_canonical(kept["charter"])
    run_started = parse_body(RunStarted, kept["run_started"])
    loop = RoundLoop(coordinator, grid, charter, run_started, exchange=exchange)
    return loop.carry_out(kept["charter_author"])
