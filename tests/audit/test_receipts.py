from __future__ import annotations

import base64
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.checkpoints import Checkpoint
from audit.errors import (
    AuditError,
    BadSignatureError,
    MalformedReceiptError,
    OriginMismatchError,
    ReceiptMismatchError,
)
from audit.keys import SigningKey
from audit.merkle import hash_leaf, inclusion_proof_of, root_of
from audit.notes import NoteSigner, NoteVerifier
from audit.receipts import MAX_BATCH, Receipt, issue_receipts, verify_kept, verify_receipt

KEY = SigningKey.generate()
LOG = NoteVerifier("hospital.example/log", KEY.verify_key)
LEAVES = [hash_leaf(b"%d" % i) for i in range(20)]
TIME, DEADLINE = "2026-11-23T22:23:12Z", "2026-11-23T22:24:12Z"


def issue(count: int) -> list[Receipt]:
    leaves = [(index, LEAVES[index]) for index in range(count)]
    return issue_receipts(KEY, LOG.name, leaves, time=TIME, merge_deadline=DEADLINE)


RECEIPT = issue(7)[4]


def test_every_receipt_of_every_batch_size_verifies() -> None:
    for count in range(1, 20):
        receipts = issue(count)
        assert len({receipt.signature for receipt in receipts}) == 1
        for receipt in receipts:
            verify_receipt(Receipt.parse(receipt.encode()), LOG)


@pytest.mark.parametrize(
    "change",
    [
        {"leaf_index": 5},
        {"leaf_hash": LEAVES[5]},
        {"time": "2026-11-23T22:23:11Z"},
        {"merge_deadline": "2026-11-23T22:24:13Z"},
        {"batch_index": 5},
        {"batch_size": 8},
        {"signature": b"\0" * 64},
    ],
)
def test_altered_receipt_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((BadSignatureError, ReceiptMismatchError)):
        verify_receipt(dataclasses.replace(RECEIPT, **change), LOG)  # type: ignore[arg-type]


def test_altered_path_is_refused() -> None:
    path = RECEIPT.batch_path
    for changed in ((), path[1:], (*path, path[0]), path[::-1], (LEAVES[0], *path[1:])):
        with pytest.raises((BadSignatureError, ReceiptMismatchError)):
            verify_receipt(dataclasses.replace(RECEIPT, batch_path=changed), LOG)


def test_receipt_of_another_log_or_key_is_refused() -> None:
    with pytest.raises(OriginMismatchError):
        verify_receipt(RECEIPT, NoteVerifier("other.example/log", KEY.verify_key))
    with pytest.raises(BadSignatureError):
        verify_receipt(RECEIPT, NoteSigner(LOG.name, SigningKey.generate()).verifier)


def test_kept_promise_is_shown_and_a_broken_one_is_transferable() -> None:
    honest = Checkpoint(LOG.name, 20, root_of(LEAVES))
    verify_kept(RECEIPT, honest, inclusion_proof_of(LEAVES, 4))
    forged = [*LEAVES[:4], hash_leaf(b"forged"), *LEAVES[5:]]
    for checkpoint, proof in (
        (Checkpoint(LOG.name, 20, root_of(forged)), inclusion_proof_of(forged, 4)),
        (Checkpoint(LOG.name, 20, root_of(LEAVES)), inclusion_proof_of(LEAVES, 5)),
        (Checkpoint(LOG.name, 4, root_of(LEAVES[:4])), []),
        (Checkpoint("other.example", 20, root_of(LEAVES)), inclusion_proof_of(LEAVES, 4)),
    ):
        with pytest.raises(ReceiptMismatchError):
            verify_kept(RECEIPT, checkpoint, proof)


def altered(**change: object) -> bytes:
    document = json.loads(RECEIPT.encode())
    for name, value in change.items():
        if value is None:
            del document[name]
        else:
            document[name] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"origin": None},
        {"more": 1},
        {"origin": 5},
        {"origin": "two words"},
        {"leaf_index": "4"},
        {"leaf_index": True},
        {"leaf_index": -1},
        {"leaf_hash": "00"},
        {"leaf_hash": "G" * 64},
        {"leaf_hash": "AB" * 32},
        {"time": "2026-11-23 22:23:12Z"},
        {"time": "2026-11-23T22:23:12+00:00"},
        {"merge_deadline": "2026-11-23T22:23:11Z"},
        {"batch_index": 7},
        {"batch_size": 0},
        {"batch_size": MAX_BATCH + 1},
        {"batch_path": "x"},
        {"batch_path": [1]},
        {"batch_path": ["00"]},
        {"signature": "AAAA"},
        {"signature": "!"},
        {"signature": base64.b64encode(b"x" * 64).decode()[:-3] + "B=="},
    ],
)
def test_malformed_receipt_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(MalformedReceiptError):
        Receipt.parse(altered(**change))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b'{"a":1,"a":1}', b"x" * 20_000])
def test_what_is_no_receipt_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedReceiptError):
        Receipt.parse(data)


@given(
    st.dictionaries(
        st.sampled_from(sorted(json.loads(RECEIPT.encode()))), st.one_of(st.integers(), st.text())
    )
)
def test_fuzzed_receipt_raises_declared_errors_only(change: dict[str, object]) -> None:
    data = altered(**change)
    try:
        receipt = Receipt.parse(data)
        verify_receipt(receipt, LOG)
    except AuditError:
        return
    assert receipt == RECEIPT


@pytest.mark.parametrize("count", [0, MAX_BATCH + 1])
def test_batch_of_impossible_size_is_refused(count: int) -> None:
    with pytest.raises(MalformedReceiptError):
        issue_receipts(KEY, LOG.name, [(0, LEAVES[0])] * count, time=TIME, merge_deadline=DEADLINE)
