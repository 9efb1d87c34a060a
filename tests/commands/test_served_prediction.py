"""A prediction of `affidavit serve --workers 2`, and a stranger who judges it later with a file and a policy.

By commands, curl's kind of HTTP and real witnesses alone; when the file is judged no server runs any more.
"""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.commands.conftest import run_command
from tests.server.load import served

QUESTION = {"purpose": "triage", "rows": [{"age": 44.5, "dose": 3.25}, {"age": 71, "dose": 8.5}]}


def ask(url, key, path, question=None):
    data = None if question is None else json.dumps(question).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url + path, data, headers), timeout=60
    ) as reply:  # a consumer's own program
        return reply.read()


@pytest.mark.slow  # two workers of their own, and the witnesses' commands
def test_served_prediction_is_proved_to_a_stranger_offline(own, tmp_path):
    own.approve()
    keys = {}
    for role in ("consumer", "officer"):
        keys[role] = tmp_path / f"{role}.key"
        assert own.run("keys", "create", "--role", role, "--out", keys[role]).code == 0
    policy, answer, evidence = tmp_path / "policy.txt", tmp_path / "answer.json", tmp_path / "e.zip"
    with served(own.homes, "--workers", "2") as server:
        text = keys["consumer"].read_text().strip()
        told = json.loads(ask(server.url, text, "/v1/models/own/predict", QUESTION))
        answer.write_text(json.dumps(told))
        assert run_command("log", "policy", "--url", server.url, "--out", policy).code == 0
        ask(server.url, text, f"/v1/receipts/{told['entry']['id']}?wait=checkpointed")
        for site in ("alpha", "beta"):
            assert own.run("site", "witness", site, "--url", server.url).code == 0
        proof = ask(server.url, text, f"/v1/receipts/{told['entry']['id']}?wait=witnessed")
        assert proof.startswith(b"c2sp.org/tlog-proof@v1\n")
        place = ("--url", server.url, "--key-file", keys["officer"])
        index = told["entry"]["leaf_index"]
        made = run_command("evidence", "export", index, "--answer", answer, "--out", evidence, *place)
        assert made.code == 0, made.err
        other = tmp_path / "other.json"
        opened = told["opened"][0]["output"]
        lied = dict(told, opened=[{**told["opened"][0], "output": swapped(opened)}, told["opened"][1]])
        other.write_text(json.dumps(lied))
        forged = run_command(
            "evidence", "export", index, "--answer", other, "--out", tmp_path / "f.zip", *place
        )
    judged = run_command("verify", evidence, "--policy", policy, "--replay", "--json")
    assert judged.code == 0, judged.out
    report = judged.json
    assert report["verdict"] == "VALID"
    steps = {step["title"]: step for step in report["steps"]}
    assert {step["word"] for step in steps.values()} <= {"PROVED", "ATTESTED"}
    said = json.dumps(report)
    trained = json.loads((own.folder / "trained.json").read_text())
    for word in ("own", own.version[:12], trained["run"][:12], "alpha", "beta", "exactly this answer"):
        assert word in said, f"{word} is nowhere in the report"
    assert {line["site"] for line in report["epsilon"]} == {"alpha", "beta"}
    assert all(float(line["run_epsilon"]) > 0 for line in report["epsilon"])
    assert told["decision"]["policies"] == ["consumers-may-predict"]
    assert "consumers-may-predict" in said
    # without the policy nothing is valid, and an answer that was not given convicts itself
    assert run_command("verify", evidence, "--json").code != 0
    lie = (
        run_command("verify", tmp_path / "f.zip", "--policy", policy, "--json") if not forged.code else forged
    )
    assert lie.code == 1


def swapped(output):
    """The same answer with its label turned round."""
    document = json.loads(output)
    document["label"] = {"no": "yes", "yes": "no"}[document["label"]]
    return json.dumps(document, separators=(",", ":"), sort_keys=True)
