"""Layers that stay at a site: trained there, in no update and no version, through odd names and crashes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.layers import ModelError, check_local_layers, shared_spans
from audit.models import initial_weights, weights_of_file
from audit.weights import decode_update
from clients.errors import HomeError
from clients.local_layers import LocalLayers, local_values, overlaid, shared_values
from clients.terms import read_terms
from federation.charter import Charter
from federation.errors import CharterError

LAYERS = [
    {"layer": "linear", "in": 4, "out": 3, "bias": 1},
    {"layer": "layer_norm", "size": 3},
    {"layer": "tanh"},
    {"layer": "linear", "in": 3, "out": 1, "bias": 1},
]
MODEL = """model:
  family: layers
  local_layers: [1]
  layers:
    - {layer: linear, in: 4, out: 3}
    - {layer: layer_norm, size: 3}
    - {layer: tanh}
    - {layer: linear, in: 3, out: 1}
"""
SHARED, LOCAL = 4 * 3 + 3 + 3 + 1, 6


@given(st.data())
def test_shared_and_local_coordinates_part_the_vector(data):
    local = data.draw(st.lists(st.sampled_from([0, 1, 3]), unique=True, min_size=1, max_size=2).map(sorted))
    spans, flat = shared_spans(LAYERS, local), list(range(SHARED + LOCAL))
    shared, kept = shared_values(spans, flat), local_values(spans, flat)
    assert sorted(shared + kept) == flat
    assert overlaid(spans, [-1 if v in kept else v for v in flat], kept) == flat


@pytest.mark.parametrize("local", [[], [2], [4], [-1], [1, 1], [1, 0], [0, 1, 3], [True], ["1"], [1.0]])
def test_a_list_that_names_no_such_layers_is_refused(local):
    with pytest.raises(ModelError):
        check_local_layers(LAYERS, local)


def test_what_is_kept_is_found_again_and_old_rounds_go(tmp_path):
    kept = LocalLayers(tmp_path / "local")
    assert kept.load("run-1", 0) is None
    for number in range(1, 6):
        kept.save("run-1", number, [float(number), 0.5], keep=3)
    assert kept.load("run-1", 5) == [5.0, 0.5]
    assert [kept.load("run-1", number) is None for number in range(1, 6)] == [True, True, False, False, False]
    assert kept.average("run-1", 5, 3) == [4.0, 0.5]
    assert kept.load("run-2", 5) is None
    assert kept.average("run-2", 5, 3) is None
    assert (tmp_path / "local").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("run", ["../escape", "a/b", "", ".hidden", "x" * 200, "a\x00b"])
def test_a_run_name_that_would_leave_the_folder_is_refused(tmp_path, run):
    with pytest.raises(HomeError):
        LocalLayers(tmp_path / "local").save(run, 1, [1.0], keep=1)
    assert not (tmp_path / "local").exists()


def test_a_damaged_file_is_named_and_another_models_parameters_are_refused(tmp_path):
    kept = LocalLayers(tmp_path)
    kept.save("run", 1, [1.0], keep=1)
    (tmp_path / "run.1.safetensors").write_bytes(b"torn")
    with pytest.raises(HomeError, match="damaged"):
        kept.load("run", 1)
    with pytest.raises(HomeError, match="another model"):
        overlaid(((0, 2),), [0.0] * 4, [1.0])


@pytest.fixture
def personal(build_network):
    """A played round of a charter whose second layer stays at the sites."""
    network = build_network(rounds=2)
    text = network.charter.to_yaml()
    start = text.index("model:")
    end = text.index("plan:")
    network.charter = Charter.parse(text[:start] + MODEL + text[end:])
    network.start()
    return network


def test_nothing_of_a_local_layer_leaves_and_no_version_holds_it(personal):
    layers = [dict(layer) for layer in personal.charter.layers]
    spans = shared_spans(layers, [1])
    start = initial_weights(layers, personal.charter.digest)
    replies = {}
    for site in ("alpha", "beta", "gamma"):
        document, update = personal.ask(site, 1)
        assert "statement" in document, document
        replies[site] = decode_update(update)
        assert len(replies[site]) == SHARED
        assert document["statement"]["event"]["dimension"] == SHARED + LOCAL  # all of them were noised
    kept = {
        site: LocalLayers(agent.home.local_layers_path).load(personal.run, 1)
        for site, agent in personal.agents.items()
    }
    assert all(len(values) == LOCAL for values in kept.values())
    assert len({tuple(values) for values in kept.values()}) == 3
    personal.play(1)  # the same request again: the same bytes, and the same layers
    again = LocalLayers(personal.agents["alpha"].home.local_layers_path).load(personal.run, 1)
    assert again == kept["alpha"]
    version = weights_of_file(layers, personal.base)
    assert local_values(spans, version) == local_values(spans, start)
    assert shared_values(spans, version) != shared_values(spans, start)


def test_a_charter_with_local_layers_and_a_pull_reads_back(personal):
    text = personal.charter.to_yaml()
    assert Charter.from_canonical(personal.charter.canonical().decode()).digest == personal.charter.digest
    assert personal.charter.released == SHARED
    terms = read_terms(personal.charter.canonical().decode(), site="alpha")
    assert terms.spans == shared_spans(LAYERS, [1])
    steps = text.replace("local_steps: 1", "local_steps: 4").replace("proximal: 0", "proximal: 0.5")
    pulled = Charter.parse(steps)
    assert pulled.document["plan"]["proximal"] == "0.5"
    assert Charter.from_canonical(pulled.canonical().decode()).digest == pulled.digest
    for wrong, path in (
        (text.replace("proximal: 0", "proximal: 0.5"), "plan.proximal"),
        (steps.replace("proximal: 0.5", "proximal: 50"), "plan.proximal"),
        (text.replace("local_layers: [1]", "local_layers: [7]"), "model.local_layers"),
    ):
        with pytest.raises(CharterError) as caught:
            Charter.parse(wrong)
        assert [problem.path for problem in caught.value.problems] == [path]
