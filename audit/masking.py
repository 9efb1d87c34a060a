"""Masks that cancel in a sum: what a site adds to its integers so that one update alone is uniform.

Everything is in whole numbers modulo 2**64. A site's masked update is

    x + own mask + sum over later sites of their pair's mask - sum over earlier sites of theirs

in the order of the sites' names, so in the sum over a set of sites the masks of its pairs cancel. A mask is
an AES-256-CTR stream under a 256-bit key; a pair's key comes by HKDF-SHA256 from an X25519 exchange between
keys made for the round, a site's own from a seed that it shares out before it sends anything. The names of
those whose mask it is go into the derivation: one X25519 key can be written in several ways (RFC 7748,
section 7), so a site that shows its neighbour's key in another form has the neighbour's secrets with all
others, and must not get masks that take the neighbour's off again.

This is the definition, in plain Python; sites use the same bytes with numpy. An update file holds the numbers
as signed 64-bit integers, so a masked update and a plain one have one format.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation", section 6.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from audit.canonical import canonical_bytes
from audit.errors import AuditError

BITS: Final = 64
MODULUS: Final = 1 << BITS
_HALF: Final = 1 << (BITS - 1)
_MASK: Final = MODULUS - 1
KEY_BYTES: Final = 32
_ANY_PRIVATE: Final = X25519PrivateKey.from_private_bytes(b"affidavit compares public keys..")


class MaskError(AuditError):
    """A key that is none, or numbers that do not fit together."""

    code = "audit.mask"


def coordinate_limit(sites: int, noise: int) -> int:
    """Return the largest magnitude of a site's coordinate before its noise, so that no sum wraps around.

    Args:
        sites: how many sites may be in the sum. noise: the largest magnitude that one site's noise takes.

    Returns:
        L with sites * (L + noise) < 2**63; below 1 when nothing fits.
    """
    return (_HALF - 1) // sites - noise


def seed_commitment(seed: bytes) -> str:
    """Return the hex digest by which a site binds itself to the seed of its own mask."""
    return hashlib.sha256(b"affidavit/mask-seed/v1\x00" + seed).hexdigest()


def own_mask_key(seed: bytes, binding: bytes, site: str) -> bytes:
    """Return the key of a site's own mask; `binding` is the digest of everybody's keys for the round."""
    return _derive(seed, binding, b"affidavit/own-mask/v1", site)


def pair_mask_key(private: X25519PrivateKey, public: bytes, binding: bytes, pair: tuple[str, str]) -> bytes:
    """Return the key of the mask that two sites share, from one's private and the other's public key.

    Args:
        pair: the two sites' names, in either order.

    Raises:
        MaskError: the public key is none that an honest site has.
    """
    return _derive(_exchanged(private, public), binding, b"affidavit/pair-mask/v1", *sorted(pair))


@lru_cache(maxsize=1 << 12)  # every site of a round reads all its keys
def same_point(public: bytes) -> bytes:
    """Return what is equal for two public keys exactly when every private key gives both one secret.

    Raises:
        MaskError: every private key gives it the secret that is all zeros.
    """
    return _exchanged(_ANY_PRIVATE, public)


def mask_bytes(key: bytes, size: int) -> bytes:
    """Return the mask of `size` numbers as little-endian 64-bit words."""
    if len(key) != KEY_BYTES:
        raise MaskError(f"a mask's key has {KEY_BYTES} bytes, not {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * size))


def mask_words(key: bytes, size: int) -> array[int]:
    """Return the mask of `size` numbers, each in [0, 2**64)."""
    words = array("Q")
    words.frombytes(mask_bytes(key, size))
    if sys.byteorder != "little":
        words.byteswap()
    return words


def combined(size: int, parts: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
    """Return the sum of signed vectors modulo 2**64, each number in its signed form.

    Args:
        parts: (+1 or -1, vector of `size` numbers, signed or not).
    """
    total = [0] * size
    for sign, vector in parts:
        if len(vector) != size:
            raise MaskError(f"a vector has {len(vector)} numbers, the others {size}")
        if sign > 0:
            total = [(a + b) & _MASK for a, b in zip(total, vector, strict=True)]
        else:
            total = [(a - b) & _MASK for a, b in zip(total, vector, strict=True)]
    return [value - MODULUS if value & _HALF else value for value in total]


def sign_of(site: str, other: str) -> int:
    """Return how `site` takes the mask it shares with `other`: +1 where the other's name is later."""
    return 1 if site < other else -1


def _exchanged(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MaskError(f"a mask key is not usable: {error}") from error


def _derive(secret: bytes, binding: bytes, label: bytes, *sites: str) -> bytes:
    info = label + b"\x00" + canonical_bytes(list(sites))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=binding, info=info).derive(secret)
