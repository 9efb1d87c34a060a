"""`runs resume`: go on with a run whose coordinator died, over the network or with the sites of this home."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, base_home, emit, guarded
from federation.run_commands import AsJson, Home, RunId, tell_event

if TYPE_CHECKING:
    from audit.principal import Principal
    from federation.coordinator import Coordinator
    from federation.progress import RunEvent


def register(application: typer.Typer) -> None:
    """Add the command to `runs`, as the front door composed it."""
    for group in application.registered_groups:
        if group.typer_instance is not None and group.typer_instance.info.name == "runs":
            group.typer_instance.command("resume")(resume_run)


@guarded
def resume_run(
    run: RunId,
    author: Annotated[
        Path | None,
        typer.Option(help="Home of your identity; the log then names its key, else `operator`."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was broken off, from its last completed round, and register its version.

    Over the network where this home has a coordinator that is up; else with the sites' homes beside it. Sites
    answer what they released already with the same bytes, and no debit is made twice. Of a run that ended,
    the sites are told once more.

    Exit codes: 0 completed and registered, 1 refused or failed (resume it again when it says so), 2 wrong
    usage.
    """
    from audit.principal import LocalOwner
    from federation.coordinator import Coordinator
    from federation.service import RegisterRequest, register

    base, principal = base_home(home), _principal(author)
    with Coordinator.open(base / "coordinator") as opened:
        name = _full_id(opened, run)
        trained = _go_on(opened, base, name, principal, as_json=as_json)
        version = register(opened, principal, LocalOwner(), RegisterRequest(run=trained.run))
    document = {
        "run": trained.run,
        "model": version.model,
        "version": version.digest,
        "gates_passed": version.gates_passed,
    }
    shown = f"run {trained.run} is complete\nversion {version.digest} of {version.model} is registered"
    emit(document, shown, as_json=as_json)


def _go_on(coordinator: Coordinator, base: Path, run: str, principal: Principal, *, as_json: bool) -> Any:
    from audit.principal import LocalOwner
    from federation.network.settings import NetworkHome
    from federation.network.submit import network_launch
    from federation.service import ResumeRequest, resume

    def tell(event: RunEvent) -> None:
        tell_event(event, as_json=as_json)

    if NetworkHome.exists(coordinator.home):
        launch = network_launch(coordinator, tell)
        return resume(coordinator, principal, LocalOwner(), ResumeRequest(run=run), launch)
    from clients.home import SiteHome
    from clients.simulation import resume_federation
    from federation.resume import prepared_run

    names = prepared_run(coordinator, run).charter.site_names
    homes = {name: SiteHome.open(base / "sites" / name) for name in names}
    return resume_federation(run, homes, coordinator, principal, on_event=tell)


def _principal(author: Path | None) -> Principal:
    import os

    from audit.principal import Principal

    if author is None:
        return Principal(id="operator", role="operator")
    from clients.identity import Identity

    passphrase = os.environ.get("AFFIDAVIT_PASSPHRASE")
    key = Identity.open(author, passphrase.encode() if passphrase else None).key
    return Principal(id=key.verify_key.fingerprint, role="scientist", key=key.text)


def _full_id(coordinator: Coordinator, prefix: str) -> str:
    """Return the one prepared run whose id begins so; the log need not know it yet."""
    kept = {path.stem for path in (coordinator.home / "runs").glob("*.json")}
    logged = {row.columns.run for row in coordinator.ledger.search(type="run.started", limit=1000)}
    found = sorted(name for name in kept | logged if name and name.startswith(prefix))
    if len(found) != 1:
        problem = "names several runs; give more of it" if found else "was never prepared in this home"
        raise CommandError(f"run {prefix} {problem}", code="runs.not_found")
    return found[0]
