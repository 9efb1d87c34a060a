"""A coordinator that dies at any durable step of a run, and the one that goes on: nothing lost or twice."""

from __future__ import annotations

import pytest

from audit.entries import (
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunFailed,
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
)
from audit.ledger import Ledger
from audit.principal import AccessDeniedError, Decision
from audit.round_bodies import RoundExamined, RunResumed, UpdateRefused
from federation import service
from federation.errors import ResumeLaterError, RunFailedError
from federation.resume import RunPast
from federation.run_hold import RunHold
from federation.runs import find_run
from tests.federation.dying import (
    ALL,
    HOLD_S,
    PLANS,
    CrashError,
    assert_whole,
    charter_of,
    crash,
    go,
    judged,
    logged,
    make_strict,
    measured,
    prepared,
)


@pytest.fixture
def strict(federation):
    return make_strict(federation)


@pytest.fixture(scope="session")
def steps_and_weights(tmp_path_factory, charter_text, keys):
    return measured(tmp_path_factory, charter_text, keys)


@pytest.mark.parametrize("share", range(4))
def test_after_a_crash_at_any_durable_step_the_run_ends_with_the_same_weights(
    strict, steps_and_weights, share
):
    """Each step in turn is the last; a fourth of the steps a test, all in one log, one run after another."""
    charter, steps, weights = steps_and_weights()
    assert steps > 30
    for at in range(share, steps, 4):
        run = prepared(strict, charter)
        try:
            go(strict, run, steps=at)
        except CrashError:
            go(strict, run)
        ended = [body for body in strict.bodies(RunCompleted) if body.run == run]
        assert [body.weights for body in ended] == [weights], f"died before step {at}"
        own = [body for body in strict.bodies(SiteStatement) if body.run == run]
        assert sorted((body.round, body.site) for body in own) == [(r, s) for r in (1, 2) for s in ALL]
        rounds = [body for body in strict.bodies(RoundCompleted) if body.run == run]
        assert [(body.round, body.missing) for body in rounds] == [(1, ()), (2, ())]
    for name, site in strict.sites.items():
        sequences = [body.sequence for body in strict.bodies(SiteStatement) if body.site == name]
        assert sequences == list(range(1, site.sequence + 1))
    report = judged(strict)
    assert (report.step("The odometers").code, report.step("The aggregation").code) == ("ok", "ok")


