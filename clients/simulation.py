"""A whole federation on one machine: real homes, agents, ledgers, log and witnesses, Flower's real objects.

`run_federation` carries out one run for homes that exist; the command and the demo call it. `simulate`
makes temporary homes from DataFrames first, for a notebook. Both use `federation.server_app` and
`clients.client_app` as they are, over the in-process grid or, with `engine="ray"`, over Flower's own
simulation.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from audit.keys import SigningKey
from audit.principal import LocalOwner, Principal
from clients.agent import Agent
from clients.errors import ClientsError, SimulationError
from clients.home import SiteHome
from clients.inprocess import live_agents
from clients.service import federation_policy
from clients.socket_link import served_agents
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.service import Launch, RunConfig, TrainedRun, TrainRequest, train

if TYPE_CHECKING:
    from federation.progress import Listener

Engine = Literal["inprocess", "ray"]

_LINK_VARIABLES: Final = ("AFFIDAVIT_AGENT", "AFFIDAVIT_SITES")


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
        RunFailedError: the run stopped; the log says why.
    """
    if sorted(homes) != list(charter.site_names):
        raise SimulationError(f"homes of {sorted(homes)} for a charter of {list(charter.site_names)}")
    if public_set is not None:
        coordinator.blobs.put(public_set.read_bytes())
    join_all(homes, coordinator)
    with ExitStack() as stack:
        agents = {}
        for name, home in homes.items():
            agents[name] = Agent.open(home)
            stack.callback(agents[name].close)
        launch = _launchers[engine](agents)
        principal = Principal(id=author.verify_key.fingerprint, role="scientist", key=author.text)
        request = TrainRequest(charter=charter, model=model)
        return train(coordinator, principal, LocalOwner(), request, author, launch, on_event=on_event)


def join_all(homes: Mapping[str, SiteHome], coordinator: Coordinator) -> None:
    """Let every site that follows no log yet follow this one."""
    witnesses = {name: home.keys().witness_signer(name).vkey for name, home in homes.items()}
    policy = federation_policy(coordinator.log_key, witnesses)
    for home in homes.values():
        if not home.witness_path.exists():
            home.join(policy)


def inprocess_launch(agents: Mapping[str, Agent]) -> Launch:
    """Run the ServerApp here, with one thread a site for the ClientApp."""

    def launch(config: RunConfig) -> None:
        from flwr.app import Context, RecordDict

        from clients.client_app import app as client_app
        from federation.grid import InProcessGrid
        from federation.server_app import app as server_app

        with (
            live_agents(agents),
            InProcessGrid(client_app, {name: {} for name in agents}, run_config=config) as grid,
        ):
            context = Context(
                run_id=grid.run.run_id,
                node_id=0,
                node_config={},
                state=RecordDict(),
                run_config=dict(config),
            )
            server_app(grid=grid, context=context)

    return launch


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
            context.run_config = dict(config)  # Flower's simulation passes none
            try:
                server_app(grid=grid, context=context)
            except Exception as error:
                failures.append(error)
                raise

        backend: Any = {
            "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
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


_launchers: Final[dict[str, Callable[[Mapping[str, Agent]], Launch]]] = {
    "inprocess": inprocess_launch,
    "ray": ray_launch,
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


def new_coordinator(folder: Path, origin: str = "") -> Coordinator:
    """Make a coordinator's home and its signer's beside it, under `folder`."""
    name = origin or f"simulation.invalid/{secrets.token_hex(4)}"
    return Coordinator.create(folder / "coordinator", folder / "signer", name)


__all__ = [
    "ClientsError",
    "Engine",
    "inprocess_launch",
    "join_all",
    "new_coordinator",
    "ray_launch",
    "run_federation",
]
