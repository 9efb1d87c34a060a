"""Use cases of a site: add it, look at its file, approve and sign a charter, follow the log as a witness.

These are called by the person who owns the site's home, on the machine that holds it; the file system is
their authoriser. What the coordinator asks goes to `clients.agent` instead.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from audit.canonical import canonical_bytes, parse_strict
from audit.entries import SiteStatement, decode_entry
from audit.epsilon import recompute, whole_site_epsilon
from audit.errors import AuditError, WitnessError, WitnessProofError
from audit.merkle import NodeSource
from audit.units import of_people
from clients.accusations import keep_accusation
from clients.errors import DataProblem, LinkError
from clients.home import SiteHome

if TYPE_CHECKING:
    import httpx

    from clients.agent import Agent
    from federation.coordinator import Coordinator

_PAGE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class AddSiteRequest:
    """A new site. The lifetime budget is a decision: it has no default."""

    home: Path
    name: str
    data: Path
    population: str
    lifetime_epsilon: str
    lifetime_delta: str
    auto_approve: bool = False
    purposes: tuple[str, ...] = ()
    operator: str = ""  # who runs this site's machines, where the same people run other sites too


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """What a site's own people see of it."""

    name: str
    operator: str
    population: str
    pseudonym: str
    data: Path
    releases: int
    undelivered: int
    open_runs: tuple[str, ...]
    lifetime_epsilon: float  # spent, by the filter that stops the site
    committed_epsilon: float  # spent and reserved
    cap_epsilon: str
    cap_delta: str
    whole_site_epsilon: float | None  # spent and reserved by all rows together; None: unbounded
    whole_site_cap: str  # "": the site sets none
    approved_charters: tuple[str, ...]
    witnessed_size: int | None  # None: the site follows no log yet
    waiting: tuple[str, ...]  # runs and charters that this site's people have to decide about


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A charter, as it would bind this site, and what its data file says to it."""

    charter: str
    releases: int
    charter_epsilon: float  # for one of `unit`
    unit: str
    row_epsilon: float | None  # for one row as a part of the site, where the unit is the site
    lifetime_after: float  # for a row or subject
    fits: bool
    counts_on: str  # whose shares of the noise epsilon relies on; empty where a site adds the whole
    problems: tuple[DataProblem, ...]


def add_site(request: AddSiteRequest) -> SiteHome:
    """Make a site's home: keys, population pseudonym, budget. The data file must be readable.

    Raises:
        HomeError, IdentityError: the home cannot be made.
        DataFileError: the file as a whole cannot serve.
    """
    from clients.loader import read_table

    read_table(request.data)
    return SiteHome.create(
        request.home,
        name=request.name,
        data=request.data,
        population=request.population,
        lifetime_epsilon=request.lifetime_epsilon,
        lifetime_delta=request.lifetime_delta,
        auto_approve=request.auto_approve,
        purposes=request.purposes,
        operator=request.operator,
    )


def review(home: SiteHome, charter: str) -> Review:
    """Say what a charter (canonical text) would cost this site, and what is wrong with its file.

    Raises:
        RefusedError: the charter is malformed, or not for this site.
    """
    from clients.decisions import run_cost
    from clients.ledger import SiteLedger
    from clients.loader import inspect_file
    from clients.reviewing import counts_on
    from clients.terms import read_terms

    terms = read_terms(charter, site=home.name)
    lifetime = home.config.lifetime
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        committed = ledger.committed_events(home.config.population.pseudonym)
    finally:
        ledger.close()
    planned = terms.planned
    after = recompute(of_people((*committed, *planned)), float(lifetime.delta)).value
    return Review(
        charter=terms.digest,
        releases=len(planned),
        charter_epsilon=recompute(planned, float(lifetime.delta)).value,
        unit=terms.event.unit,
        row_epsilon=run_cost(terms, float(lifetime.delta)) if terms.by_site else None,
        lifetime_after=after,
        fits=after <= float(lifetime.epsilon),
        counts_on=counts_on(terms, float(lifetime.delta)),
        problems=inspect_file(home.config.data, terms),
    )


def approve_charter(home: SiteHome, charter: str) -> SiteHome:
    """Record that this site's people agree; the agent signs the charter when the coordinator asks.

    Raises:
        RefusedError: the charter is malformed, or not for this site.
    """
    from clients.proposals import Proposal
    from clients.reviewing import approve_charter_text

    return approve_charter_text(home, Proposal(charter=charter, run=None))


def status(home: SiteHome) -> SiteStatus:
    """Read the site's home, also while its agent runs.

    Raises:
        HomeError: the ledger is missing or damaged.
        LedgerBehindError: an old copy of the ledger was put back.
    """
    from clients.ledger import SiteLedger

    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        return status_of(home, ledger)
    finally:
        ledger.close()


def status_of(home: SiteHome, ledger: Any) -> SiteStatus:
    """Return the status of a site whose ledger is open here."""
    from clients.proposals import Proposals

    population, lifetime = home.config.population, home.config.lifetime
    events = ledger.events(population.pseudonym)
    committed = ledger.committed_events(population.pseudonym)
    whole, whole_cap = whole_site_epsilon(committed, float(lifetime.delta)), lifetime.whole_site_epsilon
    witnessed = None
    if home.witness_path.exists():
        witnessed = home.witness().tree_size
    return SiteStatus(
        name=home.name,
        operator=home.config.operator,
        population=population.name,
        pseudonym=population.pseudonym,
        data=home.config.data,
        releases=len(events),
        undelivered=len(ledger.undelivered(population.pseudonym)),
        open_runs=tuple(item.run for item in ledger.open_reservations(population.pseudonym)),
        lifetime_epsilon=recompute(of_people(events), float(lifetime.delta)).value if events else 0.0,
        committed_epsilon=recompute(of_people(committed), float(lifetime.delta)).value if committed else 0.0,
        cap_epsilon=format(lifetime.epsilon, "f"),
        cap_delta=format(lifetime.delta, "f"),
        whole_site_epsilon=whole if math.isfinite(whole) else None,
        whole_site_cap="" if whole_cap is None else format(whole_cap, "f"),
        approved_charters=home.config.rules.approved_charters,
        witnessed_size=witnessed,
        waiting=Proposals(home.path).ids(),
    )


def witness_once(home: SiteHome, url: str, *, client: httpx.Client | None = None) -> int:
    """Pull the log's checkpoint, prove that it extends the last one this site saw, post the cosignature.

    Two contradicting checkpoints are kept in the home's folder `misbehaviour`, as a file that convicts the
    log before anyone.

    Returns:
        The tree size now cosigned.

    Raises:
        WitnessError: the log was rewritten, truncated or forked; nothing was cosigned.
        LinkError: the log does not answer, or not in its protocol.
    """
    import httpx

    own = client is None
    client = client or httpx.Client(timeout=30.0)
    try:
        return _witness_once(home, url.rstrip("/"), client)
    except httpx.HTTPError as error:
        raise LinkError(f"{url} does not answer: {error}") from error
    finally:
        if own:
            client.close()


def _witness_once(home: SiteHome, url: str, client: httpx.Client) -> int:
    from audit.checkpoints import parse_checkpoint_note

    asked = f"{url}/v1/audit/checkpoint"
    note = client.get(asked, params={"meeting": "true"}).raise_for_status().content
    witness = home.witness()
    old_size = witness.tree_size
    proof: list[bytes] = []
    try:
        size = parse_checkpoint_note(note).tree_size
        if size < old_size:  # another server's meeting is behind ours: only the newest can show a truncation
            note = client.get(asked).raise_for_status().content
            size = parse_checkpoint_note(note).tree_size
        if 0 < old_size < size:
            reply = client.get(f"{url}/v1/audit/consistency", params={"old": old_size, "new": size})
            proof = _hashes(reply.raise_for_status().content)
        line = witness.cosign(note, old_size, proof, now=int(datetime.now(UTC).timestamp()))
    except WitnessProofError as error:
        kept = keep_accusation(
            home.path, error.seen_note, error.offered_note, proof, _tiles_of(url, client, size)
        )
        if kept is not None:
            error.add_note(f"kept as {kept}; show it to the other members")
        raise
    except WitnessError:
        raise
    except AuditError as error:
        raise LinkError(f"{url} does not speak as a log: {error}") from error
    body = {"note_signature": line.decode(), "site": home.name}
    client.post(f"{url}/v1/audit/cosignatures", json=body).raise_for_status()
    return size


def _tiles_of(url: str, client: httpx.Client, tree_size: int) -> NodeSource:
    """Nodes of the log's tree as it serves them to witnesses; read only when a proof of them is wanted."""
    import httpx

    from audit.tiles import MAX_TILE_BYTES, TileTree

    def fetch(path: str) -> bytes:
        try:
            data = client.get(f"{url}/v1/audit/{path}").raise_for_status().content
        except httpx.HTTPError as error:
            raise LinkError(f"{url}/v1/audit/{path}: {error}") from error
        if len(data) > MAX_TILE_BYTES:
            raise LinkError(f"{url}/v1/audit/{path}: is no tile")
        return data

    return TileTree(fetch, tree_size).node


