"""A federation without data: real keys, real log, real Flower objects, and sites that answer as a test
tells them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import cosign
from audit.entries import (
    ZERO_DIGEST,
    CharterSigned,
    RunAccepted,
    RunStarted,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    body_document,
    decode_entry,
    event_hash,
    parse_body,
    run_digest,
    signing_payload,
)
from audit.keys import SigningKey
from audit.merkle import hash_leaf
from audit.notes import KeyType, NoteSigner
from audit.principal import LocalOwner, Principal
from audit.weights import encode_update
from federation import registry, service
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.mechanism import planned_event, planned_events
from federation.pieces import message_content, read_blobs
from federation.progress import RunEvent
from federation.server_app import app as server_app
from federation.server_app import carry_out
from tests.waiting import Moved

ORIGIN = "example.org/log"
CHARTER = """\
affidavit: 1
name: cells
task: binary
features:
  - {name: radius, type: number, unit: mm, lower: 0, upper: 10}
  - {name: texture, type: number, unit: "1", lower: 1, upper: 100, transform: log}
  - {name: smoker, type: boolean, missing: midpoint}
  - {name: stage, type: category, categories: [I, II, III]}
label: {name: diagnosis, classes: [benign, malignant]}
model: {family: logistic_regression}
plan: {learning_rate: 2, rounds: 3, round_timeout_s: 4, minimum_sites: 2}
privacy:
  unit: row
  relation: add_remove
  epsilon: 3
  delta: 1e-5
  max_grad_norm: 1
  noise_multiplier: 3
sites:
  - {name: north, identity: "NORTH", nominal_rows: 100}
  - {name: south, identity: "SOUTH", nominal_rows: 50}
  - {name: west, identity: "WEST", nominal_rows: 70}
public_set: {digest: PUBLIC, rows: 8}
gates:
  - {metric: auc, source: public_set, floor: 0.1}
purposes: [research]
officers:
  - {name: dr-lee, key: "OFFICER"}
  - {name: dr-ito, key: "AUTHOR"}
