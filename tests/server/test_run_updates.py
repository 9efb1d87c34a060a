"""The officer's view of a run over HTTP: who may look, and that looking is an entry."""

from __future__ import annotations

import pytest

from audit.entries import CharterPublished, RoundCompleted, RunStarted, SiteStatement
from audit.keys import SigningKey
from audit.weights import encode_update
from federation.charter import Charter
from federation.mechanism import planned_event


@pytest.fixture
def run(lab):
    """One logged round of two sites."""
    sites = [
        {"name": name, "identity": SigningKey.generate().text, "nominal_rows": 100, "weight": "100"}
        for name in ("alpha", "beta")
    ]
    digest = lab.publish_charter(sites=sites)
    published = [body for _, body in lab.coordinator.bodies(CharterPublished)]
    charter = Charter.from_canonical(published[-1].canonical)
    assert charter.digest == digest
    lab.coordinator.append(
        RunStarted(
            run="run-7", charter=charter.digest, model="toy", author=lab.stranger.text,
            sites=charter.site_names, rounds=1, initial_model="0" * 64, code="0" * 64, signature="",
        ),
        "coordinator",
    )  # fmt: skip
    leaves = []
    for place, site in enumerate(charter.site_names):
        update = encode_update([(place + 1) << 20] * charter.dimension)
        statement = SiteStatement(
            run="run-7", round=1, charter=charter.digest, site=site, population="ab" * 16,
            base_model="0" * 64, participants=charter.site_names, agent_code="0" * 64,
            previous_round="0" * 64, event=planned_event(charter), sequence=1, previous_event="0" * 64,
            update=lab.coordinator.blobs.put(update), signature="",
        )  # fmt: skip
        leaves.append(lab.coordinator.append(statement, f"site:{site}").leaf_hash.hex())
    lab.coordinator.append(
        RoundCompleted(
            run="run-7", round=1, base_model="0" * 64, statements=tuple(leaves), missing=(),
            output_model="0" * 64, metrics=(),
        ),
        "coordinator",
    )  # fmt: skip
    return "run-7"


def test_an_officer_sees_each_round_and_the_look_is_an_entry(client, lab, as_role, run):
    answer = client.get(f"/v1/audit/runs/{run}/updates", headers=as_role("officer"))
    assert answer.status_code == 200
    (view,) = answer.json()["rounds"]
    assert (view["round"], view["sites"]) == (1, ["alpha", "beta"])
    assert view["cosines"][0][1] == "1"
    read = lab.entries("audit.read")[-1]["body"]
    assert (read["action"], read["role"], read["count"]) == ("updates", "officer", 1)


def test_an_officer_gets_the_picture(client, as_role, run):
    answer = client.get(f"/v1/audit/runs/{run}/updates?format=png", headers=as_role("officer"))
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("role", ["consumer", "node"])
def test_others_are_refused_and_the_refusal_is_an_entry(client, lab, as_role, run, role):
    answer = client.get(f"/v1/audit/runs/{run}/updates", headers=as_role(role))
    assert answer.status_code == 403
    assert lab.entries("access.denied")[-1]["body"]["action"] == "log.read"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("no-such-run/updates", 404),
        ("run-7/updates?format=svg", 422),
        ("%2e%2e/updates", 422),
        ("RUN/updates", 422),
    ],
)
def test_what_is_not_there_is_a_problem_document(client, as_role, run, path, status):
    answer = client.get(f"/v1/audit/runs/{path}", headers=as_role("officer"))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_without_a_key_nothing_is_said(client, run):
    assert client.get(f"/v1/audit/runs/{run}/updates").status_code == 401
