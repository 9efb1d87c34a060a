"""A coordinator in miniature: it speaks to agents as the real one does, and lies on demand."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from audit.canonical import canonical_bytes
from audit.checkpoints import parse_checkpoint_note
from audit.entries import (
    RoundCompleted,
    RunStarted,
    SiteStatement,
    body_document,
    parse_body,
    signing_payload,
)
from audit.keys import SigningKey
from audit.models import initial_weights, model_file, weights_of_file
from audit.replay import AggregationPlan, Aggregator, SiteUpdate
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof
from audit.weights import decode_update
from clients.agent import Agent
from clients.home import SiteHome
from clients.identity import signature_text
from federation.charter import Charter
from federation.coordinator import Coordinator

SITES = ("alpha", "beta", "gamma")
ORIGIN = "log.example/small"

CHARTER = """
affidavit: 1
name: small
task: binary
features:
  - {{name: age, type: number, lower: 0, upper: 100}}
  - {{name: dose, type: number, lower: 1, upper: 1000, transform: log}}
  - {{name: arm, type: category, categories: [placebo, drug], missing: midpoint}}
label: {{name: outcome, classes: ["no", "yes"]}}
model: {{family: logistic_regression}}
plan: {{learning_rate: 2, rounds: {rounds}, minimum_sites: 2}}
privacy:
  unit: row
  relation: add_remove
  epsilon: 5
  delta: 0.00001
  max_grad_norm: {max_grad_norm}
  noise_multiplier: {noise}
  grid_bits: 24
