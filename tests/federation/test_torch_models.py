"""The torch model, the layer list and the model file are one model; what a list cannot say is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from audit.forward import forward
from audit.layers import ModelError, dimension, parameter_specs
from audit.models import initial_weights
from audit.weights import WeightsError
from federation.describe import describe
from federation.errors import DescribeError, LayerError
from federation.evaluation import model_outputs
from federation.families import check_layers, cnn, logistic_regression, mlp, normalise_layers
from federation.torch_models import (
    Reshape,
    SiteIntercept,
    build_model,
    dump_model,
    get_weights,
    load_model,
    set_weights,
)

DIGEST = "ab" * 32
MODELS = {
    "logistic": logistic_regression(6, 1),
    "multiclass with intercepts": logistic_regression(6, 3, sites=4),
    "mlp": mlp(6, 2, [5, 4], activation="gelu", sites=2),
    "cnn": cnn(36, 3, [1, 6, 6], [4, 6]),
    "norms": [
        {"layer": "linear", "in": 6, "out": 8, "bias": 0},
        {"layer": "layer_norm", "size": 8},
        {"layer": "tanh"},
        {"layer": "reshape", "shape": [2, 2, 2]},
        {"layer": "group_norm", "groups": 1, "channels": 2},
        {"layer": "sigmoid"},
        {"layer": "avg_pool2d", "kernel": 2},
        {"layer": "flatten"},
        {"layer": "linear", "in": 2, "out": 1, "bias": 1},
    ],
}


def inputs(layers, rows=5):
    width = 36 if layers[0]["layer"] == "reshape" else 6
    return torch.linspace(-1, 1, rows * width, dtype=torch.float64).sin().reshape(rows, width)


@pytest.mark.parametrize("name", MODELS)
def test_torch_says_what_the_definition_says(name):
    layers = MODELS[name]
    weights = [0.01 * (i % 37) - 0.15 for i in range(dimension(layers))]
    model = build_model(layers)
    set_weights(model, weights)
    x = inputs(layers)
    for site in (None, 1) if layers[-1]["layer"] == "site_intercept" else (None,):
        outputs = model(x, site).tolist()
        for row, found in zip(x.tolist(), outputs, strict=True):
            assert found == pytest.approx(forward(layers, weights, row, site), abs=1e-12)
    assert model_outputs(layers, weights, x.tolist()) == [
        pytest.approx(o, abs=1e-12) for o in model(x).tolist()
    ]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_named_and_ordered_as_the_file_says(name):
    layers = MODELS[name]
    model = build_model(layers)
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == [
        (n, s) for n, s in parameter_specs(layers)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_model_files_carry_weights_exactly(name):
    layers = MODELS[name]
    model = build_model(layers)
    set_weights(model, initial_weights(layers, DIGEST))
    data = dump_model(layers, model)
    assert get_weights(load_model(layers, data)) == initial_weights(layers, DIGEST)
    theirs = load_safetensors(data)
    assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_described_models_come_back(name):
    assert describe(build_model(MODELS[name])) == MODELS[name]


def test_a_file_of_another_model_is_refused():
    data = dump_model(MODELS["logistic"], build_model(MODELS["logistic"]))
    with pytest.raises(ModelError):
        load_model(MODELS["mlp"], data)
    with pytest.raises(WeightsError):
        load_model(MODELS["logistic"], data[:-1])


def test_weights_of_the_wrong_length_are_refused():
    with pytest.raises(LayerError):
        set_weights(build_model(MODELS["logistic"]), [0.0] * 6)


def test_bound_site_is_used_when_none_is_given():
    layers = logistic_regression(2, 1, sites=3)
    weights = [0.0, 0.0, 0.0, 10.0, 20.0, 60.0]
    x = torch.zeros(2, 2, dtype=torch.float64)
    bound = build_model(layers, site=1)
    set_weights(bound, weights)
    assert bound(x).tolist() == [[20.0], [20.0]]
    assert bound(x, torch.tensor([0, 2])).tolist() == [[10.0], [60.0]]
    free = build_model(layers)
    set_weights(free, weights)
    assert free(x).tolist() == [[30.0], [30.0]]


def test_a_site_beyond_the_charter_is_refused():
    with pytest.raises(LayerError, match="index in the charter"):
        build_model(logistic_regression(2, 1, sites=3), site=3)


def test_describe_writes_an_ordinary_sequential():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Identity(),
        nn.Flatten(),
        nn.Linear(64, 10),
        SiteIntercept(3, 10),
    )
    layers = describe(model)
    assert [layer["layer"] for layer in layers] == [
        "reshape", "conv2d", "relu", "max_pool2d", "flatten", "linear", "site_intercept",
    ]  # fmt: skip
    check_layers(layers, width=64, outputs=10, sites=3)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.BatchNorm1d(4), "LayerNorm"),
        (nn.BatchNorm2d(4), "GroupNorm"),
        (nn.Dropout(0.1), "leave it out"),
        (nn.LSTM(4, 4), "fixed window"),
        (nn.MultiheadAttention(4, 2), "not in the closed set"),
        (nn.GELU("tanh"), "GELU()"),
        (nn.Conv2d(1, 1, (3, 5)), "square"),
        (nn.Conv2d(2, 2, 3, groups=2), "groups"),
        (nn.Conv2d(1, 1, 3, bias=False), "leave bias on"),
        (nn.Conv2d(1, 1, 3, padding="same"), "square whole numbers"),
        (nn.MaxPool2d(3, stride=1), "same stride"),
        (nn.AvgPool2d(2, padding=1), "no padding"),
        (nn.LayerNorm(4, eps=1e-3), "eps"),
        (nn.GroupNorm(1, 4, affine=False), "weight and bias"),
        (nn.Flatten(0), "Flatten(1, -1)"),
        (nn.Embedding(5, 2, padding_idx=0), "padding_idx"),
        (nn.Bilinear(2, 2, 2), "closed set"),
    ],
)
def test_describe_names_what_it_cannot_say_and_what_would_do(module, words):
    with pytest.raises(DescribeError) as caught:
        describe(nn.Sequential(nn.Linear(4, 4), module))
    assert f"1 ({type(module).__name__})" in str(caught.value)
    assert words in str(caught.value)


def test_describe_refuses_a_model_that_is_no_sequence():
    with pytest.raises(DescribeError, match=r"nn\.Sequential"):
        describe(nn.Linear(2, 2))


def test_describe_refuses_a_subclass_that_may_do_anything():
    class Sneaky(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(DescribeError, match="Sneaky"):
        describe(nn.Sequential(Sneaky(2, 2)))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([{"layer": "linear", "in": 6}], "lacks 'out'"),
        ([{"layer": "linear", "in": 6, "out": 1, "activation": "relu"}], "no field 'activation'"),
        ([{"layer": "linear", "in": -6, "out": 1}], "whole number"),
        ([{"layer": "linear", "in": 6, "out": 1, "bias": 2}], "write 1 or 0"),
        ([{"in": 6, "out": 1}], "key `layer`"),
        ([{"layer": "lstm"}], "unknown layer"),
    ],
)
def test_malformed_layers_name_the_layer_and_the_fix(layers, words):
    with pytest.raises(LayerError, match=words) as caught:
        normalise_layers(layers)
    assert caught.value.index == 0


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [{"layer": "relu"}],
        [{"layer": "conv2d", "in": 1, "out": 1, "kernel": 3, "stride": 1, "padding": 0}],
        [
            {"layer": "linear", "in": 6, "out": 1, "bias": 1},
            {"layer": "site_intercept", "sites": 5, "out": 1},
        ],
        [{"layer": "reshape", "shape": [1, 2, 2]}],
    ],
)
def test_lists_that_do_not_fit_together_are_refused(layers):
    with pytest.raises(LayerError):
        check_layers(layers, width=6, outputs=1, sites=3)


def test_reshape_keeps_the_batch_axis():
    assert Reshape([1, 2, 3])(torch.zeros(4, 6)).shape == (4, 1, 2, 3)
