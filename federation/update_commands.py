"""Commands about a run's updates: `affidavit runs updates RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit.console import base_home, emit, guarded


def register(runs: typer.Typer) -> None:
    """Add this command to `affidavit runs`."""
    runs.command("updates")(show_updates)


@guarded
def show_updates(
    run: Annotated[
        str, typer.Argument(help="The run, as `affidavit log search --type run.started` names it.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Write the cosine map and the distances as PNG.")] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show how the sites' updates agree, round by round, and who stands apart.

    Made from released, noised updates: looking costs no privacy. A site may stand apart because its patients
    differ, because its data are wrong, or because it lies; the view cannot say which.

    Exit codes: 0 done, 1 the run or an update is not here, 2 wrong usage.
    """
    from federation.anomaly import view_lines, views_of_run
    from federation.coordinator import Coordinator

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        views = list(views_of_run(coordinator, run))
    lines = view_lines(views)
    if plot is not None:
        from federation.plots import png_of, updates_figure

        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(png_of(updates_figure(views)))
        lines.append(f"picture {plot}")
    emit({"run": run, "rounds": views}, lines, as_json=as_json)
