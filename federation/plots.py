"""Pictures of a run: what it learnt and what it cost, round by round, and how its updates agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.progress import RunEvent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_in_notebooks(figure: Figure) -> Figure:
    """Give a figure made without pyplot the picture that a notebook looks for."""

    def png() -> bytes:
        buffer = BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        return buffer.getvalue()

    figure._repr_png_ = png  # type: ignore[attr-defined]
    return figure


def history_figure(events: Sequence[RunEvent], *, budget: float | None = None, title: str = "") -> Figure:
    """Return a figure of metrics and epsilon per round, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rounds = [event for event in events if event.kind == "round"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    learnt, cost = figure.subplots(1, 2)
    numbers = [event.round for event in rounds]
    for name in sorted({name for event in rounds for name in event.metrics}):
        values = [event.metrics.get(name, float("nan")) for event in rounds]
        learnt.plot(numbers, values, marker=".", label=name)
    learnt.set(xlabel="round", ylabel="on the public set", title=title or "metrics of each round's weights")
    if rounds and rounds[0].metrics:
        learnt.legend()
    cost.plot(numbers, [event.epsilon or 0.0 for event in rounds], marker=".", color="tab:red", label="spent")
    if budget is not None:
        cost.axhline(budget, linestyle="--", color="grey", label="the charter's epsilon")
    cost.set(xlabel="round", ylabel="epsilon of each site", title="privacy spent")
    cost.set_ylim(bottom=0)
    cost.legend()
    return show_in_notebooks(figure)


def save_history(
    events: Sequence[RunEvent], path: Path | str, *, budget: float | None = None, title: str = ""
) -> Path:
    """Write the figure as a PNG file; return its path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    history_figure(events, budget=budget, title=title).savefig(target, dpi=120, format="png")
    return target


def updates_figure(views: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a figure of `audit.anomaly`'s documents: the last round's cosines, and distances by round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    directions, distances = figure.subplots(1, 2)
    if views:
        last = views[-1]
        cosines = [[float(value) for value in row] for row in last["cosines"]]
        picture = directions.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
        figure.colorbar(picture, ax=directions, shrink=0.8)
        places = range(len(last["sites"]))
        directions.set_xticks(places, last["sites"], rotation=45, ha="right")
        directions.set_yticks(places, last["sites"])
        directions.set(title=f"cosines of round {last['round']}'s updates")
    for site in sorted({site for view in views for site in view["sites"]}):
        seen = [
            (view["round"], float(view["distance"][view["sites"].index(site)]), site in view["apart"])
            for view in views
            if site in view["sites"]
        ]
        (line,) = distances.plot([r for r, _, _ in seen], [d for _, d, _ in seen], marker=".", label=site)
        marked = [(r, d) for r, d, apart in seen if apart]
        distances.plot(
            [r for r, _ in marked], [d for _, d in marked], "x", color=line.get_color(), markersize=9
        )
    distances.set(
        xlabel="round", ylabel="distance / what noise makes", title="distance from the others (x: apart)"
    )
    distances.set_ylim(bottom=0)
    if views:
        distances.legend(fontsize="small")
    return show_in_notebooks(figure)


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
