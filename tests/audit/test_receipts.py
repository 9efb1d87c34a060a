from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
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
from audit.receipts import (
    MAX_BATCH,
    Receipt,
    issue_documents,
    issue_receipts,
    verify_kept,
    verify_receipt,
)

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


def same_documents(leaves: list[tuple[int, bytes]], origin: str = LOG.name) -> None:
    documents = issue_documents(KEY, origin, leaves, time=TIME, merge_deadline=DEADLINE)
    receipts = issue_receipts(KEY, origin, leaves, time=TIME, merge_deadline=DEADLINE)
    assert documents == [receipt.to_json() for receipt in receipts]
    assert [list(document) for document in documents] == [list(receipt.to_json()) for receipt in receipts]
    for document, receipt in zip(documents, receipts, strict=True):
        assert Receipt.from_json(document) == receipt
        verify_receipt(receipt, NoteVerifier(origin, KEY.verify_key))


@pytest.mark.parametrize("count", range(1, 41))
def test_documents_of_a_batch_are_its_receipts(count: int) -> None:
    same_documents([(1000 + index, hash_leaf(b"%d" % index)) for index in range(count)])


@given(
    st.lists(
        st.tuples(st.integers(0, 2**53 - 1), st.binary(min_size=32, max_size=32)), min_size=1, max_size=9
    )
)
@example([(2**53 - 1, b"\xff" * 32), (0, b"\0" * 32), (2**53 - 1, b"\xff" * 32)])
def test_documents_of_leaves_in_any_order_are_their_receipts(leaves: list[tuple[int, bytes]]) -> None:
    same_documents(leaves)


@pytest.mark.parametrize("origin", ["x", "größe.example/log", 'quoted"\\.example', "%s.{}", "a" * 64])
def test_documents_of_any_log_are_its_receipts(origin: str) -> None:
    same_documents([(index, LEAVES[index]) for index in range(3)], origin)


def test_documents_of_a_batch_share_nothing_that_can_be_changed() -> None:
    leaves = [(index, LEAVES[index]) for index in range(4)]
    documents = issue_documents(KEY, LOG.name, leaves, time=TIME, merge_deadline=DEADLINE)
    for document in documents[1:]:
        document["batch_path"].append("changed")  # type: ignore[union-attr]
        document["origin"] = "changed"
    verify_receipt(Receipt.from_json(documents[0]), LOG)


@pytest.mark.parametrize(
    "change",
    [
        {"leaves": []},
        {"leaves": [(0, LEAVES[0])] * (MAX_BATCH + 1)},
        {"leaves": [(-1, LEAVES[0])]},
        {"leaves": [(0, LEAVES[0]), (-1, LEAVES[1])]},
        {"leaves": [(2**53, LEAVES[0])]},
        {"leaves": [(0, LEAVES[0]), (2**53, LEAVES[1]), (1, LEAVES[2])]},
        {"leaves": [(-1, LEAVES[0]), (2**53, LEAVES[1])]},
        {"leaves": [(0, LEAVES[0][:31])]},
        {"leaves": [(0, LEAVES[0] + b"0")]},
        {"leaves": [(0, LEAVES[0]), (1, LEAVES[1][:31])]},
        {"leaves": [(0, LEAVES[0]), (1, LEAVES[1]), (2, b"")]},
        {"leaves": [(0, LEAVES[0]), (1, LEAVES[1] + b"0"), (2, LEAVES[2])]},
        {"origin": ""},
        {"origin": "two words"},
        {"origin": "a+b"},
        {"origin": "line\nbreak"},
        {"time": ""},
        {"time": "2026-11-23 22:23:12Z"},
        {"time": "2026-11-23T22:23:12+00:00"},
        {"time": "2026-11-23T22:23:12.5Z"},
        {"time": TIME + "\n"},
        {"merge_deadline": "tomorrow"},
        {"merge_deadline": DEADLINE.lower()},
        {"merge_deadline": "2026-11-23T22:23:11Z"},
    ],
)
def test_batch_of_documents_is_refused_where_its_receipts_are(change: dict[str, Any]) -> None:
    given = {"leaves": [(0, LEAVES[0]), (1, LEAVES[1])], "origin": LOG.name, "time": TIME,
             "merge_deadline": DEADLINE, **change}  # fmt: skip
    for issue_batch in (issue_receipts, issue_documents):
        with pytest.raises(MalformedReceiptError):
            issue_batch(KEY, **given)
