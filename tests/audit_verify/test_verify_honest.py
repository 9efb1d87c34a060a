from __future__ import annotations

import dataclasses
import json
import time
from datetime import timedelta

import pytest

from audit.evidence import read_evidence, write_evidence
from audit.verify import Verdict, Word

SIGNED_ONLY = {"The noise and the data", "The rules that allowed it"}


def test_an_honest_prediction_is_valid_and_every_step_says_what_it_knows(honest):
    report = honest.world.report(honest.data)
    assert (report.verdict, report.exit_code) == (Verdict.VALID, 0)
    assert {step.title for step in report.steps if step.word is Word.ATTESTED} == SIGNED_ONLY
    assert [step.number for step in report.steps] == list(range(1, len(report.steps) + 1))
    assert all(step.code == "ok" for step in report.steps)


def test_epsilon_is_printed_with_all_that_it_means_nothing_without(honest):
    report = honest.world.report(honest.data)
    text = report.text()
    for line in report.epsilons:
        assert f"{line.site}: epsilon {line.run_epsilon}" in text
        assert line.claimed == line.run_epsilon
    for part in ("one row", "add/remove", "delta 0.00001", "exact Gaussian composition"):
        assert part in " ".join(text.split())
    assert text.splitlines()[-1].startswith("VALID")


def test_the_json_report_says_the_same(honest):
    report = honest.world.report(honest.data)
    document = json.loads(report.json_text())
    assert (document["verdict"], document["exit_code"]) == ("VALID", 0)
    assert [step["word"] for step in document["steps"]] == [step.word.value for step in report.steps]
    assert document["epsilon"][0]["delta"] == "0.00001"


def test_a_version_and_a_run_verify_on_their_own(honest):
    world = honest.world
    for kind, steps in (("version.registered", 16), ("version.transition", 16), ("run.completed", 14)):
        report = world.report(world.evidence(world.find(kind)))
        if kind == "version.registered":
            assert report.verdict is Verdict.INCOMPLETE, "registered is not yet approved"
            assert report.step("The approvals").code == "approval.none"
        else:
            assert (report.verdict, len(report.steps)) == (Verdict.VALID, steps)


def test_an_entry_of_another_kind_stands_alone(honest):
    report = honest.world.report(honest.world.evidence(honest.world.find("site.enrolled")))
    assert (report.verdict, report.scope, len(report.steps)) == (Verdict.VALID, "entry", 4)
    assert "Nothing is said of what it claims" in report.text()


def test_without_a_policy_the_best_verdict_is_self_consistent_only(honest):
    report = honest.world.report(honest.data, policy_text=None)
    assert (report.verdict, report.exit_code) == (Verdict.SELF_CONSISTENT_ONLY, 3)
    assert {s.title for s in report.steps if s.code == "verify.no_policy"} == {
        "The log's checkpoint",
        "The sites and their keys",
    }


def test_two_of_three_witnesses_are_enough_and_one_is_not(make_world):
    world = make_world()
    index, opened = world.whole()
    world.publish(witnesses=["east", "west"])
    assert world.report(world.evidence(index, opened=opened)).verdict is Verdict.VALID
    world.publish(witnesses=["east"])
    report = world.report(world.evidence(index, opened=opened))
    assert (report.verdict, report.exit_code) == (Verdict.UNWITNESSED, 6)
    assert "north, west" in report.step("The log's checkpoint").detail


@pytest.mark.reported
def test_an_old_checkpoint_is_stale_only_when_an_age_is_asked_for(honest, now, report):
    world = honest.world
    later = now + timedelta(days=2)
    assert world.report(honest.data, now=later).verdict is Verdict.VALID
    assert world.report(honest.data, now=later, max_age_s=3 * 86400).verdict is Verdict.VALID
    told = world.report(honest.data, now=later, max_age_s=3600)
    assert (told.verdict, told.exit_code) == (Verdict.STALE, 5)
    assert told.step("How recent it is").code == "verify.stale"
    for jump, verdict in ((1, Verdict.STALE), (-1, Verdict.UNWITNESSED), (-24, Verdict.UNWITNESSED)):
        at = now + timedelta(hours=jump)
        assert world.report(honest.data, now=at, max_age_s=3000).verdict is verdict
    report(
        "clocks",
        size="a reader's clock at +1 h, -1 h, -1 day, allowing 50 minutes",
        result="STALE; UNWITNESSED, for all cosignatures lie ahead; UNWITNESSED",
    )


def test_cosignatures_from_the_future_do_not_count(make_world, now):
    world = make_world()
    index, opened = world.whole()
    world.publish(at=now + timedelta(days=1))
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.UNWITNESSED
    assert report.step("The log's checkpoint").code == "verify.cosignature_from_future"


def test_a_policy_without_witnesses_is_only_the_operator_s_word(honest):
    lines = honest.world.policy.splitlines()
    policy = "\n".join(
        [*(line for line in lines if not line.startswith(("group", "quorum"))), "quorum none", ""]
    )
    report = honest.world.report(honest.data, policy_text=policy)
    assert report.step("The log's checkpoint").word is Word.ATTESTED
    assert "operator" in report.step("The log's checkpoint").detail


