"""The run's picture and its events: drawn without a display, heard only by whoever listens."""

from __future__ import annotations

import logging

from federation.plots import history_figure, save_history
from federation.progress import RunEvent, emit, listening


def events(metrics):
    return [
        RunEvent(kind="accepted", run="r"),
        *[RunEvent(kind="round", run="r", round=n, metrics=metrics, epsilon=0.1 * n) for n in (1, 2, 3)],
    ]


def test_a_png_is_written_where_it_was_asked_for(tmp_path):
    path = save_history(
        events({"auc": 0.9, "accuracy": 0.8}), tmp_path / "new" / "run.png", budget=3, title="cells"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


def test_the_figure_shows_metrics_epsilon_and_the_budget():
    learnt, cost = history_figure(events({"auc": 0.9, "accuracy": 0.8}), budget=3).axes
    assert [line.get_label() for line in learnt.lines] == ["accuracy", "auc"]
    assert list(cost.lines[0].get_ydata()) == [0.1, 0.2, 0.1 * 3]
    assert len(cost.lines) == 2


def test_a_run_without_metrics_or_rounds_is_drawn_all_the_same():
    assert len(history_figure(events({})).axes[0].lines) == 0
    assert history_figure([]).axes


def test_listeners_hear_their_own_run_and_only_inside_the_block():
    heard = []
    with listening("r", heard.append):
        emit(RunEvent(kind="round", run="r", round=1))
        emit(RunEvent(kind="round", run="another", round=1))
    emit(RunEvent(kind="round", run="r", round=2))
    assert [event.round for event in heard] == [1]


def test_a_listener_that_fails_stops_neither_the_run_nor_the_others(caplog):
    heard = []

    def fails(event):
        raise RuntimeError("the table is gone")

    with caplog.at_level(logging.ERROR), listening("r", fails), listening("r", heard.append):
        emit(RunEvent(kind="round", run="r", round=1))
    assert len(heard) == 1
    assert "the table is gone" in caplog.text
