"""A log changes its key in the open; beyond its end a retired or stolen key's signature is nothing."""

from __future__ import annotations

import base64
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit import ledger_keys
from audit._key_ring import Ring
from audit.checkpoints import Checkpoint, add_signatures, cosign, open_checkpoint, sign_checkpoint
from audit.entries import (
    Entry,
    KeyRevoked,
    KeyRotated,
    LogCompromised,
    LogCreated,
    columns_of,
    encode_entry,
    new_entry,
    signing_payload,
)
from audit.errors import KeyFileError, LogKeyError, NoKnownSignatureError, SignerSplitError, SignerStateError
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.log_keys import read_log_keys
from audit.misbehaviour import prove_broken_promise
from audit.notes import KeyType, NoteSigner, parse_note
from audit.receipts import issue_receipts
from audit.service import export_evidence
from audit.signer import Signer, publish
from audit.verify import Report, Word, verify_evidence
from audit.verify.misbehaviour import verify_misbehaviour
from audit.whole_log import verify_log
from federation.trust import log_policy

ORIGIN = "hospital.example/log"
TIME = "2026-11-23T22:23:12Z"
NOW = 1_000
FILLER = KeyRevoked(key_id="k")


def new_key(name: str = ORIGIN, kind: KeyType = KeyType.ED25519) -> NoteSigner:
    return NoteSigner(name, SigningKey.generate(), kind)


def signed(body: Any, **fields: NoteSigner) -> Any:
    made = {
        field: base64.b64encode(key.key.sign(*signing_payload(body))).decode()
        for field, key in fields.items()
    }
    return replace(body, **made)


def created(key: NoteSigner) -> LogCreated:
    return LogCreated(origin=ORIGIN, log_key=key.vkey)


def rotated(old: NoteSigner, new: NoteSigner, retire_at: int) -> KeyRotated:
    body = KeyRotated(
        log_key=old.vkey, new_key=new.vkey, retire_at=retire_at, signature="", successor_proof=""
    )
    return signed(body, signature=old, successor_proof=new)  # type: ignore[no-any-return]


def compromised(lost: NoteSigner, successor: NoteSigner, valid_size: int) -> LogCompromised:
    body = LogCompromised(
        log_key=lost.vkey, valid_size=valid_size, successor=successor.vkey, reason="stolen", signature=""
    )
    return signed(body, signature=successor)  # type: ignore[no-any-return]


def append(ledger: Ledger, *bodies: Any) -> list[int]:
    placed = []
    for body in bodies:
        entry: Entry = new_entry(body, actor="coordinator", time=TIME)
        data = encode_entry(entry)
        found = ledger.append_wait(data, event_id=entry.event_id, index_columns=columns_of(data))
        placed.append(found.leaf_index)
    return placed


# what entries say


def test_key_is_valid_up_to_its_end_and_the_next_one_beyond() -> None:
    old, new = new_key(), new_key()
    keys = read_log_keys([(0, created(old)), (7, rotated(old, new, 20))])
    keys.check(old.vkey, 20, witnessed=False)
    keys.check(new.vkey, 20, witnessed=False)
    keys.check(new.vkey, 21, witnessed=False)
    with pytest.raises(LogKeyError) as caught:
        keys.check(old.vkey, 21, witnessed=True)
    assert (caught.value.code, caught.value.leaf_index) == ("log.key_retired", 7)


def test_stolen_key_counts_only_before_its_end_and_only_with_witnesses() -> None:
    old, new = new_key(), new_key()
    keys = read_log_keys([(0, created(old)), (9, compromised(old, new, 5))])
    keys.check(old.vkey, 5, witnessed=True)
    keys.check(new.vkey, 6, witnessed=False)
    for size, witnessed in ((5, False), (6, True), (6, False)):
        with pytest.raises(LogKeyError) as caught:
            keys.check(old.vkey, size, witnessed=witnessed)
        assert (caught.value.code, caught.value.leaf_index) == ("log.key_compromised", 9)


def test_compromise_ends_an_overlap_too() -> None:
    old, new, third = new_key(), new_key(), new_key()
    keys = read_log_keys([(0, created(old)), (3, rotated(old, new, 50)), (9, compromised(old, third, 5))])
    with pytest.raises(LogKeyError):
        keys.check(old.vkey, 6, witnessed=True)
    keys.check(new.vkey, 100, witnessed=False)


