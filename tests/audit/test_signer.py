from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import signer as signer_module
from audit._files import locked
from audit.checkpoints import cosign, open_checkpoint, parse_checkpoint_note
from audit.errors import (
    KeyFileError,
    SignerExistsError,
    SignerMissingError,
    SignerRewriteError,
    SignerRollbackError,
    SignerSplitError,
    SignerStateError,
)
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.merkle import EMPTY_ROOT, consistency_proof_of, hash_leaf, root_of
from audit.notes import KeyType, NoteSigner
from audit.signer import Signer, publish

ORIGIN = "hospital.example/log"
LEAVES = [hash_leaf(b"%d" % i) for i in range(40)]


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.create(tmp_path / "signer", ORIGIN)


def sign(signer: Signer, leaves: list[bytes], since: int) -> bytes:
    return signer.sign(len(leaves), root_of(leaves), consistency_proof_of(leaves, since))


def test_signed_tree_opens_under_the_signers_vkey(signer: Signer) -> None:
    note = sign(signer, LEAVES[:5], 0)
    opened = open_checkpoint(note, log=signer.verifier, now=0)
    assert opened.checkpoint.tree_size == 5
    assert signer.state().checkpoint == opened.checkpoint


def test_empty_tree_can_be_signed_and_grown(signer: Signer) -> None:
    signer.sign(0, EMPTY_ROOT, [])
    sign(signer, LEAVES[:3], 0)
    assert signer.state().checkpoint.tree_size == 3


def test_same_tree_again_yields_the_same_note(signer: Signer) -> None:
    first = sign(signer, LEAVES[:5], 0)
    assert sign(signer, LEAVES[:5], 5) == first
    assert sign(Signer.open(signer.home), LEAVES[:5], 5) == first