def cosign_here(homes: Mapping[str, SiteHome], coordinator: Coordinator) -> bytes:
    """Publish the log and let the sites of `homes`, all on this machine, cosign it; return the note.

    Raises:
        WitnessError: a site refuses, because the log was rewritten, truncated or forked.
    """
    from audit.checkpoints import parse_checkpoint_note
    from federation.trust import asked_to_cosign

    operators = {name: home.config.operator for name, home in homes.items()}
    now = int(datetime.now(UTC).timestamp())

    def collect(note: bytes) -> dict[str, list[bytes]]:
        size, lines = parse_checkpoint_note(note).tree_size, {}
        for name in asked_to_cosign(homes, operators):
            witness = homes[name].witness()
            old_size = witness.tree_size
            proof = coordinator.ledger.consistency_proof(old_size, size) if old_size else []
            lines[name] = [witness.cosign(note, old_size, proof, now=now)]
        return lines

    return coordinator.cosign_round(collect)


def check_against_log(
    agent: Agent, url: str, *, headers: Mapping[str, str] | None = None, client: httpx.Client | None = None
) -> int:
    """Compare the agent's ledger with its statements in the log, before it serves; return how many there are.

    `headers` carries the site's API key.

    Raises:
        LedgerBehindError: the log shows a release that the ledger does not have.
        LinkError: the log does not answer, or not in its protocol.
    """
    import httpx

    own = client is None
    client = client or httpx.Client(timeout=30.0)
    seen, after = 0, -1
    query: dict[str, str | int] = {"type": "site.statement", "site": agent.name, "limit": _PAGE}
    try:
        while True:
            reply = client.get(
                f"{url.rstrip('/')}/v1/audit/entries", params={**query, "after": after}, headers=headers
            )
            page = reply.raise_for_status().json()
            for item in page["entries"]:
                body = decode_entry(canonical_bytes(item["entry"])).body
                if isinstance(body, SiteStatement):
                    agent.observe(body)
                    seen += 1
            if page["next"] is None:
                return seen
            after = int(page["next"])
    except (httpx.HTTPError, KeyError, TypeError, ValueError, AuditError) as error:
        raise LinkError(f"{url} does not answer as a log: {error}") from error
    finally:
        if own:
            client.close()


def _hashes(data: bytes) -> list[bytes]:
    document = parse_strict(data)
    proof = document.get("proof") if isinstance(document, dict) else None
    if not isinstance(proof, list) or not all(isinstance(item, str) for item in proof):
        raise LinkError(f"a consistency proof is a list of hashes, not {json.dumps(document)[:60]}")
    return [base64.b64decode(str(item), validate=True) for item in proof]
