"""A prediction about a person: sealed, opened, handed out, erased; and what each role may do about it."""

from __future__ import annotations

import base64
import io
import json
import threading
import zipfile
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from audit import subjects
from audit.disclosure import opened_row, parse_disclosed, verify_disclosed
from audit.entries import decode_entry
from audit.errors import LedgerBusyError
from audit.evidence import read_evidence, write_evidence
from audit.merkle import hash_leaf, verify_inclusion
from audit.principal import LocalOwner, Principal
from audit.vault_home import open_vault
from audit.verify import verify_evidence
from server.app import create_app

URL = "/v1/models/toy/predict"
MRN = "MRN-00412-somebody"


def ask(client, headers, *rows, subject=MRN, purpose="triage"):
    return client.post(
        URL, headers=headers, json={"purpose": purpose, "rows": list(rows), "subject": subject}
    )


def post(client, headers, what, **body):
    return client.post(f"/v1/subjects/{what}", headers=headers, json=body)


def get(client, headers, path, **query):
    return client.get(f"/v1/audit/{path}", headers=headers, params=query)


def files_of(lab):
    return [path for path in (lab.folder / "coordinator").rglob("*") if path.is_file()]


def test_entry_about_a_person_holds_a_pseudonym_and_nothing_else_of_them(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row).json()
    (entry,) = lab.entries("prediction")
    body = entry["body"]
    assert body["subject"] == answer["sealed"]["subject"]
    assert (body["purpose"], body["request_id"]) == ("", "")
    assert len(body["sealed"]) == len(body["context"]) == 64
    text = json.dumps(entry)
    for told in (MRN, "triage", "north", '"51"', answer["decision"]["id"], answer["opened"][0]["input_salt"]):
        assert told not in text
    plain = [MRN.encode(), answer["opened"][0]["input_salt"].encode(), answer["opened"][0]["input"].encode()]
    assert not [path for path in files_of(lab) for told in plain if told in path.read_bytes()]


def test_caller_can_open_the_entry_with_what_it_was_given(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row, {**row, "age": 7}).json()
    body = lab.entries("prediction")[0]["body"]
    for number, opened in enumerate(answer["opened"]):
        for side in ("input", "output"):
            root, _ = opened_row(f"row.{number}.{side}", opened[f"{side}_salt"], opened[side])
            assert root == body["rows"][number][side]
    root, context = opened_row("context", answer["sealed"]["context_salt"], answer["sealed"]["context"])
    assert root == body["context"]
    assert context == {"purpose": "triage", "request_id": answer["decision"]["id"]}


def test_requests_without_a_person_are_as_they_were(client, lab, as_role, row):
    answer = client.post(URL, headers=as_role("consumer"), json={"purpose": "triage", "rows": [row]}).json()
    body = lab.entries("prediction")[0]["body"]
    assert answer["sealed"] is None
    assert not {"subject", "context", "sealed"} & set(body)
    assert body["purpose"] == "triage"


@pytest.mark.parametrize("subject", ["", "x" * 257, 7, ["a"], "nul\u0000"])
def test_id_out_of_form_is_refused_and_nothing_is_written(client, lab, as_role, row, subject):
    size = lab.coordinator.ledger.tree_size
    answer = ask(client, as_role("consumer"), row, subject=subject)
    assert (answer.status_code, answer.json()["code"]) == (422, "request.malformed")
    assert lab.coordinator.ledger.tree_size == size


def test_officer_opens_all_or_chosen_fields_and_that_is_an_entry(client, lab, as_role, row):
    index = ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"]
    whole = get(client, as_role("officer"), f"entries/{index}/opened").json()["parts"]
    assert json.loads(whole["row.0.input"]["opened"]["age"]["value"]) == "51"
    assert json.loads(whole["context"]["opened"]["purpose"]["value"]) == "triage"
    some = get(client, as_role("officer"), f"entries/{index}/opened", field="age").json()["parts"]
    assert list(some) == ["row.0.input"]
    assert sorted(some["row.0.input"]["closed"]) == ["fever", "ward"]
    body = decode_entry(lab.coordinator.ledger.entry(index)).body
    verify_disclosed(body, parse_disclosed({"0": some})[0])
    assert [read["body"]["action"] for read in lab.entries("audit.read")] == ["opened", "opened"]
    wrong = get(client, as_role("officer"), f"entries/{index}/opened", field="income")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "disclosure.mismatch")


