"""Large blobs in pieces: whole again by digest, and every way to tamper has a code of its own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from audit.canonical import canonical_bytes
from audit.weights import encode_update, encode_weights
from federation import pieces
from federation.exchange import read_answer
from federation.flat import update_bytes
from federation.pieces import (
    PieceDigestError,
    PieceMissingError,
    PiecesError,
    PieceSizeError,
    PieceUnknownError,
    blob_records,
    brings_blobs,
    message_content,
    read_blobs,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 10)


RANDOM = np.random.default_rng(3)
UPDATE = encode_update([int(v) for v in RANDOM.integers(-(2**31), 2**31, size=1000)])
WIDE = encode_update([2**31, *range(1000)])
MODEL = encode_weights({"w": ((700,), RANDOM.normal(size=700).tolist())})


def content(**blobs):
    return RecordDict(blob_records(blobs))


def changed(record, **fields):
    lines = json.loads(record["lines"])
    lines["update"].update(fields)
    return ConfigRecord({"lines": canonical_bytes(lines)})


@pytest.mark.parametrize("blob", [b"", b"x", UPDATE, WIDE, MODEL, bytes(5000), RANDOM.bytes(4099)])
def test_what_is_cut_comes_back(blob):
    assert read_blobs(content(update=blob, other=b"small")) == {"update": blob, "other": b"small"}


@pytest.mark.parametrize("edge", [-(2**31), 2**31 - 1, -1, 0])
def test_integers_of_32_bits_travel_in_half_the_bytes(edge):
    blob = encode_update([edge] * 2000)
    sent = content(update=blob)
    carried = sum(len(record["piece"]) for key, record in sent.items() if key.startswith("piece-"))
    assert carried < len(blob) / 2 + 200
    assert read_blobs(sent) == {"update": blob}


@pytest.mark.parametrize("edge", [-(2**31) - 1, 2**31])
def test_one_wider_integer_and_nothing_is_left_out(edge):
    blob = encode_update([0] * 2000 + [edge])
    sent = content(update=blob)
    assert json.loads(sent["pieces"]["lines"])["update"]["packing"] == "plain"
    assert read_blobs(sent) == {"update": blob}


def test_small_blobs_are_not_cut():
    assert set(content(update=bytes(1024))) == {"blobs"}


def missing(sent):
    del sent["piece-000001-update"]


def repeated(sent):
    sent["piece-000099-update"] = sent["piece-000000-update"]


def reordered(sent):
    one, two = "piece-000001-update", "piece-000002-update"
    sent[one], sent[two] = sent[two], sent[one]


def altered(sent):
    piece = sent["piece-000001-update"]["piece"]
    sent["piece-000001-update"] = ConfigRecord({"piece": bytes([piece[0] ^ 1]) + piece[1:]})


def oversized(sent):
    sent["piece-000001-update"] = ConfigRecord({"piece": bytes(2000)})


def cut_short(sent):
    sent["piece-000001-update"] = ConfigRecord({"piece": bytes(3)})


def empty(sent):
    sent["piece-000001-update"] = ConfigRecord({"piece": b""})


def no_bytes(sent):
    sent["piece-000001-update"] = ConfigRecord({"piece": "text"})


def other_digest(sent):
    sent["pieces"] = changed(sent["pieces"], digest="0" * 64)


def other_size(sent):
    sent["pieces"] = changed(sent["pieces"], size=json.loads(sent["pieces"]["lines"])["update"]["size"] + 8)


def huge_size(sent):
    sent["pieces"] = changed(sent["pieces"], size=1 << 40)


def many_pieces(sent):
    sent["pieces"] = changed(sent["pieces"], count=10**6)


def negative(sent):
    sent["pieces"] = changed(sent["pieces"], count=-1)


def other_packing(sent):
    sent["pieces"] = changed(sent["pieces"], packing="zip")


def unknown_field(sent):
    sent["pieces"] = changed(sent["pieces"], more=1)


def twice(sent):
    sent["blobs"] = ConfigRecord({"update": b"another"})


def no_lines(sent):
    sent["pieces"] = ConfigRecord({"lines": b"{}"})


def not_canonical(sent):
    sent["pieces"] = ConfigRecord({"lines": b" " + sent["pieces"]["lines"]})


def no_announcement(sent):
    del sent["pieces"]


def no_blobs(sent):
    del sent["blobs"]


HOSTILE = {
    missing: PieceMissingError,
    no_bytes: PieceMissingError,
    repeated: PieceUnknownError,
    no_announcement: PieceUnknownError,
    reordered: PieceDigestError,
    altered: PieceDigestError,
    other_digest: PieceDigestError,
    oversized: PieceSizeError,
    cut_short: PieceSizeError,
    empty: PieceSizeError,
    other_size: PieceSizeError,
    huge_size: PieceSizeError,
    many_pieces: PieceSizeError,
    negative: PieceSizeError,
    other_packing: PiecesError,
    unknown_field: PiecesError,
    twice: PiecesError,
    no_lines: PiecesError,
    not_canonical: PiecesError,
    no_blobs: PiecesError,
}


@pytest.mark.parametrize("blob", [UPDATE, MODEL], ids=["packed", "plain"])
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_a_hostile_message_is_named(attack, blob):
    sent = content(update=blob)
    attack(sent)
    with pytest.raises(PiecesError) as caught:
        read_blobs(sent)
    assert type(caught.value) is HOSTILE[attack]


def test_the_codes_differ():
    codes = {error.code for error in HOSTILE.values()}
    assert codes == {
        "federation.piece_missing",
        "federation.piece_unknown",
        "federation.piece_digest",
        "federation.piece_size",
        "federation.pieces",
    }


def test_a_coordinator_says_which_and_goes_on():
    sent = RecordDict({"header": ConfigRecord({"kind": "round", "header": b"{}"}), **content(update=UPDATE)})
    reordered(sent)
    reply = SimpleNamespace(content=sent, has_error=lambda: False)
    assert read_answer("a", reply).failure.startswith("federation.piece_digest")


def test_numpy_gives_the_definitions_bytes():
    values = RANDOM.integers(-(2**60), 2**60, size=333)
    assert update_bytes(values) == encode_update(values.tolist()) == update_bytes(values.tolist())


def test_a_small_message_is_one_record_and_comes_back():
    sent = message_content("round", b"{}", {"update": b"abc", "other": b""})
    assert set(sent) == {"header"}
    assert read_blobs(sent) == {"update": b"abc", "other": b""}
    assert brings_blobs(sent)
    assert not brings_blobs(message_content("round", b"{}", {}))


def test_a_larger_blob_has_a_record_that_several_sites_can_share(monkeypatch):
    monkeypatch.setattr(pieces, "INLINE_BYTES", 100)
    blob = RANDOM.bytes(101)
    ready = blob_records({"model": blob})
    one = message_content("round", b"1", {"model": blob}, ready)
    two = message_content("round", b"2", {"model": blob}, ready)
    assert one["blobs"] is two["blobs"]
    assert read_blobs(one) == {"model": blob}
    assert brings_blobs(one)


@pytest.mark.parametrize(
    "fields",
    [
        {"blob-a": "text"},
        {"blob-": b"x"},
        {"blob-A": b"x"},
        {"blob-../a": b"x"},
        {"bloba": b"x"},
        {"blobs": b"x"},
        {"blob-a": bytes((64 << 10) + 1)},
        {f"blob-{name}": b"" for name in "abcdefghi"},
    ],
    ids=str,
)
def test_a_header_with_other_fields_is_refused(fields):
    record = ConfigRecord({"kind": "round", "header": b"{}", **fields})
    with pytest.raises(PiecesError):
        read_blobs(RecordDict({"header": record}))


def test_blobs_in_the_header_and_beside_it_are_refused():
    sent = message_content("round", b"{}", {"a": b"x"})
    with pytest.raises(PiecesError, match="beside it"):
        read_blobs(RecordDict({**sent, "blobs": ConfigRecord({"b": b"y"})}))


def test_a_record_that_nobody_knows_is_refused():
    sent = message_content("round", b"{}", {"a": b"x"})
    for name in ("pieces", "piece-000000-a", "more"):
        with pytest.raises(PiecesError):
            read_blobs(RecordDict({**sent, name: ConfigRecord({"piece": b"y"})}))
