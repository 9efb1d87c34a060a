"""C2SP signed notes: a text, an empty line, and signature lines by named keys.

`NoteSigner` makes lines, `NoteVerifier` is a parsed vkey, `open_note` says which of the keys we know have
signed. Key types: 0x01 signs the text, 0x04 (cosignature/v1) signs the text with a time. Lines of any other
type parse and are kept as unknown.

Source: C2SP signed-note v1.0.0 and tlog-cosignature v1.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from audit.errors import (
    BadSignatureError,
    KeyFormatError,
    MalformedNoteError,
    NoKnownSignatureError,
)
from audit.keys import SIGNATURE_SIZE, SigningKey, VerifyKey

MAX_NOTE_BYTES = 1 << 18
MAX_SIGNATURES = 100
MAX_TIMESTAMP = 2**63 - 1

_DASH = "\N{EM DASH} ".encode()
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")
_NO_NAME = re.compile(r"[\s\x00-\x1f+]")  # \s is what str.isspace says
_VKEY = re.compile(r"([^+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})")
_TIMESTAMP_SIZE = 8


class KeyType(IntEnum):
    ED25519 = 0x01
    COSIGNATURE = 0x04


@lru_cache(maxsize=256)
def check_key_name(name: str) -> str:
    """Return `name` if it may name a key.

    Raises:
        KeyFormatError: it is empty, or holds a space, a '+' or a control character.
    """
    if not name or _NO_NAME.search(name) or not (name.isascii() or _is_utf8(name)):
        raise KeyFormatError(f"key name {name!r} is empty or holds a space, '+' or control character")
    return name


def key_id_of(name: str, kind: KeyType, public: bytes) -> bytes:
    """Return SHA-256(name || 0x0A || type || public key)[:4]."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def cosigned_bytes(text: bytes, timestamp: int) -> bytes:
    """Return the message under a cosignature/v1 at `timestamp` (POSIX seconds)."""
    return b"cosignature/v1\ntime %d\n" % timestamp + text


@dataclass(frozen=True, slots=True)
class NoteVerifier:
    """A named public key of one type; `NoteVerifier.parse` reads its vkey."""

    name: str
    key: VerifyKey
    kind: KeyType = KeyType.ED25519

    def __post_init__(self) -> None:
        check_key_name(self.name)

    @classmethod
    def parse(cls, vkey: str) -> NoteVerifier:
        """Read `<name>+<key id>+<base64 of type and key>`.

        Raises:
            KeyFormatError: another form, an unsupported type, or a key id that is not the key's.
        """
        found = _VKEY.fullmatch(vkey)
        if not found:
            raise KeyFormatError(f"vkey {vkey[:120]!r} is not <name>+<8 hex>+<base64>")
        raw = _strict_base64(found[3])
        if raw is None or not raw:
            raise KeyFormatError(f"vkey {vkey[:120]!r} does not end in canonical base64")
        try:
            kind = KeyType(raw[0])
        except ValueError as error:
            raise KeyFormatError(
                f"vkey of {found[1]!r} has key type 0x{raw[0]:02x}; supported are 0x01 and 0x04"
            ) from error
        verifier = cls(found[1], VerifyKey(raw[1:]), kind)
        if verifier.key_id.hex() != found[2]:
            raise KeyFormatError(
                f"vkey of {found[1]!r} says key id {found[2]}, its key has {verifier.key_id.hex()}"
            )
        return verifier

    @property
    def key_id(self) -> bytes:
        return key_id_of(self.name, self.kind, self.key.public_bytes)

    @property
    def vkey(self) -> str:
        encoded = base64.b64encode(bytes([self.kind]) + self.key.public_bytes).decode()
        return f"{self.name}+{self.key_id.hex()}+{encoded}"

    def verify(self, text: bytes, payload: bytes) -> int | None:
        """Prove one signature line's payload over the note's text; return its time, None for type 0x01.

        Raises:
            BadSignatureError: it is no signature by this key.
        """
        if self.kind is KeyType.ED25519:
            message, signature, timestamp = text, payload, None
        else:
            timestamp = int.from_bytes(payload[:_TIMESTAMP_SIZE], "big")
            message, signature = cosigned_bytes(text, timestamp), payload[_TIMESTAMP_SIZE:]
        if len(signature) != SIGNATURE_SIZE or (timestamp or 0) > MAX_TIMESTAMP:
            raise BadSignatureError(f"signature by {self.name} has a wrong length or time", key=self.vkey)
        try:
            self.key.verify_raw(message, signature)
        except BadSignatureError as error:
            raise BadSignatureError(f"signature by {self.name} does not verify", key=self.vkey) from error
        return timestamp


@dataclass(frozen=True, slots=True)
class NoteSigner:
    """A named private key of one type. One key pair must not serve two names or two types."""

    name: str
    key: SigningKey
    kind: KeyType = KeyType.ED25519

    def __post_init__(self) -> None:
        check_key_name(self.name)

    @property
    def verifier(self) -> NoteVerifier:
        return NoteVerifier(self.name, self.key.verify_key, self.kind)

    @property
    def vkey(self) -> str:
        return self.verifier.vkey

    def line(self, text: bytes, timestamp: int | None = None) -> bytes:
        """Return the signature line over `text`; `timestamp` is for type 0x04, and required there.

        Raises:
            ValueError: the timestamp is missing, not wanted, or out of range.
        """
        if self.kind is KeyType.ED25519:
            if timestamp is not None:
                raise ValueError("a plain note signature carries no timestamp")
            payload = self.key.unsafe_sign_raw(text)
        else:
            if timestamp is None or not 0 <= timestamp <= MAX_TIMESTAMP:
                raise ValueError(f"a cosignature needs a timestamp in POSIX seconds, not {timestamp}")
            signature = self.key.unsafe_sign_raw(cosigned_bytes(text, timestamp))
            payload = timestamp.to_bytes(8, "big") + signature
        return SignatureLine(self.name, self.verifier.key_id, payload).format()


