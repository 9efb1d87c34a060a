"""What an operator with the log's key, the database and the API may try, alone or with one site.

Every forgery here is signed by whoever would have to sign it; only the keys of other people are out of reach.
Each test names the step, its word and its code. Where the lie cannot be seen from inside one file, the test
shows that the report then claims no more than it knows.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

import pytest

from audit.canonical import canonical_bytes
from audit.charter_view import CharterFormError
from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.commitments import commit, new_salt
from audit.entries import (
    ZERO_DIGEST,
    RowCommitment,
    decode_entry,
)
from audit.evidence import read_evidence, write_evidence
from audit.keys import SigningKey
from audit.merkle import hash_leaf, root_of
from audit.metrics import MetricError, evaluate
from audit.verify import Verdict, Word

LINKS, CHARTER, SITES, RUN = (
    "The chain of references",
    "The charter",
    "The sites and their keys",
    "The training run",
)
ROUNDS, REPLAY = "The rounds and their statements", "The aggregation"
ODOMETERS, EPSILON = "The odometers", "Epsilon"
GATES, APPROVALS = "The gates", "The approvals"
DECISION, ANSWER = "The decision to answer", "The answer"


def says(report, title, word, code="ok", verdict=None):
    step = report.step(title)
    assert (step.word, step.code) == (word, code), report.text()
    if verdict is not None:
        assert report.verdict is verdict, report.text()
    return step


def fails(report, title, code):
    step = says(report, title, Word.FAIL, code, Verdict.INVALID)
    assert report.failures[0].title == title, report.text()
    return step


def without(data, gone):
    """The file without the entries for which `gone(index, body)` holds: the operator chooses what to show."""
    evidence = read_evidence(data)
    entries = {i: leaf for i, leaf in evidence.entries.items() if not gone(i, decode_entry(leaf).body)}
    proofs = {i: proof for i, proof in evidence.proofs.items() if i in entries}
    return write_evidence(replace(evidence, entries=entries, proofs=proofs))


def again(world, index):
    """Log the very body of a leaf a second time, in a fresh envelope; return index and leaf hash."""
    body = decode_entry(world.log.leaves[index]).body
    return world.append(body)


# transitions played again


def retired_then_played_again(world):
    digest = world.train()
    registration = world.register(digest)
    live = world.approve(digest, registration)
    place = next(i for i, leaf in enumerate(world.log.leaves) if hash_leaf(leaf).hex() == live)
    retired = world.move(digest, registration, "live", "retired")
    hidden = {place, next(i for i, leaf in enumerate(world.log.leaves) if hash_leaf(leaf).hex() == retired)}
    _, copy = again(world, place)
    index, opened = world.predict(digest, copy)
    return index, opened, hidden


def test_an_officer_s_old_approval_logged_again_proves_no_version_live(make_world):
    """The version was retired; the operator logs the signed "live" once more, and hides the retirement."""
    world = make_world()
    index, opened, hidden = retired_then_played_again(world)
    data = world.evidence(index, opened=opened)
    fails(world.report(data), APPROVALS, "approval.fork")
    report = world.report(without(data, lambda i, body: i in hidden))
    step = says(report, DECISION, Word.ATTESTED)
    assert "operator" in step.detail


# releases that nobody shows


def test_releases_of_a_later_run_are_not_said_to_be_counted(make_world):
    """Another run spends more of the same population before this version is registered; the file hides it."""
    world = make_world()
    digest = world.train("run-1")
    world.train("run-2")
    for hospital in world.hospitals:
        hospital.sequence -= world.charter.rounds  # the claim that hides run-2
    registration = world.register(digest, "run-1")
    index, opened = world.predict(digest, world.approve(digest, registration))
    data = world.evidence(index, opened=opened)
    fails(world.report(data), EPSILON, "epsilon.claimed_lower")
    report = world.report(without(data, lambda i, body: getattr(body, "run", "") == "run-2"))
    text = " ".join(report.text().split())
    assert "first 4 releases of its population" in text
    assert "every release counted once" not in text


def test_a_release_of_a_site_that_a_round_calls_missing_is_only_the_operator_s_word(make_world):
    """West answered round 4, its release was debited; the operator drops the answer and says "missing"."""

    class Dropping(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            if number < 4:
                return super().round(run, number, weights, base, previous, aggregator)
            west = self.hospital("west")
            self.statement(west, run, number, base, previous, self._update(west, weights))
            everyone, self.hospitals = self.hospitals, self.hospitals[:2]
            self.before["round.completed"] = lambda world, body: replace(body, missing=("west",))
            try:
                return super().round(run, number, weights, base, previous, aggregator)
            finally:
                self.hospitals = everyone

        def _claim(self, hospital, run):
            claim = super()._claim(hospital, run)
            if hospital.name != "west":
                return claim
            low = self.understated()
            return replace(claim, events=3, run_epsilon=low, lifetime_epsilon=low)

        def understated(self):
            from audit.decimals import decimal_text
            from audit.epsilon import recompute

            value = recompute([self.event()] * 3, float(self.charter.privacy.delta)).value
            return decimal_text(round(value + 0.0001, 4))

    report = Dropping().judge()
    step = says(report, ODOMETERS, Word.ATTESTED, "odometer.missing_site")
    assert "west" in step.detail
    assert "round 4" in step.detail


def test_a_site_that_accepted_and_is_not_even_called_missing_is_only_the_operator_s_word(make_world):
    """West was asked for round 1 and answered; the others were told that west takes no part."""

    class Alone(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            if number == 1:
                west = self.hospitals.pop()
                self.statement(west, run, number, base, previous, self._update(west, weights))
                self.west, self.before["site.statement"] = west, lambda w, b: replace(b, participants=others)
            return super().round(run, number, weights, base, previous, aggregator)

    others = ("east", "north")
    world = Alone()
    index, opened = world.whole()
    world.hospitals.append(world.west)  # still a member, a witness and in the policy
    report = world.report(world.evidence(index, opened=opened))
    assert "west" in says(report, ODOMETERS, Word.ATTESTED, "odometer.missing_site").detail
    assert {line.site for line in report.epsilons} == {"east", "north"}


def test_an_undelivered_release_before_the_run_may_not_be_left_out(make_world):
    world = make_world()
    world.lose_release(world.hospital("west"), "run-0", 1)
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    report = world.report(without(data, lambda i, body: type(body).__name__ == "SiteUndelivered"))
    assert report.verdict is not Verdict.VALID
    assert report.step(ODOMETERS).code == "odometer.gap"


def test_interleaved_runs_are_counted_together_or_show_a_gap(make_world):
    """Run-0 and run-1 share each population's odometer, event by event; showing one alone leaves gaps."""

    class Interleaved(make_world):
        other = False

        def round(self, run, number, weights, base, previous, aggregator):
            if run == "run-1" and not self.other:
                for hospital in self.hospitals:
                    body = self.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7)
                    self.append(body)
            return super().round(run, number, weights, base, previous, aggregator)

    world = Interleaved()
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    assert {line.events for line in world.report(data).epsilons} == {8}
    hidden = world.report(without(data, lambda i, body: getattr(body, "run", "") == "run-0"))
    fails(hidden, ODOMETERS, "odometer.gap")


