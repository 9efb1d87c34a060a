"""The requests an agent answers: untrusted bytes, strictly parsed into frozen values before anything else.

Headers are canonical JSON objects with exactly the fields below. Entries travel with the proof that a
witnessed checkpoint holds them: `{"entry": base64 of the leaf, "proof": tlog-proof text}`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from audit.canonical import AlikeObjects, JsonValue, canonical_around, canonical_bytes, parse_canonical
from audit.entries import RunStarted, parse_body
from audit.errors import AuditError
from audit.keys import parse_public_key
from audit.tlog_proof import TlogProof
from clients.errors import RefusedError

T = TypeVar("T")

_RUN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,95}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
MAX_PROOF_CHARS: Final = 1 << 19
_rounds = AlikeObjects("own_statement")  # of a round, sites are shown the same but for this


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEntry:
    """A leaf's bytes and where a log is said to hold them; nothing is believed yet."""

    leaf: bytes
    proof: TlogProof


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterRequest:
    charter: str
    author: str  # a public key, as text


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeRequest:
    run: RunStarted
    charter: str
    own_statement: LoggedEntry | None
    ended: LoggedEntry | None = None  # how the last run ended that the site accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRequest:
    run: str
    round: int
    charter: str
    participants: tuple[str, ...]
    previous_round: LoggedEntry | None
    own_statement: LoggedEntry | None
    base_model: bytes
    base_digest: str
    shares: Mapping[str, str] | None = None  # sealed for this site, by sender; where updates are masked


@dataclass(frozen=True, slots=True, kw_only=True)
class CosignRequest:
    old_size: int
    proof: tuple[bytes, ...]
    note: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    run: str
    own_statement: LoggedEntry | None


def parse_header(
    header: bytes,
    required: frozenset[str],
    optional: frozenset[str] = frozenset(),
    parse: Callable[[bytes], JsonValue] = parse_canonical,
) -> dict[str, Any]:
    """Read a header with all of `required`, none but those and `optional`.

    Raises:
        RefusedError: bad_request; anything else.
    """
    try:
        document = parse(header)
    except AuditError as error:
        raise _bad(f"the header is not canonical JSON: {error}") from error
    if not isinstance(document, dict) or not required <= set(document) <= required | optional:
        raise _bad(f"the header has exactly the fields {sorted(required)}")
    return document


def parse_charter_request(header: bytes) -> CharterRequest:
    document = parse_header(header, frozenset({"charter", "author"}))
    author = _text(document, "author")
    try:
        parse_public_key(author)
    except AuditError as error:
        raise _bad(f"author: {error}") from error
    return CharterRequest(charter=_text(document, "charter"), author=author)


def parse_propose(header: bytes) -> ProposeRequest:
    document = parse_header(
        header, frozenset({"run_started", "charter"}), frozenset({"own_statement", "ended"})
    )
    try:
        run = parse_body(RunStarted, document["run_started"])
    except AuditError as error:
        raise _bad(f"run_started: {error}") from error
    if not _RUN.fullmatch(run.run):
        raise _bad(f"run_started.run: {run.run[:100]!r} cannot name a run")
    return ProposeRequest(
        run=run,
        charter=_text(document, "charter"),
        own_statement=_entry(document.get("own_statement")),
        ended=_entry(document.get("ended")),
    )


def parse_round(header: bytes, blobs: Mapping[str, bytes]) -> RoundRequest:
    document = parse_header(
        header,
        frozenset({"run", "round", "charter", "participants", "previous_round", "own_statement"}),
        frozenset({"shares"}),
        _rounds.parse,
    )
    if set(blobs) != {"base_model"}:
        raise _bad("a round comes with the one blob base_model")
    base_model = blobs["base_model"]
    return RoundRequest(
        run=_text(document, "run"),
        round=round_number(document),
        charter=charter_digest_of(document),
        participants=names_of(document, "participants"),
        previous_round=_entry(document["previous_round"]),
        own_statement=_entry(document["own_statement"]),
        base_model=base_model,
        base_digest=hashlib.sha256(base_model).hexdigest(),
        shares=_texts_by_name(document["shares"], "shares") if "shares" in document else None,
    )


def parse_cosign(header: bytes) -> CosignRequest:
    document = parse_header(header, frozenset({"old_size", "proof", "note"}))
    old_size, hashes = document["old_size"], document["proof"]
    if isinstance(old_size, bool) or not isinstance(old_size, int) or old_size < 0:
        raise _bad("old_size: is a tree size")
    if not isinstance(hashes, list) or len(hashes) > 64:
        raise _bad("proof: is a list of at most 64 hashes")
    return CosignRequest(
        old_size=old_size,
        proof=tuple(_base64(item, "proof") for item in hashes),
        note=_text(document, "note").encode(),
    )