sites:
{sites}
purposes: [research]
"""

ROWS = "age,dose,arm,outcome\n" + "".join(
    f"{20 + 3 * i},{5 + 11 * i},{'drug' if i % 2 else 'placebo'},{'yes' if i % 3 else 'no'}\n"
    for i in range(20)
)


def call(
    agent: Agent, kind: str, header: dict[str, Any], **blobs: bytes
) -> tuple[dict[str, Any], dict[str, bytes]]:
    raw, answer = agent.handle(kind, canonical_bytes(header), blobs)
    document: dict[str, Any] = json.loads(raw)
    return document, answer


def refusal_code(document: dict[str, Any]) -> str:
    """The closed code of a refused request, signed or not."""
    if "refusal" in document:
        return str(document["refusal"]["reason"])
    return str(document.get("error", "none"))


@dataclass
class Network:
    """Three sites with real homes and agents, a real log, and a hand-driven coordinator."""

    folder: Path
    coordinator: Coordinator
    agents: dict[str, Agent]
    charter: Charter
    author: SigningKey = field(default_factory=SigningKey.generate)
    theta: list[float] = field(default_factory=list)
    base: bytes = b""
    run: str = "run-1"
    previous: tuple[int, dict[str, int]] | None = None  # leaf of the last round, and of each statement

    def text(self, charter: Charter | None = None) -> str:
        return (charter or self.charter).canonical().decode()

    def variant(self, **changes: Any) -> Charter:
        """The same charter on other terms."""
        return make_charter(self.agents, **changes)

    def charter_file(self) -> Path:
        """The charter as its author wrote it."""
        path = self.folder / "charter.yaml"
        path.write_text(charter_text(self.agents, rounds=self.charter.plan.rounds), encoding="utf-8")
        return path

    def restart(self, site: str) -> Agent:
        self.agents[site].close()
        self.agents[site] = Agent.open(self.folder / "sites" / site)
        return self.agents[site]

    def to_sign(self, charter: Charter | None = None) -> dict[str, Any]:
        return {"charter": self.text(charter), "author": self.author.text}

    def sign(self, charter: Charter | None = None) -> None:
        for agent in self.agents.values():
            document, _ = call(agent, "charter.sign", self.to_sign(charter))
            assert "signature" in document, document

    def run_started(self, charter: Charter | None = None, **changes: Any) -> dict[str, Any]:
        charter = charter or self.charter
        layers = [dict(layer) for layer in charter.layers]
        self.theta = initial_weights(layers, charter.digest)
        self.base = model_file(layers, self.theta)
        body = RunStarted(
            run=self.run,
            charter=charter.digest,
            model="small",
            author=self.author.text,
            sites=SITES,
            rounds=charter.plan.rounds,
            initial_model=hashlib.sha256(self.base).hexdigest(),
            code="0" * 64,
            signature="",
        )
        body = dataclasses.replace(body, **changes)
        if not body.signature:
            domain, payload = signing_payload(body)
            body = dataclasses.replace(body, signature=signature_text(self.author, domain, payload))
        return body_document(body)

    def propose(
        self, charter: Charter | None = None, *, only: str = "", **changes: Any
    ) -> dict[str, dict[str, Any]]:
        header = {"run_started": self.run_started(charter, **changes), "charter": self.text(charter)}
        asked = {only: self.agents[only]} if only else self.agents
        return {site: call(agent, "run.propose", header)[0] for site, agent in asked.items()}

    def start(self, charter: Charter | None = None) -> None:
        """Sign the charter and get the run accepted everywhere."""
        self.sign(charter)
        answers = self.propose(charter)
        assert all("acceptance" in answer for answer in answers.values()), answers

    def logged(self, leaf_index: int, *, witnesses: int = 3, note: bytes | None = None) -> dict[str, str]:
        """An entry as it travels: with a proof to a checkpoint that `witnesses` sites cosigned."""
        note = note or self.checkpoint(witnesses)
        size = parse_checkpoint_note(note).tree_size
        proof = TlogProof(
            leaf_index=leaf_index,
            hashes=tuple(self.coordinator.ledger.inclusion_proof(leaf_index, size)),
            checkpoint_note=note,
        )
        leaf = self.coordinator.ledger.entry(leaf_index)
        return {"entry": base64.b64encode(leaf).decode(), "proof": proof.format().decode()}

    def checkpoint(self, witnesses: int = 3) -> bytes:
        sites = list(self.agents)[:witnesses]
        return self.coordinator.cosign_round(lambda note: {site: [self.cosign(site, note)] for site in sites})

    def cosign(self, site: str, note: bytes) -> bytes:
        ledger, size = self.coordinator.ledger, parse_checkpoint_note(note).tree_size
        old = 0
        for _ in range(2):
            proof = ledger.consistency_proof(old, size) if old else []
            header = {
                "old_size": old,
                "proof": [base64.b64encode(item).decode() for item in proof],
                "note": note.decode(),
            }
            document, _ = call(self.agents[site], "cosign", header)
            if document.get("error") != "witness.stale":
                break
            old = document["tree_size"]
        return document["cosignature"].encode()

    def round_header(self, number: int, site: str, **changes: Any) -> dict[str, Any]:
        header: dict[str, Any] = {
            "run": self.run,
            "round": number,
            "charter": self.charter.digest,
            "participants": list(SITES),
            "previous_round": None,
            "own_statement": None,
        }
        if self.previous is not None:
            leaf, statements = self.previous
            header["previous_round"] = self.logged(leaf)
            header["own_statement"] = self.logged(statements[site]) if site in statements else None
        return header | changes

    def ask(
        self, site: str, number: int, base: bytes | None = None, **changes: Any
    ) -> tuple[dict[str, Any], bytes]:
        header = self.round_header(number, site, **changes)
        document, blobs = call(
            self.agents[site], "round", header, base_model=self.base if base is None else base
        )
        return document, blobs.get("update", b"")

    def play(self, number: int, sites: tuple[str, ...] = SITES) -> None:
        """Run one honest round and log it."""
        replies = {}
        for site in sites:
            document, update = self.ask(site, number)
            assert "statement" in document, document
            replies[site] = (parse_body(SiteStatement, document["statement"]), update)
        self.complete(number, replies)

    def complete(self, number: int, replies: dict[str, tuple[SiteStatement, bytes]]) -> None:
        appended = {
            s: self.coordinator.append(reply[0], "coordinator") for s, reply in sorted(replies.items())
        }
        members = {site.name: site for site in self.charter.sites}
        updates = [
            SiteUpdate(
                site=s, nominal_rows=members[s].nominal_rows, weight=1.0, values=decode_update(reply[1])
            )
            for s, reply in sorted(replies.items())
        ]
        plan = AggregationPlan.of_charter(self.charter.document)
        theta = Aggregator(plan).step(number, self.theta, updates)
        layers = [dict(layer) for layer in self.charter.layers]
        base, self.base, self.theta = self.base, model_file(layers, theta), list(theta)
        body = RoundCompleted(
            run=self.run,
            round=number,
            base_model=hashlib.sha256(base).hexdigest(),
            statements=tuple(appended[s].leaf_hash.hex() for s in sorted(replies)),
            missing=tuple(s for s in SITES if s not in replies),
            output_model=hashlib.sha256(self.base).hexdigest(),
            metrics=(),
        )
        leaf = self.coordinator.append(body, "coordinator").leaf_index
        self.previous = leaf, {s: item.leaf_index for s, item in appended.items()}

    def weights(self) -> list[float]:
        return weights_of_file([dict(layer) for layer in self.charter.layers], self.base)

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()
        self.coordinator.close()


def charter_text(
    agents: dict[str, Agent], *, rounds: int = 3, noise: str = "2", max_grad_norm: str = "1"
) -> str:
    sites = "\n".join(
        f'  - {{name: {name}, identity: "{agent.home.keys().identity.text}", nominal_rows: 20, weight: 1}}'
        for name, agent in agents.items()
    )
    return CHARTER.format(rounds=rounds, noise=noise, max_grad_norm=max_grad_norm, sites=sites)


def make_charter(agents: dict[str, Agent], **changes: Any) -> Charter:
    return Charter.parse(charter_text(agents, **changes))


def make_homes(folder: Path) -> None:
    """Make three sites and a log in which they are enrolled; nothing else has happened yet."""
    homes = {}
    for site in SITES:
        path = folder / "data" / f"{site}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROWS, encoding="utf-8")
        homes[site] = SiteHome.create(
            folder / "sites" / site,
            name=site,
            data=path,
            population=f"people of {site}",
            lifetime_epsilon="20",
            lifetime_delta="0.00001",
            auto_approve=True,
        )
    coordinator = Coordinator.create(folder / "coordinator", folder / "signer", ORIGIN)
    lines = [f"log {coordinator.log_key}"]
    lines += [f"witness {s} {home.keys().witness_signer(s).vkey}" for s, home in homes.items()]
    policy = Policy.parse("\n".join([*lines, "group sites 2 alpha beta gamma", "quorum sites"]))
    for home in homes.values():
        home.join(policy)
        population = home.config.population.pseudonym
        coordinator.append(home.keys().enrolment(home.name, population, ORIGIN), "coordinator")
    coordinator.close()


def open_copy(
    homes: Path,
    folder: Path,
    *,
    data: dict[str, str] | None = None,
    lifetime_epsilon: str = "20",
    auto_approve: bool = True,
    rounds: int = 3,
    agent: Callable[[SiteHome], Agent] = Agent.open,
) -> Network:
    """Copy what `make_homes` made, set in each site's file what differs, and open everything."""
    shutil.copytree(homes, folder, dirs_exist_ok=True)
    for site in SITES:
        rows, settings = folder / "data" / f"{site}.csv", folder / "sites" / site / "site.yaml"
        rows.write_text((data or {}).get(site, ROWS), encoding="utf-8")
        document = yaml.safe_load(settings.read_text(encoding="utf-8"))
        document["data"] = str(rows)
        document["lifetime"]["epsilon"] = lifetime_epsilon
        document["rules"]["auto_approve"] = auto_approve
        settings.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    coordinator = Coordinator.open(folder / "coordinator", folder / "signer")
    agents = {site: agent(SiteHome.open(folder / "sites" / site)) for site in SITES}
    return Network(folder, coordinator, agents, make_charter(agents, rounds=rounds))


