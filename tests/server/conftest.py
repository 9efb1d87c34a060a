"""A small registry without any training: real log, real signer, real keys, one live linear model.

`lab` is fresh for each test; `client` is its application under Starlette's test client.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient

from audit.canonical import canonical_bytes
from audit.entries import (
    ZERO_DIGEST,
    CharterPublished,
    GateResult,
    SiteEnrolled,
    SiteEpsilon,
    VersionRegistered,
    VersionTransition,
    signing_payload,
)
from audit.keys import SigningKey
from audit.models import model_file
from audit.notes import KeyType, NoteSigner
from audit.principal import ROLES
from audit.public_set import public_set_digest
from audit.vault_home import open_vault
from federation.coordinator import Coordinator
from server.app import create_app
from server.keys import KeyStore
from server.settings import Settings
from tests.postgresql import running_server

CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)  # its cost is in the stored hash
ORIGIN = "tests.example/server"
MODEL = "toy"
LAYERS = [
    {"layer": "linear", "in": 4, "out": 1, "bias": 1},
    {"layer": "site_intercept", "sites": 2, "out": 1},
]
WEIGHTS = [0.75, -1.25, 0.5, 2.0, 0.125, -0.5, 0.25]
ROW = {"age": 51, "fever": True, "ward": "north"}


@dataclass
class Clock:
    """A clock that tests move."""

    moment: datetime = field(default_factory=lambda: datetime.now(UTC))

    def now(self) -> datetime:
        return self.moment

    def __call__(self) -> datetime:
        return self.moment

    def forward(self, **time: float) -> None:
        self.moment += timedelta(**time)


def charter(officers: list[SigningKey], identity: str, /, **changed: object) -> dict:
    document = {
        "affidavit": 1,
        "name": MODEL,
        "task": "binary",
        "features": [
            {"name": "age", "type": "integer", "unit": "years", "lower": "0", "upper": "120",
             "transform": "none", "missing": "refuse"},
            {"name": "fever", "type": "boolean", "unit": "", "missing": "midpoint"},
            {"name": "ward", "type": "category", "unit": "", "categories": ["north", "south"],
             "missing": "refuse"},
        ],
        "label": {"name": "outcome", "classes": ["well", "ill"]},
        "model": {"family": "layers", "site_intercept": 1, "layers": LAYERS},
        "plan": {"strategy": "fedavg", "rounds": 2, "local_steps": 1, "learning_rate": "1",
                 "local_learning_rate": "0.1", "average_last": 1, "beta1": "0.9", "beta2": "0.99",
                 "tau": "0.001", "round_timeout_s": 60, "minimum_sites": 2},
        "privacy": {"unit": "row", "relation": "add_remove", "epsilon": "3", "delta": "0.00001",
                    "sample_rate": "1", "max_grad_norm": "1", "noise_multiplier": "8",
                    "accountant": "pld", "grid_bits": 20, "precision": "float64", "subject_id": "",
                    "max_rows_per_subject": 1},
        "sites": [
            {"name": name, "identity": key, "nominal_rows": 100, "weight": "100"}
            for name, key in (("alpha", identity), ("beta", SigningKey.generate().text))
        ],
        "gates": [],
        "purposes": ["audit-trial", "triage"],
        "officers": [{"name": f"officer-{k}", "key": key.text} for k, key in enumerate(officers)],
    }  # fmt: skip
    return {**document, **changed}


class Lab:
    """One coordinator's home and its people."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.folder = folder
        self.clock = Clock()
        self.officer, self.other_officer, self.stranger = (SigningKey.generate() for _ in range(3))
        self.site_identity, self.site_witness = SigningKey.generate(), SigningKey.generate()
        self.coordinator = Coordinator.create(
            folder / "coordinator", folder / "signer", ORIGIN, clock=self.clock, database=database
        )
        self.enrol("alpha")
        self.previous: dict[str, str] = {}
        self.layers, self.weights = LAYERS, WEIGHTS

    def close(self) -> None:
        self.coordinator.close()

    def enrol(self, site: str) -> NoteSigner:
        witness = NoteSigner(site, self.site_witness, KeyType.COSIGNATURE)
        self.coordinator.append(
            SiteEnrolled(
                site=site, operator="", origin=ORIGIN, population="ab" * 16,
                identity_key=self.site_identity.text, statement_key=self.site_identity.text,
                witness_key=witness.vkey, agreement_key="",
                signature="", statement_proof="", witness_proof="",
            ),
            "coordinator",
        )  # fmt: skip
        return witness

    def publish_charter(self, **changed: object) -> str:
        document = charter([self.officer, self.other_officer], self.site_identity.text, **changed)
        text = canonical_bytes(document)
        digest = public_set_digest(text)
        self.coordinator.append(
            CharterPublished(digest=digest, canonical=text.decode(), author=self.stranger.text), "scientist"
        )
        return digest

    def register(
        self, charter_digest: str, *, weights: list[float] = WEIGHTS, epsilon: str = "2.9",
        model: str = MODEL, counted: tuple[str, ...] = ("alpha", "beta"),
    ) -> str:  # fmt: skip
        digest = self.coordinator.blobs.put(model_file(LAYERS, weights))
        sequenced = self.coordinator.append(
            VersionRegistered(
                version=digest, model=model, charter=charter_digest, run="run-1",
                author=self.stranger.text, averaged_from=2, averaged_to=2,
                gates=(GateResult(metric="auc", source="public_set", dataset=ZERO_DIGEST, floor="0.5",
                                  baseline="0.5", value="0.9", passed=1),),
                epsilons=tuple(
                    SiteEpsilon(site=site, population="ab" * 16, events=2, run_epsilon=epsilon,
                                run_epsilon_rdp=epsilon, lifetime_epsilon=epsilon, delta="0.00001",
                                accountant="pld", relation="add_remove", unit="row")
                    for site in counted
                ),
            ),
            "coordinator",
        )  # fmt: skip
        self.registered = sequenced.leaf_hash.hex()
        return digest

    def move(
        self, version: str, charter_digest: str, from_state: str, to_state: str,
        *, key: SigningKey | None = None, model: str = MODEL, forge: bool = False,
    ) -> str:  # fmt: skip
        key = key or self.officer
        unsigned = VersionTransition(
            version=version, model=model, charter=charter_digest, from_state=from_state, to_state=to_state,
            gate_results=self.registered, previous_transition=self.previous.get(model, ZERO_DIGEST),
            officer=key.text, reason="reviewed", signature="",
        )  # fmt: skip
        domain, payload = signing_payload(unsigned)
        signature = key.sign(domain, payload + (b"x" if forge else b""))
        body = dataclasses.replace(unsigned, signature=base64.b64encode(signature).decode())
        leaf_hash = self.coordinator.append(body, "officer").leaf_hash.hex()
        if not forge:
            self.previous[model] = leaf_hash
        return leaf_hash

    def live(self, **changed: object) -> tuple[str, str]:
        """Publish, register and approve; return (version, charter)."""
        digest = self.publish_charter(**changed)
        version = self.register(digest, model=str(changed.get("name", MODEL)))
        model = str(changed.get("name", MODEL))
        self.move(version, digest, "candidate", "approved", model=model)
        self.move(version, digest, "approved", "live", model=model)
        return version, digest

    def settings(self, **changed: object) -> Settings:
        values = {
            "coordinator_home": self.folder / "coordinator",
            "signer_home": self.folder / "signer",
            "publish_interval_s": 3600,
        }
        return Settings.model_validate({**values, **changed})

    def keys(self) -> KeyStore:
        return KeyStore(self.folder / "coordinator", self.clock, hasher=CHEAP)

    def key(self, role: str, **options: object) -> str:
        store = self.keys()
        text, _ = store.create(role=role, **options)
        store.close()
        return text

    def entries(self, type: str | None = None) -> list[dict]:
        found = self.coordinator.ledger.search(type=type, limit=1000)
        return [{"leaf_index": row.leaf_index, **json.loads(row.body)} for row in found]


