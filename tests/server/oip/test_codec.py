"""The protocol's bytes: what is read, and everything that is refused, by name and without a crash."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import BodyTooLargeError, MalformedRequestError
from server.oip.codec import compressed, decompressed, read_ask, write_answer
from server.oip.tensors import InferAsk, Signature, Tensor, TensorError, flat, from_raw, to_raw

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
        (body(tensor(data=[1, 2]), parameters={"binary_data_output": 1}), "binary_data_output"),
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
        (body(tensor(data=[[[1, 2]]])), "level 1 has 1 items"),
        (body(tensor(data=[[1], [2, 3]])), "level 0 has 2 items"),
        (body(tensor(data=[1, "2"])), "no FP64"),
        (body(tensor(data=[1, True])), "no FP64"),
        (body(tensor(data=[1, None])), "send NaN in a binary tensor"),
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


@pytest.mark.parametrize(
    ("shape", "data", "problem"),
    [
        ((2, 3), [[1, 2], [3, 4], [5, 6]], "level 0 has 3 items"),  # the columns, one after the other
        ((2, 3), [[1, 2], [3, 4, 5, 6]], "level 1 has 2/4 items"),
        ((2, 3), [[1, 2, 3, 4], [5, 6]], "level 1 has 2/4 items"),
        ((2, 3), [[1, 2, 3, 4, 5, 6], []], "level 1 has 0/6 items"),
        ((2, 3), [[1], [2], [3], [4], [5], [6]], "level 0 has 6 items"),
        ((6, 1), [[1, 2], [3, 4], [5, 6]], "level 0 has 3 items"),
        ((2, 3), [1, [2, 3, 4, 5, 6]], "level 1 is not all lists"),
        ((2, 3), [[1, 2, 3], 4, 5, 6], "level 0 has 4 items"),
        ((2, 1, 3), [[1, 2, 3], [4, 5, 6]], "level 1 has 3 items"),
        ((2, 3, 1), [[1, 2, 3], [4, 5, 6]], "level 2 is not all lists"),
        ((2, 3), [[[1], [2], [3]], [[4], [5], [6]]], "deeper than its shape"),
        ((1,), [[1]], "deeper than its shape"),
        ((2, 0), [[], [[]]], "level 1 has 0/1 items"),
    ],
)
def test_nested_data_that_contradicts_its_shape_is_refused_by_tensor_and_level(shape, data, problem):
    with pytest.raises(TensorError, match=f"^rows: data.*{problem}|^rows: data is nested {problem}"):
        flat("rows", "FP64", shape, data)


def nested(values, shape):
    if len(shape) == 1:
        return values
    size = len(values) // shape[0]
    return [nested(values[k * size : (k + 1) * size], shape[1:]) for k in range(shape[0])]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_values_in_their_own_shape_are_read_row_by_row(shape):
    values = list(range(math.prod(shape)))
    assert flat("t", "INT64", shape, nested(values, shape)) == flat("t", "INT64", shape, values) == values


def test_no_rows_may_be_nested():
    assert flat("t", "FP64", (0, 3), []) == flat("t", "FP64", (2, 0), [[], []]) == []
    assert flat("t", "FP64", (2, 0, 3), [[], []]) == []


@pytest.mark.parametrize(
    ("accepted", "used"),
    [
        ("gzip", "gzip"), ("deflate", "deflate"), ("deflate, gzip", "gzip"), ("GZIP", "gzip"), ("*", "gzip"),
        ("gzip;q=0", ""), ("gzip; q=0.000", ""), ("gzip;Q=0", ""), ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.2, deflate;q=0.9", "deflate"), ("*;q=0", ""), ("*;q=0, gzip", "gzip"),
        ("gzip;q=0, *", "deflate"), ("identity, gzip;q=0.5", ""), ("identity;q=0.1, gzip;q=0.5", "gzip"),
        ("gzip;q=2", ""), ("gzip;q=", ""), ("gzip;x", ""), ("br", ""), ("identity", ""), (";q=1", ""),
    ],
)  # fmt: skip
def test_answer_is_compressed_only_as_the_caller_weighs_it(accepted, used):
    assert compressed(b"x" * 2_000, accepted)[1] == used


def test_gzip_of_several_members_is_one_body_under_one_limit():
    parts = [gzip.compress(part, mtime=0) for part in (b"one", b"", b"two")]
    assert decompressed(b"".join(parts), "gzip", limit=6) == b"onetwo"
    with pytest.raises(BodyTooLargeError):
        decompressed(b"".join(parts), "gzip", limit=5)
    with pytest.raises(BodyTooLargeError):
        decompressed(gzip.compress(b"\0" * 900) * 3, "gzip", limit=2_000)
    for broken in (b"".join(parts)[:-1], b"".join(parts) + b"\0", zlib.compress(b"x") * 2):
        with pytest.raises(MalformedRequestError):
            decompressed(broken, "gzip", limit=1_000)
    with pytest.raises(MalformedRequestError):
        decompressed(zlib.compress(b"x") * 2, "deflate", limit=1_000)
    assert decompressed(parts[0] * 64, "gzip", limit=1_000) == b"one" * 64
    with pytest.raises(MalformedRequestError, match="more than 64 members"):
        decompressed(parts[1] * 65, "gzip", limit=1_000)


@pytest.mark.parametrize(
    "parameters",
    [
        {"classification": 1},
        {"binary_data": True, "classification": 3},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8},
        {"binary_data": 1},
    ],
)
def test_output_parameters_that_are_not_offered_are_refused(parameters):
    asked = [{"name": "probability", "parameters": parameters}]
    with pytest.raises(TensorError, match=r"^probability: .*binary_data"):
        read_ask(body(tensor(data=[1, 2]), outputs=asked), None)


@pytest.mark.parametrize("field", ["model_name", "model_version"])
def test_name_in_the_body_is_a_text(field):
    with pytest.raises(MalformedRequestError, match="model_name, model_version"):
        read_ask(body(tensor(data=[1, 2]), **{field: 5}), None)
