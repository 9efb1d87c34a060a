"""Who does the sites' work of a simulation: threads, copies of this process, or Ray."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clients.agent import Agent
from clients.agent_server import served_agents
from clients.errors import SimulationError
from clients.home import SiteHome
from clients.inprocess import live_agents
from clients.virtual import Memory, VirtualHome, VirtualState
from federation.charter import Charter
from federation.service import Launch, RunConfig

if TYPE_CHECKING:
    from federation.grid import Fault, InProcessGrid

LARGE_MODEL: Final = 1_000_000  # parameters; one site at a time computes from here on, for memory's sake
RAY_STARTS_S: Final = 120.0
MOST_PROCESSES: Final = 8  # the coordinator's own work does not share out: more would wait for it
NO_PAUSE_S: Final = 1e-6
_LINK_VARIABLES: Final = ("AFFIDAVIT_AGENT", "AFFIDAVIT_SITES")


def inprocess_launch(
    agents: Mapping[str, Agent], *, fault: Fault | None = None, workers: int | None = None
) -> Launch:
    """Run the ServerApp here and the ClientApps in threads, by default as many as `InProcessGrid` chooses.

    `fault` plays the bad network.
    """

    def launch(config: RunConfig) -> None:
        from clients.client_app import app as client_app
        from federation.grid import MANY_NODES, InProcessGrid

        with (
            _one_thread_each(len(agents) > MANY_NODES),
            live_agents(agents),
            InProcessGrid(
                client_app,
                {name: {} for name in agents},
                run_config=config,
                fault=fault,
                workers=workers,
            ) as grid,
        ):
            _serve(grid, config)

    return launch


def _serve(grid: InProcessGrid, config: Mapping[str, str | float]) -> None:
    """Run Flower's ServerApp over a grid of ours until the run is over."""
    from flwr.app import Context, RecordDict

    from federation.server_app import app

    app(
        grid=grid,
        context=Context(
            run_id=grid.run.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config)
        ),
    )


@contextmanager
def _one_thread_each(many: bool) -> Iterator[None]:
    """Let torch use one thread a site where many sites share the cores: two at one product cost more."""
    import torch

    before = torch.get_num_threads()
    if many:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forked_launch(agents: Mapping[str, Agent], *, processes: int) -> Launch:
    """Run the ServerApp here and the ClientApps, with their agents, in copies of this process; for virtual
    sites alone: what became of them is handed back when the run is over.
    """
    homes = {name: agent.home for name, agent in agents.items()}

    def leaving(site: str) -> VirtualState:
        agents[site].close()
        return _memory(homes[site]).state()

    def launch(config: RunConfig) -> None:
        from clients.client_app import app as client_app
        from federation.forked_grid import ForkedGrid

        with (
            _one_thread_each(True),
            live_agents(agents),
            ForkedGrid(
                client_app,
                {name: {} for name in agents},
                processes=processes,
                leaving=leaving,
                returned=lambda site, state: _memory(homes[site]).take(state),
                resting=next(iter(agents.values())).rest,  # what sites share, one of them uses for all
                run_config=config,
            ) as grid,
        ):
            _serve(grid, {**config, "poll-s": NO_PAUSE_S})  # the grid itself waits for what comes

    return launch


def _memory(home: SiteHome) -> Memory:
    if not isinstance(home, VirtualHome):
        raise SimulationError(f"site {home.name} is on disk: only virtual sites live in several processes")
    return home.memory


def ray_launch(agents: Mapping[str, Agent]) -> Launch:
    """Run the same two objects under Flower's Ray simulation; the agents stay here, behind Unix sockets."""

    def launch(config: RunConfig) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise SimulationError(
                "engine ray needs Ray; install affidavit[simulation], or use engine inprocess"
            ) from error
        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation

        from clients.client_app import app as client_app
        from federation.server_app import app as server_app

        configured = ServerApp()
        failures: list[Exception] = []

        @configured.main()
        def main(grid: Grid, context: Context) -> None:
            # Flower's simulation passes none; Ray's first actors take a minute on a busy machine
            context.run_config = {"discovery-s": RAY_STARTS_S, **config}
            try:
                server_app(grid=grid, context=context)
            except Exception as error:
                failures.append(error)
                raise

        backend: Any = {
            "init_args": {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1},
        }
        with (
            tempfile.TemporaryDirectory(prefix="affidavit-") as folder,
            served_agents(Path(folder), agents),
            _link_environment(folder, agents),
        ):
            run_simulation(configured, client_app, len(agents), backend_config=backend)
        if failures:
            raise failures[0]

    return launch


def _local_launch(agents: Mapping[str, Agent], charter: Charter) -> Launch:
    """Choose: many virtual sites on several cores, one site at a time of a large model, or threads."""
    from federation.forked_grid import may_fork
    from federation.grid import MANY_NODES

    if charter.dimension > LARGE_MODEL:
        return inprocess_launch(agents, workers=1)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    virtual = all(isinstance(agent.home, VirtualHome) for agent in agents.values())
    many = virtual and cores > 1 and len(agents) > MANY_NODES
    with _one_thread_each(many):  # torch's pool of another size has threads of its own, which end here
        can_fork = many and may_fork()
    if can_fork:
        return forked_launch(agents, processes=min(cores, MOST_PROCESSES))
    return inprocess_launch(agents)


LAUNCHERS: Final[dict[str, Callable[[Mapping[str, Agent], Charter], Launch]]] = {
    "inprocess": _local_launch,
    "ray": lambda agents, _: ray_launch(agents),
}


@contextmanager
def _link_environment(folder: str, agents: Mapping[str, Agent]) -> Iterator[None]:
    """Tell the relays, which Ray starts with this process's environment, where the agents are."""
    before = {name: os.environ.get(name) for name in _LINK_VARIABLES}
    os.environ.update({"AFFIDAVIT_AGENT": f"unix:{folder}", "AFFIDAVIT_SITES": ",".join(sorted(agents))})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
