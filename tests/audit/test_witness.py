from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, open_checkpoint, sign_checkpoint
from audit.errors import (
    KeyFormatError,
    WitnessClockError,
    WitnessConflictError,
    WitnessError,
    WitnessProofError,
    WitnessRequestError,
    WitnessSignatureError,
    WitnessStateError,
    WitnessUnknownOriginError,
)
from audit.keys import SigningKey
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import KeyType, NoteSigner, SignatureLine, sign_note
from audit.witness import Witness, status_of

ORIGIN = "hospital.example/log"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
KEY = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
LEAVES = [hash_leaf(b"%d" % i) for i in range(40)]
NOW = 1_700_000_000


def signed(leaves: list[bytes]) -> bytes:
    return sign_checkpoint(Checkpoint(ORIGIN, len(leaves), root_of(leaves)), LOG)


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness.create(tmp_path / "witness.json", KEY, LOG.vkey)


@pytest.fixture
def grown(witness: Witness) -> Witness:
    """A witness that has cosigned the first twenty leaves."""
    witness.cosign(signed(LEAVES[:20]), 0, [], NOW)
    return witness


def test_cosignature_verifies_and_the_state_follows(witness: Witness) -> None:
    note = signed(LEAVES[:5])
    line = witness.cosign(note, 0, [], NOW)
    opened = open_checkpoint(
        add_signatures(note, [line]), log=LOG.verifier, witnesses=[KEY.verifier], now=NOW
    )
    assert [(c.name, c.timestamp) for c in opened.cosignatures] == [("site-a", NOW)]
    assert witness.tree_size == 5
    witness.cosign(signed(LEAVES[:9]), 5, consistency_proof_of(LEAVES[:9], 5), NOW + 1)
    assert Witness(witness.path, KEY, LOG.verifier).tree_size == 9


def test_same_tree_is_cosigned_again_with_a_fresh_time(grown: Witness) -> None:
    note = signed(LEAVES[:20])
    line = grown.cosign(note, 20, [], NOW + 60)
    opened = open_checkpoint(
        add_signatures(note, [line]), log=LOG.verifier, witnesses=[KEY.verifier], now=NOW + 60
    )
    assert opened.cosignatures[0].timestamp == NOW + 60


def test_empty_tree_is_cosigned(witness: Witness) -> None:
    witness.cosign(signed([]), 0, [], NOW)
    assert witness.tree_size == 0


def refusal(witness: Witness, note: bytes, old: int, proof: list[bytes]) -> WitnessError:
    before = witness.path.read_bytes()
    with pytest.raises(WitnessError) as caught:
        witness.cosign(note, old, proof, NOW + 5)
    assert witness.path.read_bytes() == before
    return caught.value


def test_malformed_request_is_400(grown: Witness) -> None:
    good = consistency_proof_of(LEAVES[:30], 20)
    for note, old, proof in (
        (b"", 20, good),
        (b"hello\n\n", 20, good),
        (sign_note(b"hello\n", LOG), 20, good),
        (sign_note(Checkpoint(ORIGIN, 30, b"r" * 32).body() + b"extension\n", LOG), 20, good),
        (signed(LEAVES[:30]), 31, good),
        (signed(LEAVES[:30]), -1, good),
        (signed(LEAVES[:30]), 20, [b"x" * 32] * 64),
    ):
        error = refusal(grown, note, old, proof)
        assert isinstance(error, WitnessRequestError)
        assert status_of(error)[0] == 400


def test_unknown_origin_is_404_before_anything_else(grown: Witness) -> None:
    other = NoteSigner("other.example/log", SigningKey.generate())
    note = sign_checkpoint(Checkpoint(other.name, 30, b"r" * 32), other)
    error = refusal(grown, note, 99, [])
    assert isinstance(error, WitnessUnknownOriginError)
    assert error.status == 404


def test_missing_or_forged_log_signature_is_403(grown: Witness) -> None:
    body = Checkpoint(ORIGIN, 30, root_of(LEAVES[:30])).body()
    thief = NoteSigner(ORIGIN, SigningKey.generate())
    forged = body + b"\n" + SignatureLine(ORIGIN, LOG.verifier.key_id, b"\0" * 64).format()
    for note in (sign_note(body, thief), forged, sign_note(body, KEY, timestamp=NOW)):
        error = refusal(grown, note, 20, consistency_proof_of(LEAVES[:30], 20))
        assert isinstance(error, WitnessSignatureError)
        assert error.status == 403


def test_other_old_size_is_409_with_the_recorded_size_as_body(grown: Witness) -> None:
    for old in (0, 19, 21):
        error = refusal(grown, signed(LEAVES[:30]), old, consistency_proof_of(LEAVES[:30], old))
        assert isinstance(error, WitnessConflictError)
        assert status_of(error) == (409, "text/x.tlog.size", b"20\n")


def test_bad_proof_is_422_and_keeps_both_notes(grown: Witness) -> None:
    good = consistency_proof_of(LEAVES[:30], 20)
    seen = signed(LEAVES[:20])
    for leaves, proof in (
        (LEAVES[:30], []),
        (LEAVES[:30], good[:-1]),
        (LEAVES[:30], [*good, good[0]]),
        (LEAVES[:30], list(reversed(good))),
        (LEAVES[1:31], good),
        (LEAVES[1:21], []),
        (LEAVES[:20], [LEAVES[0]]),
    ):
        error = refusal(grown, signed(leaves), 20, proof)
        assert isinstance(error, WitnessProofError)
        assert error.status == 422
        assert (error.seen_note, error.offered_note) == (seen, signed(leaves))


