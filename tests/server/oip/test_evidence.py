"""An answer of either protocol goes into an evidence file, with what it was for, and of a person no more."""

from __future__ import annotations

import json

import pytest

from audit.commitments import commit, parse_salt
from audit.evidence import read_evidence
from audit.verify import verify_evidence
from tests.commands.conftest import run_command
from tests.server.oip.test_rest import URL, ask

PERSON = {"subject": "patient-7", "legal_basis": "consent", "consent": "form 12"}


@pytest.fixture
def told(client, lab, as_role, row, tmp_path):
    """Ask, keep the answer in a file, and return the file and its entry's place."""

    def keep(path, **more):
        if path == URL:
            body = ask(parameters={"purpose": "triage", **more})
        else:
            body = {"purpose": "triage", "rows": [row], **more}
        answer = client.post(path, headers=as_role("consumer"), json=body).json()
        file = tmp_path / "answer.json"
        file.write_text(json.dumps(answer))
        return file, answer.get("parameters", answer.get("entry"))["leaf_index"]

    return keep


@pytest.fixture
def exported(client, as_role, tmp_path, monkeypatch):
    """Run the command against this server; return what came of it and the file."""

    def fetched(url, path, *, key):
        reply = client.get(path, headers=as_role("officer"))
        assert reply.status_code == 200, reply.text
        return reply.content

    monkeypatch.setattr("audit.commands.ask_api", fetched)
    monkeypatch.setattr("audit.commands.read_key", lambda *_: "")

    def export(file, index):
        out = tmp_path / "e.zip"
        place = ("--answer", file, "--out", out, "--url", "http://here")
        return run_command("evidence", "export", index, *place), out

    return export


def opened_step(lab, data):
    report = verify_evidence(data, policy_text=f"log {lab.coordinator.log_key}\nquorum none\n")
    return report.step("The opened fields")


@pytest.mark.parametrize("path", [URL, "/v1/models/toy/predict"])
def test_answer_of_either_protocol_opens_its_rows(lab, told, exported, path):
    file, index = told(path)
    made, out = exported(file, index)
    assert made.code == 0, made.err
    evidence = read_evidence(out.read_bytes())
    assert json.loads(evidence.receipt)["leaf_index"] == index
    row = evidence.opened[0]
    (entry,) = lab.entries("prediction")
    for field in ("input", "output"):
        given = (parse_salt(row[f"{field}_salt"]), row[field].encode())
        assert commit(field, *given) == entry["body"]["rows"][0][field]
    assert evidence.disclosed is None


@pytest.mark.parametrize("path", [URL, "/v1/models/toy/predict"])
def test_answer_about_a_person_opens_what_it_was_for_and_no_more_of_the_context(lab, told, exported, path):
    file, index = told(path, **PERSON)
    made, out = exported(file, index)
    assert made.code == 0, made.err
    evidence = read_evidence(out.read_bytes())
    part = evidence.disclosed[index]["context"]
    assert {name: field.value for name, field in part.opened.items()} == {
        "purpose": '"triage"', "legal_basis": '"consent"',
    }  # fmt: skip
    assert set(part.closed) == {"request_id", "consent"}
    step = opened_step(lab, out.read_bytes())
    assert step.word.value == "PROVED"
    assert "context.purpose" in step.detail
    assert b"form 12" not in out.read_bytes()


def test_context_that_was_altered_convicts_itself(lab, told, exported):
    file, index = told(URL, **PERSON)
    answer = json.loads(file.read_text())
    answer["parameters"]["sealed"] = answer["parameters"]["sealed"].replace("triage", "travel")
    file.write_text(json.dumps(answer))
    made, out = exported(file, index)
    assert made.code == 0, made.err
    assert opened_step(lab, out.read_bytes()).word.value == "FAIL"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"receipt": "{"}, "no JSON"), ({"opened": None}, "receipt and opened"),
        ({"sealed": "{}"}, "no context"), ({"sealed": "7"}, "no context"),
        ({"sealed": '{"context":"{}","context_salt":"00"}'}, "context"),
    ],
)  # fmt: skip
def test_answer_that_is_none_is_refused_by_what_it_lacks(told, exported, change, problem):
    file, index = told(URL, **PERSON)
    answer = json.loads(file.read_text())
    for name, text in change.items():
        if text is None:
            del answer["parameters"][name]
        else:
            answer["parameters"][name] = text
    file.write_text(json.dumps(answer))
    made, out = exported(file, index)
    assert made.code == 1
    assert problem in made.err
    assert not out.exists()


def test_answer_of_another_entry_is_refused(lab, told, exported):
    file, index = told(URL, **PERSON)
    made, _ = exported(file, index - 1)
    assert (made.code, f"leaf {index}" in made.err) == (1, True)
