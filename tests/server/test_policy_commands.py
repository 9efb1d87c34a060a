"""The commands of rules, reviews and keys, at a home: results, exit codes, entries."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.testclient import TestClient

from affidavit import main
from audit.entries import KeyCreated, PolicyApplied
from audit.keys import SigningKey
from audit.serving_bodies import KeyReplaced, PolicyChanged
from federation.coordinator import Coordinator
from server.access import shipped_policies
from server.app import create_app
from server.keys import KeyStore
from tests.server.test_proxy_identity import certificate

CLOSED = '@id("closed") forbid (principal, action == Affidavit::Action::"predict", resource);\n'
CASE = """\
- name: closed for everybody
  principal: {role: consumer}
  action: predict
  expect: deny
  policies: [closed]
"""


@pytest.fixture
def office(lab, as_role, row, tmp_path, capsys):
    """A home with one logged answer, an officer's key file, rules with a test, and a way to run commands."""
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        body = {"purpose": "triage", "rows": [row]}
        assert (
            client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body).status_code == 200
        )
    lab.coordinator.close()
    lab.officer.save(tmp_path / "officer.pem", None)
    rules = tmp_path / "mine.cedar"
    rules.write_text(shipped_policies().policies + CLOSED)
    (tmp_path / "mine.tests.yaml").write_text(CASE)

    def run(*words: object, home: bool = True) -> tuple[int, dict]:
        capsys.readouterr()
        given = [str(word) for word in words] + (["--home", str(lab.folder)] if home else []) + ["--json"]
        try:
            code = main(given)
        except SystemExit as left:
            code = int(left.code or 0)
        return code, json.loads(capsys.readouterr().out)

    run.rules, run.officer = rules, tmp_path / "officer.pem"
    return run


def bodies(lab, kind):
    with Coordinator.open(lab.folder / "coordinator", lab.folder / "signer") as coordinator:
        return [body for _, body in coordinator.bodies(kind)]


def test_check_shows_what_would_change_and_changes_nothing(office, lab):
    code, found = office("policy", "check", office.rules)
    assert (code, found["tests"]["failed"]) == (0, [])
    assert (found["dry_run"]["asked"], found["dry_run"]["reversed"]) == (1, 1)
    (row,) = found["dry_run"]["changed"]
    assert (row["before"], row["after"]) == ("allow by consumers-may-predict", "deny by closed")
    assert bodies(lab, PolicyChanged) == []


@pytest.mark.parametrize("text", ["permit (", "permit (principal, action, resource);"])
def test_check_of_what_does_not_hold_together_is_one_code(office, text):
    office.rules.write_text(text)
    status, found = office("policy", "check", office.rules)
    assert (status, found["error"]["code"]) == (1, "access.policy_invalid")


def test_failing_test_is_told_and_exits_1(office):
    (office.rules.parent / "mine.tests.yaml").write_text(CASE.replace("deny", "allow"))
    code, found = office("policy", "test", office.rules, home=False)
    assert (code, found["failed"][0]["found"]) == (1, "deny by closed")
    assert office("policy", "check", office.rules)[0] == 1


def test_apply_signs_the_rules_into_force_and_servers_follow(office, lab, as_role, row):
    code, found = office("policy", "apply", office.rules, "--officer", office.officer, "--reason", "closed")
    assert code == 0
    (body,) = bodies(lab, PolicyChanged)
    assert (body.officer, body.text, body.reason) == (lab.officer.text, office.rules.read_text(), "closed")
    shown = office("policy", "show")[1]
    assert (shown["policy_set"], shown["change"]["leaf_index"]) == (
        found["policy_set"],
        found["entry"]["leaf_index"],
    )
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        asked = {"purpose": "triage", "rows": [row]}
        reply = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=asked)
        assert reply.json()["policies"] == ["closed"]
    assert body.policy_set in [said.policy_set for said in bodies(lab, PolicyApplied)]


