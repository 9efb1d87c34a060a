"""From rows at three sites to an explained answer that a stranger checks: sketch, score, sums."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from audit.service import export_evidence
from audit.verify import Word, verify_evidence
from clients.simulation import simulate
from server.app import create_app
from server.journal import utc_now
from server.keys import KeyStore
from server.settings import Settings

CHARTER = """
name: scored
task: binary
features:
  - {name: x, type: number, lower: -3, upper: 3}
  - {name: ward, type: category, categories: [north, south]}
label: {name: y, classes: ["no", "yes"]}
model: {family: mlp, hidden: [3], activation: tanh}
plan: {learning_rate: 4, rounds: 1}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
reference: {bins: 6, noise_multiplier: 2}
gates: [{metric: accuracy, source: public_set, floor: 0.1}]
purposes: [triage]
"""


def frame(rows, seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 0.7, rows).clip(-3, 3).round(3)
    ward = np.where(draw.random(rows) < 0.8, "north", "south")
    return pd.DataFrame({"x": x, "ward": ward, "y": np.where(x > 0, "yes", "no")})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    sites = {name: frame(1_000, seed) for seed, name in enumerate("abc")}
    made = simulate(CHARTER, sites, public=frame(60, 9), folder=tmp_path_factory.mktemp("scored"))
    made.register()
    made.approve()
    yield made
    made.close()


@pytest.fixture(scope="module")
def answered(run):
    """Two answers, one for a named person, each with the evidence that a stranger gets."""
    coordinator = run.federation.coordinator
    homes = {"coordinator_home": coordinator.home, "signer_home": coordinator.home.parent / "signer"}
    store = KeyStore(coordinator.home, utc_now)
    key, _ = store.create(role="consumer")
    store.close()
    rows = [{"x": 0.4, "ward": "north"}, {"x": -2.9, "ward": "south"}]
    settings = Settings(**homes, publish_interval_s=0.1, explain_timeout_s=60)
    found = []
    with TestClient(create_app(settings)) as client:
        for more in ({}, {"subject": "patient 7"}):
            body = {"purpose": "triage", "rows": rows, "explain": True, **more}
            reply = client.post(
                "/v1/models/scored/predict?wait=checkpointed",
                headers={"Authorization": f"Bearer {key}"},
                json=body,
            )
            assert reply.status_code == 200, reply.text
            found.append(reply.json())
    return found


def report(run, answer, opened=None):
    log = run.federation.coordinator
    data = export_evidence(
        log.ledger,
        log.blobs.find,
        leaf_index=answer["entry"]["leaf_index"],
        opened=answer["opened"] if opened is None else opened,
    )
    return verify_evidence(data, policy_text=run.policy, replay=True)


@pytest.mark.parametrize("which", [0, 1], ids=["anybody", "a person"])
def test_a_stranger_proves_answer_score_and_sum_of_attributions(run, answered, which):
    answer = answered[which]
    step = report(run, answer).step("The answer")
    assert step.word is Word.PROVED, step
    for words in ("2 rows opened", "the score beside it", "add up"):
        assert words in step.detail
    near, far = answer["annotations"]["ood"]
    assert (near["basis"], near["out"], far["out"]) == ("reference", False, True)


def test_what_was_added_is_sealed_with_a_persons_answer(run, answered):
    entry = run.federation.coordinator.ledger.entry(answered[1]["entry"]["leaf_index"]).decode()
    body = json.loads(entry)["body"]
    assert body["subject"]
    assert "ood" not in entry
    assert "attributions" not in entry
    assert "ood" in answered[1]["opened"][0]["output"]


def test_a_score_that_somebody_edits_opens_nothing(run, answered):
    first, second = answered[0]["opened"]
    edited = {**first, "output": first["output"].replace('"out":false', '"out":true')}
    assert edited != first
    step = report(run, answered[0], [edited, second]).step("The answer")
    assert (step.word, step.code) == (Word.FAIL, "answer.row_path")
