"""A charter that restricts answers keeps its model from those who ask: their evidence leaves it out."""

from __future__ import annotations

import pytest

from audit.evidence import read_evidence
from audit.principal import LocalOwner, Principal
from audit.service import SearchRequest, add_answer, export_asked, export_entry
from audit.verify import Verdict, Word
from audit.verify.aggregation import REPLAY, WEIGHTS
from audit.verify.answer import ANSWER
from tests.audit_verify.judging import says
from tests.audit_verify.test_forged_sketches import SketchingWorld
from tests.audit_verify.world import World

RESTRICTED = {
    "labels": {"decimals": 6, "label_only": 1, "cache": 0},
    "rounded": {"decimals": 5, "label_only": 0, "cache": 0},
}


class Told:
    """A world up to one prediction, and what each role is given of it."""

    def __init__(self, answers=None, world=World):
        def change(document):
            if answers is not None:
                document["answers"] = answers

        self.world = world(charter_changes=change)
        self.index, self.opened = self.world.whole()
        self.world.publish()

    def file(self, role):
        caller = Principal(id="p", role=role)
        return export_entry(self.world.log, self.world.blobs.get, caller, LocalOwner(), self.index)

    def artefacts(self, role):
        return set(read_evidence(self.file(role)).artefacts)


@pytest.fixture(scope="module", params=RESTRICTED)
def restricted(request):
    return Told(RESTRICTED[request.param])


@pytest.mark.parametrize("role", ["consumer", "tester"])
def test_who_only_asks_gets_nothing_by_which_the_model_can_be_rebuilt(restricted, role):
    whole = restricted.artefacts("scientist")
    assert restricted.world.blobs_of_last_run() in whole
    public = restricted.world.charter.public_set
    assert restricted.artefacts(role) == ({public} & whole if public else set())


@pytest.mark.parametrize("role", ["officer", "scientist", "operator", "node"])
def test_members_get_the_whole_file(restricted, role):
    assert restricted.artefacts(role) == restricted.artefacts("scientist")
    assert len(restricted.artefacts(role)) > 2


def test_a_versions_story_by_terms_leaves_the_model_out_too(restricted):
    version = restricted.world.blobs_of_last_run()
    for role, holds in (("consumer", False), ("officer", True)):
        caller, asked = Principal(id="p", role=role), SearchRequest(version=version)
        data = export_asked(restricted.world.log, restricted.world.blobs.get, caller, LocalOwner(), asked)
        assert (version in read_evidence(data).artefacts) is holds


def test_the_verifier_says_that_the_model_is_withheld_and_who_has_it(restricted):
    data = add_answer(restricted.file("consumer"), opened=restricted.opened)
    report = restricted.world.report(data)
    assert report.verdict is Verdict.INCOMPLETE, report.text()
    for title, code in ((REPLAY, "replay.update_missing"), (WEIGHTS, "version.weights_missing")):
        step = says(report, title, Word.NO_EVIDENCE, code)
        for words in ("the charter restricts answers", "consumer", "an officer, a scientist"):
            assert words in step.detail
    assert report.step(ANSWER).word is Word.NO_EVIDENCE
    assert not [step for step in report.steps if step.word is Word.FAIL], report.text()


def sketching(charter_changes):
    return SketchingWorld(also=charter_changes)


def test_counts_and_the_sketch_are_left_out_as_well():
    told = Told(RESTRICTED["rounded"], sketching)
    public = told.world.charter.public_set
    assert told.artefacts("consumer") <= {public}
    assert len(told.artefacts("officer")) > len(told.artefacts("consumer")) + 2
    report = told.world.report(told.file("consumer"))
    assert not [step for step in report.steps if step.word is Word.FAIL], report.text()


@pytest.mark.parametrize("answers", [None, {"decimals": 6, "label_only": 0, "cache": 1}])
def test_a_charter_of_exact_answers_gives_everybody_the_whole_file(answers):
    told = Told(answers)
    assert told.artefacts("consumer") == told.artefacts("tester") == told.artefacts("officer")
    data = add_answer(told.file("consumer"), opened=told.opened)
    assert told.world.report(data).verdict is Verdict.VALID


def test_what_a_file_lacks_for_another_reason_is_not_said_to_be_withheld():
    told = Told()
    del told.world.blobs[told.world.blobs_of_last_run()]
    step = told.world.report(told.file("consumer"), replay=False).step(WEIGHTS)
    assert step.code == "version.weights_missing"
    assert "restricts" not in step.detail