def test_entry_about_nobody_has_nothing_to_open(client, lab, as_role):
    answer = get(client, as_role("officer"), "entries/0/opened")
    assert (answer.status_code, answer.json()["code"]) == (404, "vault.not_sealed")
    assert get(client, as_role("officer"), "entries/9999/opened").json()["code"] == "audit.entry_not_found"


def test_search_terms_can_be_opened_by_an_officer(client, lab, as_role):
    get(client, as_role("officer"), "entries", actor="api")
    (read,) = lab.entries("audit.read")
    opened = get(client, as_role("officer"), f"entries/{read['leaf_index']}/opened").json()["parts"]["terms"]
    assert json.loads(opened["opened"]["actor"]["value"]) == "api"


def test_search_finds_a_person_until_they_are_erased(client, lab, as_role, row):
    places = [ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"] for _ in range(3)]
    ask(client, as_role("consumer"), row, subject="somebody else")
    officer = as_role("officer")
    pseudonym = post(client, officer, "find", subject=MRN).json()["pseudonym"]
    for terms in ({"subject": MRN}, {"pseudonym": pseudonym}):
        found = get(client, officer, "entries", **terms).json()["entries"]
        assert [item["leaf_index"] for item in found] == places
        assert get(client, officer, "count", **terms).json()["entries"] == 3
    assert read_evidence(get(client, officer, "evidence", subject=MRN).content).entries.keys() >= set(places)
    stored = b"".join(lab.coordinator.ledger.entries(0, 1000))
    assert MRN.encode() not in stored
    assert post(client, officer, "erase", subject=MRN).status_code == 200
    assert get(client, officer, "entries", subject=MRN).json()["entries"] == []
    assert get(client, officer, "count", subject="never seen").json()["entries"] == 0
    after = get(client, officer, "entries", pseudonym=pseudonym).json()["entries"]
    assert [item["entry"]["type"] for item in after] == ["prediction"] * 3 + ["subject.erased"]
    both = get(client, officer, "entries", subject="never seen", pseudonym=pseudonym)
    assert both.json()["code"] == "request.malformed"


def test_export_holds_everything_about_one_person_and_verifies_offline(client, lab, as_role, row):
    ages = [51, 52, 53]
    for age in ages:
        ask(client, as_role("consumer"), {**row, "age": age})
    ask(client, as_role("consumer"), {**row, "age": 99}, subject="somebody else")
    data = post(client, as_role("officer"), "export", subject=MRN).content
    evidence = read_evidence(data)
    told = [parts["row.0.input"].opened["age"].value for parts in evidence.disclosed.values()]
    assert told == ['"51"', '"52"', '"53"']
    assert b'"99"' not in data
    (entry,) = lab.entries("subject.exported")
    assert (entry["body"]["entries"], entry["leaf_index"]) == (3, evidence.leaf_index)
    report = verify_evidence(data, policy_text=f"log {lab.coordinator.log_key}\nquorum none\n")
    assert report.verdict.value == "VALID", report.text()
    step = report.step("The opened fields")
    assert step.word.value == "PROVED"
    assert "all 3 entries" in step.detail
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_export_that_leaves_an_entry_out_does_not_verify(client, lab, as_role, row):
    for _ in range(2):
        ask(client, as_role("consumer"), row)
    evidence = read_evidence(post(client, as_role("officer"), "export", subject=MRN).content)
    gone = min(evidence.disclosed)
    cut = replace(
        evidence,
        entries={index: data for index, data in evidence.entries.items() if index != gone},
        proofs={index: proof for index, proof in evidence.proofs.items() if index != gone},
        disclosed={index: parts for index, parts in evidence.disclosed.items() if index != gone},
    )
    policy = f"log {lab.coordinator.log_key}\nquorum none\n"
    report = verify_evidence(write_evidence(cut), policy_text=policy)
    assert [step.code for step in report.failures] == ["disclosed.incomplete"]


@pytest.mark.parametrize("forged", ["value", "moved", "of another leaf"])
def test_verifier_refuses_an_export_that_opens_something_else(client, lab, as_role, row, forged):
    first, second = (
        ask(client, as_role("consumer"), {**row, "age": age}).json()["entry"]["leaf_index"]
        for age in (51, 52)
    )
    evidence = read_evidence(post(client, as_role("officer"), "export", subject=MRN).content)
    told = {index: dict(parts) for index, parts in evidence.disclosed.items()}
    if forged == "value":
        part = told[first]["row.0.input"]
        age = replace(part.opened["age"], value='"15"')
        told[first]["row.0.input"] = replace(part, opened={**part.opened, "age": age})
    elif forged == "moved":
        told[first], told[second] = told[second], told[first]
    else:
        told[0] = told.pop(first)
    policy = f"log {lab.coordinator.log_key}\nquorum none\n"
    report = verify_evidence(write_evidence(replace(evidence, disclosed=told)), policy_text=policy)
    assert report.verdict.value == "INVALID"
    assert [step.code for step in report.failures] == ["disclosure.mismatch"]


def test_erasure_leaves_proofs_and_nothing_to_open(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row).json()
    index, officer = answer["entry"]["leaf_index"], as_role("officer")
    held = get(client, as_role("consumer"), f"entries/{index}/proof").json()
    done = post(client, officer, "erase", subject=MRN, request_id="case-7").json()
    assert (done["records"], done["scrubbed"]) == (1, True)
    (entry,) = lab.entries("subject.erased")
    assert entry["leaf_index"] == done["entry"]["leaf_index"]
    assert entry["body"] == {
        "subject": answer["sealed"]["subject"], "records": 1, "request_id": "case-7",
        "principal": entry["body"]["principal"], "role": "officer",
    }  # fmt: skip
    gone = get(client, officer, f"entries/{index}/opened")
    problem = gone.json()
    assert (gone.status_code, problem["code"]) == (410, "vault.erased")
    assert problem["erasure"] == done["entry"]
    ledger = lab.coordinator.ledger
    for proof in (held, problem["proof"]):  # given before, and after
        verify_inclusion(
            leaf_index=index,
            tree_size=proof["tree_size"],
            leaf_hash=bytes.fromhex(proof["leaf_hash"]),
            proof=[base64.b64decode(node) for node in proof["proof"]],
            root_hash=ledger.root_at(proof["tree_size"]),
        )
    assert hash_leaf(ledger.entry(index)).hex() == answer["entry"]["leaf_hash"]
    assert get(client, officer, f"entries/{index}/disclosed").status_code == 410
    get(client, officer, f"entries/{entry['leaf_index']}/proof")  # a checkpoint that covers the erasure
    evidence = read_evidence(get(client, officer, f"evidence/{index}").content)
    assert done["entry"]["leaf_index"] in evidence.entries, "the file itself says that it was erased"


def test_erasure_is_idempotent_by_its_request_and_unknown_afterwards(client, lab, as_role, row):
    ask(client, as_role("consumer"), row)
    officer = as_role("officer")
    first = post(client, officer, "erase", subject=MRN, request_id="case-7").json()
    assert post(client, officer, "erase", subject=MRN, request_id="case-7").json() == first
    assert len(lab.entries("subject.erased")) == 1
    erased = [post(client, officer, what, subject=MRN) for what in ("find", "export", "erase")]
    unknown = [post(client, officer, what, subject="never seen") for what in ("find", "export", "erase")]
    for left, right in zip(erased, unknown, strict=True):
        assert left.status_code == right.status_code == 404
        known = {"instance"}
        assert {k: v for k, v in left.json().items() if k not in known} == {
            k: v for k, v in right.json().items() if k not in known
        }


@pytest.mark.parametrize("role", ["consumer", "node", "scientist", "operator"])
def test_only_officers_find_open_export_or_erase(client, lab, as_role, row, role):
    index = ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"]
    post(client, as_role("officer"), "find", subject=MRN)
    answers = {}
    for person in (MRN, "never seen"):
        answers[person] = [
            post(client, as_role(role), what, subject=person) for what in ("find", "export", "erase")
        ]
        answers[person].append(get(client, as_role(role), "count", subject=person))
    answers["opened"] = [
        get(client, as_role(role), f"entries/{index}/{what}") for what in ("opened", "disclosed")
    ]
    for group in answers.values():
        assert {(a.status_code, a.json()["code"]) for a in group} == {(403, "access.denied")}
    known, unknown = ([a.json()["detail"] for a in answers[person]] for person in (MRN, "never seen"))
    assert known == unknown, "a refusal says nothing about who is known"
    assert lab.entries("subject.exported") == lab.entries("subject.erased") == []
    assert client.app.state.context.vault.pseudonym(MRN)


def test_nobody_without_a_key_learns_anything(client, lab, row):
    for what in ("find", "export", "erase"):
        assert post(client, {}, what, subject=MRN).json()["code"] == "access.unauthenticated"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"subject": 7}', b'{"subject": "a", "x": 1}', b'{"subject": "a", "subject": "b"}']
)
def test_malformed_bodies_are_refused(client, as_role, body):
    for what in ("find", "export", "erase"):
        answer = client.post(f"/v1/subjects/{what}", headers=as_role("officer"), content=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "request.malformed")