def test_a_population_that_starts_again_within_a_file_is_seen(make_world):
    """A site and the operator reset the odometer: the second run is numbered from 1 once more."""
    world = make_world()
    world.train("run-0")
    west = world.hospital("west")
    west.sequence, west.head = 0, ZERO_DIGEST
    digest = world.train("run-1")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    fails(world.report(world.evidence(index, opened=opened)), ODOMETERS, "odometer.sequence")


def test_two_sites_may_not_count_one_population_apart(make_world):
    class Shared(make_world):
        def _enrolment(self, hospital):
            hospital.population = "ab" * 16 if hospital.name != "north" else hospital.population
            return super()._enrolment(hospital)

    fails(Shared().judge(), ODOMETERS, "odometer.population_shared")


def test_a_population_renamed_during_its_run_fails(make_world):
    def rename(world, body):
        return replace(body, population="cd" * 16) if body.site == "west" and body.round > 2 else body

    fails(make_world(before={"site.statement": rename}).judge(), ROUNDS, "statement.field")


# what an event is worth


def test_an_earlier_run_under_another_relation_costs_what_it_costs_under_this_one(make_world):
    """Replacing a row moves an add/remove release by two gradients: it weighs twice in the lifetime."""
    world = make_world(charter_changes=lambda c: (c["privacy"].update(relation="replace_one", epsilon="8"),))
    run_0 = replace(world.event(), relation="add_remove")
    run_0 = replace(run_0, sensitivity_grid=run_0.sensitivity_grid // 2, sigma_grid=run_0.sigma_grid // 2)
    for hospital in world.hospitals:
        for number in (1, 2, 3):
            body = world.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7)
            hospital.sequence, hospital.head = body.sequence - 1, body.previous_event
            world.before["site.statement"] = lambda w, b: replace(b, event=run_0)
            world.append(world.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7))
            world.before.pop("site.statement")
    digest = world.train("run-1")
    from audit.decimals import decimal_text
    from audit.epsilon import recompute

    plain = [replace(run_0, relation="replace_one")] * 3 + [world.event()] * 4
    low = decimal_text(round(recompute(plain, 1e-5).value + 0.0001, 4))

    def understate(world, body):
        return replace(body, epsilons=tuple(replace(e, lifetime_epsilon=low) for e in body.epsilons))

    world.before["version.registered"] = understate
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    step = fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.claimed_lower")
    assert "lifetime_epsilon" in step.detail


