from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.checkpoints import (
    Checkpoint,
    add_signatures,
    cosign,
    open_checkpoint,
    parse_checkpoint_note,
    sign_checkpoint,
)
from audit.errors import (
    BadSignatureError,
    KeyFormatError,
    MalformedCheckpointError,
    MalformedNoteError,
    NoKnownSignatureError,
    OriginMismatchError,
)
from audit.keys import SigningKey
from audit.merkle import EMPTY_ROOT
from audit.notes import KeyType, NoteSigner, SignatureLine, parse_note, sign_note

ORIGIN = "hospital.example/log"
ROOT = bytes(range(32))
ROOT64 = base64.b64encode(ROOT).decode()
LOG = NoteSigner(ORIGIN, SigningKey.generate())
SITES = [NoteSigner(f"site-{c}", SigningKey.generate(), KeyType.COSIGNATURE) for c in "abc"]
CHECKPOINT = Checkpoint(ORIGIN, 7, ROOT)
NOTE = sign_checkpoint(CHECKPOINT, LOG)
NOW = 1_700_000_000


def cosigned(*sites: NoteSigner, at: int = NOW) -> bytes:
    return add_signatures(NOTE, [cosign(NOTE, site, at) for site in sites])


def test_body_is_three_lines_and_reads_back() -> None:
    assert CHECKPOINT.body() == f"{ORIGIN}\n7\n{ROOT64}\n".encode()
    assert Checkpoint.parse(CHECKPOINT.body()) == CHECKPOINT
    assert Checkpoint.parse(Checkpoint("o", 0, EMPTY_ROOT).body()).tree_size == 0


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        f"{ORIGIN}\n7\n",
        f"{ORIGIN}\n7\n{ROOT64}",
        f"{ORIGIN}\n7\n{ROOT64}\n\n",
        f"{ORIGIN}\n7\n{ROOT64}\nextension\n",
        f"\n7\n{ROOT64}\n",
        f"two words\n7\n{ROOT64}\n",
        f"a+b\n7\n{ROOT64}\n",
        f"{ORIGIN}\n07\n{ROOT64}\n",
        f"{ORIGIN}\n+7\n{ROOT64}\n",
        f"{ORIGIN}\n-7\n{ROOT64}\n",
        f"{ORIGIN}\n7 \n{ROOT64}\n",
        f"{ORIGIN}\n1_0\n{ROOT64}\n",
        f"{ORIGIN}\n\u0667\n{ROOT64}\n",
        f"{ORIGIN}\n9223372036854775808\n{ROOT64}\n",
        f"{ORIGIN}\n{'9' * 5000}\n{ROOT64}\n",
        f"{ORIGIN}\n7\n{ROOT64[:-1]}\n",
        f"{ORIGIN}\n7\n{ROOT64[:-4]}\n",
        f"{ORIGIN}\n7\n{ROOT64[:-2]}9=\n",
        f"{ORIGIN}\n7\n {ROOT64}\n",
        f"{ORIGIN}\n7\n{base64.b64encode(ROOT + b'x').decode()}\n",
        f"{ORIGIN}\n0\n{ROOT64}\n",
        f"{ORIGIN}\r\n7\r\n{ROOT64}\r\n",
    ],
)
def test_other_spelling_of_a_checkpoint_is_refused(body: str) -> None:
    with pytest.raises(MalformedCheckpointError):
        Checkpoint.parse(body.encode())


@given(st.binary(max_size=120))
def test_fuzzed_checkpoint_raises_the_declared_error_only(body: bytes) -> None:
    with pytest.raises(MalformedCheckpointError):
        Checkpoint.parse(body)


def test_log_signature_and_cosignatures_are_found() -> None:
    opened = open_checkpoint(
        cosigned(*SITES), log=LOG.verifier, witnesses=[s.verifier for s in SITES], now=NOW
    )
    assert opened.checkpoint == CHECKPOINT
    assert [(c.name, c.timestamp) for c in opened.cosignatures] == [(s.name, NOW) for s in SITES]


def test_unknown_witnesses_do_not_count() -> None:
    opened = open_checkpoint(cosigned(*SITES), log=LOG.verifier, witnesses=[SITES[1].verifier], now=NOW)
    assert [c.name for c in opened.cosignatures] == ["site-b"]


def test_witnesses_without_the_log_prove_nothing() -> None:
    lines = [line.format() for line in parse_note(cosigned(*SITES)).signatures if line.name != ORIGIN]
    note = parse_note(NOTE).text + b"\n" + b"".join(lines)
    with pytest.raises(NoKnownSignatureError):
        open_checkpoint(note, log=LOG.verifier, witnesses=[s.verifier for s in SITES], now=NOW)