def test_answer_waits_for_the_vault_and_no_entry_is_written_without_it(client, lab, as_role, row):
    vault = client.app.state.context.vault

    class Busy:
        def submit_from_loop(self, request):
            raise LedgerBusyError(retry_after_s=1, pending=4096)

        def close(self):
            """Nothing waits."""

    working, vault._sequencer = vault._sequencer, Busy()
    answer = ask(client, as_role("consumer"), row)
    vault._sequencer = working
    assert (answer.status_code, answer.json()["code"]) == (503, "audit.ledger_unavailable")
    assert lab.entries("prediction") == []
    assert ask(client, as_role("consumer"), row).status_code == 200


def test_record_without_an_entry_is_swept_and_told_to_nobody(client, lab, as_role, row):
    context = client.app.state.context
    ledger = context.coordinator.ledger
    real = ledger.append_from_loop

    def full(*_args, **_kwargs):
        raise LedgerBusyError(retry_after_s=1, pending=4096)

    ledger.append_from_loop = full
    answer = ask(client, as_role("consumer"), row)
    ledger.append_from_loop = real
    assert answer.status_code == 503
    pseudonym = context.vault.pseudonym(MRN)
    assert len(context.vault.records(pseudonym)) == 1
    young = subjects.reconcile(ledger, context.vault, before="2020-01-01T00:00:00Z")
    assert young.swept == 0
    assert subjects.reconcile(ledger, context.vault, before="2999-01-01T00:00:00Z").swept == 1
    assert context.vault.records(pseudonym) == []


