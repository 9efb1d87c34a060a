"""What a site signs belongs to one log, one start of a run, and one author of a charter."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from audit.checkpoints import Checkpoint, sign_checkpoint
from audit.entries import RunStarted, decode_entry, run_digest
from audit.evidence import read_evidence
from audit.keys import SigningKey
from audit.merkle import root_of
from audit.notes import NoteSigner
from audit.tlog_policy import Policy
from audit.verify import Verdict, Word, aggregation, history, members, training
from audit.verify.chain import Chain, GapError
from tests.audit_verify.judging import CHARTER, REPLAY, RUN, SITES, WEIGHTS, fails, once, says, without

OTHER = "other.example/log"


def logged_start(change, key=None):
    """The operator logs another start than the one that the sites were asked to accept, properly signed."""

    def hook(world, body):
        signer = key or world.author
        return world.sign(change(replace(body, author=signer.text)), signer)

    return {"run.started": hook}


def a_site(field, value, name="north"):
    return once(lambda body: replace(body, **{field: value}), lambda body: body.site == name)


# one start


def test_a_run_logged_under_another_author_than_the_sites_accepted(make_world):
    after = logged_start(lambda body: body, SigningKey.generate())
    step = fails(make_world(after=after).judge(), RUN, "run.acceptance")
    assert "start is" in step.detail


@pytest.mark.parametrize("change", [{"code": "cd" * 32}, {"sites": ("east", "north")}])
def test_a_start_that_its_own_author_signed_anew_is_not_the_accepted_one(make_world, change):
    after = logged_start(lambda body: replace(body, **change))
    report = make_world(after=after).judge()
    assert report.verdict is Verdict.INVALID, report.text()
    assert report.failures[0].title == RUN


def test_two_starts_of_a_run_cannot_each_be_shown_in_a_file_of_its_own(make_world):
    stranger = SigningKey.generate()

    class Twice(make_world):
        def append(self, body, actor="operator"):
            if isinstance(body, RunStarted):
                super().append(self.sign(replace(body, author=stranger.text), stranger), actor)
            return super().append(body, actor)

    world = Twice()
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    authors = {world.author.text: None, stranger.text: None}
    for author in authors:
        shown = without(data, lambda i, body, a=author: isinstance(body, RunStarted) and body.author != a)
        authors[author] = world.report(shown)
    assert authors[world.author.text].verdict is Verdict.VALID, authors[world.author.text].text()
    fails(authors[stranger.text], RUN, "run.acceptance")


def test_an_acceptance_of_no_start_in_particular_fails(make_world):
    report = make_world(before={"run.accepted": a_site("start", "00" * 32)}).judge()
    assert fails(report, RUN, "run.acceptance").entry is not None


def test_a_start_is_named_by_all_that_its_author_signed_and_nothing_else(honest):
    body = decode_entry(honest.world.log.leaves[honest.world.find("run.started")]).body
    assert run_digest(replace(body, signature="")) == run_digest(body)
    for change in ({"author": "x"}, {"run": "x"}, {"code": "0" * 64}, {"model": "x"}, {"rounds": 5}):
        assert run_digest(replace(body, **change)) != run_digest(body)


# one log


def test_a_run_copied_into_a_second_log_is_nobody_s(make_world):
    """All of the first log's leaves, under another name and key; the policy asks for no witness."""
    world, key = make_world(), NoteSigner(OTHER, SigningKey.generate())
    index, opened = world.whole()
    world.replace_leaf(0, lambda body: replace(body, origin=OTHER, log_key=key.vkey))
    policy = republish(world, key)
    report = world.report(world.evidence(index, opened=opened), policy_text=policy)
    assert "origin" in fails(report, SITES, "site.other_log").detail


def test_sites_enrolled_in_both_logs_have_not_accepted_the_run_in_both(make_world):
    world, key = make_world(), NoteSigner(OTHER, SigningKey.generate())
    index, opened = world.whole()
    world.replace_leaf(0, lambda body: replace(body, origin=OTHER, log_key=key.vkey))
    for number, hospital in enumerate(world.hospitals):
        world.replace_leaf(
            world.find("site.enrolled", number),
            lambda body, site=hospital: enrolled_again(world, site, body),
        )
    policy = republish(world, key)
    report = world.report(world.evidence(index, opened=opened), policy_text=policy)
    assert report.step(SITES).word is Word.PROVED, report.text()
    assert "origin is" in fails(report, RUN, "run.acceptance").detail


def enrolled_again(world, site, body):
    body = world.sign(replace(body, origin=OTHER), site.identity)
    body = world.sign(body, site.statement, "statement_proof")
    return world.sign(body, site.witness, "witness_proof")


