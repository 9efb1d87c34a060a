"""Two histories shown to two parts of the witnesses: which quorum keeps both from being believed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.errors import WitnessConflictError, WitnessProofError
from audit.keys import SigningKey
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.misbehaviour import Misbehaviour, prove_fork
from audit.notes import KeyType, NoteSigner
from audit.tlog_policy import Policy
from audit.verify.misbehaviour import verify_misbehaviour
from audit.verify.report import Verdict
from audit.witness import Witness
from tests.soak_report import Report

ORIGIN = "hospital.example/split"
NOW = 1_700_000_000
LOG = NoteSigner(ORIGIN, SigningKey.generate())
SITES = [NoteSigner(f"site-{n}", SigningKey.generate(), KeyType.COSIGNATURE) for n in range(7)]
COMMON = [hash_leaf(b"%d" % n) for n in range(8)]
VIEWS = ([*COMMON, hash_leaf(b"to the one")], [*COMMON, hash_leaf(b"to the other")])
NOTES = tuple(sign_checkpoint(Checkpoint(ORIGIN, 9, root_of(view)), LOG) for view in VIEWS)
LINES = [[cosign(note, site, NOW) for site in SITES] for note in NOTES]  # what each would sign, asked first


def policy(n: int, k: int) -> Policy:
    lines = [f"log {LOG.vkey}", *(f"witness {site.name} {site.vkey}" for site in SITES[:n])]
    lines += [f"group sites {k} {' '.join(site.name for site in SITES[:n])}", "quorum sites"]
    return Policy.parse("\n".join(lines))


def accepted(rule: Policy, view: int, cosigners: tuple[int, ...]) -> bool:
    note = add_signatures(NOTES[view], [LINES[view][site] for site in cosigners])
    return rule.open(note, now=NOW).quorum.satisfied


def splits(n: int, corrupt: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to part the honest witnesses: each sees one view first; the corrupt ones cosign both."""
    for side in itertools.product((0, 1, None), repeat=n - corrupt):
        both = tuple(range(n - corrupt, n))
        yield (
            tuple(site for site, view in enumerate(side) if view == 0) + both,
            tuple(site for site, view in enumerate(side) if view == 1) + both,
        )


def enumerate_splits(n: int, k: int) -> tuple[int, int]:
    """Try every split of n witnesses under k of n; return how many there are and how many fool somebody."""
    rule, tried, fooled = policy(n, k), 0, 0
    known: dict[tuple[int, tuple[int, ...]], bool] = {}

    def believes(view: int, cosigners: tuple[int, ...]) -> bool:
        key = view, cosigners
        if key not in known:
            known[key] = accepted(rule, view, cosigners)
        return known[key]

    for corrupt in range(n + 1):
        possible = False
        for one, other in splits(n, corrupt):
            both = believes(0, one) and believes(1, other)
            possible, tried, fooled = possible or both, tried + 1, fooled + both
        # w of n with 2w > n + f is what the design promises; and no smaller quorum keeps it
        assert possible == (2 * k <= n + corrupt), (n, k, corrupt)
    return tried, fooled


def test_no_two_histories_reach_a_quorum_that_is_large_enough() -> None:
    for n, k in ((3, 2), (4, 3), (5, 3), (5, 4)):
        enumerate_splits(n, k)


@pytest.mark.soak
def test_no_split_of_three_to_seven_witnesses_fools_a_large_enough_quorum(report: Report) -> None:
    tried = fooled = 0
    for n in range(3, 8):
        for k in range(2, min(n, 5) + 1):
            more = enumerate_splits(n, k)
            tried, fooled = tried + more[0], fooled + more[1]
    report(
        "split",
        size=f"{tried:,} splits: every one of n = 3 to 7 witnesses under k = 2 to 5, 0 to n corrupt",
        result="0 times both believed where 2k > n + corrupt; below that bound "
        f"{fooled:,} times, so the bound is tight",
    )


def meet(folder: Path, sides: tuple[int, ...]) -> None:
    """Real witnesses, each shown one view first. When the parts meet, every one of them is told apart."""
    witnesses = []
    for number, view in enumerate(sides):
        witness = Witness.create(folder / f"{number}.json", SITES[number], LOG.vkey)
        witness.cosign(sign_checkpoint(Checkpoint(ORIGIN, 8, root_of(COMMON)), LOG), 0, [], NOW)
        proof = consistency_proof_of(VIEWS[view], 8)
        line = witness.cosign(NOTES[view], 8, proof, NOW)
        assert line == LINES[view][number]
        with pytest.raises(WitnessConflictError):
            witness.cosign(NOTES[1 - view], 8, consistency_proof_of(VIEWS[1 - view], 8), NOW)
        witnesses.append(witness)
    for witness, view in zip(witnesses, sides, strict=True):
        with pytest.raises(WitnessProofError) as caught:
            witness.cosign(NOTES[1 - view], 9, [], NOW)
        assert caught.value.seen_note is not None
        convicted = prove_fork(caught.value.seen_note, caught.value.offered_note).encode()
        assert Misbehaviour.parse(convicted).kind == "split"
        text = f"log {LOG.vkey}\nquorum none\n"
        assert verify_misbehaviour(convicted, policy_text=text).verdict is Verdict.VALID
        witness.path.unlink()


def test_first_exchange_after_a_split_convicts_the_log(tmp_path: Path) -> None:
    for sides in ((0, 0, 0, 1, 1), (0, 1, 0, 1, 0), (1, 0, 0, 0, 0)):
        meet(tmp_path, sides)


@pytest.mark.soak
def test_every_split_of_five_sites_convicts_the_log_when_they_meet(tmp_path: Path, report: Report) -> None:
    every = [sides for sides in itertools.product((0, 1), repeat=5) if len(set(sides)) == 2]
    for sides in every:
        meet(tmp_path, sides)
    report(
        "split",
        size=f"{len(every)} splits of 5 sites, each with its own witness",
        result="each witness refuses the other view and holds a file that convicts the log",
    )


def test_sites_of_one_operator_count_once_in_a_split() -> None:
    """Two sites under one operator who cosigns everything are one corrupt witness, not two."""
    names = [site.name for site in SITES[:5]]
    lines = [f"log {LOG.vkey}", *(f"witness {site.name} {site.vkey}" for site in SITES[:5])]
    lines += [
        f"group same any {names[3]} {names[4]}",
        f"group all 3 {' '.join(names[:3])} same",
        "quorum all",
    ]
    rule = Policy.parse("\n".join(lines))
    assert not accepted(rule, 0, (0, 3, 4))
    assert accepted(rule, 0, (0, 1, 3))
    both = [
        one
        for one in itertools.product((0, 1), repeat=3)
        if all(
            accepted(rule, view, (*(site for site, side in enumerate(one) if side == view), 3, 4))
            for view in (0, 1)
        )
    ]
    assert both == []