def test_what_show_prints_is_the_set_in_force_and_passes_its_tests(office, lab, capsys):
    where = ("--home", str(lab.folder))
    assert main(["policy", "show", *where]) == 0
    shown = capsys.readouterr()
    digest = office("policy", "show")[1]["policy_set"]
    assert shown.err.startswith(f"{digest}: ")
    rules = office.rules.with_name("copy.cedar")
    rules.write_text(shown.out)
    assert main(["policy", "show", "--tests", *where]) == 0
    rules.with_name("copy.tests.yaml").write_text(capsys.readouterr().out)
    code, found = office("policy", "check", rules)
    assert (code, found["policy_set"]) == (0, digest)
    assert found["tests"]["failed"] == []


def test_rules_that_fail_their_tests_or_have_none_are_not_signed(office, lab):
    tests = office.rules.parent / "mine.tests.yaml"
    tests.write_text(CASE.replace("deny", "allow"))
    assert (
        office("policy", "apply", office.rules, "--officer", office.officer)[1]["error"]["code"]
        == "access.policy_tests"
    )
    tests.unlink()
    assert office("policy", "apply", office.rules, "--officer", office.officer)[0] == 1
    assert bodies(lab, PolicyChanged) == []
    assert office("policy", "apply", office.rules, "--officer", office.officer, "--untested")[0] == 0


def test_strangers_key_changes_no_rule(office, lab, tmp_path):
    SigningKey.generate().save(tmp_path / "stranger.pem", None)
    code, found = office("policy", "apply", office.rules, "--officer", tmp_path / "stranger.pem")
    assert (code, found["error"]["code"]) == (1, "access.policy_refused")
    assert bodies(lab, PolicyChanged) == []


NOBODY = '@id("nobody") forbid (principal, action, resource);\n'
NO_READING = '@id("blind") forbid (principal, action == Affidavit::Action::"policy.read", resource);\n'
LOCKED = {
    "forbid all": (NOBODY, ["policy.read", "policy.change"]),
    "no reading": (shipped_policies().policies + NO_READING, ["policy.read"]),
    "no permit": (CLOSED, ["policy.read", "policy.change"]),
}


@pytest.mark.parametrize("name", LOCKED)
def test_rules_that_lock_officers_out_are_warned_of_and_applied_only_when_asked(office, lab, name):
    text, refused = LOCKED[name]
    office.rules.write_text(text)
    (office.rules.parent / "mine.tests.yaml").unlink()
    code, found = office("policy", "check", office.rules)
    assert (code, found["locked_out"]) == (0, refused)
    words = ("policy", "apply", office.rules, "--officer", office.officer, "--untested")
    code, found = office(*words)
    assert (code, found["error"]["code"]) == (1, "access.policy_lock_out")
    assert all(action in found["error"]["message"] for action in refused)
    assert bodies(lab, PolicyChanged) == []
    assert office(*words, "--lock-out")[0] == 0
    office.rules.write_text(shipped_policies().policies)
    assert office(*words)[0] == 0, "the home puts others in force, whatever the rules say"
    assert len(bodies(lab, PolicyChanged)) == 2


def test_rules_that_lock_nobody_out_are_not_warned_of(office):
    assert office("policy", "check", office.rules)[1]["locked_out"] == []


