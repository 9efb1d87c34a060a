"""A site's part in a masked round: keys, shares, the mask on its update, and one unmasking.

Order of requests: `keys`, `shares`, the round itself (`mask`), `survivors`, and, where somebody dropped out,
`open`. What a step answers is in the site's ledger before it leaves; the same request gets the same bytes
again and any other is refused, so a coordinator that asks two questions learns one answer. Keys and shares
alone may be made anew, all of them, as long as nothing was released under them: then they hid nothing, and
the old ones are gone. This module trusts nothing that the coordinator says
about other sites: every key comes under the signature of a site whose identity the charter pins.

What the site gives up to open a sum are shares of survivors' own masks and of dropped sites' mask keys, each
once, for the one set that it signed together with enough of the others. Its own secrets are deleted with that
answer, or when the round is over.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from audit.canonical import JsonValue, canonical_bytes
from audit.entries import body_document, parse_body
from audit.errors import AuditError
from audit.masking import mask_bytes, own_mask_key, pair_mask_key, seed_commitment, sign_of
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.secure_round import (
    RoundName,
    SecureRoundError,
    SecureTerms,
    check_agreed,
    check_keys,
    keys_digest,
    raw_key,
    roster_digest,
)
from audit.shamir import SHARE_BYTES, split
from clients.errors import RefusedError
from clients.identity import SiteKeys
from clients.ledger import Odometers
from clients.requests import RoundRequest, charter_digest_of, names_of, parse_header, round_number
from clients.terms import Terms
from federation.errors import StatementError
from federation.statements import verify_enrolment

State = dict[str, Any]
MaskedStep = Callable[["MaskedRequest", Terms], dict[str, Any]]
_SECRETS = ("secret", "own", "held")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedRequest:
    """One step of a masked round, parsed: `document` holds the fields of its kind."""

    run: str
    round: int
    charter: str
    document: Mapping[str, Any]


def parse_masked(header: bytes, *fields: str) -> MaskedRequest:
    """Read the header of a step that has, beside run, round and charter, exactly `fields`.

    Raises:
        RefusedError: bad_request.
    """
    document = parse_header(header, frozenset({"run", "round", "charter", *fields}))
    run = document["run"]
    if not isinstance(run, str):
        raise RefusedError("bad_request", "run: is not text")
    return MaskedRequest(
        run=run, round=round_number(document), charter=charter_digest_of(document), document=document
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedUpdate:
    """What leaves in place of the site's integers, and what the site has to remember about it."""

    values: Sequence[int]
    roster: str
    state: Mapping[str, JsonValue]


