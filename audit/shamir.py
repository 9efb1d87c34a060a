"""Shamir's secret sharing of 32 bytes: any `threshold` shares give the secret, fewer say nothing of it.

Over the field of P = 2**256 + 297, the least prime above every 32-byte number. Shares are 33 bytes, big
endian; the holder's place x = 1, 2, … is known from context and no part of the share.

Source: Shamir 1979, "How to share a secret".
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from audit.errors import AuditError

P: Final = (1 << 256) + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


class ShareError(AuditError):
    """Shares that no honest dealer made, or too few of them."""

    code = "audit.share"


def split(
    secret: bytes,
    *,
    holders: int,
    threshold: int,
    below: Callable[[int], int] = secrets.randbelow,
) -> list[bytes]:
    """Return one share for each of `holders`, in the order of their places 1, 2, …

    Args:
        secret: 32 bytes. threshold: how many shares give it back, 1 to `holders`. below: returns a uniform
        number in [0, n); the system's generator, but for tests.

    Raises:
        ShareError: the secret is not 32 bytes, or the threshold is out of range.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ShareError(f"{len(secret)} bytes for {threshold} of {holders}: give 32 bytes, 1 to {holders}")
    coefficients = [int.from_bytes(secret, "big"), *(below(P) for _ in range(threshold - 1))]
    return [_value(coefficients, place).to_bytes(SHARE_BYTES, "big") for place in range(1, holders + 1)]


class Opening:
    """The weights that join the shares of one set of holders; made once for all their secrets."""

    def __init__(self, places: Sequence[int]) -> None:
        """Take the holders' places.

        Raises:
            ShareError: none, one twice, or one below 1.
        """
        if not places or len(set(places)) != len(places) or min(places) < 1:
            raise ShareError(f"places {list(places)[:20]} are not distinct and at least 1")
        self._places = tuple(places)
        self._weights = [_weight(places, place) for place in places]

    def join(self, shares: Mapping[int, bytes]) -> bytes:
        """Return the 32 bytes that the shares, by place, are of.

        Raises:
            ShareError: a share is missing or malformed, or they join to no 32 bytes.
        """
        total = 0
        for place, weight in zip(self._places, self._weights, strict=True):
            share = shares.get(place)
            if share is None or len(share) != SHARE_BYTES or (value := int.from_bytes(share, "big")) >= P:
                raise ShareError(f"the share of place {place} is missing or not one of this field")
            total = (total + weight * value) % P
        if total >> (8 * SECRET_BYTES):
            raise ShareError("the shares join to no secret of 32 bytes: one of them is wrong")
        return total.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: Sequence[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % P
    return value


def _weight(places: Sequence[int], place: int) -> int:
    above, below = 1, 1
    for other in places:
        if other != place:
            above, below = above * other % P, below * (other - place) % P
    return above * pow(below, -1, P) % P