def test_first_checkpoint_takes_an_empty_proof_only(witness: Witness) -> None:
    error = refusal(witness, signed(LEAVES[:5]), 0, [LEAVES[0]])
    assert isinstance(error, WitnessProofError)
    assert error.seen_note is None


def test_empty_tree_with_another_root_is_refused(witness: Witness) -> None:
    body = Checkpoint(ORIGIN, 7, b"r" * 32).body().replace(b"\n7\n", b"\n0\n")
    assert isinstance(refusal(witness, sign_note(body, LOG), 0, []), WitnessRequestError)


def test_operators_attacks_are_all_refused(grown: Witness) -> None:
    chooser = random.Random(11)
    for kind, _ in itertools.product(["rewrite", "insert", "delete", "swap", "truncate"], range(40)):
        forged, at = list(LEAVES[: chooser.randrange(20, 41)]), chooser.randrange(19)
        if kind == "rewrite":
            forged[at] = hash_leaf(b"forged")
        elif kind == "insert":
            forged.insert(at, hash_leaf(b"forged"))
        elif kind == "delete":
            del forged[at]
        elif kind == "swap":
            forged[at], forged[at + 1] = forged[at + 1], forged[at]
        else:
            del forged[at:]
        old = min(20, len(forged))
        assert isinstance(
            refusal(grown, signed(forged), old, consistency_proof_of(forged, old)),
            (WitnessProofError, WitnessConflictError),
        )


def test_forged_line_in_the_witness_name_does_not_poison_the_state(grown: Witness) -> None:
    forged = SignatureLine("site-a", KEY.verifier.key_id, b"\0" * 72).format()
    grown.cosign(signed(LEAVES[:30]) + forged, 20, consistency_proof_of(LEAVES[:30], 20), NOW)
    assert grown.tree_size == 30


def test_lost_damaged_or_foreign_state_is_never_taken_for_a_new_start(grown: Witness, tmp_path: Path) -> None:
    state = grown.path.read_bytes()
    other = NoteSigner("other.example/log", SigningKey.generate())
    with pytest.raises(WitnessStateError, match="other"):
        Witness(grown.path, KEY, other.vkey)
    for damaged in (
        b"",
        b"{}",
        state[:-1],
        state.replace(b'"tree_size":20', b'"tree_size":19'),
        state + b" ",
    ):
        assert damaged != state
        grown.path.write_bytes(damaged)
        with pytest.raises(WitnessStateError):
            Witness(grown.path, KEY, LOG.vkey)
        with pytest.raises(WitnessStateError):
            grown.cosign(signed(LEAVES[:20]), 20, [], NOW)
    with pytest.raises(WitnessStateError, match="never starts over"):
        Witness.create(grown.path, KEY, LOG.vkey)
    grown.path.unlink()
    with pytest.raises(WitnessStateError):
        grown.cosign(signed(LEAVES[:5]), 0, [], NOW)
    with pytest.raises(WitnessStateError):
        Witness(tmp_path / "absent.json", KEY, LOG.vkey)


def test_state_is_durable_before_the_cosignature_exists(grown: Witness) -> None:
    grown.path.parent.joinpath("moved").mkdir()
    moved = grown.path.rename(grown.path.parent / "moved" / "witness.json")
    opened = Witness(moved, KEY, LOG.vkey)
    moved.unlink()
    moved.mkdir()  # nothing can be renamed over a folder, and reading it fails
    with pytest.raises(WitnessStateError):
        opened.cosign(signed(LEAVES[:20]), 20, [], NOW)


def test_clock_that_ran_backwards_never_dates_a_cosignature_earlier(grown: Witness) -> None:
    note = signed(LEAVES[:20])
    line = grown.cosign(note, 20, [], NOW - 5)
    opened = open_checkpoint(
        add_signatures(note, [line]), log=LOG.verifier, witnesses=[KEY.verifier], now=NOW
    )
    assert opened.cosignatures[0].timestamp == NOW
    for now in (NOW - 3600, -1):
        with pytest.raises(WitnessClockError):
            grown.cosign(note, 20, [], now)


def test_racing_requests_never_let_the_recorded_size_fall(witness: Witness) -> None:
    sizes = list(range(1, 41)) * 2
    random.Random(5).shuffle(sizes)
    outcomes: list[int | WitnessError] = []

    def race(part: list[int]) -> None:
        for size in part:
            try:
                old = witness.tree_size
                if old <= size:
                    witness.cosign(signed(LEAVES[:size]), old, consistency_proof_of(LEAVES[:size], old), NOW)
                    outcomes.append(size)
            except WitnessConflictError as error:
                outcomes.append(error)
            seen = max([size for size in outcomes if isinstance(size, int)], default=0)
            assert witness.tree_size >= seen  # read after: other threads go on meanwhile

    threads = [threading.Thread(target=race, args=(sizes[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert witness.tree_size == max(size for size in outcomes if isinstance(size, int)) == 40


def test_keys_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFormatError):
        Witness.create(tmp_path / "a.json", LOG, LOG.vkey)
    with pytest.raises(KeyFormatError):
        Witness.create(tmp_path / "b.json", KEY, KEY.vkey)
    with pytest.raises(KeyFormatError):
        Witness.create(tmp_path / "c.json", KEY, "garbage")
