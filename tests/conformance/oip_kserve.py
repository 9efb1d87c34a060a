"""Run by the tests with an interpreter that has `kserve`: its REST client, unchanged."""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

address, key, version = sys.argv[1:4]


def request(count, *, binary):
    inputs = [
        InferInput(name="age", shape=[count], datatype="INT64"),
        InferInput(name="fever", shape=[count], datatype="BOOL"),
        InferInput(name="ward", shape=[count], datatype="BYTES"),
    ]
    inputs[0].set_data_from_numpy(np.arange(count, dtype=np.int64) + 40, binary_data=binary)
    inputs[1].set_data_from_numpy(np.arange(count) % 2 == 0, binary_data=binary)
    inputs[2].set_data_from_numpy(np.array(["north"] * count, dtype=object), binary_data=binary)
    return InferRequest(
        model_name="toy", infer_inputs=inputs, request_id="7", parameters={"purpose": "triage"}
    )


async def main():
    headers = {"Authorization": f"Bearer {key}"}
    base = f"http://{address}"
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(base) is True
        assert await client.is_server_ready(base) is True
        assert await client.is_model_ready(base, "toy", headers=headers) is True
        answers = []
        for binary in (False, True):
            got = await client.infer(base, request(3, binary=binary), model_name="toy", headers=headers)
            assert got.id == "7"
            outputs = {output.name: output for output in got.outputs}
            answers.append((outputs["probability"].as_numpy().tolist(), list(outputs["label"].data)))
        assert answers[0] == answers[1]
        return answers[0]


print(json.dumps({"answers": asyncio.run(main())}))
