"""What a message holds, in as few objects as can be: a question, its header, and blobs of any size.

Flower handles every record of a message as an object of its own, with a request to push it, another to pull
it and rows in two databases; that, and not the bytes, is what a small message costs. So kind, header and
blobs of up to `INLINE_BYTES` together are one record, `header`, the blobs as its fields `blob-<name>`. Larger
ones are records of their own, so that what several sites are sent alike is uploaded once. What is larger
still is cut into pieces and put together by digest.

A blob of more than `PIECE_BYTES` leaves the record `blobs` and becomes records `piece-<index>-<name>`, with
one line about it in the record `pieces`: size, digest, number of pieces, packing. Flower pushes each record
as an object of its own, so that no request's body grows with the model, and what several sites are sent
alike is uploaded once.

Packing is exact and looks at nothing but the released bytes: the noised integers of an update have eight
bytes each, of which the upper four repeat the sign wherever they all fit into 32 bits. Those four planes are
left out and made again. Standard library only: the relay uses it too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from flwr.app import ConfigRecord, RecordDict

from audit.canonical import JsonValue, canonical_bytes, parse_canonical
from audit.errors import AuditError
from federation.errors import FederationError

INLINE_BYTES: Final = 64 << 10
PIECE_BYTES: Final = 4 << 20
MAX_BLOB_BYTES: Final = 1 << 30
MAX_BLOBS: Final = 8

_HEADER, _BLOBS, _PIECES = "header", "blobs", "pieces"
_INLINE: Final = "blob-"
_QUESTION: Final = {"kind", "header"}
_NAME: Final = re.compile(r"[a-z_]{1,32}")
_PIECE_KEY: Final = re.compile(r"piece-([0-9]{6})-([a-z_]{1,32})")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"count", "digest", "packing", "size"}
_SIGN: Final = bytes(0xFF if value & 0x80 else 0 for value in range(256))


class PiecesError(FederationError):
    """A message's blobs cannot be put together."""

    code = "federation.pieces"


class PieceMissingError(PiecesError):
    code = "federation.piece_missing"


class PieceUnknownError(PiecesError):
    """A piece that no line announces: one too many, or the same twice under another number."""

    code = "federation.piece_unknown"


class PieceSizeError(PiecesError):
    code = "federation.piece_size"


class PieceDigestError(PiecesError):
    """All pieces are there, and what they make is not what was announced: one altered, or out of order."""

    code = "federation.piece_digest"


def message_content(
    kind: str | Sequence[str],
    header: bytes | Sequence[bytes],
    blobs: Mapping[str, bytes],
    records: Mapping[str, ConfigRecord] | None = None,
) -> RecordDict:
    """Return the content of a message; `records` are those of `blobs`, where they were made before."""
    question: dict[str, Any] = {"kind": kind, "header": header}
    if sum(map(len, blobs.values())) <= INLINE_BYTES and len(blobs) <= MAX_BLOBS:
        question |= {_INLINE + name: blob for name, blob in blobs.items()}
        return RecordDict({_HEADER: ConfigRecord(question)})
    return RecordDict(
        {_HEADER: ConfigRecord(question), **(blob_records(blobs) if records is None else records)}
    )


def brings_blobs(content: RecordDict) -> bool:
    """Whether a message seems to hold any blob; nothing is checked."""
    header = content.get(_HEADER)
    inline = isinstance(header, ConfigRecord) and any(name.startswith(_INLINE) for name in header)
    return inline or bool(content.get(_BLOBS)) or _PIECES in content


def blob_records(blobs: Mapping[str, bytes]) -> dict[str, ConfigRecord]:
    """Return the records that carry `blobs`: small ones together, large ones in pieces."""
    small = {name: blob for name, blob in blobs.items() if len(blob) <= PIECE_BYTES}
    records = {_BLOBS: ConfigRecord(dict(small))}
    lines: dict[str, JsonValue] = {}
    for name in sorted(set(blobs) - set(small)):
        data = blobs[name]
        packing, packed = _pack(data)
        count = 0
        for count, piece in enumerate(_cut(packed), start=1):
            records[f"piece-{count - 1:06d}-{name}"] = ConfigRecord({"piece": bytes(piece)})
        digest = hashlib.sha256(data).hexdigest()
        lines[name] = {"count": count, "digest": digest, "packing": packing, "size": len(data)}
    if lines:
        records[_PIECES] = ConfigRecord({"lines": canonical_bytes(lines)})
    return records


def read_blobs(content: RecordDict) -> dict[str, bytes]:
    """Return a message's blobs, each whole.

    Raises:
        PiecesError: the content is not what `message_content` writes.
        PieceMissingError, PieceUnknownError, PieceSizeError, PieceDigestError: see there.
    """
    inline = _inline(content.get(_HEADER))
    if _BLOBS not in content and set(content) <= {_HEADER}:
        return inline
    if inline:
        raise PiecesError("the message holds blobs in its header and beside it")
    blobs = _small(content.get(_BLOBS))
    lines = _lines(content.get(_PIECES), taken=set(blobs))
    announced = {
        f"piece-{index:06d}-{name}" for name, line in lines.items() for index in range(line["count"])
    }
    for key in content:
        if key.startswith("piece-") and key not in announced:
            raise PieceUnknownError(f"{str(key)[:60]!r} is announced by no line")
    for name, line in lines.items():
        blobs[name] = _joined(content, name, line)
    return blobs


