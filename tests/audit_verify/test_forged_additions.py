"""What stands beside an answer: its rounding, the score, the attributions, and who can lie about them."""

from __future__ import annotations

import pytest

from audit.answers import AnswerTerms, AnswerTermsError
from audit.explanations import LINEAR, attribution_document, by_feature, linear_attributions
from audit.forward import forward
from audit.reference import OodScorer
from audit.verify import Word
from tests.audit_verify.judging import ANSWER, fails, says
from tests.audit_verify.test_forged_sketches import SketchingWorld
from tests.audit_verify.world import World


class Answering:
    """A world of one run, from which tests predict in many ways."""

    def __init__(self, world):
        self.world = world
        self.digest = world.train()
        self.live = world.approve(self.digest, world.register(self.digest))
        self.weights = world.weights(self.digest)

    def report(self, finish):
        index, opened = self.world.predict(self.digest, self.live, finish=finish)
        self.world.publish()
        return self.world.report(self.world.evidence(index, opened=opened), replay=True)

    def scorer(self):
        charter = self.world.charter
        reference = charter.serving.reference
        if reference is None:
            return OodScorer(charter.features)
        counts = [self.world.counts(hospital) for hospital in self.world.hospitals]
        total = [sum(cells) for cells in zip(*counts, strict=True)]
        return OodScorer(charter.features, reference=reference, counts=total)

    def explained(self, encoded, outputs, **changed):
        base = forward(self.world.charter.layers, self.weights, [0.0] * len(encoded))[0]
        names = [feature["name"] for feature in self.world.charter.features]
        values = by_feature(
            self.world.charter.features,
            linear_attributions(self.world.charter.layers, self.weights, encoded, 0),
        )
        assert sorted(values) == sorted(names)
        document = attribution_document(method=LINEAR, output=0, base=base, total=outputs[0], values=values)
        return {**document, **changed}


@pytest.fixture(scope="module")
def sketched():
    return Answering(SketchingWorld())


@pytest.fixture(scope="module")
def plain():
    return Answering(World())


def rounding(**answers):
    part = {"decimals": 6, "label_only": 0, "cache": 0, **answers}
    return Answering(World(charter_changes=lambda document: document.update(answers=part)))


@pytest.fixture(scope="module")
def rounded():
    return rounding(decimals=2)


@pytest.fixture(scope="module")
def terse():
    return rounding(label_only=1)


def scored(answering, **lie):
    scorer = answering.scorer()
    return lambda answer, encoded, outputs: {**answer, "ood": {**scorer.score(encoded), **lie}}


@pytest.mark.parametrize("world", ["sketched", "plain"])
def test_an_honest_score_is_proved(request, world):
    report = request.getfixturevalue(world)
    report = report.report(scored(report))
    assert "the score beside it" in says(report, ANSWER, Word.PROVED).detail


@pytest.mark.parametrize("lie", [{"score": "0.5"}, {"out": True}, {"basis": "bounds"}, {"basis": "mood"}])
def test_a_false_score_fails(sketched, lie):
    fails(sketched.report(scored(sketched, **lie)), ANSWER, "answer.additions")


def test_a_score_that_the_charter_paid_for_must_be_there(sketched):
    fails(sketched.report(lambda answer, *_: answer), ANSWER, "answer.additions")


def test_answers_from_before_there_were_scores_stand(plain):
    says(plain.report(lambda answer, *_: answer), ANSWER, Word.PROVED)


def test_attributions_are_proved_to_add_up(plain):
    def finish(answer, encoded, outputs):
        return {**answer, "attributions": plain.explained(encoded, outputs)}

    report = plain.report(finish)
    assert "the model's own terms" in says(report, ANSWER, Word.PROVED).detail


@pytest.mark.parametrize(
    "lie", [{"total": "9"}, {"base": "9"}, {"gap": "0.5"}, {"method": "magic"}, {"output": 3}, {"values": {}}]
)
def test_attributions_that_the_model_does_not_give_fail(plain, lie):
    def finish(answer, encoded, outputs):
        return {**answer, "attributions": plain.explained(encoded, outputs, **lie)}

    fails(plain.report(finish), ANSWER, "answer.additions")


def test_anything_else_beside_an_answer_fails(plain):
    fails(plain.report(lambda answer, *_: {**answer, "advice": "buy"}), ANSWER, "answer.other_model")


def test_a_rounded_answer_is_proved_to_be_the_rounding(rounded):
    terms = AnswerTerms(decimals=2)
    report = rounded.report(lambda answer, *_: terms.released(answer))
    assert "rounded by the charter to 2 decimals" in says(report, ANSWER, Word.PROVED).detail


def test_more_decimals_than_the_charter_lets_out_fail(rounded):
    fails(rounded.report(lambda answer, *_: answer), ANSWER, "answer.other_model")


def test_a_rounding_that_is_off_fails(rounded):
    def off(answer, *_):
        shown = AnswerTerms(decimals=2).released(answer)
        up = float(shown["probability"]) + (0.01 if float(shown["probability"]) < 0.5 else -0.01)
        return {**shown, "probability": f"{up:.2f}".rstrip("0")}

    fails(rounded.report(off), ANSWER, "answer.other_model")


def test_a_label_alone_is_proved(terse):
    report = terse.report(lambda answer, *_: {"label": answer["label"]})
    assert "the label alone" in says(report, ANSWER, Word.PROVED).detail


def test_a_confidence_under_a_charter_of_labels_alone_fails(terse):
    fails(terse.report(lambda answer, *_: answer), ANSWER, "answer.other_model")


def test_another_label_alone_fails(terse):
    def other(answer, *_):
        labels = terse.world.charter.label["classes"]
        return {"label": labels[1 - labels.index(answer["label"])]}

    fails(terse.report(other), ANSWER, "answer.other_model")


@pytest.mark.parametrize(
    "part", [{}, {"decimals": 7}, {"decimals": "2"}, {"label_only": 2}, {"cache": -1}, {"more": 0}]
)
def test_terms_of_answers_are_read_strictly(part):
    whole = {"decimals": 6, "label_only": 0, "cache": 0, **part} if part else {}
    with pytest.raises(AnswerTermsError):
        AnswerTerms.of_charter({"task": "binary", "answers": whole})
    with pytest.raises(AnswerTermsError):
        AnswerTerms.of_charter(
            {"task": "regression", "answers": {"decimals": 6, "label_only": 1, "cache": 0}}
        )