SECOND = '@id("second")\npermit (\n  principal,\n  action == Affidavit::Action::"predict",\n  resource\n)'
BROKEN = {
    "a missing comma": (CLOSED + "permit (principal action, resource);\n", ["line 2", '@id("closed")']),
    "in the second": (CLOSED + SECOND + " when {\n  1 + };\n" + NOBODY, ["line 8", '@id("second")']),
    "cut short": (CLOSED + SECOND, ["line 7", '@id("second")', "end of input"]),
    "before all": ("permit (principal action, resource);\n" + CLOSED, ["line 1", "before the first @id"]),
    "a name in a comment": ('// @id("x")\n' + CLOSED + "forbid forbid;\n", ["line 3", '@id("closed")']),
    "an unknown attribute": (
        CLOSED + SECOND + " when { resource.nope };\n" + NOBODY, ['@id("second")', "`nope`"],
    ),
    "no id": (CLOSED + "forbid (principal, action, resource);\n", ["policy 2", '@id("closed")', "no @id"]),
    "no id at first": ("forbid (principal, action, resource);\n" + CLOSED, ["policy 1 of", "no @id"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_hold_together_names_file_and_place(office, name):
    text, words = BROKEN[name]
    office.rules.write_text(text)
    for command in (("check",), ("test",), ("apply", "--officer", office.officer, "--untested")):
        told = ("policy", command[0], office.rules, *command[1:])
        status, found = office(*told, home=command[0] != "test")
        assert (status, found["error"]["code"]) == (1, "access.policy_invalid")
        detail = found["error"]["message"]
        for word in (str(office.rules), *words):
            assert word in detail, detail
        assert "`policy" not in detail


def test_keys_are_made_with_terms_and_rotated(office, lab, tmp_path):
    code, made = office(
        "keys", "create", "--role", "consumer", "--region", "eu", "--model", "toy", "--model", "b"
    )
    assert (code, made["region"], made["models"]) == (0, "eu", ["b", "toy"])
    code, new = office("keys", "rotate", made["key_id"], "--overlap", "60", "--out", tmp_path / "new.key")
    assert (code, new["principal"], new["models"]) == (0, made["principal"], made["models"])
    assert (bodies(lab, KeyCreated)[-1].region, bodies(lab, KeyReplaced)[0].successor) == (
        "eu",
        new["key_id"],
    )
    keys = KeyStore(lab.folder / "coordinator", lambda: datetime.now(UTC) + timedelta(seconds=90))
    assert keys.authenticate((tmp_path / "new.key").read_text().strip()).region == "eu"
    keys.close()


def test_certificate_in_place_of_a_secret(office, lab, tmp_path):
    found = certificate()
    (tmp_path / "ward.pem").write_bytes(found.public_bytes(Encoding.PEM))
    code, made = office("keys", "create", "--role", "consumer", "--certificate", tmp_path / "ward.pem")
    assert (code, made["key"], made["certificate"]) == (0, "", found.fingerprint(hashes.SHA256()).hex())
    (tmp_path / "none.pem").write_text("none")
    code, said = office("keys", "create", "--role", "consumer", "--certificate", tmp_path / "none.pem")
    assert (code, said["error"]["code"]) == (1, "keys.bad_request")


@pytest.fixture
def at(lab, as_role, monkeypatch):
    """A server that listens, and an officer's API key in the environment; return its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(lab.settings(), clock=lab.clock), log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    monkeypatch.setenv("AFFIDAVIT_API_KEY", lab.tokens["officer"])
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_rules_and_reviews_by_address_are_the_same_use_cases(lab, as_role, row, tmp_path, capsys, request):
    lab.version, lab.charter = lab.live(name="verdicts", decisions="legal_effect")
    url = request.getfixturevalue("at")
    lab.officer.save(tmp_path / "officer.pem", None)

    def run(*words: object) -> tuple[int, dict]:
        capsys.readouterr()
        code = main([*map(str, words), "--url", url, "--json"])
        return code, json.loads(capsys.readouterr().out)

    body = json.dumps({"purpose": "triage", "rows": [row]}).encode()
    headers = {**as_role("consumer"), "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/models/verdicts/predict", data=body, headers=headers)
    with urllib.request.urlopen(asked, timeout=30) as reply:
        decision = json.loads(reply.read())["review"]["id"]
    officer = ("--officer", tmp_path / "officer.pem")
    assert run("review", "show", decision)[1]["final"] is False
    code, done = run("review", "record", decision, "--outcome", "confirmed", *officer)
    assert (code, done["final"], done["review"]["officer"]) == (0, True, lab.officer.text)
    assert (
        run("review", "record", decision, "--outcome", "overturned", *officer)[1]["error"]["code"]
        == "reviews.done"
    )

    (tmp_path / "mine.cedar").write_text(shipped_policies().policies + CLOSED)
    (tmp_path / "mine.tests.yaml").write_text(CASE)
    code, applied = run("policy", "apply", tmp_path / "mine.cedar", *officer)
    assert code == 0
    assert run("policy", "show")[1]["policy_set"] == applied["policy_set"]
    again = run("policy", "apply", tmp_path / "mine.cedar", *officer)
    assert again[0] == 0, "the next change continues the chain by itself"
