"""What people see of a run: from the log what happened, from its journal whom it waits for."""

from __future__ import annotations

import dataclasses
import json

import pytest

from audit.entries import RunFailed
from federation.errors import HomeError, RunFailedError
from federation.progress import RunEvent
from federation.run_journal import RunJournal
from federation.runs import RunView, find_run, list_runs


def view(**changes) -> RunView:
    members = ("a", "b", "c")
    made = RunView("0" * 32, "model", "1" * 64, "2026-11-24T08:00:00Z", 5, members)
    return dataclasses.replace(made, **changes)


def event(kind: str, *sites: str, **more) -> RunEvent:
    return RunEvent(kind=kind, run="0" * 32, sites=sites, **more)


def test_a_completed_run_is_seen_with_rounds_epsilon_and_weights(federation):
    run = federation.train()
    (seen,) = list_runs(federation.coordinator.ledger)
    assert (seen.run, seen.state, seen.round, seen.weights) == (run.run, "completed", 3, run.weights)
    assert sorted(seen.accepted) == sorted(seen.members)
    assert set(seen.epsilon) == set(seen.members)
    assert all(value > 0 for value in seen.epsilon.values())
    assert seen.awaited == ()
    journal, end = RunJournal(federation.coordinator.home, run.run).read()
    assert [item.kind for item in journal][-1] == "completed"
    assert RunJournal(federation.coordinator.home, run.run).read(end) == ([], end)


def test_a_run_that_is_asked_to_stop_ends_before_its_next_round(federation):
    def listener(item: RunEvent) -> None:
        if item.kind == "round":
            RunJournal(federation.coordinator.home, item.run).ask_to_stop()

    with pytest.raises(RunFailedError) as caught:
        federation.train(on_event=listener)
    assert caught.value.reason == "stopped"
    (seen,) = list_runs(federation.coordinator.ledger)
    assert (seen.state, seen.round) == ("stopped", 1)
    assert [body.reason for body in federation.bodies(RunFailed)] == ["stopped"]


def test_who_is_awaited_shrinks_with_each_answer_and_ends_with_the_round():
    asked = [event("asked", "a", "b", "c"), event("answered", "b")]
    assert view().follow(asked).awaited == ("a", "c")
    assert view().follow([*asked, event("round", "b", missing=("a", "c"))]).awaited == ()


def test_a_run_that_is_over_awaits_nobody_whatever_its_journal_says():
    assert view(state="failed").follow([event("asked", "a")]).awaited == ()


def test_a_refusal_in_the_log_is_not_overwritten_by_the_journal():
    seen = view(refused={"a": "budget_exhausted"}).follow([event("refused", "a", detail="something")])
    assert seen.refused == {"a": "budget_exhausted"}


def test_half_a_line_is_left_for_the_next_look(tmp_path):
    (tmp_path / "runs").mkdir()
    journal = RunJournal(tmp_path, "x")
    journal.write(event("asked", "a"))
    whole = journal.events_path.stat().st_size
    line = json.dumps(dataclasses.asdict(event("answered", "a")))
    with journal.events_path.open("a") as file:
        file.write(line[:20])
    events, after = journal.read()
    assert ([item.kind for item in events], after) == (["asked"], whole)
    with journal.events_path.open("a") as file:
        file.write(line[20:] + "\n")
    assert [item.kind for item in journal.read(after)[0]] == ["answered"]


@pytest.mark.parametrize(
    "line", ["", "{}", "null", "[1]", '{"kind": 1', '{"sites": 5, "missing": []}', "\x00"]
)
def test_lines_that_are_no_events_are_passed_over(tmp_path, line):
    (tmp_path / "runs").mkdir()
    journal = RunJournal(tmp_path, "x")
    journal.events_path.write_text(line + "\n")
    journal.write(event("asked", "a"))
    assert [item.kind for item in journal.read()[0]] == ["asked"]


def test_a_journal_that_cannot_be_written_costs_the_run_nothing(tmp_path, caplog):
    journal = RunJournal(tmp_path / "absent", "x")
    journal.write(event("asked", "a"))
    assert "not written" in caplog.text
    assert journal.read() == ([], 0)
    assert journal.number is None


def test_an_ambiguous_or_unknown_run_is_refused(federation):
    with pytest.raises(HomeError, match="not in the log"):
        find_run(federation.coordinator.ledger, "ffff")