def test_rows_and_subjects_do_not_add_up(make_world):
    """Run-0 protected rows; nobody knows how many a subject had, so no lifetime holds for a subject."""
    world = make_world(
        charter_changes=lambda c: c["privacy"].update(unit="subject", subject_id="id", max_rows_per_subject=3)
    )
    world.before["site.statement"] = lambda w, b: replace(b, event=replace(b.event, unit="row"))
    for hospital in world.hospitals:
        world.append(world.statement(hospital, "run-0", 1, "ab" * 32, ZERO_DIGEST, [0] * 7))
    world.before.clear()
    index, opened = world.whole()
    fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.event")


def test_a_sensitivity_that_forgets_the_rounding_of_the_grid_fails(make_world):
    """On a coarse grid, rounding seven coordinates moves a sum by up to three units more."""

    def coarse(charter):
        charter["privacy"]["grid_bits"] = 4

    def smaller(world, body):
        return replace(body, event=replace(body.event, sensitivity_grid=16, sigma_grid=32))

    world = make_world(charter_changes=coarse, before={"site.statement": smaller})
    fails(world.judge(), ROUNDS, "statement.event")


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_grid": 0},
        {"sigma_grid": -(2**53) + 1},
        {"sensitivity_grid": 0},
        {"sensitivity_grid": -1, "sigma_grid": -2},
        {"sensitivity_grid": 2**53 - 1},
        {"steps": 0},
        {"steps": -4},
        {"dimension": 0},
        {"sample_rate": "0.99999999999999999999", "sampling": "full"},
        {"sample_rate": "1.0"},
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()),
)
def test_extremes_in_an_event_fail(make_world, change):
    def extreme(world, body):
        late = body.round == 4 and body.site == "east"
        return replace(body, event=replace(body.event, **change)) if late else body

    fails(make_world(before={"site.statement": extreme}).judge(), ROUNDS, "statement.event")


def test_a_negative_event_of_an_earlier_run_cannot_lower_the_lifetime(make_world):
    world = make_world()
    west = world.hospital("west")
    world.before["site.statement"] = lambda w, b: replace(b, event=replace(b.event, steps=-3))
    world.append(world.statement(west, "run-0", 1, "ab" * 32, ZERO_DIGEST, [0] * 7))
    world.before.clear()
    index, opened = world.whole()
    fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.event")


# runs and charters