def _inline(record: object) -> dict[str, bytes]:
    """Return the blobs in a message's header; there is nothing else in it but kind and header."""
    if not isinstance(record, ConfigRecord):
        return {}
    blobs: dict[str, bytes] = {}
    for field, blob in record.items():
        if field in _QUESTION:
            continue
        name = field.removeprefix(_INLINE)
        if not field.startswith(_INLINE) or not _NAME.fullmatch(name) or not isinstance(blob, bytes):
            raise PiecesError(f"the header's field {field[:40]!r} is no blob")
        blobs[name] = blob
    if len(blobs) > MAX_BLOBS or sum(map(len, blobs.values())) > INLINE_BYTES:
        raise PieceSizeError(f"a header holds at most {MAX_BLOBS} blobs of {INLINE_BYTES} bytes together")
    return blobs


def _small(record: object) -> dict[str, bytes]:
    if not isinstance(record, ConfigRecord):
        raise PiecesError("the message lacks its record of blobs")
    blobs: dict[str, bytes] = {}
    for name, blob in record.items():
        if not isinstance(blob, bytes):
            raise PiecesError(f"blob {name[:40]!r} is no bytes")
        if len(blob) > MAX_BLOB_BYTES:
            raise PieceSizeError(f"blob {name[:40]!r} is larger than {MAX_BLOB_BYTES} bytes")
        blobs[name] = blob
    return blobs


def _lines(record: object, *, taken: set[str]) -> dict[str, dict[str, Any]]:
    if record is None:
        return {}
    raw = record.get("lines") if isinstance(record, ConfigRecord) else None
    if not isinstance(raw, bytes):
        raise PiecesError("the record of pieces holds no lines")
    try:
        found = parse_canonical(raw)
    except AuditError as error:
        raise PiecesError(f"the lines about pieces cannot be read: {error}") from error
    if not isinstance(found, dict) or not 0 < len(found) <= MAX_BLOBS:
        raise PiecesError(f"pieces are announced for one to {MAX_BLOBS} blobs")
    for name, line in found.items():
        if not _NAME.fullmatch(name) or name in taken or not isinstance(line, dict) or set(line) != _FIELDS:
            raise PiecesError(f"the line about {name[:40]!r} is malformed, or the blob is there twice")
        count, size = line["count"], line["size"]
        if type(count) is not int or type(size) is not int or line["packing"] not in ("plain", "sign32"):
            raise PiecesError(f"the line about {name} is malformed")
        if not isinstance(line["digest"], str) or not _DIGEST.fullmatch(line["digest"]):
            raise PiecesError(f"the line about {name} names no digest")
        if not PIECE_BYTES < size <= MAX_BLOB_BYTES or not 0 < count <= -(-size // PIECE_BYTES):
            raise PieceSizeError(f"blob {name}: {count} pieces of {size} bytes in all are more than may come")
    return found


def _joined(content: RecordDict, name: str, line: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    for index in range(line["count"]):
        record = content.get(f"piece-{index:06d}-{name}")
        piece = record.get("piece") if isinstance(record, ConfigRecord) else None
        if not isinstance(piece, bytes):
            raise PieceMissingError(f"blob {name}: piece {index} of {line['count']} is missing")
        if not 0 < len(piece) <= PIECE_BYTES or (len(piece) < PIECE_BYTES and index + 1 < line["count"]):
            raise PieceSizeError(f"blob {name}: piece {index} has {len(piece)} bytes")
        parts.append(piece)
    data = _unpack(name, line["packing"], b"".join(parts), line["size"])
    if hashlib.sha256(data).hexdigest() != line["digest"]:
        raise PieceDigestError(f"blob {name}: what its pieces make has another digest")
    return data


def _cut(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def _body_start(data: bytes) -> int:
    """Where the numbers of an update or model file begin; 0 where the bytes are none."""
    start = 8 + int.from_bytes(data[:8], "little")
    return start if start % 8 == 0 and start <= len(data) and len(data) % 8 == 0 else 0


def _pack(data: bytes) -> tuple[str, bytes]:
    start = _body_start(data)
    upper = data[start + 4 :: 8] if start else b""
    if not start or any(data[start + k :: 8] != upper for k in (5, 6, 7)):
        return "plain", data
    planes = [data[start + k :: 8] for k in range(4)]
    if planes[3].translate(_SIGN) != upper:
        return "plain", data
    return "sign32", b"".join([data[:start], *planes])


def _unpack(name: str, packing: str, packed: bytes, size: int) -> bytes:
    if packing == "plain":
        if len(packed) != size:
            raise PieceSizeError(f"blob {name}: its pieces have {len(packed)} bytes, not {size}")
        return packed
    start = 8 + int.from_bytes(packed[:8], "little")
    count = (size - start) // 8
    if start % 8 or size % 8 or count < 1 or len(packed) != start + 4 * count:
        raise PieceSizeError(f"blob {name}: its packed pieces do not make {size} bytes")
    whole = bytearray(size)
    whole[:start] = packed[:start]
    planes = [packed[start + k * count : start + (k + 1) * count] for k in range(4)]
    for k in range(8):
        whole[start + k :: 8] = planes[k] if k < 4 else planes[3].translate(_SIGN)
    return bytes(whole)


__all__ = [
    "INLINE_BYTES",
    "MAX_BLOB_BYTES",
    "PIECE_BYTES",
    "PieceDigestError",
    "PieceMissingError",
    "PieceSizeError",
    "PieceUnknownError",
    "PiecesError",
    "blob_records",
    "brings_blobs",
    "message_content",
    "read_blobs",
]