def test_smaller_tree_is_refused_with_both_sizes(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    with pytest.raises(SignerRollbackError) as caught:
        sign(signer, LEAVES[:8], 0)
    assert (caught.value.signed_size, caught.value.offered_size) == (9, 8)
    assert caught.value.signed_root == root_of(LEAVES[:9])
    with pytest.raises(SignerRollbackError):
        signer.sign(0, EMPTY_ROOT, [])


def test_second_history_of_one_size_is_refused_with_both_roots(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    with pytest.raises(SignerSplitError) as caught:
        sign(signer, LEAVES[1:10], 9)
    assert (caught.value.signed_root, caught.value.offered_root) == (
        root_of(LEAVES[:9]),
        root_of(LEAVES[1:10]),
    )


def test_refusal_leaves_the_state_and_the_next_honest_tree_alone(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    before = (signer.home / "state.json").read_bytes()
    for forged in (LEAVES[:8], LEAVES[1:10], LEAVES[1:20]):
        with pytest.raises((SignerRollbackError, SignerSplitError, SignerRewriteError)):
            signer.sign(len(forged), root_of(forged), lambda size, f=forged: consistency_proof_of(f, size))
    assert (signer.home / "state.json").read_bytes() == before
    sign(signer, LEAVES[:20], 9)


def test_operators_rewrites_are_all_refused(signer: Signer) -> None:
    """Rewrite, insert, delete and swap below the signed size, with the best proof of the forged tree."""
    chooser = random.Random(3)
    sign(signer, LEAVES[:20], 0)
    for _ in range(100):
        forged = list(LEAVES)
        at = chooser.randrange(19)
        kind = chooser.choice(["rewrite", "insert", "delete", "swap"])
        if kind == "rewrite":
            forged[at] = hash_leaf(b"forged")
        elif kind == "insert":
            forged.insert(at, hash_leaf(b"forged"))
        elif kind == "delete":
            del forged[at]
        else:
            forged[at], forged[at + 1] = forged[at + 1], forged[at]
        with pytest.raises(SignerRewriteError) as caught:
            sign(signer, forged, 20)
        assert caught.value.offered_root == root_of(forged)
        honest_proof = consistency_proof_of(LEAVES, 20)
        with pytest.raises(SignerRewriteError):
            signer.sign(40, root_of(forged), honest_proof)


@pytest.mark.parametrize("proof", [[], [b"x" * 32], [b"short"], [b"x" * 32] * 70])
def test_growth_without_a_valid_proof_is_refused(signer: Signer, proof: list[bytes]) -> None:
    sign(signer, LEAVES[:20], 0)
    with pytest.raises(SignerRewriteError):
        signer.sign(40, root_of(LEAVES), proof)


def test_signers_home_is_private_and_made_once(signer: Signer) -> None:
    for name in ("key.pem", "state.json"):
        assert stat.S_IMODE((signer.home / name).stat().st_mode) == 0o600
    with pytest.raises(SignerExistsError):
        Signer.create(signer.home, ORIGIN)
    assert Signer.open(signer.home).vkey == signer.vkey


def test_creation_that_died_before_its_key_goes_on(signer: Signer) -> None:
    (signer.home / "key.pem").unlink()
    with pytest.raises(SignerMissingError):
        Signer.open(signer.home)
    with pytest.raises(SignerExistsError):
        Signer.create(signer.home, "other.example/log")
    assert Signer.create(signer.home, ORIGIN).state().note is None


def test_signer_that_has_signed_and_lost_its_key_is_never_made_anew(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    (signer.home / "key.pem").unlink()
    with pytest.raises(SignerExistsError):
        Signer.create(signer.home, ORIGIN)


def test_opening_never_makes_a_signer(tmp_path: Path) -> None:
    with pytest.raises(SignerMissingError):
        Signer.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    made = Signer.create(tmp_path / "signer", ORIGIN, b"passphrase")
    assert Signer.open(tmp_path / "signer", b"passphrase").vkey == made.vkey
    with pytest.raises(KeyFileError):
        Signer.open(tmp_path / "signer")


def test_lost_state_is_never_taken_for_a_new_start(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    (signer.home / "state.json").unlink()
    with pytest.raises(SignerStateError):
        sign(signer, LEAVES[:3], 0)
    with pytest.raises(SignerStateError):
        Signer.open(signer.home)
    with pytest.raises(SignerExistsError):
        Signer.create(signer.home, ORIGIN)


def edited_states(state: bytes) -> list[bytes]:
    document = json.loads(state)
    edits = [
        {"tree_size": 3},
        {"tree_size": 0, "root_hash": EMPTY_ROOT.hex()},
        {"root_hash": "00" * 32},
        {"root_hash": "zz" * 32},
        {"note": ""},
        {"note": document["note"].replace("\u2014", "-")},
        {"origin": "other.example/log"},
        {"tree_size": "9"},
        {"more": 1},
    ]
    made = [
        json.dumps(document | edit, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        for edit in edits
    ]
    return [b"", b"{}", b"[]", state[:-1], state + b"\n", *(text.encode() for text in made)]


def test_edited_state_is_refused(signer: Signer) -> None:
    sign(signer, LEAVES[:9], 0)
    path = signer.home / "state.json"
    state = path.read_bytes()
    for edited in edited_states(state):
        path.write_bytes(edited)
        with pytest.raises(SignerStateError):
            signer.sign(40, root_of(LEAVES), lambda size: consistency_proof_of(LEAVES, size))
    path.write_bytes(state)
    sign(signer, LEAVES[:10], 9)


def test_state_signed_by_another_key_is_refused(signer: Signer, tmp_path: Path) -> None:
    other = Signer.create(tmp_path / "other", ORIGIN)
    sign(other, LEAVES[:9], 0)
    (signer.home / "state.json").write_bytes((other.home / "state.json").read_bytes())
    with pytest.raises(SignerStateError):
        signer.state()


def test_two_threads_never_sign_two_histories(signer: Signer) -> None:
    forged = [hash_leaf(b"forged"), *LEAVES[1:]]
    notes: list[bytes] = []
    refused: list[Exception] = []

    def race(leaves: list[bytes]) -> None:
        for size in range(1, 30):
            part = leaves[:size]
            try:
                notes.append(
                    signer.sign(size, root_of(part), lambda old, p=part: consistency_proof_of(p, old))
                )
            except (SignerRewriteError, SignerSplitError, SignerRollbackError) as error:
                refused.append(error)

    threads = [threading.Thread(target=race, args=(leaves,)) for leaves in (LEAVES, forged)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    roots = {parse_checkpoint_note(note).tree_size: parse_checkpoint_note(note).root_hash for note in notes}
    for history in (LEAVES, forged):
        honest = [roots[size] == root_of(history[:size]) for size in roots]
        assert all(honest) or not any(honest)
    assert len(notes) + len(refused) == 58
    assert refused


def test_home_is_locked_during_a_signature_only(signer: Signer, tmp_path: Path) -> None:
    script = (
        "import sys; from audit.signer import Signer; from audit.merkle import EMPTY_ROOT\n"
        "Signer.open(sys.argv[1]).sign(0, EMPTY_ROOT, [])"
    )
    sign_elsewhere = [sys.executable, "-c", script, str(signer.home)]
    subprocess.run(sign_elsewhere, check=True, timeout=30)
    with locked(signer.home / "lock", 1), pytest.raises(TimeoutError), locked(signer.home / "lock", 0.05):
        pytest.fail("the lock was given twice")
    subprocess.run(sign_elsewhere, check=True, timeout=30)


def test_publish_signs_and_keeps_cosignatures(
    ledger: Ledger, signer: Signer, log_tools: SimpleNamespace
) -> None:
    log_tools.fill(ledger, range(300))
    note = publish(ledger, signer)
    site = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
    cosigned = ledger.store_checkpoint(note + cosign(note, site, 100))
    assert publish(ledger, signer) == cosigned
    log_tools.fill(ledger, range(300, 301))
    assert parse_checkpoint_note(publish(ledger, signer)).tree_size == 301


def test_publish_of_a_restored_old_backup_is_refused(
    tmp_path: Path, signer: Signer, log_tools: SimpleNamespace
) -> None:
    path, backup = tmp_path / "log.db", tmp_path / "backup.db"
    with Ledger.create(path, ORIGIN) as ledger:
        log_tools.fill(ledger, range(5))
    backup.write_bytes(path.read_bytes())
    with Ledger.open(path) as ledger:
        log_tools.fill(ledger, range(5, 9))
        publish(ledger, signer)
    path.write_bytes(backup.read_bytes())
    with Ledger.open(path) as ledger:
        with pytest.raises(SignerRollbackError):
            publish(ledger, signer)
        log_tools.fill(ledger, range(5, 9), text="regrown otherwise")
        with pytest.raises(SignerSplitError):
            publish(ledger, signer)
        log_tools.fill(ledger, range(9, 12))
        with pytest.raises(SignerRewriteError):
            publish(ledger, signer)


def test_publish_of_another_log_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(SignerStateError):
        publish(ledger, Signer.create(tmp_path / "other-signer", "other.example/log"))


def test_signer_loads_no_database() -> None:
    script = f"import {signer_module.__name__}, sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"sqlmodel", "sqlalchemy", "pydantic", "torch", "flwr"} & set(out.split())
