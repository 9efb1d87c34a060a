"""Who can lie about a masked round, and by which code the verifier says so."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from audit.charter_parts import CharterFormError
from audit.entries import decode_entry
from audit.errors import AuditError
from audit.evidence import read_evidence, write_evidence
from audit.secure_bodies import MaskKeys, RoundOpened, SharesOpened, SurvivorsAgreed
from audit.secure_round import Transcript
from audit.shared_noise import share_grid
from audit.verify import Verdict, Word
from audit.weights import encode_update
from tests.audit_verify.judging import CHARTER, EPSILON, REPLAY, ROUNDS, assert_caught, in_round, once, says
from tests.audit_verify.masked_world import MaskedWorld

NOISE = "The noise and the data"


@pytest.fixture(scope="module")
def honest():
    world = MaskedWorld()
    index, opened = world.whole()
    world.publish()
    return world, world.evidence(index, opened=opened)


def test_an_honest_masked_run_with_a_dropout_is_rebuilt_bit_for_bit(honest):
    world, data = honest
    report = world.report(data)
    assert report.verdict is Verdict.VALID, report.text()
    assert "masks come off in the sum alone" in report.step(REPLAY).detail
    assert "at most 0 of 2 sites collude" in report.step(EPSILON).detail
    assert "2 honest sites' shares" in report.step(NOISE).detail


def test_no_update_in_the_file_is_what_a_site_measured(honest):
    world, data = honest
    artefacts = set(read_evidence(data).artefacts.values())
    assert not artefacts & {encode_update(values) for values in world.plain.values()}
    assert len(world.plain) == 9


def forged(**options):
    return MaskedWorld(**options).judge()


def of(kind, number, change, site="east"):
    """Change one site's piece of one round before it signs it."""
    return lambda world, body: (
        change(world, body) if isinstance(body, kind) and (body.round, body.site) == (number, site) else body
    )


def spoilt(seeds):
    return (flipped(seeds[0]), *seeds[1:])


def flipped(text):
    return text[:-1] + ("0" if text[-1] != "0" else "1")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (  # the coordinator swaps a masked vector for another: the survivors signed its digest
            {"tamper": of(SurvivorsAgreed, 1, lambda w, b: replace(b, updates=("11" * 32, *b.updates[1:])))},
            "secure.survivors",
        ),
        (  # a site adds to its update after masking it, and signs that: nothing cancels, the sum is another
            {"masks": lambda w, n, s, v: [v[0] + 1, *v[1:]] if (n, s) == (1, "east") else v},
            "replay.opened",
        ),
        (  # a site that gives a wrong share, and signs it
            {
                "tamper": of(
                    SharesOpened, 1, lambda w, b: replace(b, seeds=(flipped(b.seeds[0]), *b.seeds[1:]))
                )
            },
            "secure.seed",
        ),
        (  # a dropped site's mask taken off with another key
            {"tamper": of(SharesOpened, 2, lambda w, b: replace(b, keys=(flipped(b.keys[0]),)))},
            "secure.mask_key",
        ),
        (
            {"tamper": of(SharesOpened, 1, lambda w, b: replace(b, seeds=b.seeds[:1]))},
            "secure.shares",
        ),
        (
            {"tamper": of(SharesOpened, 1, lambda w, b: replace(b, round=2))},
            "secure.shares",
        ),
        (
            {"tamper": of(SharesOpened, 1, lambda w, b: replace(b, seeds=("zz", *b.seeds[1:])))},
            "secure.shares",
        ),
        (  # a seed that it did not bind itself to
            {"tamper": of(MaskKeys, 1, lambda w, b: replace(b, seed="33" * 32))},
            "secure.seed",
        ),
        (
            {"tamper": of(MaskKeys, 1, lambda w, b: replace(b, run="run-0"))},
            "secure.keys",
        ),
        (
            {"tamper": of(MaskKeys, 1, lambda w, b: replace(b, participants=("east", "north")))},
            "secure.keys",
        ),
        (
            {"tamper": of(SurvivorsAgreed, 2, lambda w, b: replace(b, survivors=("east", "north", "west")))},
            "secure.survivors",
        ),
        (
            {"tamper": of(SurvivorsAgreed, 1, lambda w, b: replace(b, roster="44" * 32))},
            "secure.survivors",
        ),
    ],
)
def test_a_signed_lie_in_a_transcript_is_found(options, code):
    assert_caught(forged(**options), REPLAY, code)


