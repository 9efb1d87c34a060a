"""The ONNX export follows from layers and weights and equals the definition; nothing else passes as one."""

from __future__ import annotations

import pickle

import numpy as np
import onnx
import pytest
from onnx import helper

from audit.models import dimension, initial_weights
from federation.errors import ExportError, LayerNotExportedError
from federation.onnx_export import check_export, export_onnx, measure_parity

BINARY = {"name": "y", "classes": ["a", "b"]}
NUMBER = {"name": "y", "lower": "-10", "upper": "10"}
LINEAR = {"layer": "linear", "in": 4, "out": 1, "bias": 1}
# name -> (layers, inputs, task, label): every layer that there is, but gelu
MODELS = {
    "linear": ([LINEAR], 4, "binary", BINARY),
    "without bias": ([{**LINEAR, "bias": 0}], 4, "binary", BINARY),
    "mlp": (
        [{"layer": "linear", "in": 4, "out": 8, "bias": 1}, {"layer": "tanh"},
         {"layer": "layer_norm", "size": 8}, {"layer": "linear", "in": 8, "out": 3, "bias": 1},
         {"layer": "sigmoid"}, {"layer": "linear", "in": 3, "out": 3, "bias": 1}],
        4, "multiclass", {"name": "y", "classes": ["a", "b", "c"]},
    ),
    "sites": ([LINEAR, {"layer": "site_intercept", "sites": 3, "out": 1}], 4, "regression", NUMBER),
    "convolutions": (
        [{"layer": "reshape", "shape": [1, 6, 6]},
         {"layer": "conv2d", "in": 1, "out": 4, "kernel": 3, "stride": 2, "padding": 1}, {"layer": "relu"},
         {"layer": "group_norm", "groups": 2, "channels": 4}, {"layer": "max_pool2d", "kernel": 2},
         {"layer": "flatten"}, {"layer": "linear", "in": 4, "out": 1, "bias": 1}],
        36, "regression", NUMBER,
    ),
    "average": (
        [{"layer": "reshape", "shape": [2, 4, 4]}, {"layer": "avg_pool2d", "kernel": 2},
         {"layer": "flatten"}, {"layer": "linear", "in": 8, "out": 1, "bias": 1}],
        32, "binary", BINARY,
    ),
    "embedding": (
        [{"layer": "embedding", "count": 5, "size": 3}, {"layer": "linear", "in": 3, "out": 2, "bias": 1},
         {"layer": "flatten"}, {"layer": "linear", "in": 8, "out": 1, "bias": 1}],
        4, "binary", BINARY,
    ),
}  # fmt: skip


def weights_for(layers):
    made = initial_weights(layers, "ab" * 32)
    return [value or 0.1 * (k % 7 - 3) for k, value in enumerate(made)]


@pytest.mark.parametrize("name", MODELS)
def test_export_answers_as_the_definition_and_as_torch(name):
    layers, inputs, task, label = MODELS[name]
    weights = weights_for(layers)
    parity = measure_parity(
        export_onnx(layers, weights, inputs), layers, weights, inputs, task=task, label=label
    )
    assert parity.difference < 1e-12
    assert parity.rows == 16
    assert "onnxruntime" in parity.runtime
    assert "torch" in parity.runtime


@pytest.mark.parametrize("name", MODELS)
def test_export_is_one_file_and_passes_its_check(name):
    layers, inputs, _, _ = MODELS[name]
    weights = weights_for(layers)
    data = export_onnx(layers, weights, inputs)
    assert data == export_onnx(layers, weights, inputs)
    check_export(data, layers, weights, inputs)
    onnx.checker.check_model(onnx.ModelProto.FromString(data))


def test_layer_without_a_float64_form_is_left_to_torch():
    with pytest.raises(LayerNotExportedError):
        export_onnx([LINEAR, {"layer": "gelu"}], weights_for([LINEAR]), 4)


def test_export_of_slightly_other_weights_fails_parity():
    weights = weights_for([LINEAR])
    data = export_onnx([LINEAR], [weights[0] + 1e-4, *weights[1:]], 4)
    with pytest.raises(ExportError, match="differ"):
        measure_parity(data, [LINEAR], weights, 4, task="binary", label=BINARY)


def test_weights_of_another_size_are_refused():
    for count in (0, dimension([LINEAR]) - 1, dimension([LINEAR]) + 1):
        with pytest.raises(ExportError):
            export_onnx([LINEAR], [0.5] * count, 4)


class Run:
    def __reduce__(self):
        return (print, ("ran",))


def hostile():
    weights = weights_for([LINEAR])
    good = onnx.ModelProto.FromString(export_onnx([LINEAR], weights, 4))
    yield "pickle", pickle.dumps(Run())
    yield "nothing", b""
    yield "rubbish", b"\xff" * 500
    yield "cut short", good.SerializeToString()[:-9]
    yield "huge", good.SerializeToString() + b"\x00" * (2 << 20)
    outside = onnx.ModelProto()
    outside.CopyFrom(good)
    tensor = outside.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    yield "external data", outside.SerializeToString()
    custom = onnx.ModelProto()
    custom.CopyFrom(good)
    custom.graph.node[0].domain = "evil.ops"
    yield "custom operator", custom.SerializeToString()
    loop = onnx.ModelProto()
    loop.CopyFrom(good)
    loop.graph.node.append(helper.make_node("Loop", ["", ""], ["z"]))
    yield "loop", loop.SerializeToString()
    weight = onnx.ModelProto()
    weight.CopyFrom(good)
    other = np.frombuffer(weight.graph.initializer[0].raw_data).copy()
    other[0] = np.nextafter(other[0], 9)
    weight.graph.initializer[0].raw_data = other.tobytes()
    yield "one bit of one weight", weight.SerializeToString()


@pytest.mark.parametrize(
    ("what", "data"), list(hostile()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_any_other_file_is_refused(what, data, capsys):
    with pytest.raises(ExportError):
        check_export(data, [LINEAR], weights_for([LINEAR]), 4)
    assert "ran" not in capsys.readouterr().out
