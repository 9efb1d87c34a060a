"""A masked round's transcript, and the sum that it opens: nothing in it is believed, everything is checked.

The transcript holds, each signed by its site, the keys of the round (`MaskKeys`), the one set of masked
updates that enough sites agreed on (`SurvivorsAgreed`) and the shares they gave for it (`SharesOpened`).
`open_sum` proves all of it and returns the sum of the survivors' updates in whole numbers, without any mask:
the coordinator calls it to get the sum, the verifier to get it again.

`least` is the charter's `minimum_sites`, which secure charters hold above half of their sites. As many must
agree on a set, and as many give shares: two sets with so many signatures each share more sites than may
collude, and an honest site signs one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from audit.canonical import canonical_bytes, parse_canonical
from audit.entries import EntryError, body_document, decode_signature, parse_body, signing_payload
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.masking import (
    MaskError,
    combined,
    mask_words,
    own_mask_key,
    pair_mask_key,
    same_point,
    seed_commitment,
    sign_of,
)
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.shamir import SHARE_BYTES, Opening, ShareError

MOST_SITES: Final = 1000
Signed = TypeVar("Signed", MaskKeys, SurvivorsAgreed, SharesOpened)
KeyOf = Callable[[str], str]  # a site's statement key, "ed25519:…"


class SecureRoundError(AuditError):
    """The transcript does not open the sum; `part` says which piece of it, `site` whose."""

    def __init__(self, part: str, problem: str, site: str = "") -> None:
        super().__init__(f"site {site}: {problem}" if site else problem)
        self.code, self.part, self.site = f"secure.{part}", part, site


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureTerms:
    """What a charter says of masked rounds.

    Of `sites`, `tolerated` may drop out or collude: each site draws noise that suffices from
    `sharers` = sites - tolerated of them. `least` is how many a round may end with.
    """

    sites: int
    tolerated: int
    least: int

    @classmethod
    def of_charter(cls, charter: Any) -> SecureTerms | None:
        """Read them from a charter's canonical JSON values; None where it has none."""
        part = charter.get("secure_aggregation")
        if part is None:
            return None
        least = charter["plan"]["minimum_sites"]
        return cls(sites=len(charter["sites"]), tolerated=part["tolerated"], least=least)

    @property
    def sharers(self) -> int:
        return self.sites - self.tolerated

    def colluders(self, survivors: int) -> int:
        """Return how many of a round's survivors may collude while the noise of the rest still suffices."""
        return survivors - self.sharers


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundName:
    """Which round the signatures must be for."""

    run: str
    round: int
    charter: str
    participants: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The pieces in order; see the module's text."""

    keys: tuple[MaskKeys, ...]  # by site
    members: tuple[str, ...]  # who sent shares: among them the masks are
    agreed: tuple[SurvivorsAgreed, ...]  # by site
    opened: tuple[SharesOpened, ...]  # by site, exactly as many as needed

    @property
    def roster(self) -> str:
        return roster_digest(keys_digest(self.keys), self.members)

    @property
    def survivors(self) -> tuple[str, ...]:
        return self.agreed[0].survivors if self.agreed else ()

    def encode(self) -> bytes:
        return canonical_bytes(
            {
                "format": "affidavit-masked-round/1",
                "keys": [body_document(item) for item in self.keys],
                "members": list(self.members),
                "agreed": [body_document(item) for item in self.agreed],
                "opened": [body_document(item) for item in self.opened],
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Transcript:
        """Read a transcript strictly.

        Raises:
            SecureRoundError: anything but the bytes of `encode`.
        """
        try:
            document = parse_canonical(data)
            if not isinstance(document, dict) or document.get("format") != "affidavit-masked-round/1":
                raise EntryError("transcript", "is not affidavit-masked-round/1")
            found = cls(
                keys=_bodies(MaskKeys, document.get("keys")),
                members=tuple(map(str, _list(document.get("members")))),
                agreed=_bodies(SurvivorsAgreed, document.get("agreed")),
                opened=_bodies(SharesOpened, document.get("opened")),
            )
        except AuditError as error:
            raise SecureRoundError("transcript", str(error)) from error
        if found.encode() != data:
            raise SecureRoundError("transcript", "is not in the one form that has a digest")
        return found


def keys_digest(keys: Sequence[MaskKeys]) -> bytes:
    """Return the digest of everybody's keys for a round, to which all masks and shares are bound."""
    document: Any = [body_document(item) for item in keys]
    return hashlib.sha256(b"affidavit/mask-keys/v1\x00" + canonical_bytes(document)).digest()


def roster_digest(binding: bytes, members: Sequence[str]) -> str:
    """Return what a statement names as `roster`: the keys, and whose masks its update carries."""
    document: Any = {"keys": binding.hex(), "members": list(members)}
    return hashlib.sha256(b"affidavit/roster/v1\x00" + canonical_bytes(document)).hexdigest()


def check_keys(name: RoundName, keys: Sequence[MaskKeys], key_of: KeyOf, *, least: int) -> None:
    """Prove the keys of a round: enough sites, in order, each key its own, all signed for this round.

    Raises:
        SecureRoundError: `secure.keys`.
    """
    sites = [item.site for item in keys]
    if sites != sorted(set(sites)) or not set(sites) <= set(name.participants):
        raise SecureRoundError("keys", "are not of participants, each once, in the order of their names")
    if not least <= len(sites) <= MOST_SITES:
        raise SecureRoundError("keys", f"{len(sites)} sites gave keys; {least} to {MOST_SITES} are needed")
    for item in keys:
        _check_round(item, name, "keys")
        if item.participants != name.participants:
            raise SecureRoundError("keys", "are for other participants", item.site)
        verify_signed(item, key_of(item.site), "keys")
    points = [_point(text, item.site) for item in keys for text in (item.mask_key, item.share_key)]
    if len(set(points)) != len(points):
        raise SecureRoundError("keys", "one key occurs twice")


def check_agreed(
    name: RoundName,
    agreed: Sequence[SurvivorsAgreed],
    key_of: KeyOf,
    *,
    members: Sequence[str],
    roster: str,
    least: int,
) -> SurvivorsAgreed:
    """Prove that enough survivors signed one and the same set; return what they signed.

    Raises:
        SecureRoundError: `secure.survivors`.
    """
    sites = [item.site for item in agreed]
    if sites != sorted(set(sites)) or len(sites) < least:
        raise SecureRoundError("survivors", f"{len(sites)} sites signed them, once each: {least} are needed")
    first = agreed[0]
    survivors = list(first.survivors)
    if survivors != sorted(set(survivors)) or not set(survivors) <= set(members) or len(survivors) < least:
        raise SecureRoundError(
            "survivors", f"are not {least} or more of those with shares, in the order of their names"
        )
    if len(first.updates) != len(survivors):
        raise SecureRoundError("survivors", "and their updates are not as many")
    for item in agreed:
        _check_round(item, name, "survivors")
        if item.site not in first.survivors:
            raise SecureRoundError("survivors", "signed a set that leaves itself out", item.site)
        if (item.roster, item.survivors, item.updates) != (roster, first.survivors, first.updates):
            raise SecureRoundError("survivors", "signed another set than the rest", item.site)
        verify_signed(item, key_of(item.site), "survivors")
    return first


def open_sum(
    name: RoundName,
    transcript: Transcript,
    updates: Mapping[str, Sequence[int]],
    digests: Mapping[str, str],
    key_of: KeyOf,
    *,
    least: int,
    add: Callable[[int, Iterable[tuple[int, Sequence[int]]]], list[int]] = combined,
) -> list[int]:
    """Return the sum of the survivors' updates, with every mask taken off.

    Args:
        updates: the masked updates, by site. digests: their files' digests, as the statements sign them.
        key_of: returns a site's statement key. add: `audit.masking.combined`, or what is equal and faster.

    Raises:
        SecureRoundError: a signature, share or seed does not hold; the code and `site` say which.
    """
    binding, members = keys_digest(transcript.keys), transcript.members
    check_keys(name, transcript.keys, key_of, least=least)
    by_site = {item.site: item for item in transcript.keys}
    if list(members) != sorted(set(members)) or not set(members) <= set(by_site) or len(members) < least:
        raise SecureRoundError("keys", f"the members are not {least} or more of those with keys, in order")
    agreed = check_agreed(
        name, transcript.agreed, key_of, members=members, roster=transcript.roster, least=least
    )
    survivors = agreed.survivors
    if set(survivors) != set(updates) or tuple(digests[site] for site in survivors) != agreed.updates:
        raise SecureRoundError("survivors", "signed other masked updates than those that are summed")
    dropped = [site for site in members if site not in survivors]
    seeds, keys = _join(name, transcript, survivors, dropped, key_of, least=least)
    size = len(updates[survivors[0]])
    parts: list[tuple[int, Sequence[int]]] = [(1, updates[site]) for site in survivors]
    for site in survivors:
        if seed_commitment(seeds[site]) != by_site[site].seed:
            raise SecureRoundError("seed", "the shares give another seed than it bound itself to", site)
        parts.append((-1, mask_words(own_mask_key(seeds[site], binding, site), size)))
    for site in dropped:
        private = X25519PrivateKey.from_private_bytes(keys[site])
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        if public != raw_key(by_site[site].mask_key, site):
            raise SecureRoundError("mask_key", "the shares give another key than it published", site)
        for other in survivors:
            peer = raw_key(by_site[other].mask_key, other)
            mask = mask_words(pair_mask_key(private, peer, binding, (site, other)), size)
            parts.append((-sign_of(other, site), mask))
    return add(size, parts)


def _join(
    name: RoundName,
    transcript: Transcript,
    survivors: Sequence[str],
    dropped: Sequence[str],
    key_of: KeyOf,
    *,
    least: int,
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the survivors' seeds and the dropped sites' private mask keys, joined from signed shares."""
    opened = transcript.opened
    givers = [item.site for item in opened]
    if givers != sorted(set(givers)) or not set(givers) <= set(survivors) or len(givers) != least:
        raise SecureRoundError("shares", f"are not of {least} survivors, once each, in order")
    places = {item.site: place for place, item in enumerate(transcript.keys, start=1)}
    for item in opened:
        _check_round(item, name, "shares")
        if item.roster != transcript.roster:
            raise SecureRoundError("shares", "are of another roster", item.site)
        if (len(item.seeds), len(item.keys)) != (len(survivors), len(dropped)):
            raise SecureRoundError("shares", "are not one for each member", item.site)
        verify_signed(item, key_of(item.site), "shares")
    joining = Opening([places[site] for site in givers])

    def join(field: str, position: int, site: str) -> bytes:
        shares = {
            places[item.site]: parse_share(getattr(item, field)[position], item.site) for item in opened
        }
        try:
            return joining.join(shares)
        except ShareError as error:
            raise SecureRoundError("shares", str(error), site) from error

    seeds = {site: join("seeds", position, site) for position, site in enumerate(survivors)}
    keys = {site: join("keys", position, site) for position, site in enumerate(dropped)}
    return seeds, keys


def _point(text: str, site: str) -> bytes:
    try:
        return same_point(raw_key(text, site))
    except MaskError as error:
        raise SecureRoundError("keys", str(error), site) from error


def raw_key(text: str, site: str) -> bytes:
    """Return the 32 bytes of a base64 X25519 public key, strictly."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SecureRoundError("keys", "a key is not base64", site) from error
    if len(raw) != 32 or base64.b64encode(raw).decode() != text:
        raise SecureRoundError("keys", "a key is not the base64 of 32 bytes", site)
    return raw


def parse_share(text: str, site: str) -> bytes:
    """Return the bytes of a share in lower-case hex, strictly."""
    try:
        raw = bytes.fromhex(text)
    except ValueError as error:
        raise SecureRoundError("shares", "a share is not hex", site) from error
    if len(raw) != SHARE_BYTES or raw.hex() != text:
        raise SecureRoundError("shares", f"a share is not {SHARE_BYTES} bytes of hex", site)
    return raw


def verify_signed(body: Signed, key: str, part: str) -> None:
    """Prove a piece's signature.

    Raises:
        SecureRoundError: it does not verify.
    """
    try:
        domain, payload = signing_payload(body)
        VerifyKey(parse_public_key(key)).verify(domain, payload, decode_signature(body.signature))
    except AuditError as error:
        raise SecureRoundError(part, f"the signature does not verify: {error}", body.site) from error


def _check_round(item: Signed, name: RoundName, part: str) -> None:
    for field in ("run", "round", "charter"):
        if getattr(item, field) != getattr(name, field):
            raise SecureRoundError(part, f"{field} is {getattr(item, field)!r}: of another round", item.site)


def _bodies(kind: type[Signed], value: Any) -> tuple[Signed, ...]:
    return tuple(
        parse_body(kind, item, path=f"{kind.__name__}[{index}]") for index, item in enumerate(_list(value))
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_SITES:
        raise EntryError("transcript", f"holds what is no list of at most {MOST_SITES}")
    return value


__all__ = [
    "MOST_SITES",
    "RoundName",
    "SecureRoundError",
    "SecureTerms",
    "Transcript",
    "check_agreed",
    "check_keys",
    "keys_digest",
    "open_sum",
    "parse_share",
    "raw_key",
    "roster_digest",
    "verify_signed",
]