class MaskedRounds:
    """The masked rounds of one site; every method raises `RefusedError` for what it will not do."""

    def __init__(self, site: str, origin: str, keys: SiteKeys, ledger: Odometers) -> None:
        self._site, self._origin, self._keys, self._ledger = site, origin, keys, ledger

    def keys(self, request: MaskedRequest, terms: Terms) -> dict[str, Any]:
        """Make the round's keys and sign them."""
        _secure(terms, request.round)
        participants = list(names_of(request.document, "participants"))
        attempt = request.document["attempt"]
        if type(attempt) is not int or attempt < 0:
            raise RefusedError("bad_request", "attempt: is no whole number from 0")
        state = self._ledger.masked_round(request.run, request.round)
        if state is not None:
            same = state["participants"] == participants and state["charter"] == request.charter
            if same and attempt <= state.get("attempt", 0):
                return {"keys": state["keys"]}
            if self._ledger.release_of(request.run, request.round) is not None:
                raise RefusedError("already_answered", "an update was released under other keys")
        self._check_fresh(request)
        self.forget(request.run, before=request.round)
        mask, share, seed = X25519PrivateKey.generate(), X25519PrivateKey.generate(), os.urandom(32)
        body = self._keys.signed(
            MaskKeys(
                run=request.run,
                round=request.round,
                charter=request.charter,
                site=self._site,
                participants=tuple(participants),
                mask_key=_public(mask),
                share_key=_public(share),
                seed=seed_commitment(seed),
                signature="",
            )
        )
        state = {
            "attempt": attempt,
            "charter": request.charter,
            "participants": participants,
            "keys": body_document(body),
            "secret": {"mask": _private(mask).hex(), "share": _private(share).hex(), "seed": seed.hex()},
        }
        self._ledger.put_masked_round(request.run, request.round, state)
        return {"keys": state["keys"]}

    def shares(self, request: MaskedRequest, terms: Terms) -> dict[str, Any]:
        """Check everybody's keys and seal, for each other site, its shares of this site's two secrets."""
        secure = _secure(terms, request.round)
        state = self._state(request)
        asked = request.document["keys"]
        if "asked_keys" in state:
            if state["asked_keys"] != asked:
                raise RefusedError("already_answered", "shares were made for another set of keys")
            return {"shares": state["shares"]}
        self._check_fresh(request)
        if "secret" not in state:
            raise RefusedError("round_out_of_order", "the keys of this round were forgotten")
        keys, signers = self._read_keys(asked, terms)
        name = _name(request, state)
        try:
            check_keys(name, keys, lambda site: signers[site], least=secure.least)
        except SecureRoundError as error:
            raise RefusedError("roster_not_proved", str(error)) from error
        sites = [item.site for item in keys]
        if self._site not in sites or body_document(keys[sites.index(self._site)]) != state["keys"]:
            raise RefusedError("roster_not_proved", "this site's own keys are not those it gave")
        secret, binding = state["secret"], keys_digest(keys)
        parts = [
            split(bytes.fromhex(secret[name]), holders=len(keys), threshold=secure.least)
            for name in ("seed", "mask")
        ]
        share_key = X25519PrivateKey.from_private_bytes(bytes.fromhex(secret["share"]))
        sealed = {}
        for place, item in enumerate(keys):
            plain = parts[0][place] + parts[1][place]
            if item.site == self._site:
                state["own"] = plain.hex()
            else:
                context = _context(binding, self._site, item.site)
                box = _box(share_key, raw_key(item.share_key, item.site), context)
                sealed[item.site] = base64.b64encode(box.encrypt(bytes(12), plain, context)).decode()
        state |= {"asked_keys": asked, "signers": signers, "shares": sealed}
        self._ledger.put_masked_round(request.run, request.round, state)
        return {"shares": sealed}

    def mask(self, request: RoundRequest, terms: Terms, values: Sequence[int]) -> MaskedUpdate:
        """Return `values` under this site's own mask and those it shares with every site whose shares it has.

        Nothing is written: the ledger commits it together with the release.
        """
        secure = _secure(terms, request.round)
        state = self._ledger.masked_round(request.run, request.round)
        if state is None or "shares" not in state or "secret" not in state:
            raise RefusedError("round_out_of_order", "a masked update comes after keys and shares")
        if state["participants"] != list(request.participants):
            raise RefusedError("already_answered", "the keys were made for other participants")
        keys = _keys_of(state)
        by_site, binding = {item.site: item for item in keys}, keys_digest(keys)
        members = sorted({*(request.shares or {}), self._site})
        if not set(members) <= set(by_site) or self._site in (request.shares or {}):
            raise RefusedError(
                "roster_not_proved", "shares come from other sites of the roster, and only them"
            )
        if len(members) < secure.least:
            raise RefusedError("roster_not_proved", f"{len(members)} sites sent shares, not {secure.least}")
        secret = state["secret"]
        mask_key = X25519PrivateKey.from_private_bytes(bytes.fromhex(secret["mask"]))
        share_key = X25519PrivateKey.from_private_bytes(bytes.fromhex(secret["share"]))
        held = {self._site: state["own"]}
        total = np.array(values, dtype=np.int64).view(np.uint64)
        total = total + _words(own_mask_key(bytes.fromhex(secret["seed"]), binding, self._site), len(values))
        for site, sealed in sorted((request.shares or {}).items()):
            item = by_site[site]
            context = _context(binding, site, self._site)
            held[site] = _unseal(share_key, raw_key(item.share_key, site), context, sealed).hex()
            public, pair = raw_key(item.mask_key, site), (self._site, site)
            words = _words(pair_mask_key(mask_key, public, binding, pair), len(values))
            total = total + words if sign_of(self._site, site) > 0 else total - words
        roster = roster_digest(binding, members)
        state = {**state, "members": members, "roster": roster, "held": held}
        return MaskedUpdate(values=total.view(np.int64).tolist(), roster=roster, state=state)

    def survivors(self, request: MaskedRequest, terms: Terms) -> dict[str, Any]:
        """Sign the one set of masked updates whose sum may be opened.

        Where that set lacks nobody whose masks this site's update carries, its shares go with the signature:
        they are of seeds alone, which open the sum of all and nothing else, whatever others sign. No site's
        mask key is given before enough others have signed the same set (`open`).
        """
        secure = _secure(terms, request.round)
        state = self._state(request)
        survivors = list(names_of(request.document, "survivors"))
        updates = list(names_of(request.document, "updates"))
        if "agreed" in state:
            if (state["agreed"]["survivors"], state["agreed"]["updates"]) != (survivors, updates):
                raise RefusedError("already_answered", "another set of survivors was signed")
            return self._said(state)
        released = self._ledger.release_of(request.run, request.round)
        if released is None or "roster" not in state or "held" not in state:
            raise RefusedError("round_out_of_order", "survivors are signed after the masked update")
        own = released.statement.update
        fits = survivors == sorted(set(survivors)) and set(survivors) <= set(state["members"])
        if not fits or len(survivors) < secure.least or len(updates) != len(survivors):
            raise RefusedError("survivors_not_agreed", f"{len(survivors)} survivors are not as they must be")
        if self._site not in survivors or updates[survivors.index(self._site)] != own:
            raise RefusedError("survivors_not_agreed", "the set leaves out what this site sent")
        body = self._keys.signed(
            SurvivorsAgreed(
                run=request.run,
                round=request.round,
                charter=request.charter,
                site=self._site,
                roster=state["roster"],
                survivors=tuple(survivors),
                updates=tuple(updates),
                signature="",
            )
        )
        state["agreed"] = body_document(body)
        if survivors == state["members"]:
            state = self._give(request, state)
        self._ledger.put_masked_round(request.run, request.round, state)
        return self._said(state)

    def _said(self, state: State) -> dict[str, Any]:
        """Return what this site answers about its survivors: the set, and for a whole one its shares."""
        said = {"agreed": state["agreed"]}
        if state["agreed"]["survivors"] == state["members"] and "opened" in state:
            said["opened"] = state["opened"]
        return said

    def _give(self, request: MaskedRequest, state: State) -> State:
        """Return the state with this site's shares for the set it signed, and without its secrets."""
        held = {site: bytes.fromhex(text) for site, text in state["held"].items()}
        survivors = state["agreed"]["survivors"]
        body = self._keys.signed(
            SharesOpened(
                run=request.run,
                round=request.round,
                charter=request.charter,
                site=self._site,
                roster=state["roster"],
                seeds=tuple(held[site][:SHARE_BYTES].hex() for site in survivors),
                keys=tuple(
                    held[site][SHARE_BYTES:].hex() for site in state["members"] if site not in survivors
                ),
                signature="",
            )
        )
        kept = {name: value for name, value in state.items() if name not in _SECRETS}
        return {**kept, "opened": body_document(body)}

    def open(self, request: MaskedRequest, terms: Terms) -> dict[str, Any]:
        """Give the shares that open the agreed sum, once enough sites signed the set that this one signed."""
        secure = _secure(terms, request.round)
        state = self._state(request)
        if "agreed" not in state:
            raise RefusedError("round_out_of_order", "a sum is opened after its survivors were signed")
        try:
            agreed = [parse_body(SurvivorsAgreed, item) for item in _list(request.document["agreed"])]
            found = check_agreed(
                _name(request, state),
                agreed,
                lambda site: str(state["signers"][site]),
                members=state["members"],
                roster=state["roster"],
                least=secure.least,
            )
        except (AuditError, KeyError) as error:
            raise RefusedError("survivors_not_agreed", f"the signatures do not hold: {error}") from error
        own = state["agreed"]
        if [list(found.survivors), list(found.updates)] != [own["survivors"], own["updates"]]:
            raise RefusedError("survivors_not_agreed", "the others signed another set than this site")
        if "opened" not in state and "held" not in state:
            raise RefusedError("round_out_of_order", "a later round has begun; the shares were forgotten")
        if "opened" not in state:
            state = self._give(request, state)
            self._ledger.put_masked_round(request.run, request.round, state)
        return {"opened": state["opened"]}

    def forget(self, run: str, *, before: int | None = None) -> None:
        """Delete the secrets of a run's masked rounds, of all or of those before a number."""
        for number in self._ledger.masked_rounds(run):
            if before is not None and number >= before:
                continue
            state = self._ledger.masked_round(run, number)
            if state is not None and not state.keys().isdisjoint(_SECRETS):
                kept = {name: value for name, value in state.items() if name not in _SECRETS}
                self._ledger.put_masked_round(run, number, kept)

    def _state(self, request: MaskedRequest) -> State:
        state = self._ledger.masked_round(request.run, request.round)
        if state is None:
            raise RefusedError("round_out_of_order", "a masked round begins with this site's keys")
        if state["charter"] != request.charter:
            raise RefusedError("charter_not_approved", "the step names another charter than the round's keys")
        return state

    def _check_fresh(self, request: MaskedRequest) -> None:
        if self._ledger.release_of(request.run, request.round) is not None:
            raise RefusedError("already_released", f"run {request.run} round {request.round} was released")
        later = [number for number in self._ledger.masked_rounds(request.run) if number > request.round]
        if later:
            raise RefusedError("round_out_of_order", f"round {later[0]} of run {request.run} has begun")

    def _read_keys(self, asked: Any, terms: Terms) -> tuple[list[MaskKeys], dict[str, str]]:
        """Return the keys, and each site's statement key from an enrolment that its identity signed."""
        keys, signers = [], {}
        try:
            for item in _list(asked):
                if not isinstance(item, dict) or set(item) != {"enrolment", "keys"}:
                    raise RefusedError("bad_request", "keys: an item has the fields enrolment and keys")
                body = parse_body(MaskKeys, item["keys"])
                identity = terms.identities.get(body.site)
                if identity is None:
                    raise RefusedError("roster_not_proved", f"the charter has no member {body.site!r}")
                enrolment = verify_enrolment(body.site, identity, self._origin, item["enrolment"])
                keys.append(body)
                signers[body.site] = enrolment.statement_key
        except (AuditError, StatementError) as error:
            raise RefusedError("roster_not_proved", str(error)) from error
        return keys, signers