def test_skipping_the_replay_is_said_and_is_incomplete(honest):
    report = honest.world.report(honest.data, replay=False)
    assert report.verdict is Verdict.INCOMPLETE
    for title in ("The aggregation", "The model's weights"):
        assert report.step(title).word is Word.NO_EVIDENCE
        assert report.step(title).code == "aggregation.not_replayed"
    assert "--replay" in report.step("The aggregation").detail
    assert report.step("The answer").word is Word.PROVED


def test_a_second_run_continues_the_odometers_and_both_epsilons_are_shown(make_world):
    world = make_world()
    first = world.train("run-1")
    world.approve(first, world.register(first))
    world.lose_release(world.hospital("west"), "run-lost", 1)
    second = world.train("run-2")
    registration = world.register(second, "run-2")
    world.move(first, world.log_hash("version.registered", 0), "live", "retired")
    index, opened = world.predict(second, world.approve(second, registration))
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.VALID, report.text()
    events = {line.site: line.events for line in report.epsilons}
    assert events == {"east": 8, "north": 8, "west": 9}
    assert all(float(line.lifetime_epsilon) > float(line.run_epsilon) for line in report.epsilons)
    assert report.step("The approvals").detail.count("5 transitions") == 1


def test_a_rolled_back_version_is_live_again(make_world):
    world = make_world()
    first, second = world.train("run-1"), world.train("run-2")
    registrations = {first: world.register(first), second: world.register(second, "run-2")}
    world.approve(first, registrations[first])
    world.move(first, registrations[first], "live", "retired")
    world.approve(second, registrations[second])
    world.move(second, registrations[second], "live", "retired")
    index, opened = world.predict(first, world.move(first, registrations[first], "retired", "live"))
    assert world.report(world.evidence(index, opened=opened)).verdict is Verdict.VALID


def test_other_people_s_entries_between_leave_liveness_attested(make_world):
    world = make_world()
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    world.predict(digest, live)
    index, opened = world.predict(digest, live)
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.VALID
    assert report.step("The decision to answer").word is Word.ATTESTED


def test_unopened_rows_leave_the_answer_attested(honest):
    world = honest.world
    report = world.report(world.evidence(honest.index))
    assert report.verdict is Verdict.VALID
    assert report.step("The answer").code == "answer.not_opened"


def test_a_receipt_may_come_beside_the_file(honest):
    world = honest.world
    data = world.evidence(honest.index, opened=honest.opened)
    receipt = json.dumps(world.receipt(honest.index)).encode()
    assert world.report(data, receipt=receipt).step("The receipt").word is Word.PROVED


def test_a_policy_inside_the_file_is_not_believed(honest):
    evidence = dataclasses.replace(read_evidence(honest.data), policy=honest.world.policy)
    report = honest.world.report(write_evidence(evidence), policy_text=None)
    assert report.verdict is Verdict.SELF_CONSISTENT_ONLY


def test_a_demo_sized_file_verifies_in_under_two_seconds(make_world):
    world = make_world(
        rounds=30, charter_changes=lambda charter: charter["privacy"].update(noise_multiplier="6")
    )
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    start = time.process_time()
    report = world.report(data)
    assert report.verdict is Verdict.VALID, report.text()
    assert time.process_time() - start < 2


@pytest.mark.parametrize("policy", ["", "log nonsense", "quorum none\nquorum none\n", "\x00"])
def test_a_policy_that_is_none_is_an_error_and_no_verdict(honest, policy):
    from audit.errors import MalformedPolicyError

    with pytest.raises(MalformedPolicyError, match="line"):
        honest.world.report(honest.data, policy_text=policy)


POISSON = {"sample_rate": "0.5", "noise_multiplier": "3"}


def test_poisson_sampling_is_recomputed_by_pld_where_the_accountant_is_installed(make_world):
    pytest.importorskip("dp_accounting")
    report = make_world(charter_changes=lambda charter: charter["privacy"].update(POISSON)).judge()
    assert report.verdict is Verdict.VALID, report.text()
    assert report.step("Epsilon").word is Word.PROVED
    assert report.epsilons[0].method == "PLD, grid 0.0001"


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("plan", {"strategy": "fedadam", "learning_rate": "0.3"}),
        ("plan", {"strategy": "fedyogi", "learning_rate": "0.3"}),
        ("plan", {"local_steps": 2, "learning_rate": "1"}),
        ("privacy", {"relation": "replace_one", "noise_multiplier": "1.5"}),
        ("privacy", {"relation": "zero_out"}),
    ],
    ids=lambda value: str(sorted(value.items())[-1]) if isinstance(value, dict) else value,
)
def test_every_kind_of_plan_is_replayed_and_accounted(make_world, section, changes):
    def change(charter):
        charter["privacy"]["epsilon"] = "9"
        charter[section].update(changes)

    report = make_world(charter_changes=change).judge()
    gates = report.step("The gates")
    others = [step for step in report.steps if step is not gates]
    assert gates.code in (
        "ok",
        "gate.not_passed",
    )  # so few rows may miss a gate by chance; nothing else may fail
    assert all(step.word in (Word.PROVED, Word.ATTESTED) for step in others), report.text()
