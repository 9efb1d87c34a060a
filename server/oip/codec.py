"""Requests and answers of the protocol as bytes: JSON, the binary extension, gzip and deflate.

With the header `Inference-Header-Content-Length` the body is that many bytes of JSON and then the raw
tensors in order, each as long as its `binary_data_size`. Outputs come raw when the request asks for them so
(`binary_data` of an output, `binary_data_output` of the request). A compressed body is opened under the same
size limit as a plain one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from audit.errors import AuditError
from server.errors import BodyTooLargeError, MalformedRequestError
from server.fast_json import parse_request, write_json
from server.oip.tensors import DATATYPES, MAX_TENSORS, InferAsk, Tensor, TensorError, flat, from_raw, to_raw

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_WINDOW: Final = {"gzip": 31, "deflate": 15}
COMPRESS_FROM_BYTES: Final = 1_024
_MEMBERS: Final = 64  # of one gzip body: each costs a copy of what follows it
_QVALUE: Final = re.compile(r"q\s*=\s*(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.ASCII | re.IGNORECASE)
_TENSOR: Final = frozenset({"name", "shape", "datatype", "parameters", "data"})
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_OUTPUT: Final = frozenset({"name", "parameters"})
_REQUEST: Final = frozenset({"id", "parameters", "inputs", "outputs", "model_name", "model_version"})


def decompressed(body: bytes, encoding: str, *, limit: int) -> bytes:
    """Open a compressed body.

    Raises:
        BodyTooLargeError: it would be larger than `limit`; no more than that is unpacked.
        MalformedRequestError: it is not in that encoding, or the encoding is unknown.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOW:
        raise MalformedRequestError(f"Content-Encoding {name[:20]!r} is not read; use gzip, deflate or none")
    data, rest = b"", body
    for _ in range(_MEMBERS if name == "gzip" else 1):  # gzip's files may follow one another: RFC 1952, 2.2
        opener = zlib.decompressobj(_WINDOW[name])
        try:
            data += opener.decompress(rest, limit + 1 - len(data))
        except zlib.error as error:
            raise MalformedRequestError(f"the body is not {name}") from error
        if len(data) > limit:
            raise BodyTooLargeError(f"a body may hold {limit} bytes; send fewer rows a request")
        if not opener.eof:
            break
        rest = opener.unused_data
        if not rest:
            return data
    raise MalformedRequestError(f"the body is not whole {name}, or of more than {_MEMBERS} members")


def compressed(body: bytes, accepted: str) -> tuple[bytes, str]:
    """Return the body in an encoding that the caller accepts, and its name; a small body stays plain."""
    if len(body) < COMPRESS_FROM_BYTES:
        return body, ""
    name = _coding(accepted)
    if not name:
        return body, ""
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW[name])
    return packer.compress(body) + packer.flush(), name


def _coding(accepted: str) -> str:
    """The encoding that an `Accept-Encoding` likes best, RFC 9110 section 12.5.3; "": none of ours."""
    likes: dict[str, float] = {}
    for part in accepted.split(","):
        coding, _, weight = part.partition(";")
        found = _QVALUE.fullmatch(weight.strip()) if weight else None
        likes.setdefault(coding.strip().lower(), float(found[1]) if found else 0.0 if weight else 1.0)
    others = likes.get("*", 0.0)
    best = max(("gzip", "deflate"), key=lambda name: likes.get(name, others))
    like = likes.get(best, others)
    return best if like and like >= likes.get("identity", 0.0) else ""


def read_ask(body: bytes, header_length: str | None) -> InferAsk:
    """Read an inference request.

    Raises:
        MalformedRequestError: it is no such request; names the field and the fix.
    """
    raw = b""
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:12]) > len(body):
            raise MalformedRequestError(f"{HEADER_LENGTH}: is not a length within the body")
        length = int(header_length[:12])
        body, raw = body[:length], body[length:]
    try:
        document = parse_request(body)
    except AuditError as error:
        raise MalformedRequestError(f"the body is not strict JSON: {error}") from error
    if not isinstance(document, dict) or not document.keys() <= _REQUEST or "inputs" not in document:
        raise MalformedRequestError("give an object with inputs, and perhaps id, parameters, outputs")
    identity = document.get("id") or ""  # KServe's client repeats the path's names, and sends null for none
    if not isinstance(identity, str) or len(identity) > 256:
        raise MalformedRequestError("id: is not a text of at most 256 characters")
    model, version = document.get("model_name") or "", document.get("model_version") or ""
    if not isinstance(model, str) or not isinstance(version, str):
        raise MalformedRequestError("model_name, model_version: are not texts; the path names both")
    parameters = _parameters("parameters", document.get("parameters"))
    binary = parameters.get("binary_data_output", False)
    if type(binary) is not bool:
        raise MalformedRequestError("parameters.binary_data_output: is true or false")
    return InferAsk(
        id=identity,
        parameters=parameters,
        inputs=_inputs(document["inputs"], raw),
        outputs=_outputs(document.get("outputs")),
        binary=binary,
        model=model,
        version=version,
    )


