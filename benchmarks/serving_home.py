"""A coordinator's home with one live model for the benchmark of serving: MLP 30-64-64-2, real signatures."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from pathlib import Path

from audit.canonical import canonical_bytes
from audit.entries import (
    ZERO_DIGEST,
    CharterPublished,
    GateResult,
    SiteEpsilon,
    VersionRegistered,
    VersionTransition,
    signing_payload,
)
from audit.keys import SigningKey
from audit.models import initial_weights, model_file
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.exporting import export

FEATURES = 30
LAYERS = [
    {"layer": "linear", "in": FEATURES, "out": 64, "bias": 1},
    {"layer": "relu"},
    {"layer": "linear", "in": 64, "out": 64, "bias": 1},
    {"layer": "relu"},
    {"layer": "linear", "in": 64, "out": 2, "bias": 1},
]
MODEL = "bench"


def charter_document(officer: SigningKey) -> dict[str, object]:
    features = [
        {"name": f"f{k:02d}", "type": "number", "unit": "", "lower": "-10", "upper": "10",
         "transform": "none", "missing": "refuse"}
        for k in range(FEATURES)
    ]  # fmt: skip
    return {
        "affidavit": 1,
        "name": MODEL,
        "task": "multiclass",
        "features": features,
        "label": {"name": "outcome", "classes": ["benign", "malignant"]},
        "model": {"family": "layers", "site_intercept": 0, "layers": LAYERS},
        "plan": {"strategy": "fedavg", "rounds": 1, "local_steps": 1, "learning_rate": "1",
                 "local_learning_rate": "0.1", "average_last": 1, "beta1": "0.9", "beta2": "0.99",
                 "tau": "0.001", "round_timeout_s": 60, "minimum_sites": 1},
        "privacy": {"unit": "row", "relation": "add_remove", "epsilon": "3", "delta": "0.00001",
                    "sample_rate": "1", "max_grad_norm": "1", "noise_multiplier": "8",
                    "accountant": "pld", "grid_bits": 20, "precision": "float64", "subject_id": "",
                    "max_rows_per_subject": 1},
        "sites": [{"name": "alpha", "identity": SigningKey.generate().text, "nominal_rows": 100,
                   "weight": "100"}],
        "gates": [],
        "purposes": ["triage"],
        "officers": [{"name": "officer", "key": officer.text}],
    }  # fmt: skip


def make_home(folder: Path, database: str | None = None) -> str:
    """Make `folder/coordinator` and `folder/signer` with a live version; return its digest."""
    officer, author = SigningKey.generate(), SigningKey.generate()
    coordinator = Coordinator.create(
        folder / "coordinator", folder / "signer", "bench.example/serving", database=database
    )
    with coordinator:
        text = canonical_bytes(charter_document(officer))
        digest = hashlib.sha256(text).hexdigest()
        coordinator.append(
            CharterPublished(digest=digest, canonical=text.decode(), author=author.text), "scientist"
        )
        weights = initial_weights(LAYERS, digest)
        version = coordinator.blobs.put(model_file(LAYERS, weights))
        registered = VersionRegistered(
            version=version, model=MODEL, charter=digest, run="run-1", author=author.text,
            averaged_from=1, averaged_to=1,
            gates=(GateResult(metric="auc", source="public_set", dataset=ZERO_DIGEST, floor="0.5",
                              baseline="0.5", value="0.9", passed=1),),
            epsilons=(SiteEpsilon(site="alpha", population="ab" * 16, events=1, run_epsilon="2.9",
                                  run_epsilon_rdp="2.9", lifetime_epsilon="2.9", delta="0.00001",
                                  accountant="pld", relation="add_remove", unit="row"),),
        )  # fmt: skip
        leaf = coordinator.append(registered, "coordinator").leaf_hash.hex()
        export(coordinator, registered, Charter.from_canonical(text.decode()), weights)
        previous = ZERO_DIGEST
        for before, after in (("candidate", "approved"), ("approved", "live")):
            body = VersionTransition(
                version=version, model=MODEL, charter=digest, from_state=before, to_state=after,
                gate_results=leaf, previous_transition=previous, officer=officer.text, reason="bench",
                signature="",
            )  # fmt: skip
            domain, payload = signing_payload(body)
            signature = base64.b64encode(officer.sign(domain, payload)).decode()
            previous = coordinator.append(
                dataclasses.replace(body, signature=signature), "officer"
            ).leaf_hash.hex()
    return version
