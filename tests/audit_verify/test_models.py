from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import nn

from audit.models import (
    ModelError,
    answer_of,
    dimension,
    forward,
    initial_weights,
    model_file,
    output_shape,
    parameter_specs,
    probabilities,
    weights_of_file,
)
from audit.weights import decode_weights

DIGEST = "ab" * 32
CNN = [
    {"layer": "reshape", "shape": [2, 6, 5]},
    {"layer": "conv2d", "in": 2, "out": 4, "kernel": 3, "stride": 2, "padding": 1},
    {"layer": "group_norm", "groups": 2, "channels": 4},
    {"layer": "gelu"},
    {"layer": "max_pool2d", "kernel": 2},
    {"layer": "flatten"},
    {"layer": "linear", "in": 4, "out": 3, "bias": 1},
]
CASES = {
    "linear": ([{"layer": "linear", "in": 60, "out": 3, "bias": 1}], lambda: [nn.Linear(60, 3)]),
    "linear without bias": (
        [{"layer": "linear", "in": 60, "out": 3, "bias": 0}],
        lambda: [nn.Linear(60, 3, bias=False)],
    ),
    "mlp": (
        [
            {"layer": "linear", "in": 60, "out": 8, "bias": 1},
            {"layer": "relu"},
            {"layer": "layer_norm", "size": 8},
            {"layer": "linear", "in": 8, "out": 8, "bias": 1},
            {"layer": "tanh"},
            {"layer": "linear", "in": 8, "out": 1, "bias": 1},
            {"layer": "sigmoid"},
        ],
        lambda: [
            nn.Linear(60, 8),
            nn.ReLU(),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 1),
            nn.Sigmoid(),
        ],
    ),
    "cnn": (
        CNN,
        lambda: [
            nn.Unflatten(1, (2, 6, 5)),
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ],
    ),
    "average pool": (
        [
            {"layer": "reshape", "shape": [4, 3, 5]},
            {"layer": "avg_pool2d", "kernel": 2},
            {"layer": "conv2d", "in": 4, "out": 2, "kernel": 1, "stride": 1, "padding": 0},
            {"layer": "flatten"},
        ],
        lambda: [nn.Unflatten(1, (4, 3, 5)), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.Flatten()],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_torch_in_float64(name):
    layers, build = CASES[name]
    generator = torch.Generator().manual_seed(5)
    module = nn.Sequential(*build()).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    state = module.state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(parameter_specs(layers))
    weights = [value for tensor in state.values() for value in tensor.ravel().tolist()]
    x = torch.randn((3, 60), generator=generator, dtype=torch.float64)
    expected = module(x).flatten(1)
    assert output_shape(layers, (60,)) == tuple(module(x).shape[1:])
    for row, outputs in zip(x, expected, strict=True):
        assert forward(layers, weights, row.tolist()) == pytest.approx(outputs.tolist(), abs=1e-12)


def test_embedding_equals_torch():
    layers = [
        {"layer": "embedding", "count": 5, "size": 3},
        {"layer": "layer_norm", "size": 3},
        {"layer": "linear", "in": 3, "out": 2, "bias": 1},
        {"layer": "flatten"},
    ]
    module = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Flatten()).double()
    weights = [value for tensor in module.state_dict().values() for value in tensor.ravel().tolist()]
    codes = torch.tensor([[0, 4, 2]])
    assert forward(layers, weights, [0, 4, 2]) == pytest.approx(module(codes)[0].tolist(), abs=1e-12)
    for bad in ([5], [-1], [0.5]):
        with pytest.raises(ModelError, match="no code"):
            forward(layers, weights, bad)


def test_a_site_adds_its_own_intercept_and_nobody_gets_the_mean():
    layers = [
        {"layer": "linear", "in": 1, "out": 2, "bias": 1},
        {"layer": "site_intercept", "sites": 3, "out": 2},
    ]
    weights = [1.0, 2.0, 0.5, 0.25, *[10.0, 20.0, 30.0, 40.0, 50.0, 90.0]]
    assert dimension(layers) == 10
    assert forward(layers, weights, [2.0], site=1) == [2.0 + 0.5 + 30.0, 4.0 + 0.25 + 40.0]
    assert forward(layers, weights, [2.0]) == [2.5 + 30.0, 4.25 + 50.0]
    with pytest.raises(ModelError, match="site 3"):
        forward(layers, weights, [2.0], site=3)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        "linear",
        [None],
        [{"layer": "batch_norm"}],
        [{"layer": ["linear"]}],
        [{"layer": "linear", "in": 2, "out": 1}],
        [{"layer": "linear", "in": 2, "out": 1, "bias": 1, "code": "x"}],
        [{"layer": "linear", "in": 2, "out": 1, "bias": 2}],
        [{"layer": "linear", "in": 2, "out": True, "bias": 1}],
        [{"layer": "linear", "in": 0, "out": 1, "bias": 1}],
        [{"layer": "linear", "in": 1 << 23, "out": 1 << 23, "bias": 1}],
        [{"layer": "reshape", "shape": 5}],
        [{"layer": "reshape", "shape": [2, 0]}],
        [{"layer": "group_norm", "groups": 3, "channels": 4}],
    ],
)
def test_what_is_no_layer_list_is_refused(layers):
    with pytest.raises(ModelError):
        parameter_specs(layers)