"""

PUBLIC = (
    "radius,texture,smoker,stage,diagnosis\n"
    + "".join(
        f"{i},{10 * i + 1},{'true' if i % 2 else 'false'},{'I' if i < 4 else 'III'},"
        f"{'benign' if i in (0, 1, 2, 5) else 'malignant'}\n"
        for i in range(8)
    )
).encode()


@dataclass
class FakeSite:
    """A site with honest keys that answers the protocol; `tamper` changes what it would say."""

    name: str
    identity: SigningKey = field(default_factory=SigningKey.generate)
    statement: SigningKey = field(default_factory=SigningKey.generate)
    witness: SigningKey = field(default_factory=SigningKey.generate)
    population: str = ""
    charter: Charter | None = None
    tamper: Callable[[str, dict[str, Any], dict[str, bytes]], None] | None = None
    values: Callable[[int], list[int]] | None = None
    undelivered: list[SiteStatement] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    sequence: int = 0
    head: str = ZERO_DIGEST
    accepted: dict[str, dict[str, Any]] = field(default_factory=dict)
    answered: dict[tuple[str, int], tuple[dict[str, Any], dict[str, bytes]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.population = self.population or hashlib.sha256(self.name.encode()).hexdigest()[:32]

    def copy(self) -> FakeSite:
        """The same site with records of its own."""
        return dataclasses.replace(
            self,
            undelivered=list(self.undelivered),
            asked=list(self.asked),
            accepted=dict(self.accepted),
            answered=dict(self.answered),
        )

    def signed(self, body: Any, key: SigningKey, name: str = "signature") -> Any:
        domain, payload = signing_payload(body)
        return dataclasses.replace(body, **{name: base64.b64encode(key.sign(domain, payload)).decode()})

    def enrolment(self) -> SiteEnrolled:
        agreement = X25519PrivateKey.from_private_bytes(hashlib.sha256(self.identity.public_bytes).digest())
        raw = agreement.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        body = SiteEnrolled(
            site=self.name,
            operator="",
            origin=ORIGIN,
            population=self.population,
            identity_key=self.identity.text,
            statement_key=self.statement.text,
            witness_key=self.cosigner().vkey,
            agreement_key=base64.b64encode(raw).decode(),
            signature="",
            statement_proof="",
            witness_proof="",
        )
        for key, name in (
            (self.identity, "signature"),
            (self.statement, "statement_proof"),
            (self.witness, "witness_proof"),
        ):
            body = self.signed(body, key, name)
        return body

    def cosigner(self) -> NoteSigner:
        return NoteSigner(self.name, self.witness, KeyType.COSIGNATURE)

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        self.asked.append(kind)
        document: Any = parse_canonical(header)
        answer, out = self.answer(kind, document, blobs)
        if self.tamper is not None:
            self.tamper(kind, answer, out)
        return canonical_bytes(answer), out

    def answer(
        self, kind: str, request: Any, blobs: Mapping[str, bytes]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        if kind == "hello":
            return {"enrolment": body_document(self.enrolment())}, {}
        if kind == "charter.sign":
            digest = hashlib.sha256(request["charter"].encode()).hexdigest()
            body = self.signed(
                CharterSigned(digest=digest, author=request["author"], site=self.name, signature=""),
                self.identity,
            )
            return {"signature": body_document(body)}, {}
        if kind == "run.propose":
            self.charter = Charter.from_canonical(request["charter"])
            run = request["run_started"]
            reported = [body_document(statement) for statement in self.undelivered]
            if run["run"] in self.accepted:
                return {"acceptance": self.accepted[run["run"]], "undelivered": reported}, {}
            body = RunAccepted(
                run=run["run"],
                start=run_digest(parse_body(RunStarted, run)),
                origin=ORIGIN,
                charter=run["charter"],
                site=self.name,
                population=self.population,
                next_sequence=self.sequence + 1,
                previous_event=self.head,
                planned_events=len(planned_events(self.charter)),
                lifetime_epsilon_cap="10",
                signature="",
            )
            self.accepted[run["run"]] = body_document(self.signed(body, self.statement))
            return {"acceptance": self.accepted[run["run"]], "undelivered": reported}, {}
        if kind == "cosign":
            line = cosign(request["note"].encode(), self.cosigner(), 1_700_000_000)
            return {"cosignature": line.decode()}, {}
        if kind == "round":
            return self.round(request, blobs)
        if kind == "run.undelivered":
            mine = [answer for (run, _), (answer, _) in self.answered.items() if run == request["run"]]
            return {"undelivered": [answer["statement"] for answer in mine]}, {}
        return {}, {}

    def round(self, request: Any, blobs: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
        key = (request["run"], request["round"])
        if key not in self.answered:
            assert self.charter is not None
            event = planned_event(self.charter)
            values = (
                self.values(event.dimension)
                if self.values
                else [1000 * (i + 1) for i in range(event.dimension)]
            )
            update = encode_update(values)
            previous = ZERO_DIGEST
            if request["previous_round"] is not None:
                leaf = base64.b64decode(request["previous_round"]["entry"])
                decode_entry(leaf)
                previous = hash_leaf(leaf).hex()
            body = self.signed(
                SiteStatement(
                    run=request["run"],
                    round=request["round"],
                    charter=request["charter"],
                    site=self.name,
                    population=self.population,
                    base_model=hashlib.sha256(blobs["base_model"]).hexdigest(),
                    participants=tuple(request["participants"]),
                    agent_code=ZERO_DIGEST,
                    previous_round=previous,
                    event=event,
                    sequence=self.sequence + 1,
                    previous_event=self.head,
                    update=hashlib.sha256(update).hexdigest(),
                    signature="",
                ),
                self.statement,
            )
            self.sequence, self.head = self.sequence + 1, event_hash(body)
            self.answered[key] = ({"statement": body_document(body)}, {"update": update})
        header, out = self.answered[key]
        return dict(header), dict(out)

    def refusal(self, run: str, charter: str, number: int, reason: str) -> dict[str, Any]:
        body = SiteRefused(
            run=run, charter=charter, site=self.name, round=number, reason=reason, signature=""
        )
        return {"refusal": body_document(self.signed(body, self.statement))}


@dataclass
class Federation:
    """Three fake sites, a coordinator's home, an author who is an officer too, and an officer."""

    home: Path
    coordinator: Coordinator
    sites: dict[str, FakeSite]
    officer: SigningKey
    author: SigningKey
    charter: Charter
    principal: Principal = field(default_factory=lambda: Principal(id="p", role="scientist"))
    owner: LocalOwner = field(default_factory=LocalOwner)
    waited: Moved = field(default_factory=Moved)  # the time in runs where somebody is missing

    def train(
        self,
        *,
        charter: Charter | None = None,
        fault: Any = None,
        on_event: Callable[[RunEvent], None] | None = None,
        connected: tuple[str, ...] = ("north", "south", "west"),
    ) -> service.TrainedRun:
        """Carry out one run through Flower's real objects; `fault` loses or delays messages."""

        def launch(config: Mapping[str, str]) -> None:
            self.serve(config, fault, connected)

        request = service.TrainRequest(charter=charter or self.charter)
        return service.train(
            self.coordinator, self.principal, self.owner, request, self.author, launch, on_event=on_event
        )

    def serve(
        self,
        config: Mapping[str, str],
        fault: Any = None,
        connected: tuple[str, ...] = ("north", "south", "west"),
    ) -> None:
        """Through Flower's ServerApp; where somebody is missing, in time that passes by waiting alone."""
        nodes = {name: {} for name in connected}
        if fault is None and len(nodes) == len(self.sites):
            with InProcessGrid(self.client_app(), nodes) as grid:
                server_app(grid=grid, context=Context(0, 0, {}, RecordDict(), {**config, "poll-s": 0.002}))
            return
        with (
            Coordinator.open(config["home"]) as coordinator,
            InProcessGrid(self.client_app(), nodes, fault=fault, workers=0) as grid,
        ):
            exchange = Exchange(
                grid, poll_s=0.01, discovery_s=5, monotonic=self.waited, sleep=self.waited.forward
            )
            carry_out(grid, coordinator, config["run"], exchange=exchange)

    def resume(self, run: str) -> None:
        """Start the ServerApp of a prepared run once more."""
        self.serve({"home": str(self.coordinator.home), "run": run})

    def registered(self) -> registry.Version:
        """Return a fresh candidate version."""
        run = self.train().run
        return service.register(
            self.coordinator, self.principal, self.owner, service.RegisterRequest(run=run)
        )

    def bodies(self, kind: type[Any]) -> list[Any]:
        return [body for _, body in self.coordinator.bodies(kind)]

    def client_app(self) -> ClientApp:
        app = ClientApp()

        def relay(message: Message, context: Context) -> Message:
            record = message.content["header"]
            kind, header = str(record["kind"]), bytes(record["header"])
            blobs = read_blobs(message.content)
            answer, out = self.sites[str(context.node_config["site"])].handle(kind, header, blobs)
            return Message(message_content(kind, answer, out), reply_to=message)

        app.train()(relay)
        app.query()(relay)
        return app