def test_erasing_while_predicting_never_leaves_an_answer_without_its_story(lab, as_role, row):
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        stop, answers, erased = threading.Event(), [], []

        def work():
            while not stop.is_set():
                answers.append(ask(client, as_role("consumer"), row))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(erased) < 4:
            done = post(client, as_role("officer"), "erase", subject=MRN)
            if done.status_code == 200:
                erased.append(done.json()["pseudonym"])
        stop.set()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        seen = set()
        for answer in answers:
            index = answer.json()["entry"]["leaf_index"]
            opened = get(client, as_role("officer"), f"entries/{index}/opened", field="age")
            pseudonym = answer.json()["sealed"]["subject"]
            seen.add(opened.status_code)
            assert opened.status_code == (410 if pseudonym in erased else 200)
        assert 410 in seen


@pytest.mark.reported
def test_vault_from_a_backup_decrypts_nothing_that_was_erased_since(
    client, lab, as_role, row, tmp_path, report
):
    from audit.vault_backup import backup_vault, restore_vault
    from audit.vault_home import KEY_FILE

    gone = ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"]
    kept = ask(client, as_role("consumer"), row, subject="who stays").json()["entry"]["leaf_index"]
    home, context = lab.folder / "coordinator", client.app.state.context
    backup_vault(context.vault.location, tmp_path / "vault.backup")
    assert (tmp_path / "vault.backup").stat().st_mode & 0o077 == 0
    pseudonym = post(client, as_role("officer"), "erase", subject=MRN).json()["pseudonym"]
    place, ledger = context.vault.location, lab.coordinator.ledger
    (tmp_path / "away").mkdir()
    for path in home.glob("vault.db*"):
        path.rename(tmp_path / "away" / path.name)
    # put back by hand, behind our back: the log is believed over the vault
    (home / "vault.db").write_bytes((tmp_path / "vault.backup").read_bytes())
    with open_vault(home, lab.coordinator.origin) as old:
        assert old.pseudonym(MRN) == pseudonym
        officer = Principal(id="o", role="officer")
        with pytest.raises(subjects.ErasedError):
            subjects.open_entry(ledger, old, officer, LocalOwner(), gone)
        assert subjects.open_entry(ledger, old, officer, LocalOwner(), kept).parts
        assert subjects.reconcile(ledger, old, before="2020-01-01T00:00:00Z").forgotten == 1
        assert old.records(pseudonym) == []
    (home / "vault.db").unlink()
    for suffix in ("-wal", "-shm"):
        (home / f"vault.db{suffix}").unlink(missing_ok=True)
    done = restore_vault(
        tmp_path / "vault.backup", place, home / KEY_FILE, None, ledger,
        origin=lab.coordinator.origin, before="2020-01-01T00:00:00Z",
    )  # fmt: skip
    assert done.forgotten == 1
    with open_vault(home, lab.coordinator.origin) as restored:
        assert restored.records(pseudonym) == []
        assert subjects.open_entry(ledger, restored, officer, LocalOwner(), kept).parts
    assert not list(home.glob(".vault.db*"))
    report(
        "erasure",
        size="the vault put back from a backup of before, by hand and by `vault restore`",
        result="nothing erased opens; who stayed does",
    )


