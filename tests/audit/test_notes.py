from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import (
    AuditError,
    BadSignatureError,
    KeyFormatError,
    MalformedNoteError,
    NoKnownSignatureError,
)
from audit.keys import SigningKey
from audit.notes import (
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    KeyType,
    NoteSigner,
    NoteVerifier,
    SignatureLine,
    open_note,
    parse_note,
    sign_note,
)

VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
TEXT = b"This is an example message.\n"
LINE = (
    "\u2014 example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuw"
    "HjG1Yu72IneyaQM=\n"
).encode()
NOTE = TEXT + b"\n" + LINE
FOO = NoteVerifier.parse(VKEY)
ALICE = NoteSigner("alice.example", SigningKey.generate())
WITNESS = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)


def test_known_answer_note_opens() -> None:
    opened = open_note(NOTE, [FOO])
    assert opened.text == TEXT
    assert [(s.name, s.timestamp) for s in opened.signatures] == [("example.com/foo", None)]
    assert opened.unknown == ()


def test_vkey_reads_back() -> None:
    assert FOO.vkey == VKEY
    assert NoteVerifier.parse(WITNESS.vkey) == WITNESS.verifier


def test_every_mangled_byte_of_a_vkey_is_refused() -> None:
    for at in range(len(VKEY)):
        mangled = VKEY[:at] + chr(ord(VKEY[at]) + 1) + VKEY[at + 1 :]
        with pytest.raises(KeyFormatError):
            NoteVerifier.parse(mangled)


def test_every_part_of_a_vkey_is_refused() -> None:
    for start in range(len(VKEY)):
        for stop in range(start, len(VKEY)):
            if (start, stop) != (0, len(VKEY)):
                with pytest.raises(KeyFormatError):
                    NoteVerifier.parse(VKEY[start:stop])


@pytest.mark.parametrize("kind", [0x00, 0x02, 0x05, 0x06, 0xFF])
def test_vkey_of_an_unsupported_type_is_refused_by_its_number(kind: int) -> None:
    encoded = base64.b64encode(bytes([kind]) + b"k" * 32).decode()
    with pytest.raises(KeyFormatError, match=f"0x{kind:02x}"):
        NoteVerifier.parse(f"name+00000000+{encoded}")


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u00a0b", "a\u2028b", "a\nb", "a\tb", "\ud800"])
def test_key_name_with_space_plus_or_control_is_refused(name: str) -> None:
    with pytest.raises(KeyFormatError):
        NoteSigner(name, SigningKey.generate())


def test_unknown_lines_are_ignored_whatever_their_payload() -> None:
    ml_dsa = SignatureLine("pq.example", b"\x31\x23\x68\x97", b"\0" * 2428).format()
    garbage = SignatureLine("example.com/foo", b"\0\0\0\0", b"x").format()
    opened = open_note(NOTE + ml_dsa + garbage, [FOO])
    assert [line.name for line in opened.unknown] == ["pq.example", "example.com/foo"]


def test_one_bad_line_of_a_known_key_rejects_the_whole_note() -> None:
    note = sign_note(TEXT, ALICE) + SignatureLine("example.com/foo", FOO.key_id, b"\0" * 64).format()
    assert open_note(note, [ALICE.verifier]).signatures
    with pytest.raises(BadSignatureError) as caught:
        open_note(note, [ALICE.verifier, FOO])
    assert caught.value.key == VKEY


def test_second_bad_line_of_a_key_that_signed_well_rejects_the_note() -> None:
    note = NOTE + SignatureLine("example.com/foo", FOO.key_id, b"\0" * 64).format()
    with pytest.raises(BadSignatureError):
        open_note(note, [FOO])


def test_note_without_a_known_key_names_who_signed() -> None:
    with pytest.raises(NoKnownSignatureError) as caught:
        open_note(NOTE, [ALICE.verifier])
    assert caught.value.signers == ("example.com/foo+530d903a",)
    with pytest.raises(NoKnownSignatureError):
        open_note(NOTE, [])


def test_same_name_and_another_key_is_unknown() -> None:
    impostor = NoteSigner("example.com/foo", SigningKey.generate())
    with pytest.raises(NoKnownSignatureError):
        open_note(sign_note(TEXT, impostor), [FOO])