def test_a_run_begun_again_under_another_author_after_the_sites_accepted_fails(make_world):
    """An officer trained the run; before its end the operator logs a second start by a friend's key."""

    class TwoStarts(make_world):
        def _charter(self, rounds, public):
            document = super()._charter(rounds, public)
            self.author = self.officer
            return document

        def round(self, run, number, weights, base, previous, aggregator):
            result = super().round(run, number, weights, base, previous, aggregator)
            if number == self.charter.rounds:
                friend = SigningKey.generate()
                first = decode_entry(self.log.leaves[self.find("run.started")]).body
                self.append(self.sign(replace(first, author=friend.text), friend))
                self.author = friend
            return result

    world = TwoStarts()
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    fails(world.report(data), LINKS, "verify.ambiguous")
    first = world.find("run.started")
    report = world.report(without(data, lambda i, body: i == first))
    fails(report, RUN, "verify.order")


def test_a_charter_signed_for_one_run_does_not_serve_another(make_world):
    """Between the runs the operator lowers the noise; the sites' statements name the charter they signed."""
    world = make_world()
    loud = world.canonical.replace(b'"noise_multiplier":"2"', b'"noise_multiplier":"3"')
    digest = hashlib.sha256(loud).hexdigest()
    world.before["run.started"] = lambda w, b: replace(b, charter=digest)
    world.canonical = loud
    world.publish_charter()
    index, opened = world.whole()
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.INVALID
    assert report.step(LINKS).code == "run.charter"


def test_statements_of_another_run_cannot_be_counted(make_world):
    class Reusing(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            if run == "run-1" and number == 1:
                old = self.find("site.statement")
                self.old = hash_leaf(self.log.leaves[old]).hex()
                self.before["round.completed"] = lambda world, body: (
                    replace(body, statements=(self.old, *body.statements[1:])) if body.round == 1 else body
                )
            return super().round(run, number, weights, base, previous, aggregator)

    world = Reusing()
    world.train("run-0")
    digest = world.train("run-1")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    fails(world.report(world.evidence(index, opened=opened)), ROUNDS, "statement.not_accepted")


def test_a_round_may_not_ask_a_site_that_never_accepted(make_world):
    def refuse(world, body):
        return None if body.site == "west" else body

    report = make_world(after={"run.accepted": refuse}).judge()
    fails(report, ROUNDS, "round.sites")


def test_one_identity_may_not_be_two_sites(make_world):
    class Twins(make_world):
        def _charter(self, rounds, public):
            self.hospitals[2].identity = self.hospitals[0].identity
            return super()._charter(rounds, public)

    with pytest.raises(CharterFormError, match="identity"):
        Twins()


def test_an_enrolment_of_another_federation_anchors_nobody(make_world):
    """The operator of two federations copies an enrolment, with its real signatures, into this log."""
    other = make_world()
    stolen = decode_entry(other.log.leaves[other.find("site.enrolled", 2)]).body

    class Copying(make_world):
        def _enrolment(self, hospital):
            return stolen if hospital.name == "west" else super()._enrolment(hospital)

    says(Copying().judge(), SITES, Word.NO_EVIDENCE, "site.not_enrolled", Verdict.INCOMPLETE)


def test_a_site_enrolled_twice_speaks_with_its_newest_key_only(make_world):
    """The site hands its statement key over; what the old key signs afterwards does not count."""

    class Twice(make_world):
        def publish_charter(self):
            super().publish_charter()
            west = self.hospital("west")
            old, west.statement = west.statement, SigningKey.generate()
            self.append(self._enrolment(west))
            west.statement = old

    fails(Twice().judge(), RUN, "run.acceptance")


# answers


def answer_with(world, version, transition, change):
    """Predict honestly, then let the operator change what it answered and commit to that."""
    _, opened = world.predict(version, transition, rows=[{"alpha": 5, "beta": 5, "gamma": 5}])
    world.log.leaves.pop()
    row = opened[0]
    answer = canonical_bytes(change(json.loads(row["output"])))
    salt = new_salt()
    row = {**row, "output": answer.decode(), "output_salt": salt.hex()}
    given = commit("input", bytes.fromhex(row["input_salt"]), row["input"].encode())
    commitment = RowCommitment(input=given, output=commit("output", salt, answer))
    world.before["prediction"] = lambda w, body: replace(body, rows=(commitment,))
    index, _ = world.predict(version, transition, rows=[{"alpha": 5, "beta": 5, "gamma": 5}])
    return index, [row]


@pytest.fixture(scope="module")
def flat(make_world):
    """A federation whose model stays at zero, so that every probability is one half."""

    class Flat(make_world):
        def _update(self, hospital, weights):
            return [0] * len(weights)

    world = Flat(
        charter_changes=lambda c: c.update(gates=[{"metric": "auc", "source": "public_set", "floor": "0.1"}])
    )
    digest = world.train()
    return world, digest, world.approve(digest, world.register(digest))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {**a, "label": "operate at once"},
        lambda a: {**a, "label": 1},
        lambda a: {**a, "label": None},
        lambda a: {**a, "probability": [a["probability"]]},
        lambda a: {**a, "probability": "0.50000150"},
        lambda a: {**a, "probability": "0.500002"},
        lambda a: {**a, "probability": "0.5", "note": "certain"},
    ],
    ids=["free-text", "number", "null", "list", "not-canonical", "off-by-two", "extra"],
)
def test_a_tie_leaves_no_room_for_another_answer(flat, change):
    world, digest, live = flat
    index, opened = answer_with(world, digest, live, change)
    world.publish()
    report = world.report(world.evidence(index, opened=opened))
    fails(report, ANSWER, "answer.other_model")