def parse_finished(header: bytes) -> FinishedRequest:
    document = parse_header(header, frozenset({"run"}), frozenset({"own_statement"}))
    return FinishedRequest(run=_text(document, "run"), own_statement=_entry(document.get("own_statement")))


def parse_run(header: bytes) -> str:
    """Read a header that names a run, and nothing else."""
    run = _text(parse_header(header, frozenset({"run"})), "run")
    if not _RUN.fullmatch(run):
        raise _bad(f"run: {run[:100]!r} cannot name a run")
    return run


def parse_bundle(header: bytes) -> str:
    digest = _text(parse_header(header, frozenset({"digest"})), "digest")
    if not _DIGEST.fullmatch(digest):
        raise _bad("digest: is the SHA-256 of a bundle, in hex")
    return digest


def round_number(document: Mapping[str, Any]) -> int:
    number = document["round"]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise _bad("round: is a whole number from 1")
    return number


def charter_digest_of(document: Mapping[str, Any]) -> str:
    charter = _text(document, "charter")
    if not _DIGEST.fullmatch(charter):
        raise _bad("charter: is a digest")
    return charter


def names_of(document: Mapping[str, Any], field: str) -> tuple[str, ...]:
    names = document[field]
    if not isinstance(names, list) or not set(map(type, names)) <= {str}:
        raise _bad(f"{field}: is a list of texts")
    return tuple(names)


def _texts_by_name(value: JsonValue, field: str) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _bad(f"{field}: is an object of texts by site")
    return {name: str(text) for name, text in value.items()}


def _entry(value: JsonValue) -> LoggedEntry | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"entry", "proof"}:
        raise _bad("a logged entry has the fields entry and proof")
    proof = value["proof"]
    if not isinstance(proof, str) or len(proof) > MAX_PROOF_CHARS:
        raise _bad("proof: is the text of a tlog-proof")
    try:
        leaf = value["entry"]
        leaf = _leaf(leaf) if isinstance(leaf, str) else _base64(leaf, "entry")
        return LoggedEntry(leaf=leaf, proof=_proof(proof))
    except (AuditError, UnicodeEncodeError) as error:
        raise _bad(f"proof: {error}") from error


@lru_cache(maxsize=4)
def _leaf(text: str) -> bytes:
    """As `_base64`, once for a round's entry, which each site of this process is shown."""
    return _base64(text, "entry")


@lru_cache(maxsize=4)
def _proof(text: str) -> TlogProof:
    """Read a proof once for all sites of this process: that of a round's entry is shown to each of them."""
    return TlogProof.parse(text.encode())


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document[name]
    if not isinstance(value, str):
        raise _bad(f"{name}: is not text")
    return value


def _base64(value: JsonValue, name: str) -> bytes:
    if not isinstance(value, str):
        raise _bad(f"{name}: is not base64")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise _bad(f"{name}: is not base64") from error


def _bad(reason: str) -> RefusedError:
    return RefusedError("bad_request", reason)


def request_digest(request: RoundRequest) -> str:
    """Name a request by what it asks for: the same request may come again with a fresher proof."""
    shown, own = request.previous_round, request.own_statement
    before, after = _around_own(
        request.run,
        request.round,
        request.charter,
        request.participants,
        "" if shown is None else _leaf_digest(shown.leaf),
        request.base_digest,
        None if request.shares is None else canonical_bytes(dict(request.shares)),
    )
    leaf = b"" if own is None else hashlib.sha256(own.leaf).hexdigest().encode()
    return hashlib.sha256(b'affidavit/request/v1\x00%b"%b"%b' % (before, leaf, after)).hexdigest()


@lru_cache(maxsize=4)
def _leaf_digest(leaf: bytes) -> str:
    return hashlib.sha256(leaf).hexdigest()


@lru_cache(maxsize=4)
def _around_own(
    run: str,
    number: int,
    charter: str,
    participants: tuple[str, ...],
    previous_round: str,
    base_model: str,
    shares: bytes | None,
) -> tuple[bytes, bytes]:
    """Write what a round asks for but for the site's own statement: the same for all sites of a process."""
    document: dict[str, JsonValue] = {
        "run": run,
        "round": number,
        "charter": charter,
        "participants": list(participants),
        "previous_round": previous_round,
        "own_statement": "",
        "base_model": base_model,
    }
    if shares is not None:
        document["shares"] = parse_canonical(shares)
    return canonical_around(document, "own_statement")
