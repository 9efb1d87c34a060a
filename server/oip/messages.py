"""The protocol's messages and service, described here in place of generated code.

The field numbers are those of the protocol's `open_inference_grpc.proto` (KServe, Apache-2.0). The messages
live in a pool of their own, so that a client library that brings generated ones for the same names can be
imported beside them.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE: Final = "inference.GRPCInferenceService"
RPCS: Final = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

_PARAMETERS: Final = "map<InferParameter>"
# message -> (field, type, number); "*" repeated, "map<T>" a map from string to T, "?" in the message's oneof
_MESSAGES: Final[dict[str, tuple[tuple[str, str, int], ...]]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": (("live", "bool", 1),),
    "ServerReadyRequest": (),
    "ServerReadyResponse": (("ready", "bool", 1),),
    "ModelReadyRequest": (("name", "string", 1), ("version", "string", 2)),
    "ModelReadyResponse": (("ready", "bool", 1),),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": (("name", "string", 1), ("version", "string", 2), ("extensions", "*string", 3)),
    "ModelMetadataRequest": (("name", "string", 1), ("version", "string", 2)),
    "ModelMetadataResponse": (
        ("name", "string", 1),
        ("versions", "*string", 2),
        ("platform", "string", 3),
        ("inputs", "*ModelMetadataResponse.TensorMetadata", 4),
        ("outputs", "*ModelMetadataResponse.TensorMetadata", 5),
        ("properties", "map<string>", 6),
    ),
    "ModelMetadataResponse.TensorMetadata": (
        ("name", "string", 1),
        ("datatype", "string", 2),
        ("shape", "*int64", 3),
    ),
    "ModelInferRequest": (
        ("model_name", "string", 1),
        ("model_version", "string", 2),
        ("id", "string", 3),
        ("parameters", _PARAMETERS, 4),
        ("inputs", "*ModelInferRequest.InferInputTensor", 5),
        ("outputs", "*ModelInferRequest.InferRequestedOutputTensor", 6),
        ("raw_input_contents", "*bytes", 7),
    ),
    "ModelInferRequest.InferInputTensor": (
        ("name", "string", 1),
        ("datatype", "string", 2),
        ("shape", "*int64", 3),
        ("parameters", _PARAMETERS, 4),
        ("contents", "InferTensorContents", 5),
    ),
    "ModelInferRequest.InferRequestedOutputTensor": (("name", "string", 1), ("parameters", _PARAMETERS, 2)),
    "ModelInferResponse": (
        ("model_name", "string", 1),
        ("model_version", "string", 2),
        ("id", "string", 3),
        ("parameters", _PARAMETERS, 4),
        ("outputs", "*ModelInferResponse.InferOutputTensor", 5),
        ("raw_output_contents", "*bytes", 6),
    ),
    "ModelInferResponse.InferOutputTensor": (
        ("name", "string", 1),
        ("datatype", "string", 2),
        ("shape", "*int64", 3),
        ("parameters", _PARAMETERS, 4),
        ("contents", "InferTensorContents", 5),
    ),
    "InferParameter": (
        ("bool_param", "?bool", 1),
        ("int64_param", "?int64", 2),
        ("string_param", "?string", 3),
        ("double_param", "?double", 4),
        ("uint64_param", "?uint64", 5),
    ),
    "InferTensorContents": (
        ("bool_contents", "*bool", 1),
        ("int_contents", "*int32", 2),
        ("int64_contents", "*int64", 3),
        ("uint_contents", "*uint32", 4),
        ("uint64_contents", "*uint64", 5),
        ("fp32_contents", "*float", 6),
        ("fp64_contents", "*double", 7),
        ("bytes_contents", "*bytes", 8),
    ),
}
_Field: Final = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
}


def _file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference_grpc.proto", package="inference", syntax="proto3"
    )
    made: dict[str, Any] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        message = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        made[name] = message
        if any(kind.startswith("?") for _, kind, _ in fields):
            message.oneof_decl.add(name="parameter_choice")
        for field, kind, number in fields:
            _add(message, name, field, kind, number)
    service = file.service.add(name=SERVICE.rpartition(".")[2])
    for rpc in RPCS:
        service.method.add(
            name=rpc, input_type=f".inference.{rpc}Request", output_type=f".inference.{rpc}Response"
        )
    return file


def _add(message: Any, owner: str, name: str, kind: str, number: int) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("map<"):
        entry = "".join(part.capitalize() for part in name.split("_")) + "Entry"
        pair = message.nested_type.add(name=entry)
        pair.options.map_entry = True
        _add(pair, owner, "key", "string", 1)
        _add(pair, owner, "value", kind[4:-1], 2)
        kind = f"*{owner}.{entry}"
    if kind.startswith("*"):
        field.label = _Field.LABEL_REPEATED
    if kind.startswith("?"):
        field.oneof_index = 0
    kind = kind.lstrip("*?")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".inference.{kind}"


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())
_classes: Final = {
    name: message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))
    for name in _MESSAGES
}


def message(name: str) -> Any:
    """Return the class of one of the protocol's messages."""
    return _classes[name]