def resigned(world, body):
    """A piece signed by the coordinator in the site's name."""
    return world.sign(body, world.author)


def spoil(change, number=1):
    return {"spoil": lambda world, n, transcript: change(world, transcript) if n == number else transcript}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda w, t: replace(t, agreed=t.agreed[:1]), "secure.survivors"),
        (lambda w, t: replace(t, agreed=(t.agreed[0], resigned(w, t.agreed[1]))), "secure.survivors"),
        (lambda w, t: replace(t, agreed=(t.agreed[0], t.agreed[0])), "secure.survivors"),
        (lambda w, t: replace(t, agreed=t.agreed[::-1]), "secure.survivors"),
        (lambda w, t: replace(t, opened=t.opened[:1]), "secure.shares"),
        (lambda w, t: replace(t, opened=(t.opened[0], resigned(w, t.opened[1]))), "secure.shares"),
        (lambda w, t: replace(t, opened=(t.opened[1], t.opened[0])), "secure.shares"),
        (lambda w, t: replace(t, keys=t.keys[:1]), "secure.keys"),
        (lambda w, t: replace(t, keys=(t.keys[0], resigned(w, t.keys[1]), t.keys[2])), "secure.keys"),
        (lambda w, t: replace(t, members=t.members[:2]), "secure.keys"),
        (lambda w, t: replace(t, members=(*t.members, "zulu")), "secure.keys"),
    ],
)
def test_a_transcript_that_the_coordinator_made_up_is_found(change, code):
    assert_caught(forged(**spoil(change)), REPLAY, code)


def test_one_round_s_transcript_does_not_open_another():
    kept = []

    def reuse(world, number, transcript):
        kept.append(transcript)
        return kept[0]

    assert_caught(forged(spoil=reuse), REPLAY, "secure.keys")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda body: replace(body, total="55" * 32), "replay.opened"),
        (lambda body: replace(body, survivors=("east", "north")), "replay.opened"),
        (lambda body: replace(body, roster="66" * 32), "replay.opened"),
    ],
)
def test_an_entry_that_says_otherwise_than_the_transcript_is_found(change, code):
    report = forged(before={"round.opened": once(change, in_round(1))})
    assert_caught(report, REPLAY, code)


def test_a_round_that_nobody_opened_is_no_evidence():
    report = forged(before={"round.opened": once(None, in_round(2))})
    assert_caught(report, REPLAY, "replay.not_opened", Verdict.INCOMPLETE)


def test_a_round_opened_twice_is_found():
    def twice(world, body):
        if body.round == 1:
            world.append(body)
        return body

    assert_caught(forged(before={"round.opened": twice}), REPLAY, "replay.opened")


def test_a_transcript_left_out_of_the_file_is_no_evidence(honest):
    world, data = honest
    evidence = read_evidence(data)
    names = {
        decode_entry(leaf).body.transcript
        for leaf in evidence.entries.values()
        if isinstance(decode_entry(leaf).body, RoundOpened)
    }
    kept = {name: blob for name, blob in evidence.artefacts.items() if name not in names}
    report = world.report(write_evidence(dataclasses.replace(evidence, artefacts=kept)))
    assert_caught(report, REPLAY, "replay.transcript_missing", Verdict.INCOMPLETE)


def test_every_bit_of_a_transcript_counts(honest):
    """A sample of flipped bits: never another sum, and never believed."""
    world, _ = honest
    data = next(blob for blob in world.blobs.values() if blob.startswith(b'{"agreed"'))
    good = Transcript.decode(data)
    for position in range(0, 8 * len(data), 811):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        try:
            found = Transcript.decode(bytes(changed))
        except AuditError:
            continue
        assert found != good


# what the statements say


def test_an_update_under_other_masks_is_found():
    change = once(lambda body: replace(body, roster="77" * 32), in_round(1, "north"))
    assert_caught(forged(before={"site.statement": change}), ROUNDS, "statement.roster")