def test_start_of_the_server_finishes_a_cut_off_erasure(lab, as_role, row):
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        index = ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"]
    home, ledger = lab.folder / "coordinator", lab.coordinator.ledger

    class KilledError(Exception):
        """Stands for the process that died there."""

    class DeadLog:
        def append_wait(self, *_args, **_kwargs):
            raise KilledError

    with open_vault(home, lab.coordinator.origin) as vault, pytest.raises(KilledError):
        subjects.erase_subject(
            DeadLog(), vault, Principal(id="o", role="officer"), LocalOwner(), MRN,
            request_id="case-7", time="2026-11-23T22:23:12Z",
        )  # fmt: skip
    assert ledger.search(type="subject.erased") == []
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        (entry,) = lab.entries("subject.erased")
        assert entry["body"]["request_id"] == "case-7"
        gone = get(client, as_role("officer"), f"entries/{index}/opened")
        assert (gone.status_code, gone.json()["erasure"]["leaf_index"]) == (410, entry["leaf_index"])
        again = post(client, as_role("officer"), "erase", subject=MRN, request_id="case-7").json()
        assert again["entry"]["leaf_index"] == entry["leaf_index"]
    assert len(lab.entries("subject.erased")) == 1


def test_lost_vault_is_never_replaced_by_an_empty_one(client, lab, as_role, row):
    from audit._vault_store import VaultMissingError

    ask(client, as_role("consumer"), row)
    home = lab.folder / "coordinator"
    client.app.state.context.vault.close()
    for path in home.glob("vault.db*"):
        path.unlink()
    with pytest.raises(VaultMissingError, match="vault restore"):
        open_vault(home, lab.coordinator.origin)


def test_changed_record_is_never_shown(client, lab, as_role, row):
    from sqlalchemy import update

    from audit import _vault_store
    from audit.vault_tables import RECORD

    index = ask(client, as_role("consumer"), row).json()["entry"]["leaf_index"]
    with _vault_store.writing(client.app.state.context.vault._engine) as (connection, _):
        connection.execute(update(RECORD).values(ciphertext=b"\0" * 100))
    answer = get(client, as_role("officer"), f"entries/{index}/opened")
    assert (answer.status_code, answer.json()["code"]) == (503, "vault.seal_broken")
