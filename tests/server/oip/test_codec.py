"""The protocol's bytes: what is read, and everything that is refused, by name and without a crash."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import BodyTooLargeError, MalformedRequestError
from server.oip.codec import compressed, decompressed, read_ask, write_answer
from server.oip.tensors import InferAsk, Signature, Tensor, TensorError, from_raw, to_raw

NUMBERS = Signature((("a", "number"), ("b", "integer")), "binary", ("no", "yes"))
MIXED = Signature(
    (("age", "integer"), ("fever", "boolean"), ("ward", "category")), "multiclass", ("x", "y", "z")
)


def body(*inputs, **rest):
    return json.dumps({"inputs": list(inputs), **rest}).encode()


def tensor(name="rows", datatype="FP64", shape=(1, 2), **rest):
    return {"name": name, "datatype": datatype, "shape": list(shape), **rest}


def rows(data, signature=NUMBERS, header=None):
    return signature.rows(read_ask(data, header).inputs, max_rows=8)


def test_matrix_and_columns_and_nested_data_are_the_same_rows():
    wanted = [{"a": 1.5, "b": 2}, {"a": -3.0, "b": 4}]
    matrix = [1.5, 2, -3.0, 4]
    assert rows(body(tensor(shape=(2, 2), data=matrix))) == wanted
    assert rows(body(tensor(shape=(2, 2), data=[matrix[:2], matrix[2:]]))) == wanted
    columns = (tensor("a", shape=(2,), data=[1.5, -3.0]), tensor("b", "INT64", (2, 1), data=[2, 4]))
    assert rows(body(*columns)) == wanted


def test_mixed_features_come_one_tensor_each_and_may_be_left_out():
    found = rows(
        body(
            tensor("ward", "BYTES", (2,), data=["n", ""]), tensor("fever", "BOOL", (2,), data=[True, False])
        ),
        MIXED,
    )
    assert found == [{"ward": "n", "fever": True}, {"ward": None, "fever": False}]


def test_raw_tensors_follow_the_json():
    raw = struct.pack("<2f", 0.5, -2.0)
    head = body(tensor(datatype="FP32", parameters={"binary_data_size": 8}))
    assert rows(head + raw, header=str(len(head))) == [{"a": 0.5, "b": -2.0}]


def test_nan_is_a_missing_value():
    raw = struct.pack("<2d", float("nan"), 1.0)
    head = body(tensor(parameters={"binary_data_size": 16}))
    assert rows(head + raw, header=str(len(head))) == [{"a": None, "b": 1.0}]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (b"", "strict JSON"),
        (b"[]", "give an object"),
        (b"{}", "give an object"),
        (b'{"inputs":[],"inputs":[]}', "strict JSON"),
        (body(), "is empty"),
        (b'{"inputs":{}}', "not a list"),
        (body(3), "give an object with name"),
        (body(tensor(name=None, data=[1, 2])), "give an object with name"),
        (body({**tensor(data=[1, 2]), "extra": 1}), "give an object with name"),
        (body(tensor(data=[1, 2]), id=7), "id:"),
        (body(tensor(data=[1, 2]), parameters=[]), "parameters"),
        (body(tensor(data=[1, 2]), parameters={"a": [1]}), "parameters"),
        (body(tensor(data=[1, 2]), outputs={}), "outputs"),
        (body(tensor(data=[1, 2]), outputs=[{"name": "x", "parameters": {"binary_data": 1}}]), "binary_data"),
        (body(tensor(datatype="FP8", data=[1, 2])), "datatype"),
        (body(tensor(datatype=5, data=[1, 2])), "datatype"),
        (body(tensor(shape=(), data=[1])), "shape"),
        (body(tensor(shape=(-1, 2), data=[1, 2])), "shape"),
        (body(tensor(shape=(True, 2), data=[1, 2])), "shape"),
        (body(tensor(shape=(2**30, 2**30), data=[1, 2])), "shape"),
        (body(tensor(shape=(1.0, 2), data=[1, 2])), "shape"),
        (body(tensor(shape=(1, 3), data=[1, 2, 3])), r"give \[n, 2\]"),
        (body(tensor(shape=(2,), data=[1, 2])), r"give \[n, 2\]"),
        (body(tensor(shape=(0, 2), data=[])), "hold no row"),
        (body(tensor(shape=(9, 2), data=[0] * 18)), "at most 8"),
        (body(tensor()), "neither data"),
        (body(tensor(data=[1])), "1 values"),
        (body(tensor(data="12")), "give a list"),
        (body(tensor(data=[[[1, 2]]])), "deeper"),
        (body(tensor(data=[[1], [2, 3]])), "more values"),
        (body(tensor(data=[1, "2"])), "no FP64"),
        (body(tensor(data=[1, True])), "no FP64"),
        (body(tensor(data=[1, None])), "no FP64"),
        (body(tensor(datatype="INT64", data=[1, 2.0])), "no INT64"),
        (body(tensor(datatype="BYTES", data=["1", "2"])), "holds BYTES"),
        (body(tensor(data=[1, 2]), tensor(data=[1, 2])), "is no input"),
        (body(tensor("c", shape=(1,), data=[1])), "is no input"),
        (body(tensor("a", shape=(1,), data=[1]), tensor("a", shape=(1,), data=[1])), "given twice"),
        (body(tensor("a", shape=(1,), data=[1]), tensor("b", shape=(2,), data=[1, 2])), "2 rows"),
        (body(tensor("a", shape=(1, 1, 1), data=[1])), "give \\[n\\]"),
        (body(tensor(parameters={"binary_data_size": 16})), "beyond the body"),
        (body(tensor(parameters={"binary_data_size": -1})), "beyond the body"),
        (body(tensor(parameters={"binary_data_size": 0}, data=[1, 2])), "give one of them"),
    ],
)
def test_malformed_request_is_refused_by_name(given, problem):
    with pytest.raises(MalformedRequestError, match=problem):
        rows(given)


@pytest.mark.parametrize("header", ["-1", "1e3", "", " 5", "٣", "999999", "9" * 400])
def test_header_length_that_is_none_is_refused(header):
    with pytest.raises(MalformedRequestError):
        read_ask(body(tensor(data=[1, 2])), header)


def test_raw_bytes_of_nobody_are_refused():
    head = body(tensor(data=[1, 2]))
    with pytest.raises(MalformedRequestError, match="belong to no input"):
        read_ask(head + b"\0", str(len(head)))


@pytest.mark.parametrize(
    "data", [b"\x01", b"\x05\0\0\0abc", b"\xff\xff\xff\xff", b"\x01\0\0\0\xff", b"\0\0\0\0\0\0\0\0", b""]
)
def test_raw_text_that_does_not_add_up_is_refused(data):
    with pytest.raises(TensorError):
        from_raw("ward", "BYTES", (1,), data)


def test_raw_bool_is_zero_or_one():
    assert from_raw("f", "BOOL", (2,), b"\0\1") == [False, True]
    with pytest.raises(TensorError):
        from_raw("f", "BOOL", (1,), b"\2")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["INT8", "UINT16", "INT32", "UINT64", "FP64", "BYTES", "BOOL"]), st.data())
def test_raw_form_is_read_back(datatype, data):
    one = {"FP64": st.floats(allow_nan=False), "BYTES": st.text(max_size=9), "BOOL": st.booleans()}
    values = data.draw(st.lists(one.get(datatype, st.integers(0, 127)), max_size=5))
    given_tensor = Tensor(name="t", datatype=datatype, shape=(len(values),), values=values)
    assert list(from_raw("t", datatype, (len(values),), to_raw(given_tensor))) == values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=4)))
def test_no_bytes_crash_the_reader(data, header):
    with contextlib.suppress(MalformedRequestError):
        rows(data, header=header)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_compressed_bodies_are_read_and_written(name):
    data = body(tensor(data=[1, 2])) * 50
    packed, used = compressed(data, f"br, {name};q=0.5")
    assert used == name
    assert len(packed) < len(data)
    assert decompressed(packed, name.upper(), limit=len(data)) == data


def test_small_answer_stays_plain():
    assert compressed(b"{}", "gzip") == (b"{}", "")


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"not gzip", "gzip"), (gzip.compress(b"x" * 99, mtime=0)[:-4], "gzip"),
        (gzip.compress(b"x", mtime=0) + b"!", "gzip"),
        (zlib.compress(b"x"), "gzip"), (b"x", "br"), (gzip.compress(b"x", mtime=0), "gzip, gzip"),
    ],
)  # fmt: skip
def test_body_in_another_encoding_than_it_says_is_refused(data, encoding):
    with pytest.raises(MalformedRequestError):
        decompressed(data, encoding, limit=1000)


def test_bomb_is_refused_at_the_limit():
    with pytest.raises(BodyTooLargeError):
        decompressed(gzip.compress(b"\0" * 50_000_000), "gzip", limit=1000)


def test_outputs_are_raw_where_the_request_asks_so():
    outputs = (
        Tensor(name="label", datatype="BYTES", shape=(1,), values=["yes"]),
        Tensor(name="probability", datatype="FP64", shape=(1,), values=[0.25]),
    )
    ask = InferAsk(outputs={"label": None, "probability": True})
    data, length = write_answer({"model_name": "m"}, outputs, ask)
    assert length is not None
    assert data[length:] == struct.pack("<d", 0.25)
    head = json.loads(data[:length])
    assert head["outputs"][0]["data"] == ["yes"]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 8}
    data, length = write_answer({}, outputs, InferAsk(binary=True))
    assert data[length:] == b"\3\0\0\0yes" + struct.pack("<d", 0.25)
