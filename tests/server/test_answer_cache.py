"""Outputs of a moment ago: only where a charter allows it, for the same rows, version, charter and asker."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

from audit.answers import AnswerTerms
from audit.encoding import RowEncoder
from audit.reference import OodScorer
from server.answer_cache import MAX_ROWS, AnswerCache
from server.app import create_app
from tests.server.test_runtime import OTHER

TERMS = {"decimals": 6, "label_only": 0, "cache": 1}


class Warm:
    """As much of a version in memory as the cache looks at."""

    def __init__(self, version="v", charter="c", cache=True):
        self.version, self.charter, self.terms = version, charter, AnswerTerms(cache=cache)


@pytest.fixture
def told():
    return []


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def cache(told, now):
    return AnswerCache(3, 10.0, told.append, lambda: now[0])


@pytest.fixture
def caching(lab, monkeypatch):
    """A server of a model whose charter allows it, the runs of its models counted."""
    lab.version, lab.charter = lab.live(answers=TERMS, name="kept")
    app = create_app(lab.settings(), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        context = app.state.context
        runs, batching = [], context.predicting.batching
        computed = type(batching)._computed

        async def counted(self, warm, encoded, site):
            runs.append((warm.version, warm.charter))
            return await computed(self, warm, encoded, site)

        monkeypatch.setattr(type(batching), "_computed", counted)
        yield client, runs


def ask(client, token, row, model="kept", **more):
    headers = {"Authorization": f"Bearer {token}"}
    body = {"purpose": "triage", "rows": [row], **more}
    return client.post(f"/v1/models/{model}/predict", headers=headers, json=body)


def swap(lab, out, into, from_state):
    lab.move(into, lab.charter, from_state, "live", model="kept")
    lab.move(out, lab.charter, "live", "retired", model="kept")


def metric(client, lab):
    headers = {"Authorization": f"Bearer {lab.tokens['operator']}"}
    lines = client.get("/metrics", headers=headers).text.splitlines()
    found = [line.split() for line in lines if line.startswith("affidavit_answer_cache_total")]
    return {name.partition('"')[2].partition('"')[0]: float(value) for name, value in found}


def test_each_use_is_an_entry_with_salts_of_its_own(caching, lab, row):
    client, runs = caching
    first, again = (ask(client, lab.tokens["consumer"], row).json() for _ in range(2))
    assert first["answers"] == again["answers"]
    assert len(runs) == 1
    assert metric(client, lab) == {"miss": 1.0, "hit": 1.0}
    assert first["entry"]["leaf_index"] < again["entry"]["leaf_index"]
    opened = [reply["opened"][0] for reply in (first, again)]
    assert opened[0]["output"] == opened[1]["output"]
    assert opened[0]["input_salt"] != opened[1]["input_salt"]
    assert opened[0]["output_salt"] != opened[1]["output_salt"]
    bodies = [entry["body"] for entry in lab.entries("prediction")[-2:]]
    assert bodies[0]["rows"] != bodies[1]["rows"]


def test_refusal_is_decided_anew_for_rows_that_were_answered(caching, lab, row):
    client, runs = caching
    assert ask(client, lab.tokens["consumer"], row).status_code == 200
    assert ask(client, lab.tokens["consumer"], row, purpose="spying").status_code == 403
    assert ask(client, lab.tokens["node"], row).status_code == 403
    store = lab.keys()
    token, view = store.create(role="consumer")
    assert ask(client, token, row).status_code == 200
    store.revoke(view.key_id)
    client.app.state.context.keys.revoked_in_log(view.key_id)
    assert ask(client, token, row).status_code == 401
    store.close()
    assert len(runs) == 2, "each asker's own"


def test_what_another_asked_makes_no_answer_faster(caching, lab, row):
    client, runs = caching
    for _ in range(2):
        for token in (lab.tokens["consumer"], lab.key("consumer")):
            assert ask(client, token, row).status_code == 200
    assert len(runs) == 3  # the first key's once, and each new key's


def test_version_that_went_out_answers_no_more(caching, lab, row):
    client, runs = caching
    token, other = lab.tokens["consumer"], lab.register(lab.charter, weights=OTHER, model="kept")
    before = ask(client, token, row).json()
    lab.move(other, lab.charter, "candidate", "approved", model="kept")
    swap(lab, lab.version, other, "approved")
    after = ask(client, token, row).json()
    assert (before["version"], after["version"]) == (lab.version, other)
    assert before["answers"] != after["answers"]
    swap(lab, other, lab.version, "retired")
    back = ask(client, token, row).json()
    assert (back["version"], back["answers"]) == (lab.version, before["answers"])
    bodies = {entry["leaf_index"]: entry["body"] for entry in lab.entries("prediction")}
    assert (
        bodies[back["entry"]["leaf_index"]]["transition"] == bodies[back["entry"]["leaf_index"]]["transition"]
    )
    assert bodies[back["entry"]["leaf_index"]]["version"] == lab.version
    assert [version for version, _ in runs] == [lab.version, other]


@pytest.mark.parametrize("order", [("kept", "terse"), ("terse", "kept")])
def test_same_weights_under_another_charter_let_out_what_that_charter_lets_out(lab, row, order):
    """Both charters name one version: neither what is in memory nor what is kept may cross over."""
    lab.version, lab.charter = lab.live(answers=TERMS, name="kept")
    version, _ = lab.live(name="terse", answers={"decimals": 6, "label_only": 1, "cache": 1})
    assert version == lab.version
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for _ in range(2):
            found = {name: ask(client, lab.tokens["consumer"], row, name).json() for name in order}
            assert set(found["kept"]["answers"][0]) == {"label", "probability"}
            assert set(found["terse"]["answers"][0]) == {"label"}
            assert "probability" not in json.dumps(found["terse"]["opened"])


@pytest.mark.parametrize("first", ["toy", "numbers"])
def test_same_weights_under_another_charter_are_scored_by_that_charters_features(lab, row, first):
    features = [
        {"name": name, "type": "number", "unit": "", "lower": "0", "upper": "1",
         "transform": "none", "missing": "refuse"}
        for name in "abcd"
    ]  # fmt: skip
    version, _ = lab.live(name="numbers", features=features)
    assert version == lab.version
    rows = {"toy": row, "numbers": {"a": 1, "b": 0.9, "c": 0.05, "d": 1}}
    expected = OodScorer(features).score(RowEncoder(features).encode(rows["numbers"]))
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for name in (first, "numbers"):
            found = ask(client, lab.tokens["consumer"], rows[name], name).json()
    assert found["annotations"]["ood"] == [expected]


def test_charter_that_does_not_say_so_keeps_nothing(client, lab, row):
    for _ in range(2):
        assert ask(client, lab.tokens["consumer"], row, "toy").status_code == 200
    assert metric(client, lab) == {}
    assert not client.app.state.context.predicting.batching._cache._kept


def test_operator_may_keep_nothing_whatever_a_charter_says(lab, row):
    lab.version, lab.charter = lab.live(answers=TERMS, name="kept")
    settings = lab.settings(answer_cache_size=0)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        for _ in range(2):
            assert ask(client, lab.tokens["consumer"], row).status_code == 200
        assert metric(client, lab) == {}


def test_keys_differ_by_version_charter_site_asker_and_every_bit(cache):
    rows = [[1.0, 2.0], [3.0, 0.0]]
    keys = {
        cache.key(Warm(), rows, None, "p-1"),
        cache.key(Warm(version="w"), rows, None, "p-1"),
        cache.key(Warm(charter="d"), rows, None, "p-1"),
        cache.key(Warm(), rows, 0, "p-1"),
        cache.key(Warm(), [[1.0, 2.0], [3.0, -0.0]], None, "p-1"),
        cache.key(Warm(), [[1.0, 2.0], [3.0, 5e-324]], None, "p-1"),
        cache.key(Warm(), rows[:1], None, "p-1"),
        cache.key(Warm(), rows[::-1], None, "p-1"),
    }
    keys.add(cache.key(Warm(), rows, None, "p-2"))
    assert len(keys) == 9
    assert None not in keys
    assert cache.key(Warm(cache=False), rows, None, "p-1") is None
    assert cache.key(Warm(), [[1.0]] * (MAX_ROWS + 1), None, "p-1") is None
    assert cache.key(Warm(), [], None, "p-1") is None
    assert cache.key(Warm(), rows, None, "") is None, "nobody's"


def test_it_is_bounded_in_number_and_in_time_and_gives_copies(cache, told, now):
    keys = [cache.key(Warm(), [[float(number)]], None, "p-1") for number in range(4)]
    for number, key in enumerate(keys[:3]):
        cache.put(key, [[float(number)]])
    cache.get(keys[0])[0].append(666.0)  # whoever alters what they got alters nothing here
    assert cache.get(keys[0]) == [[0.0]]
    cache.put(keys[3], [[3.0]])
    assert cache.get(keys[1]) is None, "the one used longest ago made room"
    now[0] = 9.9
    assert cache.get(keys[0]) == [[0.0]]
    now[0] = 10.0
    assert cache.get(keys[0]) is None, "a use makes nothing younger"
    assert told == ["hit", "hit", "miss", "hit", "miss"]
    assert keys[0] not in cache._kept