def write_answer(
    head: Mapping[str, Any], outputs: Sequence[Tensor], ask: InferAsk
) -> tuple[bytes, int | None]:
    """Return the body, and the length of its JSON where raw tensors follow."""
    listed, raws = [], []
    for tensor in outputs:
        line: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        chosen = ask.outputs.get(tensor.name)
        if ask.binary if chosen is None else chosen:
            raws.append(to_raw(tensor))
            line["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            line["data"] = list(tensor.values)
        listed.append(line)
    document = write_json({**head, "outputs": listed})
    return (document + b"".join(raws), len(document)) if raws else (document, None)


def _inputs(value: object, raw: bytes) -> tuple[Tensor, ...]:
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise MalformedRequestError(f"inputs: is not a list of at most {MAX_TENSORS} tensors")
    tensors, position = [], 0
    for number, item in enumerate(value):
        where = f"inputs[{number}]"
        if not isinstance(item, dict) or not item.keys() <= _TENSOR or not isinstance(item.get("name"), str):
            raise TensorError(where, "give an object with name, shape, datatype, and data")
        name, datatype, shape = item["name"], item.get("datatype"), item.get("shape")
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise TensorError(name, f"datatype: use one of {', '.join(sorted(DATATYPES))}")
        if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
            raise TensorError(name, "shape: is not a list of sizes")
        given = item.get("parameters")
        size = None if given is None else _parameters(f"{name}.parameters", given).get("binary_data_size")
        if size is None:
            if "data" not in item:
                raise TensorError(name, "has neither data nor parameters.binary_data_size")
            values: Sequence[Any] = flat(name, datatype, shape, item["data"])
        else:
            if "data" in item:
                raise TensorError(name, "has data and binary_data_size; give one of them")
            if type(size) is not int or not 0 <= size <= len(raw) - position:
                raise TensorError(name, "binary_data_size: reaches beyond the body")
            values = from_raw(name, datatype, shape, memoryview(raw)[position : position + size])
            position += size
        tensors.append(Tensor(name=name, datatype=datatype, shape=tuple(shape), values=values))
    if position != len(raw):
        raise MalformedRequestError("the body holds raw bytes that belong to no input")
    return tuple(tensors)


def _outputs(value: object) -> dict[str, bool | None]:
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) > 64:
        raise MalformedRequestError("outputs: is not a short list")
    asked: dict[str, bool | None] = {}
    for number, item in enumerate(value):
        if not isinstance(item, dict) or not set(item) <= _OUTPUT or not isinstance(item.get("name"), str):
            raise TensorError(f"outputs[{number}]", "give an object with name, and perhaps parameters")
        given = _parameters(f"outputs[{number}].parameters", item.get("parameters"))
        asked[item["name"]] = asked_as_binary(item["name"], given)
    return asked


def asked_as_binary(name: str, parameters: Mapping[str, Any]) -> bool | None:
    """Return whether an output is to come raw; None: its parameters do not say.

    Raises:
        TensorError: they ask for what is not offered, such as a classification or shared memory.
    """
    binary = None
    for key, value in parameters.items():
        if key != "binary_data":
            known = "`binary_data` alone; there is no classification and no shared memory"
            raise TensorError(name, f"outputs: parameter {key[:80]!r} is not offered, {known}")
        if type(value) is not bool:
            raise TensorError(name, "binary_data: is true or false")
        binary = value
    return binary


def _parameters(where: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not _SCALARS.issuperset(map(type, value.values())):
        raise MalformedRequestError(f"{where[:80]}: is not an object of texts, numbers and booleans")
    return dict(value)