def charter_yaml(sites: Mapping[str, FakeSite], officer: SigningKey, author: SigningKey) -> str:
    text = CHARTER.replace("PUBLIC", hashlib.sha256(PUBLIC).hexdigest())
    for name, site in sites.items():
        text = text.replace(f'"{name.upper()}"', f'"{site.identity.text}"')
    return text.replace('"OFFICER"', f'"{officer.text}"').replace('"AUTHOR"', f'"{author.text}"')


@pytest.fixture(scope="session")
def keys() -> dict[str, SigningKey]:
    return {name: SigningKey.generate() for name in ("north", "south", "west", "officer", "author")}


@pytest.fixture(scope="session")
def charter_text(keys: dict[str, SigningKey]) -> str:
    """A charter that holds; tests replace one part of it."""
    sites = {name: FakeSite(name, identity=keys[name]) for name in ("north", "south", "west")}
    return charter_yaml(sites, keys["officer"], keys["author"])


@pytest.fixture(scope="session")
def charter(charter_text: str) -> Charter:
    return Charter.parse(charter_text)


@pytest.fixture(scope="session")
def public_set() -> bytes:
    return PUBLIC


def make_federation(folder: Path, charter_text: str, keys: dict[str, SigningKey]) -> Federation:
    sites = {name: FakeSite(name, identity=keys[name]) for name in ("north", "south", "west")}
    coordinator = Coordinator.create(folder / "coordinator", folder / "signer", ORIGIN)
    coordinator.blobs.put(PUBLIC)
    return Federation(
        home=folder,
        coordinator=coordinator,
        sites=sites,
        officer=keys["officer"],
        author=keys["author"],
        charter=Charter.parse(charter_text),
    )


@pytest.fixture
def federation(tmp_path: Path, charter_text: str, keys: dict[str, SigningKey]) -> Iterator[Federation]:
    made = make_federation(tmp_path, charter_text, keys)
    yield made
    made.coordinator.close()


@dataclass(frozen=True)
class Candidate:
    """A federation whose only run has been registered, in a copy that one test may change."""

    federation: Federation
    version: registry.Version


@pytest.fixture(scope="session")
def registered_once(
    tmp_path_factory: pytest.TempPathFactory, charter_text: str, keys: dict[str, SigningKey]
) -> tuple[Federation, str]:
    """Train and register once; `candidate` lends copies."""
    folder = tmp_path_factory.mktemp("registered")
    made = make_federation(folder, charter_text, keys)
    digest = made.registered().digest
    made.coordinator.close()
    return made, digest


@pytest.fixture
def candidate(tmp_path: Path, registered_once: tuple[Federation, str]) -> Iterator[Candidate]:
    made, digest = registered_once
    for name in ("coordinator", "signer"):
        shutil.copytree(made.home / name, tmp_path / name)
    with Coordinator.open(tmp_path / "coordinator", tmp_path / "signer") as coordinator:
        sites = {name: site.copy() for name, site in made.sites.items()}
        copy = dataclasses.replace(made, home=tmp_path, coordinator=coordinator, sites=sites)
        yield Candidate(copy, registry.find_version(coordinator.ledger, digest))