@pytest.mark.parametrize("name", [name for name in PLANS if name != "fedavg"])
def test_moments_averages_and_robust_rules_come_back_from_the_log(strict, steps_and_weights, name):
    charter, steps, weights = steps_and_weights(*PLANS[name])
    run = prepared(strict, charter)
    for lived in (steps * 2 // 3, 3):  # dies in round 2, and again at once
        crash(strict, run, lived)
    go(strict, run)
    assert strict.bodies(RunCompleted)[0].weights == weights
    assert_whole(strict, run, rounds=2)


def test_a_resumed_run_says_who_resumed_it_and_where_and_the_verifier_says_so(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8, principal="first")
    go(strict, run, principal="dr-lee")
    (resumed,) = strict.bodies(RunResumed)
    assert (resumed.run, resumed.round, resumed.principal) == (run, 2, "dr-lee")
    (first, _) = strict.coordinator.bodies(RoundCompleted)
    assert resumed.previous_round == first[0].leaf_hash.hex()
    assert resumed.base_model == first[1].output_model
    assert (
        "taken up again once, at round 2"
        in assert_whole(strict, run, rounds=2).step("The rounds and their statements").detail
    )


def test_a_run_that_ended_is_not_carried_out_again(strict, steps_and_weights):
    charter, _, weights = steps_and_weights()
    run = prepared(strict, charter)
    go(strict, run)
    size = strict.coordinator.ledger.tree_size
    asked = len(strict.sites["north"].asked)
    go(strict, run)
    assert strict.coordinator.ledger.tree_size == size
    assert strict.sites["north"].asked[asked:] == ["hello", "cosign", "run.finished"]
    assert strict.bodies(RunCompleted)[0].weights == weights


def test_a_run_that_failed_stays_failed_and_its_sites_are_told(strict, charter_text):
    run = prepared(strict, charter_of(charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1")))

    def silence(site, message):
        return None if message.metadata.group_id == "1" and site != "north" else 0.0

    with pytest.raises(RunFailedError, match="not_enough_sites"):
        go(strict, run, fault=silence)
    asked = len(strict.sites["west"].asked)
    with pytest.raises(RunFailedError, match="had ended before"):
        go(strict, run)
    assert "run.finished" in strict.sites["west"].asked[asked:]
    assert len(strict.bodies(RunFailed)) == 1


def test_sites_that_are_not_back_yet_do_not_end_the_run(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    with pytest.raises(ResumeLaterError, match="not connected") as caught:
        go(strict, run, connected=("north",))
    assert caught.value.code == "federation.resume_later"
    assert not strict.bodies(RunFailed)
    assert not strict.bodies(RunResumed)
    go(strict, run)
    assert strict.bodies(RunCompleted)[0].weights == weights


def test_a_release_in_the_log_counts_though_its_site_is_gone(strict, steps_and_weights):
    """Dies when two of three statements of round 2 are logged; one of those two never comes back."""
    charter, _, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(2, "north", "south"))
    go(strict, run, connected=("south", "west"))
    ended = [body for body in strict.bodies(RunCompleted) if body.run == run]
    assert ended[0].weights == weights
    rounds = [body for body in strict.bodies(RoundCompleted) if body.run == run]
    assert [body.missing for body in rounds] == [(), ()]


def test_who_did_not_accept_in_time_does_not_join_a_round_that_may_have_been_asked(strict, steps_and_weights):
    """The round's question names its participants; another set of names would be another question."""
    charter, _, _ = steps_and_weights()
    go(strict, prepared(strict, charter))  # so that all have signed
    run = prepared(strict, charter)

    crash(strict, run, until=lambda past: past.participants(2), connected=("north", "south"))
    assert not RunPast.read(strict.coordinator.ledger, run).statements
    go(strict, run, connected=ALL)
    ours = [body for body in strict.bodies(SiteStatement) if body.run == run]
    assert {body.participants for body in ours} == {("north", "south")}


def test_a_release_written_off_in_another_run_stays_out_and_stays_debited(strict, steps_and_weights):
    """The first run dies with a release that no entry holds; the next run's start has it reported."""
    charter, _, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(2, "north", "south"))
    go(strict, prepared(strict, charter))
    assert find_run(strict.coordinator.ledger, run).undelivered == {"west": 1}
    go(strict, run)
    last = [body for body in strict.bodies(RoundCompleted) if body.run == run][-1]
    assert last.missing == ("west",)
    assert judged(strict).step("The odometers").code == "ok"
    assert judged(strict).step("The rounds and their statements").code == "ok"


def test_a_site_that_refuses_for_another_reason_after_a_crash_stops_nobody(strict, charter_text):
    """Both refusals are its word; each is entered once."""
    reason = {"north": "budget_exhausted"}

    def refuse(kind, header, blobs):
        if kind == "run.propose":
            header.clear()
            header.update(strict.sites["north"].refusal(run, charter.digest, 0, reason["north"]))

    charter = charter_of(charter_text)
    run = prepared(strict, charter)
    strict.sites["north"].tamper = refuse
    crash(strict, run, until=lambda past: past.accepted)
    reason["north"] = "run_not_accepted"
    go(strict, run)
    assert_whole(strict, run, rounds=2)
    said = [body.reason for body in strict.bodies(SiteRefused)]
    assert said == ["budget_exhausted", "run_not_accepted"]


def test_an_update_refused_for_its_length_is_refused_again(strict, charter_text):
    charter = charter_of(charter_text, extra="aggregation: {rule: median}\n")
    strict.sites["west"].values = lambda dimension: [1 << 40] * dimension
    run = prepared(strict, charter)
    crash(strict, run, until=lambda past: past.refused and not past.rounds)
    go(strict, run)
    assert len([body for body in strict.bodies(UpdateRefused) if body.run == run]) == 1
    assert [b.missing for b in strict.bodies(RoundCompleted) if b.run == run] == [("west",), ()]
    assert [b.round for b in strict.bodies(RoundExamined) if b.run == run] == [1, 2]
    assert judged(strict).step("The aggregation").code == "ok"


def test_runs_say_that_they_can_be_resumed_and_what_it_takes(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    view = find_run(strict.coordinator.ledger, run[:10])
    assert (view.state, view.resumable, view.resumed) == ("running", True, 0)
    assert view.needs.startswith("round 2: at least 2 of the sites north, south, west")
    assert f"affidavit runs resume {run[:12]}" in view.needs
    with RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S):
        assert not find_run(strict.coordinator.ledger, run).resumable
    go(strict, run)
    view = find_run(strict.coordinator.ledger, run)
    assert (view.state, view.resumable, view.resumed, view.needs) == ("completed", False, 1, "")


def test_resuming_asks_the_authoriser_and_registers_once(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)

    class Nobody:
        def decide(self, *_):
            return Decision(allowed=False, policies=("nobody",), policy_set="0" * 64)

    def launch(config):
        strict.serve({**config, "hold-s": HOLD_S})

    request = service.ResumeRequest(run=run)
    arguments = (strict.coordinator, strict.principal)
    with pytest.raises(AccessDeniedError):
        service.resume(*arguments, Nobody(), request, launch)
    trained = service.resume(*arguments, strict.owner, request, launch)
    assert trained.weights == weights
    first = service.register(*arguments, strict.owner, service.RegisterRequest(run=run))
    assert service.register(*arguments, strict.owner, service.RegisterRequest(run=run)) == first


def test_no_entry_is_lost_or_written_twice(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    ledger: Ledger = strict.coordinator.ledger
    before = list(ledger.entries(0, ledger.tree_size))
    go(strict, run)
    after = list(ledger.entries(0, ledger.tree_size))
    assert after[: len(before)] == before
    kinds = [type(decode_entry(leaf).body) for leaf in after]
    assert kinds.count(RunAccepted) == 3
    assert kinds.count(SiteUndelivered) == 0
    assert isinstance(decode_entry(after[-1]).body, RunCompleted)