@pytest.mark.parametrize("size", [59, 61, 1])
def test_a_layer_that_does_not_fit_is_named(size):
    with pytest.raises(ModelError, match=r"layers\[0\]"):
        output_shape(CNN, (size,))


def test_weights_that_do_not_fit_are_refused():
    layers = CASES["linear"][0]
    for count in (0, dimension(layers) - 1, dimension(layers) + 1):
        with pytest.raises(ModelError):
            forward(layers, [0.0] * count, [0.0] * 60)
        with pytest.raises(ModelError):
            model_file(layers, [0.0] * count)


def test_a_linear_model_starts_at_zero_and_a_deeper_one_from_the_charter():
    linear = [*CASES["linear"][0], {"layer": "site_intercept", "sites": 2, "out": 3}]
    assert set(initial_weights(linear, DIGEST)) == {0.0}
    first, again = initial_weights(CNN, DIGEST), initial_weights(CNN, DIGEST)
    assert first == again
    assert len(first) == dimension(CNN)
    assert first != initial_weights(CNN, "cd" * 32)
    tensors = decode_weights(model_file(CNN, first))
    bound = 1 / math.sqrt(2 * 9)
    conv = tensors["1.weight"][1] + tensors["1.bias"][1]
    assert max(map(abs, conv)) <= bound
    assert max(map(abs, conv)) > 0.8 * bound
    assert abs(sum(conv) / len(conv)) < 0.4 * bound
    assert tensors["2.weight"][1] == [1.0] * 4
    assert tensors["2.bias"][1] == [0.0] * 4


def test_initial_weights_are_frozen_bytes():
    two = [
        {"layer": "linear", "in": 1, "out": 1, "bias": 0},
        {"layer": "linear", "in": 1, "out": 1, "bias": 0},
    ]

    block = hashlib.sha256(b"affidavit/init/v1\0" + bytes.fromhex(DIGEST) + bytes(8)).digest()
    unit = [(int.from_bytes(block[i : i + 8], "big") >> 11) / 2**53 for i in (0, 8)]
    assert initial_weights(two, DIGEST) == [2 * u - 1 for u in unit]


def test_a_model_file_of_other_layers_is_refused():
    data = model_file(CNN, initial_weights(CNN, DIGEST))
    assert weights_of_file(CNN, data) == initial_weights(CNN, DIGEST)
    with pytest.raises(ModelError):
        weights_of_file(CASES["linear"][0], data)


def test_probabilities_do_not_overflow():
    assert probabilities("binary", [1000.0]) == [0.0, 1.0]
    assert probabilities("binary", [-1000.0]) == [1.0, 0.0]
    assert sum(probabilities("multiclass", [1000.0, -1000.0, 999.0])) == pytest.approx(1)
    with pytest.raises(ModelError):
        probabilities("binary", [1.0, 2.0])
    with pytest.raises(ModelError):
        probabilities("multiclass", [1.0])


def test_answers_are_text_of_six_places():
    classes = {"name": "y", "classes": ["no", "yes"]}
    assert answer_of("binary", classes, [0.0]) == {"label": "yes", "probability": "0.5"}
    assert answer_of("binary", classes, [-1.0]) == {"label": "no", "probability": "0.268941"}
    three = {"name": "y", "classes": ["a", "b", "c"]}
    assert answer_of("multiclass", three, [0.0, 0.0, -50.0]) == {
        "label": "a",
        "probabilities": ["0.5", "0.5", "0"],
    }
    bounds = {"name": "days", "lower": "0", "upper": "10"}
    assert answer_of("regression", bounds, [0.0]) == {"label": "days", "value": "5"}
    with pytest.raises(ModelError):
        answer_of("binary", classes, [math.nan])