@pytest.mark.parametrize(
    "forge",
    [
        lambda old, new, other: replace(rotated(old, new, 9), retire_at=10),
        lambda old, new, other: replace(rotated(old, new, 9), new_key=other.vkey),
        lambda old, new, other: replace(rotated(old, new, 9), log_key=other.vkey),
        lambda old, new, other: replace(rotated(old, new, 9), successor_proof=""),
        lambda old, new, other: rotated(other, new, 9),
        lambda old, new, other: rotated(old, old, 9),
        lambda old, new, other: rotated(old, new_key("other.example/log"), 9),
        lambda old, new, other: rotated(old, new_key(kind=KeyType.COSIGNATURE), 9),
        lambda old, new, other: replace(compromised(old, new, 2), valid_size=3),
        lambda old, new, other: replace(compromised(old, new, 2), successor=other.vkey),
        lambda old, new, other: replace(compromised(old, new, 2), signature="x"),
        lambda old, new, other: compromised(other, new, 2),
        lambda old, new, other: compromised(old, new, 5),
        lambda old, new, other: compromised(old, new, -1),
        lambda old, new, other: created(new),
    ],
)
def test_forged_entry_about_keys_is_refused(forge: Callable[..., Any]) -> None:
    old, new, other = new_key(), new_key(), new_key()
    with pytest.raises(LogKeyError) as caught:
        read_log_keys([(0, created(old)), (4, forge(old, new, other))])
    assert caught.value.code == "log.key_entry"
    assert caught.value.leaf_index == 4


def test_retired_key_cannot_name_a_successor_of_its_own() -> None:
    old, new, thief = new_key(), new_key(), new_key()
    with pytest.raises(LogKeyError, match="ended already"):
        read_log_keys([(0, created(old)), (4, rotated(old, new, 9)), (6, rotated(old, thief, 9))])


# the signer


def test_who_asks_at_every_turn_hears_of_a_new_key_and_reads_nothing_again_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new_key(), new_key()
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        known = ledger_keys.KnownKeys(ledger)
        assert known.now().keys == {}
        append(ledger, created(first))
        before = known.now()
        assert set(before.keys) == {first.verifier.vkey}
        read = ledger_keys.keys_of
        with monkeypatch.context() as patched:
            patched.setattr(ledger_keys, "keys_of", lambda _: pytest.fail("read again"))
            assert known.now() is before
        append(ledger, rotated(first, second, 5))
        assert set(known.now().keys) == {first.verifier.vkey, second.verifier.vkey} == set(read(ledger).keys)
        append(ledger, rotated(second, first, 9))
        for _ in range(2):
            with pytest.raises(LogKeyError):
                known.now()


def test_both_keys_sign_until_the_old_one_retires(tmp_path: Path) -> None:
    signer = Signer.create(tmp_path / "signer", ORIGIN, b"secret")
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        append(ledger, created(signer.note_signer))
        first = publish(ledger, signer)
        old, new = signer.rotate(3)
        again = Signer.open(tmp_path / "signer", b"secret")
        assert again.vkey == new.vkey
        append(ledger, rotated(old, new, 3))
        for size, keys in (
            (2, {old.verifier, new.verifier}),
            (3, {old.verifier, new.verifier}),
            (4, {new.verifier}),
        ):
            while ledger.tree_size < size:
                append(ledger, FILLER)
            note = publish(ledger, again if size % 2 else signer)
            opened = open_checkpoint(note, log=[old.verifier, new.verifier], now=NOW)
            assert set(opened.log_keys) == keys, size
        assert len(parse_note(first).signatures) == 1
    files = sorted(tmp_path.glob("signer/*.pem"))
    assert len(files) == 2
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert b"ENCRYPTED" in file.read_bytes()
    with pytest.raises(KeyFileError):
        Signer.open(tmp_path / "signer")


def test_rotation_is_refused_while_another_is_under_way_or_behind_what_is_signed(tmp_path: Path) -> None:
    signer = Signer.create(tmp_path / "signer", ORIGIN)
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        append(ledger, *[FILLER] * 3)
        publish(ledger, signer)
    with pytest.raises(SignerStateError, match="signed already"):
        signer.rotate(2)
    signer.rotate(9)
    with pytest.raises(SignerStateError, match="under way"):
        signer.rotate(20)