@dataclass(frozen=True, slots=True)
class SignatureLine:
    name: str
    key_id: bytes  # 4 bytes, a hint
    payload: bytes

    @property
    def claimed_timestamp(self) -> int | None:
        """When a line of a cosignature's form says it was made, POSIX seconds; None for any other."""
        is_cosignature = len(self.payload) == _TIMESTAMP_SIZE + SIGNATURE_SIZE
        return int.from_bytes(self.payload[:_TIMESTAMP_SIZE], "big") if is_cosignature else None

    def format(self) -> bytes:
        encoded = base64.b64encode(self.key_id + self.payload)
        return _DASH + self.name.encode() + b" " + encoded + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> SignatureLine:
        """Read one line, with its newline.

        Raises:
            MalformedNoteError: another form.
        """
        if not line.startswith(_DASH) or not line.endswith(b"\n") or len(line) > MAX_NOTE_BYTES:
            raise MalformedNoteError("a signature line does not begin with an em dash and a space")
        try:
            name, space, encoded = line[len(_DASH) : -1].decode().partition(" ")
        except UnicodeDecodeError as error:
            raise MalformedNoteError("a signature line is not UTF-8") from error
        raw = _strict_base64(encoded)
        if not space or raw is None or len(raw) < 5:
            raise MalformedNoteError(f"signature line of {name[:60]!r} is not <name> <base64>")
        try:
            check_key_name(name)
        except KeyFormatError as error:
            raise MalformedNoteError(str(error)) from error
        return cls(name, raw[:4], raw[4:])


@dataclass(frozen=True, slots=True)
class ParsedNote:
    text: bytes  # ends in a newline
    signatures: tuple[SignatureLine, ...]


@dataclass(frozen=True, slots=True)
class VerifiedSignature:
    verifier: NoteVerifier
    timestamp: int | None  # POSIX seconds; None for a plain signature

    @property
    def name(self) -> str:
        return self.verifier.name


@dataclass(frozen=True, slots=True)
class OpenedNote:
    """What `open_note` proved: these keys signed this text."""

    text: bytes
    signatures: tuple[VerifiedSignature, ...]
    unknown: tuple[SignatureLine, ...]


def sign_note(text: bytes, *signers: NoteSigner, timestamp: int | None = None) -> bytes:
    """Return the note of `text` with a line of each signer; `timestamp` goes to those of type 0x04.

    Raises:
        MalformedNoteError: the text is empty, lacks its final newline, or holds control characters.
    """
    _check_text(text)
    lines = [s.line(text, timestamp if s.kind is KeyType.COSIGNATURE else None) for s in signers]
    return text + b"\n" + b"".join(lines)


@lru_cache(maxsize=16)
def parse_note(note: bytes) -> ParsedNote:
    """Split a note at its last empty line and read the signature lines, believing none of them.

    Raises:
        MalformedNoteError: over `MAX_NOTE_BYTES` or `MAX_SIGNATURES`, or not a note.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise MalformedNoteError(f"a note of {len(note)} bytes is over the cap of {MAX_NOTE_BYTES}")
    split = note.rfind(b"\n\n")
    if split < 0 or not note.endswith(b"\n"):
        raise MalformedNoteError(
            "a note has a text, an empty line, and signature lines that end in a newline"
        )
    text, tail = note[: split + 1], note[split + 2 :]
    _check_text(text)
    lines = tail.split(b"\n")[:-1]
    if not 1 <= len(lines) <= MAX_SIGNATURES:
        raise MalformedNoteError(f"a note has 1 to {MAX_SIGNATURES} signatures, this one {len(lines)}")
    return ParsedNote(text, tuple(SignatureLine.parse(line + b"\n") for line in lines))


def open_note(note: bytes, known: Iterable[NoteVerifier]) -> OpenedNote:
    """Prove which of the `known` keys signed a note.

    Lines of unknown (name, key id) are ignored. A known key's line that fails rejects the whole note.

    Raises:
        MalformedNoteError: as `parse_note`.
        BadSignatureError: a line of a known key does not verify.
        NoKnownSignatureError: no known key has signed.
        KeyFormatError: two different known keys share a name and key id.
    """
    verifiers: dict[tuple[str, bytes], NoteVerifier] = {}
    for verifier in known:
        if verifiers.setdefault((verifier.name, verifier.key_id), verifier) != verifier:
            raise KeyFormatError(f"two known keys share name {verifier.name!r} and key id")
    parsed = parse_note(note)
    proved, unknown = [], []
    for line in parsed.signatures:
        found = verifiers.get((line.name, line.key_id))
        if found is None:
            unknown.append(line)
        else:
            proved.append(VerifiedSignature(found, found.verify(parsed.text, line.payload)))
    if not proved:
        signers = tuple(f"{line.name}+{line.key_id.hex()}" for line in unknown)
        raise NoKnownSignatureError(
            f"no known key signed the note; it bears {list(signers)}", signers=signers
        )
    return OpenedNote(parsed.text, tuple(proved), tuple(unknown))


def _check_text(text: bytes) -> None:
    if not text.endswith(b"\n") or _CONTROL.search(text):
        raise MalformedNoteError("a note's text ends in a newline and holds no other control character")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise MalformedNoteError(f"byte {error.start} of the note's text is not UTF-8") from error


def _strict_base64(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return raw if base64.b64encode(raw).decode() == text else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
