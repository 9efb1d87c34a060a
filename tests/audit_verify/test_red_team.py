"""What an operator with the log's key, the database and the API may try, alone or with one site.

Every forgery here is signed by whoever would have to sign it; only the keys of other people are out of reach.
Each test names the step, its word and its code. Where the lie cannot be seen from inside one file, the test
shows that the report then claims no more than it knows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from audit.canonical import canonical_bytes
from audit.charter_parts import CharterFormError
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
from tests.audit_verify.judging import (
    ANSWER,
    APPROVALS,
    DECISION,
    EPSILON,
    LINKS,
    ROUNDS,
    RUN,
    SITES,
    again,
    fails,
    says,
    without,
)

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

    class Apart(make_world):
        def _update(self, hospital, weights):
            values = super()._update(hospital, weights)
            values[-1] -= 30 << 20 if hospital.name == "west" else 0  # so that noise cannot make it the mean
            return values

    report = Apart(before={"prediction": lambda w, body: replace(body, site="west")}).judge()
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


def test_a_long_life_of_different_sampled_events_is_refused_by_their_count(make_world):
    """One site signs Poisson releases, each of another noise: composing them would take minutes."""
    world = make_world(charter_changes=lambda c: c["privacy"].update(noise_multiplier="4"))
    west = world.hospital("west")
    for number in range(1, 101):
        world.before["site.statement"] = lambda w, b, n=number: replace(
            b,
            event=replace(b.event, sampling="poisson", sample_rate="0.01", sigma_grid=b.event.sigma_grid + n),
        )
        world.append(world.statement(west, "run-0", number, "ab" * 32, ZERO_DIGEST, [0]))
    world.before.clear()
    index, opened = world.whole()
    report = world.report(world.evidence(index, opened=opened))
    step = says(report, EPSILON, Word.NO_EVIDENCE, "epsilon.too_costly", Verdict.INCOMPLETE)
    assert "100 kinds of sampled releases" in step.detail