def test_a_prediction_of_no_rows_shows_nothing(make_world):
    world = make_world(before={"prediction": lambda w, body: replace(body, rows=())})
    index, _ = world.whole()
    fails(world.report(world.evidence(index, opened=[])), ANSWER, "answer.rows")


def test_opened_rows_in_another_order_fail(honest):
    data = honest.world.evidence(honest.index, opened=list(reversed(honest.opened)))
    fails(honest.world.report(data), ANSWER, "answer.commitment")


def test_a_salt_cannot_swallow_a_part_of_the_value(honest):
    first = honest.opened[0]
    shifted = {
        **first,
        "input_salt": first["input_salt"] + first["input"][:1].encode().hex(),
        "input": first["input"][1:],
    }
    data = honest.world.evidence(honest.index, opened=[shifted, *honest.opened[1:]])
    fails(honest.world.report(data), ANSWER, "answer.commitment")


@pytest.mark.parametrize("site", ["West", "west ", "wеst", "south"])
def test_an_intercept_of_a_site_that_does_not_exist_fails(make_world, site):
    report = make_world(before={"prediction": lambda w, body: replace(body, site=site)}).judge()
    fails(report, DECISION, "prediction.site")


def test_an_answer_with_another_site_s_intercept_fails(make_world):
    """The answer was computed with the mean intercept; the entry says it was west's."""
    report = make_world(before={"prediction": lambda w, body: replace(body, site="west")}).judge()
    fails(report, ANSWER, "answer.other_model")


def test_outputs_that_are_not_numbers_earn_no_metric():
    label = {"name": "ill", "classes": ["no", "yes"]}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MetricError, match="finite"):
            evaluate("accuracy", "binary", label, [0, 1], [[bad], [bad]])


# the log


def test_a_smaller_witnessed_checkpoint_does_not_cover_later_entries(make_world):
    world = make_world()
    index, opened = world.whole()
    whole = read_evidence(world.evidence(index, opened=opened))
    old = world.log.hashes[: index - 1]
    note = sign_checkpoint(Checkpoint("log.example/tiny", len(old), root_of(old)), world.log_signer)
    note = add_signatures(note, [cosign(note, h.note_signer, 1_700_000_000) for h in world.hospitals])
    report = world.report(write_evidence(replace(whole, checkpoint=note)))
    assert report.verdict is Verdict.INVALID
    assert report.failures[0].title == "Every entry is in the log"


def test_an_entry_without_its_proof_is_never_valid(honest):
    evidence = read_evidence(honest.data)
    for gone in (0, honest.world.find("run.accepted"), honest.index):
        proofs = {i: p for i, p in evidence.proofs.items() if i != gone}
        report = honest.world.report(write_evidence(replace(evidence, proofs=proofs)))
        says(
            report, "Every entry is in the log", Word.NO_EVIDENCE, "verify.proof_missing", Verdict.INCOMPLETE
        )


