"""The officer's view of the log: who sees what, cursors that stay, exports that show their end, proofs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from audit.checkpoints import Checkpoint, parse_checkpoint_note
from audit.cose import CoseError, issue_cose_receipt, verify_cose_receipt
from audit.entries import TYPES, SiteRefused, columns_of, encode_entry, new_entry
from audit.errors import AuditError, ProofError
from audit.evidence import read_evidence
from audit.keys import SigningKey
from audit.merkle import hash_leaf, inclusion_proof_of, root_from, root_of
from audit.notes import NoteVerifier
from audit.reading import PRIVATE_TYPES, PUBLIC_TYPES
from audit.tiles import TileTree, decode_bundle
from audit.verify import verify_evidence
from audit.verify.report import Verdict
from server.app import create_app
from server.reading_log import ReadingLog

PREDICT = {"purpose": "triage", "rows": [{"age": 51, "fever": True, "ward": "north"}]}


def get(client, headers, path, **query):
    return client.get(f"/v1/audit/{path}", headers=headers, params=query)


def refused(site: str, number: int = 1) -> SiteRefused:
    return SiteRefused(
        run="run-9", charter="a" * 64, site=site, round=number, reason="site_closed", signature=""
    )


def node_of(lab, site: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {lab.key('node', site=site)}"}


# who sees what


def test_every_type_of_entry_is_either_public_or_private():
    assert set(TYPES) == PUBLIC_TYPES | PRIVATE_TYPES
    assert not PUBLIC_TYPES & PRIVATE_TYPES


def test_site_sees_its_own_and_what_is_public(client, lab, as_role):
    client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT)
    for site in ("alpha", "beta"):
        lab.coordinator.append(refused(site), "coordinator")
    alpha = node_of(lab, "alpha")
    page = get(client, alpha, "entries", limit=500).json()
    types = {item["entry"]["type"] for item in page["entries"]}
    assert not types & {"prediction", "access.denied", "key.created", "audit.read"}
    sites = {
        item["entry"]["body"]["site"] for item in page["entries"] if item["entry"]["type"] == "site.refused"
    }
    assert sites == {"alpha"}
    assert {"charter.published", "version.registered"} <= types
    (of_beta,) = (e["leaf_index"] for e in lab.entries("site.refused") if e["body"]["site"] == "beta")
    for path in (f"entries/{of_beta}", f"entries/{of_beta}/proof", f"evidence/{of_beta}"):
        assert get(client, alpha, path).status_code == 403, path
    assert get(client, alpha, "entries", site="beta").status_code == 403
    assert get(client, alpha, "entries", site="alpha", type="site.refused").json()["entries"]


def test_unbound_node_is_refused_a_site_rather_than_shown_nothing(client, lab, as_role):
    """An agent that asks for its statements must never take a filtered answer for an empty log."""
    lab.coordinator.append(refused("alpha"), "coordinator")
    assert get(client, as_role("node"), "entries", site="alpha").status_code == 403
    assert get(client, as_role("node"), "entries").status_code == 200


def test_consumer_sees_what_names_it_and_nothing_else(client, lab, as_role):
    mine = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT).json()
    other = {"Authorization": f"Bearer {lab.key('consumer')}"}
    client.post("/v1/models/toy/predict", headers=other, json=PREDICT)
    page = get(client, as_role("consumer"), "entries").json()
    index = mine["receipt"]["leaf_index"]
    assert [i["leaf_index"] for i in page["entries"] if i["entry"]["type"] == "prediction"] == [index]
    assert get(client, as_role("consumer"), f"entries/{index}/proof").status_code == 200
    assert get(client, other, f"entries/{index}").status_code == 403


def test_filtered_pages_go_on_where_they_stopped(client, lab, as_role):
    for number in range(1, 9):
        lab.coordinator.append(refused("alpha" if number % 2 else "beta", number), "coordinator")
    alpha, seen, after = node_of(lab, "alpha"), [], -1
    while after is not None:
        page = get(client, alpha, "entries", limit=1, after=after, type="site.refused").json()
        seen += [item["entry"]["body"]["round"] for item in page["entries"]]
        after = page["next"]
    assert seen == [1, 3, 5, 7]


# searching, counting, exporting


def test_decision_and_principal_find_answers_and_refusals(client, lab, as_role):
    client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT)
    client.post("/v1/models/toy/predict", headers=as_role("consumer"), json={**PREDICT, "purpose": "resale"})
    client.get("/v1/keys", headers=as_role("consumer"))
    officer = as_role("officer")

    def types(**query):
        return [item["entry"]["type"] for item in get(client, officer, "entries", **query).json()["entries"]]

    assert types(decision="allowed") == ["prediction"]
    assert types(decision="denied") == ["prediction.denied", "access.denied"]
    assert types(decision="denied", type="access.denied") == ["access.denied"]
    who = lab.entries("prediction")[0]["body"]["principal"]
    assert set(types(principal=who)) == {
        "prediction",
        "prediction.denied",
        "access.denied",
        "key.created",
    } - (set() if lab.entries("key.created") else {"key.created"})
    assert (
        get(client, officer, "entries", decision="denied", type="prediction").json()["code"]
        == "audit.search_term"
    )
    assert get(client, officer, "entries", decision="maybe").status_code == 422


def test_count_is_the_number_of_entries_that_search_finds(client, lab, as_role):
    for number in range(1, 8):
        lab.coordinator.append(refused("beta", number), "coordinator")
    answer = get(client, as_role("officer"), "count", type="site.refused").json()
    assert answer["entries"] == 7
    assert answer["tree_size"] == lab.coordinator.ledger.tree_size - 1, "then the count itself was recorded"


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_export_holds_every_entry_and_says_how_many(client, lab, as_role, format):
    append_all(lab, [refused("beta", number) for number in range(1, 600)])
    size = lab.coordinator.ledger.tree_size
    answer = get(client, as_role("officer"), "export", format=format, type="site.refused")
    assert answer.headers["x-affidavit-entries"] == "599"
    assert answer.headers["x-affidavit-tree-size"] == str(size)
    if format == "csv":
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert [hash_leaf(row["entry"].encode()).hex() for row in rows] == [row["leaf_hash"] for row in rows]
        indices = [int(row["leaf_index"]) for row in rows]
    else:
        *lines, end = answer.content.splitlines()
        assert json.loads(end) == {"end": True, "entries": 599, "tree_size": size, "next": None}
        found = [json.loads(line) for line in lines]
        cut = [line.split(b'"entry":', 1)[1][:-1] for line in lines]
        assert [hash_leaf(data).hex() for data in cut] == [item["leaf_hash"] for item in found]
        indices = [item["leaf_index"] for item in found]
    assert indices == list(range(size - 599, size))


def append_all(lab, bodies) -> None:
    """Many entries at once: they share their commits."""
    futures = []
    for body in bodies:
        entry = new_entry(body, actor="coordinator", time="2026-01-02T03:04:05Z")
        data = encode_entry(entry)
        futures.append(
            lab.coordinator.ledger.append(data, event_id=entry.event_id, index_columns=columns_of(data))
        )
    for future in futures:
        future.result(30)


def test_export_goes_on_from_its_cursor(client, lab, as_role):
    for number in range(1, 8):
        lab.coordinator.append(refused("beta", number), "coordinator")
    seen, after = [], -1
    while after is not None:
        answer = get(client, as_role("officer"), "export", type="site.refused", limit=3, after=after)
        *lines, end = answer.content.splitlines()
        seen += [json.loads(line)["entry"]["body"]["round"] for line in lines]
        after = json.loads(end)["next"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_spreadsheet_runs_nothing_that_somebody_logged():
    from audit.reading import _harmless

    assert [_harmless(text) for text in ("=1+1", "+1", "-1", "@x", "plain", 7)] == [
        "'=1+1", "'+1", "'-1", "'@x", "plain", 7,
    ]  # fmt: skip


# reading is logged


def test_every_reading_is_an_entry_before_it_is_answered(client, lab, as_role):
    officer = as_role("officer")
    get(client, officer, "entries", type="prediction")
    get(client, officer, "count", type="prediction")
    get(client, officer, "export", type="prediction")
    get(client, officer, "entries/0")
    get(client, officer, "tile/entries/000.p/2")
    reads = [item["body"] for item in lab.entries("audit.read")]
    assert [(item["action"], item["role"]) for item in reads] == [
        (action, "officer") for action in ("search", "count", "export", "entry", "bundle")
    ]
    assert reads[-1]["count"] == 2


def test_terms_are_in_the_log_only_as_a_salted_root_and_in_the_vault_sealed(client, lab, as_role):
    who = "p-" + secrets.token_hex(16)
    get(client, as_role("officer"), "entries", principal=who)
    stored = lab.coordinator.ledger.entries(0, 1000)
    assert not [data for data in stored if who.encode() in data]
    (read,) = lab.entries("audit.read")
    terms = b'{"limit":100,"principal":"%s"}' % who.encode()
    assert read["body"]["query"] != hashlib.sha256(terms).hexdigest(), "without the salt none can be guessed"
    vault = client.app.state.context.vault
    sealed = vault.parts(read["event_id"], type="audit.read", pseudonym=read["body"]["subject"])["terms"]
    assert sealed.values == json.loads(terms)
    assert sealed.root("terms") == read["body"]["query"]
    assert vault.identify(read["body"]["subject"]) == ("reader", read["body"]["principal"])
    files = [path.read_bytes() for path in (lab.folder / "coordinator").glob("vault.db*")]
    assert not [data for data in files if who.encode() in data]


def test_equal_searches_cannot_be_linked_by_what_the_log_holds(client, lab, as_role):
    for _ in range(2):
        get(client, as_role("officer"), "entries", type="prediction")
    first, second = lab.entries("audit.read")
    assert first["body"]["query"] != second["body"]["query"]
    assert first["body"]["sealed"] != second["body"]["sealed"]


def test_watching_the_readers_does_not_feed_itself(client, lab, as_role):
    officer = as_role("officer")
    get(client, officer, "entries", type="prediction")
    before = lab.coordinator.ledger.tree_size
    for _ in range(30):
        assert get(client, officer, "entries", type="audit.read").json()["entries"]
    assert lab.coordinator.ledger.tree_size == before + 1, "one entry a minute for each reader"
    get(client, as_role("scientist"), "entries", type="audit.read")
    assert lab.coordinator.ledger.tree_size == before + 2


def test_paging_one_by_one_to_the_end_ends(client, lab, as_role):
    after, pages = -1, 0
    while after is not None:
        page = get(client, as_role("officer"), "entries", limit=1, after=after).json()
        after, pages = page["next"], pages + 1
        assert pages < 200
    assert pages >= lab.coordinator.ledger.tree_size // 2


def test_minute_of_quiet_ends():
    now = [100.0]
    log = ReadingLog(None, None, monotonic=lambda: now[0])
    assert [log._is_quiet("p"), log._is_quiet("p"), log._is_quiet("q")] == [False, True, False]
    now[0] += 60.5
    assert log._is_quiet("p") is False


# tiles


def test_tiles_over_http_prove_the_checkpoint(client, lab, as_role):
    note = client.get("/v1/audit/checkpoint").content
    checkpoint = parse_checkpoint_note(note)
    tree = TileTree(lambda path: get(client, as_role("node"), path).content, checkpoint.tree_size)
    assert root_from(tree.node, checkpoint.tree_size) == checkpoint.root_hash
    path = f"tile/entries/000.p/{checkpoint.tree_size}"
    entries = decode_bundle(get(client, as_role("officer"), path).content, checkpoint.tree_size)
    assert root_of(map(hash_leaf, entries)) == checkpoint.root_hash


def test_cache_headers_fit_what_may_change(client, lab, as_role):
    tile = get(client, as_role("node"), "tile/0/000.p/3")
    assert tile.headers["cache-control"] == "private, max-age=3600, immutable"
    assert tile.headers["content-type"] == "application/octet-stream"
    assert client.get("/v1/audit/checkpoint").headers["cache-control"] == "public, max-age=1"
    append_all(lab, [refused("beta", number) for number in range(1, 260)])
    assert get(client, as_role("node"), "tile/0/000").status_code == 404, "no checkpoint covers it yet"
    newest = lab.coordinator.ledger.tree_size - 1
    assert get(client, as_role("officer"), f"entries/{newest}/proof").status_code == 200
    full = get(client, as_role("node"), "tile/0/000")
    assert (full.headers["cache-control"], len(full.content)) == (
        "private, max-age=31536000, immutable",
        8192,
    )
    assert len(get(client, as_role("node"), "tile/1/000.p/1").content) == 32


@pytest.mark.parametrize(
    "place",
    [
        "0/000", "0/001.p/1", "1/000.p/1", "0/0", "64/000", "entries/x000/000", "0/000.p/256", "0/..", "x",
        "0/000.p/0", "0/000.p/01", "00/000.p/1", "0/000.p/1/", "0//000.p/1", "0/x000/000.p/1", "-1/000.p/1",
        "0/000.p/1%00", "0/000.p/1%0a", "%2e%2e/checkpoint", "..%2fcheckpoint", "0/%2e%2e/0/000.p/1",
        "0/000%2ep%2f1%20", "entries/..%2f0%2f000.p%2f1", "0/٠٠٠.p/1", "0/000.p/1;x", "0/000.p/1%3fx",
    ],
)  # fmt: skip
def test_tile_that_is_not_there_is_404(client, as_role, place):
    answer = get(client, as_role("officer"), f"tile/{place}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_percent_encoding_names_the_same_tile_and_opens_no_other_door(client, as_role):
    plain = get(client, as_role("node"), "tile/0/000.p/1")
    coded = get(client, as_role("node"), "tile/%30/000%2Ep%2F1")
    assert (coded.status_code, coded.content) == (200, plain.content)
    for path in ("tile/entries/000.p/1", "tile/%65ntries/000.p/1", "tile/entries%2F000.p%2F1"):
        assert get(client, as_role("node"), path).status_code == 403, path


def test_public_hashes_need_no_key_but_entries_do(lab):
    settings = lab.settings(public_tiles=True)
    with TestClient(create_app(settings, clock=lab.clock), raise_server_exceptions=False) as client:
        tile = client.get("/v1/audit/tile/0/000.p/1")
        assert (tile.status_code, tile.headers["cache-control"]) == (200, "public, max-age=3600, immutable")
        assert client.get("/v1/audit/tile/entries/000.p/1").status_code == 401


def test_hashes_of_a_private_log_need_a_key(client):
    assert client.get("/v1/audit/tile/0/000.p/1").status_code == 401


# evidence


def policy_of(lab) -> str:
    return f"log {lab.coordinator.log_key}\nquorum none\n"


def test_evidence_of_a_time_range_proves_every_entry_in_it(client, lab, as_role):
    for number in range(1, 5):
        lab.coordinator.append(refused("beta", number), "coordinator")
    answer = get(
        client, as_role("officer"), "evidence", since="2020-01-01T00:00:00Z", until="2100-01-01T00:00:00Z"
    )
    assert answer.status_code == 200, answer.text
    found = read_evidence(answer.content)
    assert sorted(found.entries) == list(range(len(found.entries)))
    report = verify_evidence(answer.content, policy_text=policy_of(lab))
    assert report.verdict in (Verdict.VALID, Verdict.UNWITNESSED), report.text()
    altered = bytearray(answer.content)
    altered[answer.content.index(b'"round":3') + 8] ^= 1
    assert verify_evidence(bytes(altered), policy_text=policy_of(lab)).verdict is Verdict.INVALID


def test_evidence_by_terms_carries_the_entries_about_keys_and_no_downgraded_story(client, lab, as_role):
    old = lab.coordinator.log_key
    client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT)
    placed = lab.coordinator.rotate_log_key(0)
    policy = f"log {lab.coordinator.log_key}\nlog {old}\nquorum none\n"
    answer = get(client, as_role("officer"), "evidence", decision="allowed")
    found = read_evidence(answer.content)
    assert placed.leaf_index in found.entries
    assert found.leaf_index == 0, "a prediction is a story of its own; among others it is only an entry"
    report = verify_evidence(answer.content, policy_text=policy)
    assert report.verdict is Verdict.VALID, report.text()


def test_evidence_of_a_version_is_that_of_its_last_transition(client, lab, as_role):
    last = [e["leaf_index"] for e in lab.entries("version.transition")][-1]
    answer = get(client, as_role("officer"), "evidence", version=lab.version)
    assert answer.status_code in (200, 404), answer.text
    if answer.status_code == 200:
        assert read_evidence(answer.content).leaf_index == last


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 422),
        ({"run": "no-such-run"}, 404),
        ({"version": "f" * 64}, 404),
        ({"type": "run.completed"}, 404),
    ],
)
def test_evidence_of_nothing_is_refused(client, as_role, query, status):
    assert get(client, as_role("officer"), "evidence", **query).status_code == status


def test_evidence_export_is_itself_an_entry(client, lab, as_role):
    answer = get(client, as_role("officer"), "evidence", type="log.created")
    assert answer.status_code == 200, answer.text
    (made,) = lab.entries("evidence.exported")
    assert made["body"]["digest"] == hashlib.sha256(answer.content).hexdigest()


# COSE receipts

KEY = SigningKey.generate()
LEAVES = [hash_leaf(b"%d" % i) for i in range(70)]


def cose(index: int, size: int) -> bytes:
    checkpoint = Checkpoint("a.example/log", size, root_of(LEAVES[:size]))
    path = inclusion_proof_of(LEAVES[:size], index)
    return issue_cose_receipt(KEY.unsafe_sign_raw, checkpoint, index, LEAVES[index], path)


def test_cose_receipt_over_http_verifies_with_the_logs_key(client, lab, as_role):
    answer = get(client, as_role("officer"), "entries/3/receipt.cose")
    assert answer.headers["content-type"] == "application/cose"
    key = NoteVerifier.parse(lab.coordinator.log_key).key
    leaf_hash = hash_leaf(lab.coordinator.ledger.entry(3))
    assert verify_cose_receipt(answer.content, leaf_hash=leaf_hash, key=key)[1] == 3


def test_cose_receipt_has_the_bytes_that_the_standards_fix():
    data = cose(0, 2)
    path = b"\x58\x20" + LEAVES[1]
    proof = b"\x83\x02\x00\x81" + path
    expected = b"\xd2\x84\x47\xa2\x01\x27\x19\x01\x8b\x01" + b"\xa1\x19\x01\x8c\xa1\x20\x81"
    expected += b"\x58" + bytes([len(proof)]) + proof + b"\xf6\x58\x40"
    assert data[:-64] == expected
    signed = b"\x84\x6aSignature1\x47\xa2\x01\x27\x19\x01\x8b\x01\x40\x58\x20" + root_of(LEAVES[:2])
    KEY.verify_key.verify_raw(signed, data[-64:])


def test_every_leaf_of_every_size_has_a_receipt():
    for size in (2, 3, 8, 24, 65, 70):
        for index in range(size):
            key = KEY.verify_key
            assert verify_cose_receipt(cose(index, size), leaf_hash=LEAVES[index], key=key) == (size, index)


def test_tree_of_one_leaf_has_no_cose_receipt():
    with pytest.raises(CoseError):
        cose(0, 1)


def test_receipt_is_not_issued_over_a_proof_that_fails():
    checkpoint = Checkpoint("a.example/log", 9, root_of(LEAVES[:9]))
    with pytest.raises(ProofError):
        issue_cose_receipt(KEY.unsafe_sign_raw, checkpoint, 3, LEAVES[4], inclusion_proof_of(LEAVES[:9], 3))


def test_no_single_bit_of_a_receipt_is_free_but_the_trees_size():
    """A root does not commit to its tree's size, and COSE signs the root alone: sizes of one shape pass."""
    data, sizes = cose(5, 9), set()
    for bit in range(len(data) * 8):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            size, index = verify_cose_receipt(bytes(altered), leaf_hash=LEAVES[5], key=KEY.verify_key)
        except AuditError:
            continue
        assert index == 5
        sizes.add(size)
    assert sizes <= set(range(9, 17)), "sizes in which leaf 5 has the same path"


@given(st.binary(max_size=80), st.integers(2, 60))
def test_any_bytes_are_refused_with_a_named_error(data, cut):
    for hostile in (data, b"\xd2\x84" + data, cose(5, 9)[:cut] + data):
        with pytest.raises(AuditError):
            verify_cose_receipt(hostile, leaf_hash=LEAVES[5], key=KEY.verify_key)