def republish(world, key):
    world.log.notes = [
        sign_checkpoint(Checkpoint(OTHER, world.log.tree_size, root_of(world.log.hashes)), key)
    ]
    witnesses = [f"witness {h.name} {h.note_signer.vkey}" for h in world.hospitals]
    return "\n".join([f"log {key.vkey}", *witnesses, "quorum none", ""])


@pytest.mark.parametrize("kind", ["site.enrolled", "run.accepted"])
def test_one_site_s_signature_for_another_log_is_enough_to_fail(make_world, kind):
    title, code = {
        "site.enrolled": (SITES, "site.other_log"),
        "run.accepted": (RUN, "run.acceptance"),
    }[kind]
    fails(make_world(before={kind: a_site("origin", OTHER)}).judge(), title, code)


@pytest.mark.parametrize("kind", ["site.enrolled", "run.accepted", "charter.signed"])
def test_none_of_these_fields_can_be_changed_after_signing(make_world, kind):
    field, title, code = {
        "site.enrolled": ("agreement_key", SITES, "site.enrolment"),
        "run.accepted": ("lifetime_epsilon_cap", RUN, "run.acceptance"),
        "charter.signed": ("author", CHARTER, "charter.signature"),
    }[kind]
    fails(make_world(after={kind: a_site(field, "other")}).judge(), title, code)


# one author


def test_a_charter_published_under_another_author_than_the_sites_were_told(make_world):
    stranger = SigningKey.generate().text
    world = make_world(after={"charter.published": lambda world, body: replace(body, author=stranger)})
    assert "author" in fails(world.judge(), CHARTER, "charter.author").detail


def test_a_charter_published_twice_cannot_each_time_be_shown_alone(make_world):
    stranger = SigningKey.generate().text
    world = make_world()
    published = decode_entry(world.log.leaves[world.find("charter.published")]).body
    world.append(replace(published, author=stranger))
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    says(world.report(data), CHARTER, Word.FAIL, "verify.ambiguous")
    honest = without(data, lambda i, body: getattr(body, "author", "") == stranger)
    assert world.report(honest).verdict is Verdict.VALID
    place = world.find("charter.published")
    fails(world.report(without(data, lambda i, body: i == place)), CHARTER, "charter.author")


def test_a_site_that_was_told_another_author_fails_the_charter(make_world):
    hook = a_site("author", SigningKey.generate().text, "west")
    fails(make_world(before={"charter.signed": hook}).judge(), CHARTER, "charter.author")


def test_a_second_signature_for_another_author_fails_even_after_the_run(make_world):
    world = make_world()
    digest = world.train()
    signed = decode_entry(world.log.leaves[world.find("charter.signed")]).body
    told = replace(signed, author=SigningKey.generate().text)
    world.append(world.sign(told, world.hospital(signed.site).identity))
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    fails(world.report(world.evidence(index, opened=opened)), CHARTER, "charter.author")


# nothing is said of an aggregation that was not replayed


def test_a_false_aggregation_is_not_valid_where_nobody_replays_it(make_world):
    def lie(world, body):
        return replace(body, output_model=world.blobs_digest) if body.round == 4 else body

    world = make_world(before={"round.completed": lie})
    world.blobs_digest = "ab" * 32
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    says(world.report(data, replay=False), REPLAY, Word.NO_EVIDENCE, "aggregation.not_replayed")
    assert world.report(data, replay=False).verdict is Verdict.INCOMPLETE
    fails(world.report(data), REPLAY, "replay.output_model")


def test_what_is_too_costly_to_replay_unasked_is_said_to_be_open(honest, now):
    chain = Chain(
        evidence=read_evidence(honest.data),
        policy=Policy.parse(honest.world.policy),
        now_s=int((now + timedelta(seconds=1)).timestamp()),
        max_age_s=None,
        replay=None,
        receipt=None,
    )
    for check in (
        history.check_checkpoint, history.check_inclusion, history.check_links, members.check_charter,
        members.check_sites, training.check_run, training.check_rounds,
    ):  # fmt: skip
        check(chain)
    additions = len(chain.rounds) * len(chain.rounds[0].statements) * chain.charter.dimension
    chain.rounds *= aggregation.CHEAP_ADDITIONS // additions + 1
    with pytest.raises(GapError, match="run again with --replay") as found:
        aggregation.check_aggregation(chain)
    assert found.value.code == "aggregation.not_replayed"
    with pytest.raises(GapError):
        aggregation.check_weights(chain)
    assert chain.outputs == ()


def test_weights_nobody_rebuilt_still_answer_but_are_not_valid(honest):
    report = honest.world.report(honest.data, replay=False)
    says(report, WEIGHTS, Word.NO_EVIDENCE, "aggregation.not_replayed", Verdict.INCOMPLETE)
    assert report.exit_code == 4
    assert "was not carried out" in " ".join(report.text().split())