def test_an_unmasked_update_in_a_masked_run_is_found():
    change = once(lambda body: replace(body, roster=""), in_round(1, "east"))
    assert_caught(forged(before={"site.statement": change}), ROUNDS, "statement.roster")


def test_a_masked_update_in_a_plain_run_is_found(make_world):
    change = once(lambda body: replace(body, roster="88" * 32), in_round(1, "east"))
    assert_caught(make_world(before={"site.statement": change}).judge(), ROUNDS, "statement.roster")


def event_of(body, **changes):
    return replace(body, event=replace(body.event, **changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: {"share_grid": e.share_grid - 1},
        lambda e: {"sharers": 3, "share_grid": share_grid(e.sigma_grid, 3)},  # as if nobody were tolerated
        lambda e: {"sharers": 0, "share_grid": 0},  # full noise claimed, and nobody said to share it
        lambda e: {"site_sensitivity_grid": 1000},
    ],
    ids=["less than its share", "tolerates none", "alone", "a bound nobody agreed"],
)
def test_a_share_of_noise_below_the_charters_is_found(change):
    lie = once(lambda body: event_of(body, **change(body.event)), in_round(1, "east"))
    assert_caught(forged(before={"site.statement": lie}), ROUNDS, "statement.event")


# what the charter may not say


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["secure_aggregation"].update(tolerated=2),
        lambda d: d["secure_aggregation"].update(tolerated=-1),
        lambda d: d["secure_aggregation"].update(tolerated=0),  # two sites do not make the noise of three
        lambda d: d["plan"].update(minimum_sites=1),
        lambda d: d["plan"].update(local_steps=2),
        lambda d: d["sites"][0].update(weight="7"),
        lambda d: d.update(aggregation={"rule": "median", "byzantine": 0, "keep": 0, "norm_bound": 0}),
        lambda d: d.update(aggregation={"rule": "mean", "byzantine": 0, "keep": 0, "norm_bound": 1}),
        lambda d: d["secure_aggregation"].update(more=1),
        lambda d: d.update(site_level={"max_update_norm": "0", "epsilon": "1"}),
        lambda d: d.update(site_level={"max_update_norm": "5"}),
    ],
)
def test_a_charter_that_contradicts_its_masks_is_refused(change):
    with pytest.raises(CharterFormError):
        MaskedWorld(charter_changes=change)


def test_site_level_without_masks_is_refused(make_world):
    with pytest.raises(CharterFormError, match="secure_aggregation"):
        make_world(charter_changes=lambda d: d.update(site_level={"max_update_norm": "5", "epsilon": "9"}))


# whole sites


class WholeSites(MaskedWorld):
    def event(self):
        return replace(super().event(), site_sensitivity_grid=self.charter.site_level.sensitivity_grid)


def with_whole_sites(epsilon):
    def change(document):
        document["site_level"] = {"max_update_norm": "3", "epsilon": epsilon}
        document["privacy"]["epsilon"] = "6"

    return change


def test_a_whole_site_is_counted_from_the_same_events():
    report = WholeSites(charter_changes=with_whole_sites("40")).judge()
    step = says(report, EPSILON, Word.PROVED)
    assert report.verdict is Verdict.VALID, report.text()
    assert "a whole site: at most" in step.detail
    units = {line.unit for line in report.epsilons}
    assert units == {"row", "site"}
    whole = [float(line.run_epsilon) for line in report.epsilons if line.unit == "site"]
    rows = [float(line.run_epsilon) for line in report.epsilons if line.unit == "row"]
    assert min(whole) > max(rows)


def test_a_whole_site_that_pays_more_than_was_promised_is_found():
    assert_caught(WholeSites(charter_changes=with_whole_sites("2")).judge(), EPSILON, "epsilon.over_charter")


def test_an_event_that_forgets_the_site_bound_is_found():
    report = MaskedWorld(charter_changes=with_whole_sites("40")).judge()
    assert_caught(report, ROUNDS, "statement.event")


def test_the_charter_of_a_masked_run_says_so(honest):
    world, data = honest
    assert world.report(data).step(CHARTER).word is Word.PROVED
    assert world.charter.secure is not None
    assert world.charter.secure.sharers == 2
