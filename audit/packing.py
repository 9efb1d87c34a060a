"""What does not fit into an entry as text: the charter and the round entry of a federation of many hundreds.

An entry holds 65,535 bytes. A charter of a thousand members is twice that, most of it keys, and the leaf
hashes of a thousand statements in hex are just over. Packed, the one is base64 of zlib, the other base64 of
the 32-byte hashes one after the other. Only what is too long is packed, so a body still has one form.
"""

from __future__ import annotations

import base64
import zlib
from typing import Final

from audit.errors import AuditError

MAX_PLAIN_TEXT: Final = 48_000  # bytes of a charter that stands as it is
MAX_TEXT: Final = 1 << 20
MAX_PLAIN_DIGESTS: Final = 512
MAX_DIGESTS: Final = 1024


class PackingError(AuditError):
    """A packed field is not what packing gives, or holds more than it may."""

    code = "audit.packing"


def pack_text(text: str) -> tuple[str, str]:
    """Return (text, "") where it is short enough, else ("", packed)."""
    raw = text.encode()
    if len(raw) <= MAX_PLAIN_TEXT:
        return text, ""
    return "", base64.b64encode(zlib.compress(raw, 9)).decode()


def unpack_text(plain: str, packed: str) -> str:
    """Return what `pack_text` was given.

    Raises:
        PackingError: both are there, the packed one is damaged, or it holds too much or too little.
    """
    if not packed:
        return plain
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(base64.b64decode(packed, validate=True), MAX_TEXT)
        text = raw.decode()
    except (zlib.error, ValueError) as error:
        raise PackingError(f"a packed text cannot be read: {error}") from error
    if plain or not inflate.eof or inflate.unused_data or len(raw) <= MAX_PLAIN_TEXT:
        raise PackingError(f"a packed text stands alone and has over {MAX_PLAIN_TEXT} to {MAX_TEXT} bytes")
    return text


def pack_digests(digests: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Return (digests, "") where they are few enough, else ((), packed)."""
    if len(digests) <= MAX_PLAIN_DIGESTS:
        return digests, ""
    return (), base64.b64encode(bytes.fromhex("".join(digests))).decode()


def unpack_digests(plain: tuple[str, ...], packed: str) -> tuple[str, ...]:
    """Return what `pack_digests` was given; errors as `unpack_text`."""
    if not packed:
        return plain
    try:
        raw = base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise PackingError(f"packed digests are not base64: {error}") from error
    if plain or len(raw) % 32 or not MAX_PLAIN_DIGESTS < len(raw) // 32 <= MAX_DIGESTS:
        raise PackingError(
            f"packed digests stand alone, over {MAX_PLAIN_DIGESTS} and at most {MAX_DIGESTS} of them"
        )
    text = raw.hex()
    return tuple(text[i : i + 64] for i in range(0, len(text), 64))