def test_every_flipped_bit_of_a_note_is_refused() -> None:
    for at in range(len(NOTE)):
        for bit in range(8):
            flipped = NOTE[:at] + bytes([NOTE[at] ^ 1 << bit]) + NOTE[at + 1 :]
            with pytest.raises((BadSignatureError, MalformedNoteError, NoKnownSignatureError)):
                open_note(flipped, [FOO])


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\n",
        TEXT,
        TEXT + b"\n",
        TEXT + LINE,
        NOTE[:-1],
        NOTE + b"\n",
        TEXT + b"\n\n" + b"x\n",
        b"no newline" + b"\n" + LINE,
        b"tab\there\n\n" + LINE,
        b"cr\r\n\n" + LINE,
        b"\xff\n\n" + LINE,
        NOTE.replace(b"\xe2\x80\x94", b"-"),
        NOTE.replace(b"foo Uw", b"foo  Uw"),
        NOTE.replace(b"M=\n", b"M\n"),
        NOTE.replace(b"M=\n", b"N=\n"),
        TEXT + b"\n" + "\u2014 name AAAA\n".encode(),
        TEXT + b"\n" + "\u2014 na+me AAAAAAAA\n".encode(),
        TEXT + b"\n" + "\u2014 name\n".encode(),
    ],
)
def test_malformed_note_is_refused(note: bytes) -> None:
    with pytest.raises(MalformedNoteError):
        parse_note(note)


def test_text_and_signatures_split_at_the_last_empty_line() -> None:
    inner = sign_note(TEXT, ALICE)
    outer = sign_note(inner, WITNESS, timestamp=7)
    assert parse_note(outer).text == inner
    assert open_note(outer, [WITNESS.verifier]).text == inner
    with pytest.raises(NoKnownSignatureError):
        open_note(outer, [ALICE.verifier])


def test_caps_on_bytes_and_signatures() -> None:
    line = SignatureLine("n", b"\0\0\0\0", b"x").format()
    assert len(parse_note(TEXT + b"\n" + line * MAX_SIGNATURES).signatures) == MAX_SIGNATURES
    with pytest.raises(MalformedNoteError, match="signatures"):
        parse_note(TEXT + b"\n" + line * (MAX_SIGNATURES + 1))
    with pytest.raises(MalformedNoteError, match="cap"):
        parse_note(b"a" * MAX_NOTE_BYTES + b"\n\n" + line)


def test_cosignature_binds_its_time() -> None:
    note = sign_note(TEXT, WITNESS, timestamp=1_700_000_000)
    assert open_note(note, [WITNESS.verifier]).signatures[0].timestamp == 1_700_000_000
    line = parse_note(note).signatures[0]
    later = SignatureLine(line.name, line.key_id, (1_700_000_001).to_bytes(8, "big") + line.payload[8:])
    with pytest.raises(BadSignatureError):
        open_note(TEXT + b"\n" + later.format(), [WITNESS.verifier])


def test_cosignature_is_no_plain_signature_of_the_same_key() -> None:
    plain = NoteSigner(WITNESS.name, WITNESS.key)
    assert plain.verifier.key_id != WITNESS.verifier.key_id
    with pytest.raises(NoKnownSignatureError):
        open_note(sign_note(TEXT, plain), [WITNESS.verifier])


def test_timestamp_is_required_exactly_where_it_belongs() -> None:
    with pytest.raises(ValueError, match="no timestamp"):
        ALICE.line(TEXT, 5)
    for timestamp in (None, -1, 2**63):
        with pytest.raises(ValueError, match="needs a timestamp"):
            WITNESS.line(TEXT, timestamp)


def test_text_that_is_no_note_text_is_not_signed() -> None:
    for text in (b"", b"no newline", b"nul\x00\n", b"\xff\n"):
        with pytest.raises(MalformedNoteError):
            sign_note(text, ALICE)


@given(st.binary(max_size=200), st.sampled_from([b"", NOTE, TEXT + b"\n" + "\u2014 ".encode()]))
def test_fuzzed_note_raises_declared_errors_only(tail: bytes, head: bytes) -> None:
    try:
        parse_note(head + tail)
    except MalformedNoteError:
        return
    assert head + tail == parse_note(head + tail).text + b"\n" + b"".join(
        line.format() for line in parse_note(head + tail).signatures
    )


@given(st.text(max_size=60))
def test_fuzzed_vkey_raises_declared_errors_only(text: str) -> None:
    for vkey in (text, f"{text}+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"):
        with pytest.raises(AuditError):
            NoteVerifier.parse(vkey)