def test_state_of_the_old_key_still_binds_the_new_one(tmp_path: Path) -> None:
    signer = Signer.create(tmp_path / "signer", ORIGIN)
    root = bytes(range(32))
    signer.sign(1, root, [])
    signer.replace_compromised()
    with pytest.raises(SignerSplitError):
        signer.sign(1, bytes(32), [])
    note = signer.sign(1, root, [])
    assert len(parse_note(note).signatures) == 1
    open_checkpoint(note, log=signer.verifier, now=NOW)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"current":"x","past":[],"retire_at":0,"retiring":""}', b"\xff"]
)
def test_damaged_ring_is_refused(tmp_path: Path, data: bytes) -> None:
    signer = Signer.create(tmp_path / "signer", ORIGIN)
    (tmp_path / "signer" / "ring.json").write_bytes(data or b"{")
    with pytest.raises(SignerStateError):
        Signer.open(tmp_path / "signer")
    assert Ring.parse(Ring(signer.vkey).encode()) == Ring(signer.vkey)


def test_ring_that_names_a_key_without_a_file_is_refused(tmp_path: Path) -> None:
    signer = Signer.create(tmp_path / "signer", ORIGIN)
    ring = Ring(signer.vkey).rotated(new_key().vkey, 5)
    (tmp_path / "signer" / "ring.json").write_bytes(ring.encode())
    with pytest.raises(SignerStateError, match="no key"):
        Signer.open(tmp_path / "signer")


# the verifier


class Frozen:
    """The log as it was when one checkpoint was the only one."""

    def __init__(self, ledger: Ledger, note: bytes) -> None:
        self.entry, self.search = ledger.entry, ledger.search
        self.inclusion_proof, self.tree_size = ledger.inclusion_proof, ledger.tree_size
        self.note = note

    def checkpoints(self) -> list[bytes]:
        return [self.note]


class World:
    """A log whose key changed at some size, two witnesses, and a policy that believes both keys."""

    def __init__(self, folder: Path, *, event: str) -> None:
        self.old, self.new = new_key(), new_key()
        self.witnesses = [new_key(f"site-{name}", KeyType.COSIGNATURE) for name in "ab"]
        self.path = folder / "log.db"
        self.ledger = Ledger.create(self.path, ORIGIN)
        append(self.ledger, created(self.old), FILLER)
        if event == "rotated":
            append(self.ledger, rotated(self.old, self.new, 3))
        else:
            append(self.ledger, compromised(self.old, self.new, 2))
        append(self.ledger, FILLER)

    @property
    def policy(self) -> str:
        lines = [f"log {self.old.vkey}", f"log {self.new.vkey}"]
        lines += [f"witness {w.verifier.name} {w.vkey}" for w in self.witnesses]
        return "\n".join([*lines, "group sites 2 site-a site-b", "quorum sites", ""])

    def checkpoint(self, size: int, *keys: NoteSigner, witnessed: bool) -> bytes:
        note = sign_checkpoint(Checkpoint(ORIGIN, size, self.ledger.root_at(size)), keys[0])
        note = add_signatures(note, [key.line(parse_note(note).text) for key in keys[1:]])
        lines = [cosign(note, witness, NOW) for witness in self.witnesses] if witnessed else []
        return add_signatures(note, lines)

    def report(self, note: bytes, leaf: int = 1) -> Report:
        ledger = Frozen(self.ledger, note)
        data = export_evidence(ledger, lambda _: None, leaf_index=leaf)
        return verify_evidence(data, policy_text=self.policy)


def code_of(report: Report) -> str:
    return next((step.code for step in report.steps if step.word is Word.FAIL), "ok")


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = World(tmp_path, event=request.param)
    yield made
    made.ledger.close()


@pytest.mark.parametrize("world", ["rotated"], indirect=True)
def test_verifier_refuses_the_retired_key_on_a_larger_tree(world: World) -> None:
    assert code_of(world.report(world.checkpoint(3, world.old, world.new, witnessed=True))) == "ok"
    assert code_of(world.report(world.checkpoint(3, world.old, witnessed=True))) == "ok"
    assert code_of(world.report(world.checkpoint(4, world.new, witnessed=True))) == "ok"
    late = world.report(world.checkpoint(4, world.old, witnessed=True))
    assert code_of(late) == "log.key_retired"
    assert late.exit_code != 0


