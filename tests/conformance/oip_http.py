"""Run by the tests in a process of its own: `tritonclient.http`, unchanged, against the address given."""

import json
import sys

import numpy as np
import tritonclient.http as client
from tritonclient.utils import InferenceServerException

address, key, version = sys.argv[1:4]
server = client.InferenceServerClient(address)
purpose = {"purpose": "triage"}


def fresh():
    """The client writes one request's own headers into the dictionary that it is given."""
    return {"Authorization": f"Bearer {key}"}


def tensors(count, *, binary):
    ages = client.InferInput("age", [count], "INT64")
    ages.set_data_from_numpy(np.arange(count, dtype=np.int64) + 40, binary_data=binary)
    fever = client.InferInput("fever", [count], "BOOL")
    fever.set_data_from_numpy(np.arange(count) % 2 == 0, binary_data=binary)
    ward = client.InferInput("ward", [count], "BYTES")
    ward.set_data_from_numpy(np.array(["north"] * count, dtype=object), binary_data=binary)
    return [ages, fever, ward]


assert server.is_server_live()
assert server.is_server_ready()
assert server.is_model_ready("toy", headers=fresh())
assert server.is_model_ready("toy", version, headers=fresh())
assert not server.is_model_ready("other", headers=fresh())
assert server.get_server_metadata()["name"] == "affidavit"
about = server.get_model_metadata("toy", headers=fresh())
assert about["versions"] == [version]
assert [line["name"] for line in about["inputs"]] == ["age", "fever", "ward"]


def refusal(call):
    try:
        call()
    except InferenceServerException as error:
        return error
    raise AssertionError("was answered")


answers = []
for binary in (False, True):
    for packed in (None, "gzip", "deflate"):
        outputs = [client.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probability")]
        got = server.infer(
            "toy", tensors(3, binary=binary), outputs=outputs, request_id="7", headers=fresh(),
            parameters=purpose, request_compression_algorithm=packed, response_compression_algorithm=packed,
        )  # fmt: skip
        assert got.get_response()["id"] == "7"
        chances = got.as_numpy("probability")
        assert chances.dtype == np.float64
        answers.append((chances.tolist(), [str(label, "utf-8") if isinstance(label, bytes) else label
                                           for label in got.as_numpy("label").tolist()]))  # fmt: skip
assert all(answer == answers[0] for answer in answers), answers

plain = server.infer(
    "toy", tensors(1, binary=True), model_version=version, headers=fresh(), parameters=purpose,
    timeout=25_000_000, priority=1, sequence_id=5, sequence_start=True, sequence_end=True,
)  # fmt: skip
shown = plain.get_response()["parameters"]
assert shown["model_digest"] == version
assert json.loads(shown["receipt"])["leaf_index"] == shown["leaf_index"]

for wanted, call in {
    "no model": lambda: server.infer("other", tensors(1, binary=True), headers=fresh(), parameters=purpose),
    "key is needed": lambda: server.infer("toy", tensors(1, binary=True), parameters=purpose),
    "purpose": lambda: server.infer("toy", tensors(1, binary=True), headers=fresh()),
    "classification": lambda: server.infer(
        "toy", tensors(1, binary=True), headers=fresh(), parameters=purpose,
        outputs=[client.InferRequestedOutput("probability", class_count=1)],
    ),
    "refused": lambda: server.infer(
        "toy", tensors(1, binary=True), headers=fresh(), parameters={"purpose": "marketing"}
    ),
    "no input": lambda: server.infer(
        "toy", [client.InferInput("x", [1], "FP64").set_data_from_numpy(np.zeros(1))], headers=fresh(),
        parameters=purpose,
    ),
    "outside": lambda: server.infer(
        "toy",
        [
            client.InferInput("age", [1], "INT64").set_data_from_numpy(np.array([500])),
            *tensors(1, binary=True)[1:],
        ],
        headers=fresh(), parameters=purpose,
    ),
    "Not Found": lambda: server.get_inference_statistics("toy", headers=fresh()),
}.items():  # fmt: skip
    told = refusal(call).message()
    assert wanted in told, (wanted, told)
print(json.dumps({"answers": answers[0], "leaf_index": shown["leaf_index"]}))
