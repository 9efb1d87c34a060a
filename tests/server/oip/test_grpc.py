"""What comes over gRPC: read as strictly as over REST; the messages are the protocol's own."""

from __future__ import annotations

import struct

import pytest

from server.errors import MalformedRequestError
from server.oip.grpc_service import read_ask
from server.oip.messages import RPCS, message


def request(**fields):
    return message("ModelInferRequest")(model_name="toy", **fields)


def tensor(name="a", datatype="FP64", shape=(1,), **contents):
    made = {"name": name, "datatype": datatype, "shape": shape}
    return {**made, "contents": contents} if contents else made


def test_contents_and_raw_contents_are_the_same_tensor():
    typed = read_ask(request(inputs=[tensor(fp64_contents=[0.5])], id="7"))
    raw = read_ask(request(inputs=[tensor()], raw_input_contents=[struct.pack("<d", 0.5)]))
    assert list(typed.inputs[0].values) == list(raw.inputs[0].values) == [0.5]
    assert (typed.id, typed.binary, raw.binary) == ("7", False, True)


def test_parameters_keep_their_kinds():
    made = request()
    made.parameters["purpose"].string_param = "triage"
    made.parameters["explain"].bool_param = True
    made.parameters["empty"].SetInParent()
    assert read_ask(made).parameters == {"purpose": "triage", "explain": True, "empty": None}


@pytest.mark.parametrize(
    "fields",
    [
        {"inputs": [tensor()], "raw_input_contents": [b"1234567"]},
        {"inputs": [tensor()], "raw_input_contents": [b"", b""]},
        {"inputs": [tensor(fp64_contents=[1])], "raw_input_contents": [struct.pack("<d", 1)]},
        {"inputs": [tensor(fp64_contents=[1, 2])]},
        {"inputs": [tensor(fp32_contents=[1])]},
        {"inputs": [tensor(shape=(-1,), fp64_contents=[1])]},
        {"inputs": [tensor(shape=(2**30, 2**30), fp64_contents=[1])]},
        {"inputs": [tensor(datatype="FP16", fp64_contents=[1])]},
        {"inputs": [tensor(datatype="", fp64_contents=[1])]},
        {"inputs": [tensor(datatype="BYTES", bytes_contents=[b"\xff"])]},
        {"inputs": [tensor(datatype="BYTES")], "raw_input_contents": [b"\xff\xff\xff\xff"]},
        {"inputs": [tensor(f"t{k}") for k in range(4_201)]},
    ],
)
def test_tensors_that_do_not_add_up_are_refused(fields):
    with pytest.raises(MalformedRequestError):
        read_ask(request(**fields))


def test_output_parameters_that_are_not_offered_are_refused():
    made = request(inputs=[tensor(fp64_contents=[1])])
    asked = made.outputs.add(name="label")
    asked.parameters["binary_data"].bool_param = True
    assert read_ask(made).outputs == {"label": True}
    asked.parameters["classification"].int64_param = 1
    with pytest.raises(MalformedRequestError, match="classification"):
        read_ask(made)


def test_every_call_of_the_protocol_has_its_messages():
    for rpc in RPCS:
        for kind in ("Request", "Response"):
            made = message(f"{rpc}{kind}")
            assert made.FromString(made().SerializeToString()) == made()
    number = {field.name: field.number for field in message("InferTensorContents").DESCRIPTOR.fields}
    assert (number["bool_contents"], number["fp64_contents"], number["bytes_contents"]) == (1, 7, 8)
