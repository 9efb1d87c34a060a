"""A version as an ONNX model in float64, made from the charter's layers and the version's weights alone.

The export is a pure function: anybody who holds both makes the same graph, so a file that claims to be one is
checked by making it again (`check_export`), never by trusting what it says. float64 keeps every answer within
the verifier's tolerance of `audit.forward`, which float32 would not (docs/adr/0030).

Inputs: `rows`, float64 (n, inputs), and, where the model has intercepts per site, `site`, float64 (1, sites):
one-hot for a site, all 1/sites for their mean. Output: `outputs`, float64 (n, outputs).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from audit.forward import forward
from audit.layers import NORM_EPS, Layer, Shape, check_layers, next_shape, parameters_of, work
from audit.models import probabilities, value_of
from federation.errors import ExportError, LayerNotExportedError

OPSET: Final = 17
IR_VERSION: Final = 9
TOLERANCE: Final = 0.0000005  # half of the last decimal place of an answer
_ROWS: Final = 16
_MOMENT: Final = 2_000_000  # multiplications
_SLACK_BYTES: Final = 1 << 20  # what an export may hold beside its weights

Array = NDArray[np.float64]
Run = Callable[[Array, Array | None], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far the export's answers lie from the definition's, at most, over `rows` rows."""

    difference: float  # of a probability, or of a value as a share of the label's range
    rows: int
    runtime: str  # what ran the export, such as "onnxruntime 1.32.0"


def export_onnx(layers: Sequence[Layer], weights: Sequence[float], inputs: int) -> bytes:
    """Return the model of `layers` and `weights` for rows of `inputs` numbers.

    Raises:
        LayerNotExportedError: a layer has no float64 form in ONNX Runtime (gelu).
        ExportError: the weights are another model's.
        ModelError: the layers are no model of so many inputs.
    """
    check_layers(layers)
    graph = _Graph(inputs)
    offset = 0
    for layer in layers:
        parameters: list[Array] = []
        for _, shape in parameters_of(layer):
            end = offset + math.prod(shape)
            values = np.asarray(weights[offset:end], dtype=np.float64)
            if values.size != end - offset:
                raise ExportError(f"{len(weights)} weights are too few for the model")
            parameters.append(values.reshape(shape))
            offset = end
        graph.add(layer, parameters)
    if offset != len(weights):
        raise ExportError(f"{len(weights)} weights, but the model has {offset} parameters")
    return graph.finish()


def check_export(data: bytes, layers: Sequence[Layer], weights: Sequence[float], inputs: int) -> None:
    """Prove that `data` is the export of these layers and weights, whoever wrote it.

    Raises:
        ExportError: it is too large, no ONNX, or any other graph than `export_onnx` makes.
    """
    limit = 8 * len(weights) + _SLACK_BYTES
    if len(data) > limit:
        raise ExportError(f"the ONNX file has {len(data)} bytes; an export of this version has under {limit}")
    expected = export_onnx(layers, weights, inputs)
    if data == expected:
        return
    try:
        found = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ExportError("the file is not ONNX") from error
    if found != onnx.ModelProto.FromString(expected):
        raise ExportError("the ONNX graph is not the export of the charter's layers and these weights")