@pytest.mark.parametrize("world", ["compromised"], indirect=True)
def test_verifier_believes_a_stolen_key_nothing_but_what_witnesses_saw(world: World) -> None:
    assert code_of(world.report(world.checkpoint(2, world.old, witnessed=True))) == "ok"
    assert code_of(world.report(world.checkpoint(4, world.new, witnessed=True))) == "ok"
    for size in (3, 4):
        report = world.report(world.checkpoint(size, world.old, witnessed=True))
        assert code_of(report) == "log.key_compromised", size


def receipt_report(world: World, leaf: int, key: NoteSigner, *, policy: str = "") -> Report:
    """A witnessed file of the whole log, with a receipt for one of its leaves by a key of our choice."""
    note = world.checkpoint(world.ledger.tree_size, world.new, witnessed=True)
    data = export_evidence(Frozen(world.ledger, note), lambda _: None, leaf_index=leaf)
    leaf_hash = world.ledger.leaf_hashes(leaf, leaf + 1)[0]
    times = {"time": "2026-01-02T03:04:05Z", "merge_deadline": "2026-01-02T03:05:05Z"}
    (receipt,) = issue_receipts(key.key, ORIGIN, [(leaf, leaf_hash)], **times)
    return verify_evidence(data, policy_text=policy or world.policy, receipt=receipt.encode())


@pytest.mark.parametrize("world", ["rotated", "compromised"], indirect=True)
def test_receipt_counts_only_for_leaves_that_its_key_could_still_promise(world: World) -> None:
    """The old key ends at size 3 when it was rotated out, at size 2 when it was stolen."""
    is_rotated = b"key.rotated" in world.ledger.entry(2)
    last, code = (2, "log.key_retired") if is_rotated else (1, "log.key_compromised")
    for leaf in range(4):
        assert code_of(receipt_report(world, leaf, world.new)) == "ok", leaf
        assert code_of(receipt_report(world, leaf, world.old)) == ("ok" if leaf <= last else code), leaf
        assert code_of(receipt_report(world, leaf, new_key())) == "receipt.invalid", leaf
    without = world.policy.replace(f"log {world.old.vkey}\n", "")
    assert code_of(receipt_report(world, 0, world.old, policy=without)) == "receipt.invalid"


@pytest.mark.parametrize("world", ["rotated", "compromised"], indirect=True)
def test_proposed_policy_keeps_a_retired_key_and_drops_a_stolen_one(world: World) -> None:
    """So nobody who asks again can be shown a promise that a thief made: it convicts nobody."""
    policy = log_policy(world.ledger)
    believed = [log.verifier.vkey for log in policy.logs]
    is_rotated = b"key.rotated" in world.ledger.entry(2)
    assert believed == ([world.new.vkey, world.old.vkey] if is_rotated else [world.new.vkey])
    times = {"time": "2026-01-02T03:04:05Z", "merge_deadline": "2026-01-02T03:05:05Z"}
    (receipt,) = issue_receipts(world.old.key, ORIGIN, [(1, b"x" * 32)], **times)
    note = world.checkpoint(4, world.new, witnessed=True)
    accused = prove_broken_promise(receipt, note, world.ledger.node).encode()
    report = verify_misbehaviour(accused, policy_text=policy.format())
    assert (code_of(report) == "ok") == is_rotated, report.text()


@pytest.mark.parametrize("world", ["rotated"], indirect=True)
def test_policy_without_the_new_key_accepts_nothing_that_it_signed(world: World) -> None:
    note = world.checkpoint(4, world.new, witnessed=True)
    data = export_evidence(world.ledger, lambda _: None, leaf_index=1, checkpoint=note)
    policy = world.policy.replace(f"log {world.new.vkey}\n", "")
    report = verify_evidence(data, policy_text=policy)
    assert code_of(report) == NoKnownSignatureError.code


@pytest.mark.parametrize("world", ["rotated", "compromised"], indirect=True)
def test_whole_log_bears_no_signature_of_an_ended_key(world: World) -> None:
    world.ledger.store_checkpoint(world.checkpoint(4, world.new, witnessed=True))
    assert code_of(verify_log(world.path, policy_text=world.policy)) == "ok"
    world.ledger.store_checkpoint(world.checkpoint(2, world.old, witnessed=True))
    assert code_of(verify_log(world.path, policy_text=world.policy)) == "ok"
    append(world.ledger, FILLER)
    world.ledger.store_checkpoint(world.checkpoint(5, world.old, witnessed=True))
    report = verify_log(world.path, policy_text=world.policy)
    assert code_of(report) in ("log.key_retired", "log.key_compromised")