def _secure(terms: Terms, number: int) -> SecureTerms:
    if terms.secure is None or not 1 <= number <= terms.most_rounds:
        raise RefusedError("round_out_of_order", "the charter does not mask this round")
    return terms.secure


def _name(request: MaskedRequest, state: State) -> RoundName:
    return RoundName(
        run=request.run,
        round=request.round,
        charter=request.charter,
        participants=tuple(state["participants"]),
    )


def _keys_of(state: State) -> list[MaskKeys]:
    return [parse_body(MaskKeys, item["keys"]) for item in state["asked_keys"]]


def _words(key: bytes, size: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.frombuffer(mask_bytes(key, size), dtype="<u8").astype(np.uint64)


def _context(binding: bytes, sender: str, receiver: str) -> bytes:
    """What a sealed share is bound to: everybody's keys for the round, and its way."""
    document: dict[str, JsonValue] = {"keys": binding.hex(), "from": sender, "to": receiver}
    return b"affidavit/mask-share/v1\x00" + canonical_bytes(document)


def _box(private: X25519PrivateKey, public: bytes, context: bytes) -> ChaCha20Poly1305:
    """One key for one message: it is derived for this sender, receiver and round, so a fixed nonce serves."""
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise RefusedError("roster_not_proved", f"a share key is not usable: {error}") from error
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=context).derive(shared)
    return ChaCha20Poly1305(key)


def _unseal(private: X25519PrivateKey, public: bytes, context: bytes, sealed: str) -> bytes:
    try:
        plain = _box(private, public, context).decrypt(
            bytes(12), base64.b64decode(sealed, validate=True), context
        )
    except (InvalidTag, ValueError) as error:
        raise RefusedError("roster_not_proved", "a sealed share was altered on its way") from error
    if len(plain) != 2 * SHARE_BYTES:
        raise RefusedError("roster_not_proved", "a sealed share has not the length of two")
    return plain


def _public(key: X25519PrivateKey) -> str:
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def _private(key: X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > 1000:
        raise RefusedError("bad_request", "is no list of at most 1000")
    return value