def measure_parity(
    data: bytes,
    layers: Sequence[Layer],
    weights: Sequence[float],
    inputs: int,
    *,
    task: str,
    label: dict[str, Any],
) -> Parity:
    """Run the export beside the definition (`audit.forward`), and beside torch where that is installed.

    Sixteen rows, fewer where one example of the model costs more than a moment in plain Python.

    Raises:
        ExportError: an answer differs by more than `TOLERANCE`; nothing may serve this file.
    """
    run, runtime = _runtime(data)
    probe = _probe(layers, inputs, max(1, min(_ROWS, _MOMENT // work(layers, (inputs,)))))
    sites = next((layer["sites"] for layer in layers if layer["layer"] == "site_intercept"), 0)
    worst = 0.0
    for site in (None, *range(min(sites, 2))):
        given = None if not sites else site_input(site, sites)
        outputs = run(probe, given)
        beside = [[forward(layers, weights, row.tolist(), site) for row in probe]]
        if importlib.util.find_spec("torch") is not None:
            beside.append(_torch(layers, weights, probe, site))
            runtime += "" if "torch" in runtime else ", beside torch"
        for others in beside:
            for ours, theirs in zip(outputs.tolist(), others, strict=True):
                worst = max(worst, _difference(task, label, ours, theirs))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the ONNX export's answers differ by {worst:.3g}; at most {TOLERANCE:g} is allowed"
        )
    return Parity(difference=worst, rows=len(probe), runtime=runtime)


def site_input(site: int | None, sites: int) -> Array:
    """Return the `site` input: one-hot, or the mean where no site is named."""
    if site is None:
        return np.full((1, sites), 1.0 / sites)
    chosen = np.zeros((1, sites))
    chosen[0, site] = 1.0
    return chosen


def _difference(task: str, label: dict[str, Any], ours: list[float], theirs: list[float]) -> float:
    if not all(map(math.isfinite, theirs)) or not all(map(math.isfinite, ours)):
        return 0.0 if ours == theirs else math.inf
    if task == "regression":
        top = value_of(label, [1.0]) - value_of(label, [-1.0])
        return abs(value_of(label, ours) - value_of(label, theirs)) / abs(top)
    pairs = zip(probabilities(task, ours), probabilities(task, theirs), strict=True)
    return max(abs(a - b) for a, b in pairs)


def _runtime(data: bytes) -> tuple[Run, str]:
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session: Any = onnxruntime.InferenceSession(
            data, sess_options=options, providers=["CPUExecutionProvider"]
        )
        name = f"onnxruntime {onnxruntime.__version__}"
    else:
        from onnx.reference import ReferenceEvaluator

        session, name = ReferenceEvaluator(onnx.ModelProto.FromString(data)), f"onnx {onnx.__version__}"

    def run(rows: Array, site: Array | None) -> Array:
        feed = {"rows": rows} if site is None else {"rows": rows, "site": site}
        return np.asarray(session.run(None, feed)[0], dtype=np.float64)

    return run, name


def _torch(
    layers: Sequence[Layer], weights: Sequence[float], rows: Array, site: int | None
) -> list[list[float]]:
    import torch

    from federation.torch_models import build_model, set_weights

    model = build_model([dict(layer) for layer in layers], precision="float64")
    set_weights(model, weights)
    model.eval()
    with torch.inference_mode():
        outputs: list[list[float]] = model(torch.from_numpy(rows), site).tolist()
    return outputs


def _probe(layers: Sequence[Layer], inputs: int, rows: int) -> Array:
    """Rows in [-1, 1] (codes where the model embeds), the same for everybody."""
    stream = b"".join(
        hashlib.sha256(b"affidavit/parity/v1\x00" + count.to_bytes(8, "big")).digest()
        for count in range(rows * inputs // 4 + 1)
    )
    whole = np.frombuffer(stream, dtype=">u8")[: rows * inputs].reshape(rows, inputs)
    embedding = next((layer for layer in layers if layer["layer"] == "embedding"), None)
    if embedding is not None:
        codes: Array = (whole % embedding["count"]).astype(np.float64)
        return codes
    values: Array = (whole >> 11).astype(np.float64) * 2.0**-52 - 1.0
    return values


class _Graph:
    """Nodes and initializers under construction; names follow from the order alone."""

    def __init__(self, inputs: int) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._values: list[onnx.TensorProto] = []
        self._now = "rows"
        self._shape: Shape = (inputs,)
        self._inputs = [helper.make_tensor_value_info("rows", TensorProto.DOUBLE, ["n", inputs])]

    def add(self, layer: Layer, parameters: list[Array]) -> None:
        kind, before = layer["layer"], self._shape
        after = next_shape(layer, before)
        match kind:
            case "linear":
                self._linear(layer, parameters)
            case "relu" | "tanh" | "sigmoid":
                self._op({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind])
            case "flatten" | "reshape":
                self._reshape(after)
            case "conv2d":
                self._windows(before, after, layer["kernel"], layer["stride"], layer["padding"], layer["in"])
                self._op("MatMul", self._value(parameters[0].reshape(layer["out"], -1).T))
                self._op("Add", self._value(parameters[1]))
                self._op("Transpose", perm=[0, 2, 1])
                self._reshape(after)
            case "max_pool2d" | "avg_pool2d":
                self._pool(before, after, layer["kernel"], largest=kind == "max_pool2d")
            case "layer_norm":
                self._normalise()
                self._op("Mul", self._value(parameters[0]))
                self._op("Add", self._value(parameters[1]))
            case "group_norm":
                self._reshape((layer["groups"], math.prod(before) // layer["groups"]))
                self._normalise()
                self._reshape(before)
                per_channel = (layer["channels"], *(1 for _ in before[1:]))
                self._op("Mul", self._value(parameters[0].reshape(per_channel)))
                self._op("Add", self._value(parameters[1].reshape(per_channel)))
            case "embedding":
                if any(node.op_type != "Reshape" for node in self._nodes):
                    raise LayerNotExportedError("an embedding of what the model computed is left to torch")
                self._op("Cast", to=TensorProto.INT64)
                self._emit("Gather", [self._value(parameters[0]), self._now], axis=0)
            case "site_intercept":
                self._site_intercept(layer, parameters[0])
            case _:
                raise LayerNotExportedError(f"ONNX Runtime has no float64 {kind}; torch serves such a model")
        self._shape = after

    def finish(self) -> bytes:
        self._emit("Identity", [self._now], output="outputs")
        outputs = [helper.make_tensor_value_info("outputs", TensorProto.DOUBLE, ["n", *self._shape])]
        graph = helper.make_graph(self._nodes, "affidavit", self._inputs, outputs, self._values)
        model = helper.make_model(
            graph,
            producer_name="affidavit",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _value(self, array: Array | NDArray[np.int64]) -> str:
        name = f"v{len(self._values)}"
        self._values.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _emit(self, kind: str, inputs: list[str], *, output: str = "", **attributes: Any) -> str:
        name = output or f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        self._now = name
        return name

    def _op(self, kind: str, *others: str, **attributes: Any) -> str:
        return self._emit(kind, [self._now, *others], **attributes)

    def _reshape(self, shape: Shape) -> None:
        self._op("Reshape", self._value(np.asarray([-1, *shape], dtype=np.int64)))

    def _linear(self, layer: Layer, parameters: list[Array]) -> None:
        if len(self._shape) == 1:
            others = [self._value(parameter) for parameter in parameters]
            self._op("Gemm", *others, transB=1)
            return
        self._op("MatMul", self._value(parameters[0].T))
        if layer["bias"]:
            self._op("Add", self._value(parameters[1]))

    def _normalise(self) -> None:
        given = self._now
        mean = self._emit("ReduceMean", [given], axes=[-1], keepdims=1)
        centred = self._emit("Sub", [given, mean])
        self._emit("Mul", [centred, centred])
        self._op("ReduceMean", axes=[-1], keepdims=1)
        self._op("Add", self._value(np.asarray(NORM_EPS)))
        scale = self._op("Sqrt")
        self._emit("Div", [centred, scale])

    def _windows(
        self, before: Shape, after: Shape, kernel: int, stride: int, padding: int, channels: int
    ) -> None:
        """Gather each output place's window: (n, places, channels * kernel**2); outside the image lies 0."""
        _, height, width = before
        outside = math.prod(before)
        places = [
            [
                (channel * height + i) * width + j if 0 <= i < height and 0 <= j < width else outside
                for channel in range(channels)
                for i in range(row * stride - padding, row * stride - padding + kernel)
                for j in range(column * stride - padding, column * stride - padding + kernel)
            ]
            for row in range(after[1])
            for column in range(after[2])
        ]
        self._reshape((outside,))
        self._op("Pad", self._value(np.asarray([0, 0, 0, 1], dtype=np.int64)))
        self._op("Gather", self._value(np.asarray(places, dtype=np.int64)), axis=1)

    def _pool(self, before: Shape, after: Shape, kernel: int, *, largest: bool) -> None:
        _, height, width = before
        windows = [
            [
                (channel * height + row * kernel + i) * width + column * kernel + j
                for i in range(kernel)
                for j in range(kernel)
            ]
            for channel in range(after[0])
            for row in range(after[1])
            for column in range(after[2])
        ]
        self._reshape((math.prod(before),))
        self._op("Gather", self._value(np.asarray(windows, dtype=np.int64)), axis=1)
        self._op("ReduceMax" if largest else "ReduceMean", axes=[-1], keepdims=0)
        self._reshape(after)

    def _site_intercept(self, layer: Layer, table: Array) -> None:
        if len(self._inputs) == 1:
            site = helper.make_tensor_value_info("site", TensorProto.DOUBLE, [1, layer["sites"]])
            self._inputs.append(site)
        given = self._now
        added = self._emit("MatMul", ["site", self._value(table)])
        self._emit("Add", [given, added])
