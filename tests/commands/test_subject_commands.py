"""From a person's prediction to their export and erasure, by command, here and with --url, to `verify`."""

from __future__ import annotations

import json
import shutil

import pytest
from starlette.testclient import TestClient

from audit.evidence import read_evidence
from server.app import create_app
from server.settings import Settings

MRN = "MRN-00412-somebody"


@pytest.fixture(scope="module")
def story(shared_own):
    """An own federation with a live model that answered three times about one person, once about another."""
    own = shared_own
    own.approve()
    key = own.folder / "consumer.key"
    assert own.run("keys", "create", "--role", "consumer", "--out", key).code == 0
    settings = Settings(
        coordinator_home=own.homes / "coordinator", signer_home=own.homes / "signer", publish_interval_s=3_600
    )
    headers = {"Authorization": f"Bearer {key.read_text().strip()}"}
    places = []
    with TestClient(create_app(settings)) as client:
        for person, age in ((MRN, 40), (MRN, 41), (MRN, 42), ("MRN-2", 77)):
            body = {"purpose": "triage", "rows": [{"age": age, "dose": 4.53125}], "subject": person}
            answer = client.post("/v1/models/own/predict", headers=headers, json=body)
            assert answer.status_code == 200, answer.text
            places.append(answer.json()["entry"]["leaf_index"])
    return own, places


@pytest.fixture
def policy(story, tmp_path):
    own, _ = story
    origin = json.loads(own.run("log", "show", "0", "--json").out)["entry"]["body"]["log_key"]
    path = tmp_path / "policy.txt"
    path.write_text(f"log {origin}\nquorum none\n")
    return path


def verify(run, file, policy):
    result = run("verify", file, "--policy", policy, "--json")
    return result.code, result.json


def test_disclosed_field_is_proved_and_the_others_stay_closed(story, run, policy, tmp_path):
    own, places = story
    file = tmp_path / "some.zip"
    assert own.run("evidence", "disclose", places[0], "--field", "row.0.input.age", "-o", file).code == 0
    assert file.stat().st_mode & 0o077 == 0
    code, report = verify(run, file, policy)
    steps = {step["title"]: step for step in report["steps"]}
    assert not [step for step in report["steps"] if step["word"] == "FAIL"], (code, report)
    assert steps["The opened fields"]["word"] == "PROVED"
    assert "row.0.input.age" in steps["The opened fields"]["detail"]
    assert "closed: row.0.input.dose, context" in steps["The opened fields"]["detail"]
    assert steps["The answer"]["word"].startswith("ATTESTED")
    assert "stays closed" in steps["The decision to answer"]["detail"]
    assert b"4.53125" not in file.read_bytes()


def test_fully_disclosed_prediction_is_recomputed(story, run, policy, tmp_path):
    own, places = story
    file = tmp_path / "all.zip"
    assert own.run("evidence", "disclose", places[0], "--all", "-o", file).code == 0
    _, report = verify(run, file, own.homes / "sites" / "alpha" / "policy.txt")
    steps = {step["title"]: step for step in report["steps"]}
    assert steps["The answer"]["word"] == "PROVED", report
    assert "for triage" in steps["The decision to answer"]["detail"]
    assert not [step for step in report["steps"] if step["word"] == "FAIL"]


def test_wrong_use_of_disclose_says_what_to_give(story, tmp_path):
    own, places = story
    for arguments in ((), ("--all", "--field", "age")):
        result = own.run("evidence", "disclose", places[0], *arguments)
        assert result.code == 2
        assert "--field" in result.err
    result = own.run("evidence", "disclose", places[0], "--field", "income", "-o", tmp_path / "x.zip")
    assert (result.code, "disclosure.mismatch" in result.err) == (1, True)
    assert "row.0.input.dose" in result.err
    result = own.run("evidence", "disclose", 0, "--all", "-o", tmp_path / "x.zip")
    assert "vault.not_sealed" in result.err
    assert not (tmp_path / "x.zip").exists()


def test_listing_by_person_and_by_pseudonym_agree_and_a_stranger_has_nothing(story):
    own, places = story
    pseudonym = own.run("subject", "find", MRN, "--json").json["pseudonym"]
    for terms in (("--subject", MRN), ("--pseudonym", pseudonym)):
        found = own.run("log", "list", *terms, "--type", "prediction", "--json").json["entries"]
        assert [item["leaf_index"] for item in found] == places[:3]
    assert own.run("log", "list", "--subject", "never seen", "--json").json["entries"] == []
    assert own.run("log", "list", "--subject", MRN, "--pseudonym", pseudonym).code == 2
    assert "vault.subject_unknown" in own.run("subject", "find", "never seen").err


def test_person_is_exported_verified_erased_and_a_restored_vault_has_forgotten_them_too(
    story, run, policy, tmp_path
):
    own, places = story
    file, backup = tmp_path / "subject.zip", tmp_path / "vault.backup"
    assert own.run("subject", "export", MRN, "-o", file).code == 0
    code, report = verify(run, file, policy)
    assert (code, report["verdict"]) == (0, "VALID")
    evidence = read_evidence(file.read_bytes())
    assert sorted(evidence.disclosed) == places[:3]
    assert own.run("vault", "backup", backup).code == 0
    assert "never overwrites" in own.run("vault", "backup", backup).err
    size = own.run("subject", "erase", MRN, "--request-id", "case-7", "--json").json
    assert (size["records"], size["scrubbed"]) == (3, True)
    assert own.run("subject", "erase", MRN, "--request-id", "case-7", "--json").json == size
    assert "vault.subject_unknown" in own.run("subject", "erase", MRN).err
    assert verify(run, file, policy)[0] == 0, "what was proved stays proved"
    gone = own.run("evidence", "disclose", places[0], "--all")
    assert "vault.erased" in gone.err
    assert own.run("log", "fsck").code == 0

    home = own.homes / "coordinator"
    assert "already" in own.run("vault", "restore", backup).err
    for path in home.glob("vault.db*"):
        path.unlink()
    lost = own.run("subject", "find", "MRN-2")
    assert "vault.missing" in lost.err
    assert "vault restore" in lost.err
    assert own.run("vault", "restore", backup, "--json").json["forgotten"] == 1
    assert "vault.erased" in own.run("evidence", "disclose", places[0], "--all").err
    assert own.run("subject", "find", "MRN-2").code == 0

    assert own.run("vault", "rotate-key", "--json").json["people"] == 1
    assert own.run("subject", "find", "MRN-2").code == 0
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in home.glob("vault.db*"):
        shutil.move(path, aside / path.name)
    closed = own.run("vault", "restore", backup)
    assert "vault.key" in closed.err, "a backup from before the rotation is closed for good"
    for path in aside.iterdir():
        shutil.move(path, home / path.name)

    tar = tmp_path / "home.tar.gz"
    assert own.run("backup", tar).code == 0
    import tarfile

    with tarfile.open(tar) as archive:
        assert not [name for name in archive.getnames() if "vault" in name]
