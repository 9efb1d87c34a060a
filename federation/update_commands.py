"""Commands about a run's updates: `affidavit runs updates RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from audit.console import ask_api, base_home, emit, guarded, read_key


def register(runs: typer.Typer) -> None:
    """Add this command to `affidavit runs`."""
    runs.command("updates")(show_updates)


@guarded
def show_updates(
    run: Annotated[
        str, typer.Argument(help="The run, as `affidavit runs list` names it; with --url in full.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Write the cosine map and the distances as PNG.")] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File with the API key [AFFIDAVIT_API_KEY].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show how the sites' updates agree, round by round, and who stands apart.

    Made from released, noised updates: looking costs no privacy. A site may stand apart because its patients
    differ, because its data are wrong, or because it lies; the view cannot say which.

    With --url a running server is asked, with an API key of an officer; the reading is an entry there.

    Exit codes: 0 done, 1 the run or an update is not here, 2 wrong usage.
    """
    from federation.anomaly import view_lines

    picture: bytes | None = None
    if url:
        key, path = read_key(None, key_file), f"/v1/audit/runs/{quote(run, safe='')}/updates"
        views = json.loads(ask_api(url, path, key=key))["rounds"]
        if plot is not None:
            picture = ask_api(url, f"{path}?format=png", key=key)
    else:
        run, views = _views_here(home, run)
        if plot is not None:
            from federation.plots import png_of, updates_figure

            picture = png_of(updates_figure(views))
    lines = view_lines(views)
    if plot is not None and picture is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(picture)
        lines.append(f"picture {plot}")
    emit({"run": run, "rounds": views}, lines, as_json=as_json)


def _views_here(home: Path | None, run: str) -> tuple[str, list[dict[str, Any]]]:
    from federation.anomaly import views_of_run
    from federation.coordinator import Coordinator

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        begun = coordinator.ledger.search(type="run.started", limit=1000)
        names = [row.columns.run for row in begun if row.columns.run and row.columns.run.startswith(run)]
        name = names[0] if len(names) == 1 else run
        return name, list(views_of_run(coordinator, name))
