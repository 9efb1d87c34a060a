"""What is signed and logged where a round's updates are masked, so that only their sum can be read.

The first three are signed by a site's statement key and kept in the round's transcript, a file that the entry
`round.opened` names by digest; `audit.secure_round` reads and judges it. Keys and commitments are of one
round only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskKeys:
    """A site's keys for one round, made for it and forgotten after it."""

    run: str
    round: int
    charter: str
    site: str
    participants: tuple[str, ...]
    mask_key: str  # X25519 public key, base64: masks between pairs of sites
    share_key: str  # X25519 public key, base64: seals the shares that sites send each other
    seed: str  # `audit.masking.seed_commitment` of the seed of the site's own mask
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivorsAgreed:
    """The one set of masked updates whose sum this site lets be opened; it signs no other of the round."""

    run: str
    round: int
    charter: str
    site: str
    roster: str
    survivors: tuple[str, ...]
    updates: tuple[str, ...]  # digests of the masked updates, in the survivors' order
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesOpened:
    """One site's shares: of survivors' own masks and of dropped sites' mask keys, never both for one site."""

    run: str
    round: int
    charter: str
    site: str
    roster: str
    seeds: tuple[str, ...]  # hex, in the order of the survivors
    keys: tuple[str, ...]  # hex, in the order of the members who are no survivors
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOpened:
    """The sum of a round's masked updates was opened, for these survivors and no others."""

    run: str
    round: int
    roster: str
    survivors: tuple[str, ...]
    transcript: str  # digest of the file that anybody can open the sum with again
    total: str  # digest of the sum, as an update file


SECURE_DOMAINS: Final[dict[type[Any], str]] = {
    MaskKeys: "mask-keys",
    SurvivorsAgreed: "survivors",
    SharesOpened: "mask-shares",
}
"""What each is signed for; see `audit.keys.DOMAINS`."""
