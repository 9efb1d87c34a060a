"""Run by the tests in a process of its own: `tritonclient.grpc`, unchanged, against the address given."""

import json
import sys

import numpy as np
import tritonclient.grpc as client
from tritonclient.utils import InferenceServerException

address, key, version = sys.argv[1:4]
headers = {"authorization": f"Bearer {key}"}
server = client.InferenceServerClient(address)
purpose = {"purpose": "triage"}


def tensors(count, first=40):
    ages = client.InferInput("age", [count], "INT64")
    ages.set_data_from_numpy(np.arange(count, dtype=np.int64) + first)
    fever = client.InferInput("fever", [count], "BOOL")
    fever.set_data_from_numpy(np.arange(count) % 2 == 0)
    ward = client.InferInput("ward", [count], "BYTES")
    ward.set_data_from_numpy(np.array(["north"] * count, dtype=object))
    return [ages, fever, ward]


def refusal(call):
    try:
        call()
    except InferenceServerException as error:
        return error
    raise AssertionError("was answered")


assert server.is_server_live()
assert server.is_server_ready()
assert server.is_model_ready("toy", headers=headers)
assert server.is_model_ready("toy", version, headers=headers)
assert server.get_server_metadata().extensions == ["binary_tensor_data"]
about = server.get_model_metadata("toy", headers=headers)
assert list(about.versions) == [version]
assert [(line.name, line.datatype, list(line.shape)) for line in about.inputs] == [
    ("age", "INT64", [-1]), ("fever", "BOOL", [-1]), ("ward", "BYTES", [-1])
]  # fmt: skip

got = server.infer("toy", tensors(3), request_id="7", headers=headers, parameters=purpose)
assert got.get_response().id == "7"
labels = [label.decode() for label in got.as_numpy("label").tolist()]
chances = got.as_numpy("probability").tolist()
chosen = server.infer(
    "toy", tensors(3), outputs=[client.InferRequestedOutput("label")], headers=headers, parameters=purpose,
    model_version=version, compression_algorithm="gzip", timeout=25_000_000, priority=1, sequence_id=5,
    sequence_start=True,
)  # fmt: skip
assert [output.name for output in chosen.get_response().outputs] == ["label"]
shown = chosen.get_response().parameters
assert shown["model_digest"].string_param == version
assert json.loads(shown["receipt"].string_param)["leaf_index"] == shown["leaf_index"].int64_param

for status, call in {
    "NOT_FOUND": lambda: server.infer("other", tensors(1), headers=headers, parameters=purpose),
    "UNAUTHENTICATED": lambda: server.infer("toy", tensors(1), parameters=purpose),
    "PERMISSION_DENIED": lambda: server.infer(
        "toy", tensors(1), headers=headers, parameters={"purpose": "marketing"}
    ),
    "INVALID_ARGUMENT": lambda: server.infer("toy", tensors(1, 500), headers=headers, parameters=purpose),
    "UNIMPLEMENTED": lambda: server.get_model_repository_index(headers=headers),
}.items():
    told = refusal(call)
    assert told.status() == f"StatusCode.{status}", (status, told.status(), told.message())
print(json.dumps({"answers": [chances, labels]}))
