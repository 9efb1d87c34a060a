from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from audit.weights import WeightsError, decode_update, decode_weights, encode_update, encode_weights
from federation.flat import update_vector

TENSORS = {"0.weight": ((2, 3), [1.0, -2.5, 3.0, 0.0, -0.0, 1e-300]), "0.bias": ((2,), [0.1, 0.2])}


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(data: bytes, text: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_the_safetensors_library_reads_a_model_file():
    read = safetensors.numpy.load(encode_weights(TENSORS))
    assert {name: array.dtype for name, array in read.items()} == dict.fromkeys(TENSORS, np.float64)
    for name, (shape, values) in TENSORS.items():
        assert read[name].shape == shape
        assert read[name].ravel().tolist() == values


def test_the_safetensors_library_reads_an_update_file():
    read = safetensors.numpy.load(encode_update([1, -2, 2**62, -(2**63)]))
    assert read["update"].dtype == np.int64
    assert read["update"].tolist() == [1, -2, 2**62, -(2**63)]


def test_files_round_trip_and_keep_the_order_of_the_parameters():
    data = encode_weights(TENSORS)
    assert (int.from_bytes(data[:8], "little")) % 8 == 0
    assert list(header_of(data)) == ["0.weight", "0.bias"]
    assert decode_weights(data) == {name: (shape, values) for name, (shape, values) in TENSORS.items()}
    assert decode_update(encode_update([5, -6])) == [5, -6]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_both_ways(value):
    with pytest.raises(WeightsError, match="finite"):
        encode_weights({"0.weight": ((1,), [value])})
    good = encode_weights({"0.weight": ((1,), [1.0])})
    with pytest.raises(WeightsError, match="finite"):
        decode_weights(good[:-8] + np.float64(value).tobytes())


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a b": ((1,), [1.0])}, {"w": ((2,), [1.0])}, {"w": ((0,), [])}, {"w": ((-1,), [1.0])}],
)
def test_a_tensor_that_cannot_be_is_refused(tensors):
    with pytest.raises(WeightsError):
        encode_weights(tensors)


def test_an_update_beyond_64_bits_is_refused():
    with pytest.raises(WeightsError):
        encode_update([2**63])
    with pytest.raises(WeightsError):
        encode_update([])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\0" * 8,
        lambda data: data[:-8],
        lambda data: data[:12],
        lambda data: b"",
        lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
        lambda data: with_header(data, json.dumps(header_of(data)).encode() + b"    "),
        lambda data: with_header(data, b"[]      "),
        lambda data: with_header(data, b"\xff" * 8),
        lambda data: data.replace(b'"shape":[2]', b'"shape":[-]'),
        lambda data: data.replace(b"F64", b"F32", 1),
        lambda data: data.replace(b"0.bias", b"0.bios"[::-1]),
        lambda data: with_header(
            data, json.dumps(dict(reversed(header_of(data).items())), separators=(",", ":")).encode()
        ),
        lambda data: with_header(
            data, json.dumps({"__metadata__": {}, **header_of(data)}, separators=(",", ":")).encode()
        ),
        lambda data: with_header(data, b"[" * 100_000),
    ],
)
def test_only_the_one_form_of_a_file_is_read(change):
    changed = change(encode_weights(TENSORS))
    try:
        read = decode_weights(changed)
    except WeightsError:
        return
    assert encode_weights(read) == changed, "another file was read as if it were canonical"
    assert list(read) != list(TENSORS)


def test_a_model_file_is_no_update_and_an_update_no_model_file():
    with pytest.raises(WeightsError):
        decode_update(encode_weights(TENSORS))
    with pytest.raises(WeightsError):
        decode_weights(encode_update([1, 2]))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=12), st.data())
def test_an_update_read_as_a_vector_is_the_update(values: list[int], data: st.DataObject) -> None:
    """And what is refused when it is read number by number is refused."""
    whole = encode_update(values)
    assert update_vector(whole).tolist() == values
    place = data.draw(st.integers(0, len(whole)))
    damaged = whole[:place] + data.draw(st.binary(max_size=9)) + whole[place + data.draw(st.integers(0, 9)) :]
    try:
        expected = decode_update(damaged)
    except WeightsError:
        with pytest.raises(WeightsError):
            update_vector(damaged)
    else:
        assert update_vector(damaged).tolist() == expected