def test_a_hundred_signatures_by_strangers_make_no_quorum(make_world):
    world = make_world()
    index, opened = world.whole()
    note = world.publish(witnesses=["east"])
    from audit.notes import KeyType, NoteSigner

    east = world.hospital("east")
    lines = [cosign(note, NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE), 1_700_000_000)
             for name in ("north", "west") for _ in range(40)]  # fmt: skip
    note += b"".join(lines) + cosign(note, east.note_signer, 1_700_000_000) * 10
    world.log.notes = [note]
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.UNWITNESSED, report.text()


@pytest.mark.parametrize(
    "lines",
    [
        "group g 1 east east\nquorum g",
        "group g any east north\nquorum east2",
        "group g 0 east\nquorum g",
        "group g 2 east\nquorum g",
        "group none any east\nquorum none",
        "group a any east\ngroup b any a a\nquorum b",
        "quorum none\nquorum east",
    ],
)
def test_an_odd_policy_is_refused(honest, lines):
    from audit.errors import MalformedPolicyError

    head = "\n".join(line for line in honest.world.policy.splitlines() if line[:5] in ("log l", "witne"))
    with pytest.raises(MalformedPolicyError):
        honest.world.report(honest.data, policy_text=f"{head}\n{lines}\n")


def test_a_policy_without_quorum_is_called_the_operator_s_word(honest):
    policy = "\n".join(
        [
            *(line for line in honest.world.policy.splitlines() if line[:5] in ("log l", "witne")),
            "quorum none",
            "",
        ]
    )
    says(honest.world.report(honest.data, policy_text=policy), "The log's checkpoint", Word.ATTESTED)


# what a file may cost its reader


def hostile_layers(charter, layers):
    charter["model"] = {"family": "layers", "site_intercept": 0, "layers": layers}


@pytest.mark.parametrize(
    "layers",
    [
        [
            {"layer": "reshape", "shape": [1, 1, 3]},
            {"layer": "conv2d", "in": 1, "out": 1, "kernel": 1, "stride": 1, "padding": 1 << 22},
            {"layer": "avg_pool2d", "kernel": 1 << 22},
            {"layer": "flatten"},
            {"layer": "linear", "in": 4, "out": 1, "bias": 1},
        ],
        [
            {"layer": "linear", "in": 3, "out": 1000, "bias": 0},
            {"layer": "reshape", "shape": [1000, 1]},
            {"layer": "linear", "in": 1, "out": 4000, "bias": 0},
            {"layer": "reshape", "shape": [1, 2000, 2000]},
            {"layer": "conv2d", "in": 1, "out": 1, "kernel": 500, "stride": 1, "padding": 0},
            {"layer": "avg_pool2d", "kernel": 1501},
            {"layer": "flatten"},
            {"layer": "linear", "in": 1, "out": 1, "bias": 1},
        ],
    ],
    ids=["padding", "convolution"],
)
def test_a_model_that_no_reader_could_run_is_no_charter(make_world, layers):
    with pytest.raises(CharterFormError, match=r"model\.layers"):
        make_world(charter_changes=lambda charter: hostile_layers(charter, layers))


def test_thousands_of_different_sampled_events_do_not_keep_a_reader_waiting(make_world):
    """One site signs a long life of Poisson releases, each of another noise."""
    world = make_world(charter_changes=lambda c: c["privacy"].update(noise_multiplier="4"))
    west = world.hospital("west")
    for number in range(1, 401):
        world.before["site.statement"] = lambda w, b, n=number: replace(
            b,
            event=replace(b.event, sampling="poisson", sample_rate="0.01", sigma_grid=b.event.sigma_grid + n),
        )
        world.append(world.statement(west, "run-0", number, "ab" * 32, ZERO_DIGEST, [0]))
    world.before.clear()
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    begun = time.process_time()
    report = world.report(data)
    assert time.process_time() - begun < 2
    says(report, EPSILON, Word.NO_EVIDENCE, "epsilon.too_costly", Verdict.INCOMPLETE)
