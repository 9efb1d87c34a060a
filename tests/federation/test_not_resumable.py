"""Runs that cannot go on, or not by this process: said with a code, and nothing is written."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from audit.entries import (
    RoundCompleted,
    RunCompleted,
    RunStarted,
    SiteStatement,
)
from audit.round_bodies import RunResumed
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import ResumeError, RunHeldError
from federation.resume import RunPast, prepared_run
from federation.run_hold import RunHold, is_held, lease_name
from tests.federation.dying import (
    ALL,
    HOLD_S,
    assert_whole,
    crash,
    go,
    judged,
    logged,
    make_strict,
    measured,
    prepared,
)
from tests.waiting import lapse


@pytest.fixture
def strict(federation):
    return make_strict(federation)


@pytest.fixture(scope="session")
def steps_and_weights(tmp_path_factory, charter_text, keys):
    return measured(tmp_path_factory, charter_text, keys)


def test_two_coordinators_resume_and_exactly_one_goes_on(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    with Coordinator.open(strict.coordinator.home, strict.coordinator.signer_home) as other:
        pair = [strict, dataclasses.replace(strict, coordinator=other)]
        outcomes: list[Any] = []
        together = threading.Barrier(2)

        def resume(federation):
            together.wait()
            try:
                outcomes.append(go(federation, run, hold_s=4))  # a busy machine starves no holder
            except RunHeldError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=resume, args=(federation,)) for federation in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, RunHeldError)]
    assert len(outcomes) == 2
    assert len(refused) <= 1  # the second may come when the first is done: it finds the run complete
    assert len(strict.bodies(RunResumed)) == 1
    assert strict.bodies(RunCompleted)[0].weights == weights
    assert_whole(strict, run, rounds=2)


def test_a_living_holder_is_not_disturbed(strict):
    run = prepared(strict)
    with RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S):
        assert is_held(strict.coordinator.ledger, run)
        with pytest.raises(RunHeldError, match="another process carries it out") as caught:
            go(strict, run)
        assert caught.value.code == "federation.run_held"
    assert not is_held(strict.coordinator.ledger, run)
    go(strict, run)


def test_a_holder_that_slept_is_told_that_another_went_on(strict):
    run = prepared(strict)
    asleep = RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S)
    asleep._take()  # and no thread prolongs it, as in a process that does not run
    lapse(strict.coordinator.ledger, lease_name(run), HOLD_S)
    with (
        RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S),
        pytest.raises(RunHeldError, match="took it over"),
    ):
        asleep.check()


def test_a_holder_that_slept_does_not_take_back_what_another_has_finished(strict):
    """The other gave the hold back: it is free, and the sleeper's keeper must not pick it up again."""
    ledger, run = strict.coordinator.ledger, prepared(strict)
    asleep = RunHold(ledger, run, ttl_s=HOLD_S)
    asleep._take()
    lapse(ledger, lease_name(run), HOLD_S)
    with RunHold(ledger, run, ttl_s=HOLD_S):
        pass
    keeper = threading.Thread(target=asleep._keep)
    keeper.start()
    keeper.join(60)
    try:
        assert not keeper.is_alive()
        assert not is_held(ledger, run)
        with pytest.raises(RunHeldError, match="took it over"):
            asleep.check()
    finally:
        asleep._over.set()
        keeper.join()


def test_a_missing_or_altered_update_is_named(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    update = strict.bodies(SiteStatement)[0].update
    path = strict.coordinator.blobs.folder / update[:2] / update
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ResumeError, match=r"update of round 1 cannot be read.*restore"):
        go(strict, run)
    path.unlink()
    with pytest.raises(ResumeError, match="no file with digest"):
        go(strict, run)
    assert not strict.bodies(RunResumed)
    path.write_bytes(kept)
    go(strict, run)


def test_a_log_whose_round_came_out_otherwise_is_not_gone_on_with(strict, steps_and_weights):
    charter, _, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(1, *ALL))
    past = RunPast.read(strict.coordinator.ledger, run)
    statements = past.release_of(past.next_round)
    lie = RoundCompleted(
        run=run, round=1, base_model=past.started.initial_model,
        statements=tuple(release.leaf_hash for release in statements.values()),
        missing=(), output_model="ab" * 32, metrics=(),
    )  # fmt: skip
    strict.coordinator.append(lie, "coordinator", stable_event_id("round.completed", run, "1"))
    with pytest.raises(ResumeError, match="round 1 gives other weights than the log says"):
        go(strict, run)


def test_a_run_prepared_otherwise_than_it_was_started_is_refused(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    kept = strict.coordinator.kept_run(run)
    kept["run_started"]["initial_model"] = "ab" * 32
    strict.coordinator.keep_run(run, kept)
    assert prepared_run(strict.coordinator, run).started == strict.bodies(RunStarted)[0]
    go(strict, run)


@pytest.mark.parametrize("field", ["round", "previous_round", "base_model", "charter"])
def test_a_resume_that_goes_on_from_something_else_fails_the_verifier(strict, steps_and_weights, field):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    past = RunPast.read(strict.coordinator.ledger, run)
    honest = RunResumed(
        run=run, charter=charter.digest, round=2, previous_round=past.last_leaf_hash,
        base_model=past.rounds[0].completed.output_model, principal="mallory",
    )  # fmt: skip
    forged = dataclasses.replace(honest, **{field: 1 if field == "round" else "cd" * 32})
    strict.coordinator.append(forged, "coordinator")
    go(strict, run)
    step = judged(strict).step("The rounds and their statements")
    assert (step.word, step.code) == ("FAIL", "run.resumed")
    assert field in step.detail


def test_a_round_told_twice_fails_the_verifier_and_is_not_resumed(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    past = RunPast.read(strict.coordinator.ledger, run)
    second = dataclasses.replace(past.rounds[0].completed, output_model="ef" * 32)
    before = strict.coordinator.append(second, "coordinator")  # a second history of round 1
    with pytest.raises(ResumeError, match="two stories"):
        go(strict, run)
    with pytest.raises(ResumeError, match="two stories"):
        go(strict, run)
    assert strict.coordinator.ledger.tree_size == before.leaf_index + 1


def test_the_log_takes_no_second_end_of_a_round(strict, steps_and_weights):
    """What two coordinators would write about one round has one event id, and the first one stands."""
    from audit.errors import EventIdConflictError

    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    first = strict.bodies(RoundCompleted)[0]
    other = dataclasses.replace(first, output_model="ef" * 32)
    with pytest.raises(EventIdConflictError):
        strict.coordinator.append(other, "coordinator", stable_event_id("round.completed", run, "1"))
