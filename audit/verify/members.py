"""Steps on who agreed to what: the charter and its signatures, the sites' keys and what anchors them."""

from __future__ import annotations

import hashlib

from audit.charter_parts import CharterFormError
from audit.charter_view import read_charter
from audit.entries import CharterPublished, CharterSigned, SiteEnrolled
from audit.errors import AuditError
from audit.keys import format_public_key
from audit.notes import KeyType, NoteVerifier
from audit.verify.chain import Chain, FailError, GapError, Leaf, Outcome, expect, need, only, verify_body
from audit.verify.history import CHECKPOINT, INCLUSION, LINKS
from audit.verify.report import NO_POLICY, Word

CHARTER, SITES = "The charter", "The sites and their keys"


def check_charter(chain: Chain) -> Outcome:
    """The charter's bytes have the digest everything names, and every member's identity key signed it."""
    if not chain.charter_digest:
        need(None, LINKS)
    digest = chain.charter_digest
    started = need(chain.started, LINKS)
    published = only(
        [leaf for leaf in chain.leaves(CharterPublished) if leaf.body.digest == digest],
        f"charter {digest[:16]}…",
        missing=f"charter {digest[:16]}… is not in the file",
    )
    canonical = published.body.text.encode()
    if hashlib.sha256(canonical).hexdigest() != digest:
        raise FailError("charter.digest", "the charter's bytes have another digest", published.index)
    try:
        charter = read_charter(canonical)
    except CharterFormError as error:
        raise FailError(error.code, str(error), published.index) from error
    if published.index >= started.index:
        raise FailError("verify.order", "the run started before its charter was published", started.index)
    for site in charter.sites:
        signed = [
            leaf
            for leaf in chain.leaves(CharterSigned)
            if (leaf.body.digest, leaf.body.site) == (digest, site.name)
        ]
        if not any(leaf.index < started.index for leaf in signed):
            raise GapError(
                "charter.signature_missing", f"site {site.name} has not signed the charter before the run"
            )
        for leaf in signed:
            verify_body(
                leaf.body, site.identity, code="charter.signature", who=f"site {site.name}", entry=leaf.index
            )
            expect(
                leaf.body.author,
                published.body.author,
                code="charter.author",
                field="author",
                entry=leaf.index,
            )
    chain.charter, chain.published = charter, published
    privacy = charter.privacy
    return Outcome(
        word=Word.PROVED,
        detail=f'"{charter.name}" {digest[:16]}…, signed by {", ".join(charter.site_names)}: epsilon '
        f"{privacy.epsilon} "
        f"a run at delta {privacy.delta}, one {privacy.unit}, {privacy.relation.replace('_', '/')}, noise "
        f"{privacy.noise_multiplier} x sensitivity, {_rounds(charter.rounds, charter.spare_rounds)}; "
        f"purposes {', '.join(charter.purposes)}",
    )


def _rounds(rounds: int, spare: int) -> str:
    return f"{rounds} rounds" + (f" and up to {spare} spare ones" if spare else "")


def check_sites(chain: Chain) -> Outcome:
    """Each member's enrolment is signed by its three keys, and its witness key is in the policy."""
    charter, origin = need(chain.charter, CHARTER), need(chain.checkpoint, CHECKPOINT).origin
    found: dict[str, list[Leaf[SiteEnrolled]]] = {}
    for leaf in chain.leaves(SiteEnrolled):
        witness = check_enrolment(leaf, origin)
        site = charter.site(leaf.body.site)
        if site is None:
            continue
        if site.identity != leaf.body.identity_key:
            continue  # the site's own earlier or later identity: another charter's business
        found.setdefault(site.name, []).append(leaf)
        if chain.policy is not None and not _is_anchored(chain, witness):
            raise GapError(
                "site.unanchored",
                f"the witness key of site {site.name} is not one of the policy's, so its identity is unknown",
                leaf.index,
            )
    missing = [name for name in charter.site_names if name not in found]
    if missing:
        raise GapError("site.not_enrolled", f"no enrolment of {', '.join(missing)} under the charter's keys")
    for name, leaves in found.items():
        _check_population(chain, name, leaves)
        _check_keys(name, leaves)
    chain.enrolments = {name: tuple(leaves) for name, leaves in found.items()}
    if chain.policy is None:
        return Outcome(
            word=Word.NO_EVIDENCE,
            code=NO_POLICY,
            detail="each site's three keys sign each other; without a policy nothing says who they belong to",
        )
    return Outcome(
        word=Word.PROVED,
        detail=f"{len(found)} sites, each anchored: a witness key of the policy signed its enrolment",
    )


def _check_population(chain: Chain, site: str, leaves: list[Leaf[SiteEnrolled]]) -> None:
    """A new population starts an odometer at 1; unless nobody is in both, that understates epsilon."""
    end = chain.registered or need(chain.completed, LINKS)
    for leaf in leaves:
        if leaf.index < end.index and leaf.body.population != leaves[0].body.population:
            raise GapError(
                "site.population_changed",
                f"site {site} enrolled anew for another population, whose odometer starts over; nothing "
                "signed says that nobody is in both",
                leaf.index,
            )


def _check_keys(site: str, leaves: list[Leaf[SiteEnrolled]]) -> None:
    """A statement key that was replaced stays replaced: who stole it must not bring it back by an old
    enrolment.
    """
    replaced: set[str] = set()
    present = ""
    for leaf in leaves:
        key = leaf.body.statement_key
        if key in replaced:
            raise FailError(
                "site.key_returned",
                f"site {site} enrolled again with a statement key that it had replaced",
                leaf.index,
            )
        if present and present != key:
            replaced.add(present)
        present = key


def check_enrolment(leaf: Leaf[SiteEnrolled], origin: str) -> NoteVerifier:
    """Return the witness key of an enrolment in log `origin` that all three of its keys signed.

    Raises:
        FailError: they did not, or they signed it for another log.
    """
    body = leaf.body
    expect(body.origin, origin, code="site.other_log", field="origin", entry=leaf.index)
    try:
        witness = NoteVerifier.parse(body.witness_key)
    except AuditError as error:
        raise FailError("site.enrolment", f"witness_key: {error}", leaf.index) from error
    if witness.kind is not KeyType.COSIGNATURE or witness.name != body.site:
        raise FailError(
            "site.enrolment", "witness_key is not a cosignature key of the site's name", leaf.index
        )
    who = f"site {body.site}"
    keys = {
        "signature": body.identity_key,
        "statement_proof": body.statement_key,
        "witness_proof": format_public_key(witness.key.public_bytes),
    }
    for field, key in keys.items():
        verify_body(body, key, code="site.enrolment", who=who, entry=leaf.index, signature=field)
    expect(
        len(set(keys.values())), 3, code="site.enrolment", field="number of distinct keys", entry=leaf.index
    )
    return witness


def _is_anchored(chain: Chain, witness: NoteVerifier) -> bool:
    policy = need(chain.policy, INCLUSION)
    return any(known.verifier == witness for known in policy.witnesses)