def test_cosignature_of_another_tree_rejects_the_note() -> None:
    other = sign_checkpoint(Checkpoint(ORIGIN, 8, ROOT), LOG)
    note = add_signatures(NOTE, [cosign(other, SITES[0], NOW)])
    with pytest.raises(BadSignatureError):
        open_checkpoint(note, log=LOG.verifier, witnesses=[SITES[0].verifier], now=NOW)


def test_cosignature_from_the_future_is_not_counted() -> None:
    note = add_signatures(cosigned(SITES[0]), [cosign(NOTE, SITES[1], NOW + 301)])
    opened = open_checkpoint(note, log=LOG.verifier, witnesses=[s.verifier for s in SITES], now=NOW)
    assert [c.name for c in opened.cosignatures] == ["site-a"]
    assert [c.name for c in opened.from_the_future] == ["site-b"]
    at_the_limit = open_checkpoint(note, log=LOG.verifier, witnesses=[SITES[1].verifier], now=NOW + 1)
    assert [c.name for c in at_the_limit.cosignatures] == ["site-b"]


def test_repeated_cosigner_counts_once_with_its_latest_time() -> None:
    lines = b"".join(cosign(NOTE, SITES[0], NOW + i) for i in (5, 9, 2))
    opened = open_checkpoint(NOTE + lines, log=LOG.verifier, witnesses=[SITES[0].verifier], now=NOW + 60)
    assert [(c.name, c.timestamp) for c in opened.cosignatures] == [("site-a", NOW + 9)]


def test_other_origin_is_refused_even_under_the_same_key() -> None:
    other = NoteSigner("other.example/log", LOG.key)
    note = sign_checkpoint(Checkpoint("other.example/log", 7, ROOT), other)
    with pytest.raises(OriginMismatchError) as caught:
        open_checkpoint(note, log=LOG.verifier, now=NOW)
    assert caught.value.found == "other.example/log"
    renamed = sign_note(Checkpoint("other.example/log", 7, ROOT).body(), LOG)
    with pytest.raises(OriginMismatchError):
        open_checkpoint(renamed, log=LOG.verifier, now=NOW)


def test_log_signs_only_its_own_origin_with_its_own_type() -> None:
    with pytest.raises(OriginMismatchError):
        sign_checkpoint(Checkpoint("other", 7, ROOT), LOG)
    with pytest.raises(KeyFormatError):
        sign_checkpoint(Checkpoint("site-a", 7, ROOT), SITES[0])
    with pytest.raises(KeyFormatError):
        cosign(NOTE, LOG, NOW)


def test_witness_does_not_cosign_what_is_no_checkpoint() -> None:
    with pytest.raises(MalformedCheckpointError):
        cosign(sign_note(b"hello\n", LOG), SITES[0], NOW)
    with pytest.raises(MalformedNoteError):
        cosign(b"hello\n", SITES[0], NOW)


def test_fresh_line_replaces_the_old_one_of_the_same_key() -> None:
    note = add_signatures(cosigned(SITES[0]), [cosign(NOTE, SITES[0], NOW + 50)])
    assert len(parse_note(note).signatures) == 2
    opened = open_checkpoint(note, log=LOG.verifier, witnesses=[SITES[0].verifier], now=NOW + 50)
    assert opened.cosignatures[0].timestamp == NOW + 50


@pytest.mark.parametrize(
    "line",
    [b"", b"x\n", cosign(NOTE, SITES[0], NOW)[:-1], cosign(NOTE, SITES[0], NOW) * 2],
    ids=["empty", "text", "cut", "two"],
)
def test_adding_what_is_no_line_is_refused(line: bytes) -> None:
    with pytest.raises(MalformedNoteError):
        add_signatures(NOTE, [line])


def test_adding_too_many_lines_is_refused() -> None:
    lines = [SignatureLine(f"w{i}", b"\0\0\0\0", b"x").format() for i in range(100)]
    with pytest.raises(MalformedNoteError, match="caps"):
        add_signatures(NOTE, lines)


def test_every_flipped_bit_of_a_cosigned_checkpoint_is_refused_or_costs_the_cosignature() -> None:
    note = cosigned(SITES[0])
    for at in range(len(note)):
        flipped = note[:at] + bytes([note[at] ^ 1 << (at % 8)]) + note[at + 1 :]
        try:
            opened = open_checkpoint(flipped, log=LOG.verifier, witnesses=[SITES[0].verifier], now=NOW)
        except (MalformedNoteError, MalformedCheckpointError):
            continue
        except (BadSignatureError, NoKnownSignatureError, OriginMismatchError):
            continue
        assert opened.cosignatures == ()
        assert opened.checkpoint == CHECKPOINT


def test_parsing_without_verifying_reads_the_claim() -> None:
    assert parse_checkpoint_note(NOTE) == CHECKPOINT