@pytest.fixture(scope="session")
def new_homes(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Three sites and a log that have done nothing yet; copy them."""
    return build_once("small-network", make_homes)


@pytest.fixture(scope="session")
def make_network(new_homes: Path) -> Callable[..., Network]:
    """Return `make(folder, **options) -> Network`; the caller closes it."""
    return partial(open_copy, new_homes)


@pytest.fixture
def network(new_homes: Path, tmp_path: Path) -> Iterator[Network]:
    made = open_copy(new_homes, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def networks(new_homes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Network]]:
    """A network with a signed charter, one with an accepted run, and one that has played round 1.

    Tests that use them through `signed`, `accepted` or `played` only make requests that change nothing.
    """
    names = ("signed", "accepted", "played")
    made = {name: open_copy(new_homes, tmp_path_factory.mktemp(name)) for name in names}
    made["signed"].sign()
    made["signed"].run_started()
    made["accepted"].start()
    made["played"].start()
    made["played"].play(1)
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
def signed(networks: dict[str, Network]) -> Iterator[Network]:
    yield from unmoved(networks["signed"])


@pytest.fixture
def accepted(networks: dict[str, Network]) -> Iterator[Network]:
    yield from unmoved(networks["accepted"])


@pytest.fixture
def played(networks: dict[str, Network]) -> Iterator[Network]:
    yield from unmoved(networks["played"])


def unmoved(network: Network) -> Iterator[Network]:
    """Lend a network, and see to it that no ledger moved."""
    before = odometers(network)
    yield dataclasses.replace(network)
    assert odometers(network) == before


def odometers(network: Network) -> dict[str, tuple[int, int]]:
    return {
        site: (
            agent.ledger.head(agent.population).sequence,
            len(agent.ledger.open_reservations(agent.population)),
        )
        for site, agent in network.agents.items()
    }


@pytest.fixture
def build_network(new_homes: Path, tmp_path: Path) -> Iterator[Callable[..., Network]]:
    """Return `build(**options) -> Network`; all are closed at the end."""
    made: list[Network] = []

    def build(**options: Any) -> Network:
        made.append(open_copy(new_homes, tmp_path / f"network-{len(made)}", **options))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def request_of() -> Callable[..., tuple[dict[str, Any], dict[str, bytes]]]:
    """Return `ask(agent, kind, header, **blobs)`."""
    return call


@pytest.fixture(scope="session")
def code_of() -> Callable[[dict[str, Any]], str]:
    """Return `code(answer)`: the closed code of a refused request."""
    return refusal_code


@pytest.fixture
def driver(network: Network) -> Any:
    """Three sites that accepted a masked run, and a coordinator by hand; one may drop out."""
    return _masked_run(network)


@pytest.fixture(scope="session")
def keyed(new_homes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All three have given keys; tests that use it only make requests that are refused."""
    network = open_copy(new_homes, tmp_path_factory.mktemp("keyed") / "network")
    made = _masked_run(network)
    made.ask_keys()
    yield made
    network.close()


@pytest.fixture
def masked(driver: Any) -> Any:
    """All three have sent masked updates."""
    driver.ask_keys()
    driver.ask_shares()
    for site in SITES:
        assert "statement" in driver.update(site)
    return driver


def _masked_run(network: Network) -> Any:
    from tests.clients.masked_driver import masked_run  # which imports this module

    return masked_run(network)