def stocked_lab(folder: Path, database: str | None = None) -> Lab:
    """A registry with a live version and a key of each role, open."""
    lab = Lab(folder, database)
    lab.version, lab.charter = lab.live()
    open_vault(folder / "coordinator", ORIGIN).close()
    lab.tokens = {role: lab.key(role) for role in ROLES}
    return lab


@pytest.fixture(scope="session")
def lab_template(tmp_path_factory):
    """One registry with a live version, made once; tests get copies of its files."""
    lab = stocked_lab(tmp_path_factory.mktemp("lab"))
    lab.close()
    return lab


@pytest.fixture(scope="module")
def postgresql_server():
    with running_server() as server:
        yield server


@pytest.fixture
def postgresql_lab(postgresql_server, tmp_path):
    """The same, its log, keys and counts in PostgreSQL."""
    lab = stocked_lab(tmp_path / "homes", postgresql_server.new_schema())
    yield lab
    lab.close()


@pytest.fixture
def lab(lab_template, tmp_path):
    folder = tmp_path / "homes"
    shutil.copytree(lab_template.folder, folder)
    copy = object.__new__(Lab)
    copy.__dict__.update(lab_template.__dict__)
    copy.folder, copy.clock, copy.previous = folder, Clock(), dict(lab_template.previous)
    copy.coordinator = Coordinator.open(folder / "coordinator", folder / "signer", clock=copy.clock)
    yield copy
    copy.close()


@pytest.fixture
def client(lab):
    with TestClient(create_app(lab.settings(), clock=lab.clock), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def as_role(lab):
    def headers(role: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {lab.tokens[role]}"}

    return headers


@pytest.fixture
def row():
    return dict(ROW)
